"""Status messages that reach the client: gRPC sends them as a header, and headers have limits.

A message is percent-encoded on the way (gRPC over HTTP/2, `Percent-Encoded`): printable ASCII but `%` is one byte, any
other byte of UTF-8 is three. Peers count that against their limit on all headers of a call, and one that is over it
loses the status too, so a message that repeats a client's long name is cut in its middle: both ends carry facts.
"""

ENCODED_BYTES_MAX = 4096
"""Half of the smallest limit on headers among gRPC's implementations (8 KiB in C core and Java)."""

_WIDEST_BYTES = 12
"""What one character can take: four bytes of UTF-8, three characters each."""


def fit_message(message: str) -> str:
    """The message itself, or its beginning and its end with the number of characters left out between them."""
    if len(message) * _WIDEST_BYTES <= ENCODED_BYTES_MAX:
        return message
    if len(message) <= ENCODED_BYTES_MAX and sum(map(_encoded_bytes, message)) <= ENCODED_BYTES_MAX:
        return message
    gap = f" [... {len(message)} characters in all ...] "
    half_bytes = (ENCODED_BYTES_MAX - len(gap)) // 2
    head, tail = message[:half_bytes], message[-half_bytes:]
    return head[: _count_within(head, half_bytes)] + gap + tail[-_count_within(tail[::-1], half_bytes) :]


def _encoded_bytes(character: str) -> int:
    if " " <= character <= "~" and character != "%":
        return 1
    return 3 * len(character.encode(errors="replace"))


def _count_within(text: str, limit_bytes: int) -> int:
    """How many of the first characters fit into the limit."""
    total_bytes = 0
    for count, character in enumerate(text):
        total_bytes += _encoded_bytes(character)
        if total_bytes > limit_bytes:
            return count
    return len(text)
