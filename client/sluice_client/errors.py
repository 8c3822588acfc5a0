"""The client's exception tree; everything that a call raises on purpose is in it.

    ClientError
    ├── InvalidRequest          refused here, before anything was sent: an argument is wrong
    ├── InvalidResponse         the server's answer breaks the protocol
    ├── ClientClosed            the client was used after close()
    ├── NotReady                the time given to wait_until_ready is up
    └── ServerError             the call ended with a gRPC status other than OK; one class for each:
        ├── Cancelled           ├── Unknown              ├── InvalidArgument     ├── DeadlineExceeded
        ├── NotFound            ├── AlreadyExists        ├── PermissionDenied    ├── ResourceExhausted
        ├── FailedPrecondition  ├── Aborted              ├── OutOfRange          ├── Unimplemented
        ├── Internal            ├── Unavailable          ├── DataLoss            └── Unauthenticated

All arguments are positional, so that the exceptions survive pickling between processes.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Final


class ClientError(Exception):
    """Any failure of a call."""


class InvalidRequest(ClientError):
    """An argument cannot be sent; the message says which one and what would do."""


class InvalidResponse(ClientError):
    """The server answered with bytes that are not what the protocol promises."""


class ClientClosed(ClientError):
    """The client was used after close()."""


class NotReady(ClientError):
    """Server or model was not ready in time; `last` is what the last poll met, None when it said "not ready"."""

    def __init__(self, what: str, waited_s: float, last: ClientError | None) -> None:
        super().__init__(what, waited_s, last)
        self.what = what
        self.waited_s = waited_s
        self.last = last

    def __str__(self) -> str:
        reason = "it answers that it is not ready" if self.last is None else str(self.last)
        return f"{self.what} was not ready within {self.waited_s:g} s; last: {reason}"


class ServerError(ClientError):
    """A call ended with a status other than OK, given by the server or, for lack of one, by gRPC on this side.

    `code` is the gRPC status name, `message` the status text, `model` the model's name ("" when the call names none),
    `endpoint` where the last attempt went, `attempts` how many there were, and `retry_after_s` the wait that the
    server asked for (None when it asked for none).
    """

    code: ClassVar[str] = "UNKNOWN"

    def __init__(
        self, message: str, model: str = "", endpoint: str = "", attempts: int = 1, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message, model, endpoint, attempts, retry_after_s)
        self.message = message
        self.model = model
        self.endpoint = endpoint
        self.attempts = attempts
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        about = f", model {self.model!r}" if self.model else ""
        tries = f", {self.attempts} attempts" if self.attempts > 1 else ""
        return f"{self.code}: {self.message} [{self.endpoint}{about}{tries}]"


class Cancelled(ServerError):
    """The server, or something between, cancelled the call."""

    code = "CANCELLED"


class Unknown(ServerError):
    """The server gave no better status."""

    code = "UNKNOWN"


class InvalidArgument(ServerError):
    """The request is wrong and would be wrong again."""

    code = "INVALID_ARGUMENT"


class DeadlineExceeded(ServerError):
    """The call's time is up."""

    code = "DEADLINE_EXCEEDED"


class NotFound(ServerError):
    """No such model or version is served."""

    code = "NOT_FOUND"


class AlreadyExists(ServerError):
    """What the call would make is there already."""

    code = "ALREADY_EXISTS"


class PermissionDenied(ServerError):
    """The caller may not do this."""

    code = "PERMISSION_DENIED"


class ResourceExhausted(ServerError):
    """A bound of the server is reached: try again after `retry_after_s`, when the server gave one."""

    code = "RESOURCE_EXHAUSTED"


class FailedPrecondition(ServerError):
    """The server is not in the state that the call needs."""

    code = "FAILED_PRECONDITION"


class Aborted(ServerError):
    """The server gave the call up."""

    code = "ABORTED"


class OutOfRange(ServerError):
    """A value is outside of what the server allows."""

    code = "OUT_OF_RANGE"


class Unimplemented(ServerError):
    """The server does not have this call or this feature."""

    code = "UNIMPLEMENTED"


class Internal(ServerError):
    """The server or the model failed."""

    code = "INTERNAL"


class Unavailable(ServerError):
    """The server could not be reached, or does not serve now."""

    code = "UNAVAILABLE"


class DataLoss(ServerError):
    """Data was lost or damaged."""

    code = "DATA_LOSS"


class Unauthenticated(ServerError):
    """The caller did not show who it is."""

    code = "UNAUTHENTICATED"


BY_CODE: Final[Mapping[str, type[ServerError]]] = MappingProxyType(
    {cls.code: cls for cls in ServerError.__subclasses__()}
)
