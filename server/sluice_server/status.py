"""The one table from the exception tree to gRPC and HTTP status codes (compatibility: Triton's section on codes)."""

import enum
import logging
import secrets
from dataclasses import dataclass

from sluice_server import errors
from sluice_server.retry_after import retry_trailers

logger = logging.getLogger(__name__)


class Code(enum.IntEnum):
    """gRPC status codes, with the numbers of the gRPC specification."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14


@dataclass(frozen=True, slots=True)
class Status:
    """How a call ended: a code and, unless it is OK, a message for the client.

    `trailers` go with it, as metadata: lower-case keys, `bytes` for those that end in `-bin`, else printable ASCII.
    """

    code: Code
    message: str = ""
    trailers: tuple[tuple[str, str | bytes], ...] = ()


OK = Status(Code.OK)

# The most derived class that is listed here decides; order does not matter.
_CODES: dict[type[errors.SluiceError], Code] = {
    errors.InvalidArgument: Code.INVALID_ARGUMENT,
    errors.NotFound: Code.NOT_FOUND,
    errors.AlreadyExists: Code.ALREADY_EXISTS,
    errors.Unimplemented: Code.UNIMPLEMENTED,
    errors.PermissionDenied: Code.PERMISSION_DENIED,
    errors.Unavailable: Code.UNAVAILABLE,
    errors.ResourceExhausted: Code.RESOURCE_EXHAUSTED,
    errors.DeadlineExceeded: Code.DEADLINE_EXCEEDED,
    errors.Cancelled: Code.CANCELLED,
    errors.Internal: Code.INTERNAL,
}

# `--status-codes=triton`: a full queue and a queue timeout are UNAVAILABLE there.
_TRITON: dict[Code, Code] = {Code.RESOURCE_EXHAUSTED: Code.UNAVAILABLE, Code.DEADLINE_EXCEEDED: Code.UNAVAILABLE}

HTTP_CODES: dict[Code, int] = {
    Code.OK: 200,
    Code.CANCELLED: 400,
    Code.UNKNOWN: 400,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 400,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
}


class StatusMapper:
    """Turns any exception into the status that a client sees."""

    def __init__(self, *, triton_codes: bool = False) -> None:
        self._triton_codes = triton_codes

    def __call__(self, error: BaseException) -> Status:
        """Give the status of an error; one that is not expected is logged in full and answered with an id only."""
        if not isinstance(error, errors.SluiceError):
            return _unexpected(error)
        code = next(_CODES[cls] for cls in type(error).__mro__ if cls in _CODES)
        if self._triton_codes:
            code = _TRITON.get(code, code)
        text = str(error)
        if isinstance(error, errors.ResourceExhausted) and error.retry_after_ns is not None:
            return Status(code, text, retry_trailers(code, text, error.retry_after_ns))
        return Status(code, text)


def _unexpected(error: BaseException) -> Status:
    incident = secrets.token_hex(4)
    logger.error("unexpected error, incident %s", incident, exc_info=error)
    return Status(Code.INTERNAL, f"internal error; the server's log has the details under incident {incident}")
