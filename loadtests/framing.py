"""gRPC's framing of a message on the wire (PROTOCOL-HTTP2 of gRPC): one flag byte, the length in four, the message."""

from typing import Final

PREFIX_BYTES: Final = 5


def frame(message: bytes) -> bytes:
    """The message as gRPC sends it, not compressed."""
    return b"\x00" + len(message).to_bytes(PREFIX_BYTES - 1, "big") + message
