"""What a client is told on coming back: gRPC's push-back, google.rpc.RetryInfo and HTTP's Retry-After.

`grpc-retry-pushback-ms` (gRFC A6) is what gRPC's own retries read, and `grpc-status-details-bin` is where the details
of an error stand, a serialised google.rpc.Status that repeats code and message.
"""

from collections.abc import Iterable
from typing import Final

from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status as RpcStatus

PUSHBACK: Final = "grpc-retry-pushback-ms"
DETAILS: Final = "grpc-status-details-bin"

NS_PER_MS: Final = 1_000_000
MS_PER_S: Final = 1000

LONGEST_MS: Final = 60_000
"""A prediction for more than a minute is none."""


def retry_trailers(code: int, message: str, retry_after_ns: int) -> tuple[tuple[str, str | bytes], ...]:
    """The trailers of a refusal that ask to come back after this time: whole milliseconds, at least one."""
    wait_ms = min(max(1, -(-retry_after_ns // NS_PER_MS)), LONGEST_MS)
    details = RpcStatus(code=code, message=message)
    info = RetryInfo()
    info.retry_delay.FromMilliseconds(wait_ms)
    details.details.add().Pack(info)
    return ((PUSHBACK, str(wait_ms)), (DETAILS, details.SerializeToString()))


def retry_after_s(trailers: Iterable[tuple[str, str | bytes]]) -> int | None:
    """What of these trailers HTTP's Retry-After says: whole seconds, rounded up; None when they ask for no wait."""
    for key, value in trailers:
        if key == PUSHBACK:
            return -(-int(value) // MS_PER_S)
    return None
