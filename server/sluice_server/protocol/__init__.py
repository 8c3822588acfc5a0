"""The inference protocol: decoding, checks, encoding, and the table of RPCs."""
