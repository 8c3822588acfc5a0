"""What a server says about coming back, read from the trailers of a failed call.

`grpc-retry-pushback-ms` (gRFC A6) is a decimal number of milliseconds; a negative or unreadable one means "do not
come back". `grpc-status-details-bin` holds a google.rpc.Status, which may carry a google.rpc.RetryInfo. The first
wins where both are there.
"""

from collections.abc import Iterable, Iterator
from typing import Final

from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from google.protobuf.empty_pb2 import Empty
from google.protobuf.message import DecodeError
from google.protobuf.unknown_fields import UnknownFieldSet  # type: ignore[import-not-found]  # its stubs lack it

PUSHBACK: Final = "grpc-retry-pushback-ms"
DETAILS: Final = "grpc-status-details-bin"
MAX_DETAILS: Final = 64  # entries looked at; a server has a handful to say

_NS_PER_MS: Final = 1_000_000
_LENGTH_DELIMITED: Final = 2
_MAX_DIGITS: Final = 10  # four months in milliseconds; what is longer is no sensible wait


def pushback(trailers: Iterable[tuple[str, str | bytes]]) -> tuple[int | None, bool]:
    """The wait in nanoseconds that the server asks for (None: not said), and whether it forbids to come back."""
    found = {key: value for key, value in trailers if key in (PUSHBACK, DETAILS)}
    said = found.get(PUSHBACK)
    if said is not None:
        text = said.decode("ascii", "replace") if isinstance(said, bytes) else said
        if text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS:
            return int(text) * _NS_PER_MS, False
        return None, True
    details = found.get(DETAILS)
    return (retry_delay_ns(details) if isinstance(details, bytes) else None), False


def retry_delay_ns(status: bytes) -> int | None:
    """The retry_delay of the first google.rpc.RetryInfo in a serialized google.rpc.Status, None when there is none.

    Status and RetryInfo come with no package that this client needs, so their few fields are read by number:
    Status.details = 3 (repeated Any), RetryInfo.retry_delay = 1 (Duration).
    """
    try:
        for _, packed in zip(range(MAX_DETAILS), _messages(status, 3), strict=False):
            detail = Any.FromString(packed)
            if detail.type_url.rpartition("/")[2] == "google.rpc.RetryInfo":
                for delay in _messages(detail.value, 1):
                    return max(0, Duration.FromString(delay).ToNanoseconds())
    except (DecodeError, ValueError):
        return None
    return None


def _messages(message: bytes, field_number: int) -> Iterator[bytes]:
    """The values of one length-delimited field of a message whose type is not at hand."""
    for field in UnknownFieldSet(Empty.FromString(message)):
        if field.field_number == field_number and field.wire_type == _LENGTH_DELIMITED:
            yield field.data
