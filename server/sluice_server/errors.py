"""The server's exception tree. `status.py` maps it to status codes, at the outermost seam and nowhere else.

    SluiceError                 expected: its text is written for the client and safe to send
    ├── InvalidArgument         the request is wrong and would be wrong again
    │   ├── repository.errors.ModelLoadError        a model file that does not fit its configuration
    │   ├── execution.parameters.BadOption          an option of a model that is none
    │   ├── execution.providers.MissingProvider, NoGpu      what this machine does not have
    │   └── execution.session.NotText               BYTES that ONNX Runtime cannot take
    ├── NotFound                no such model, version, region
    ├── AlreadyExists
    ├── Unimplemented           part of the protocol that is not there (yet), named
    ├── PermissionDenied        a control call from a peer that may not make it
    ├── Unavailable             not now: draining, model not ready
    ├── ResourceExhausted       a bound is reached; trying again later may work
    ├── DeadlineExceeded        the request's own time is up
    ├── Cancelled               the client went away
    └── Internal                the server's or the model's fault, with a text fit for clients
        ├── repository.errors.ConfigError           a configuration that cannot be used
        └── BackendError        ONNX Runtime refused or failed a run or a load

Anything else that is raised is a bug: it is logged in full and answered with a fixed text and an id.
"""


class SluiceError(Exception):
    """An expected error; `str()` of it is the message that the client gets."""


class InvalidArgument(SluiceError):
    """The request is wrong and would be wrong again."""


class NotFound(SluiceError):
    """Something that the request names is not there."""


class AlreadyExists(SluiceError):
    """Something that the request would make is there already."""


class Unimplemented(SluiceError):
    """A part of the protocol that this server does not have."""


class PermissionDenied(SluiceError):
    """The peer may not make this call."""


class Unavailable(SluiceError):
    """The server or the model cannot take the request now."""


class ResourceExhausted(SluiceError):
    """A bound of the server is reached.

    `retry_after_ns`: when trying again may work, by what the server knows; None when it does not.
    """

    retry_after_ns: int | None = None

    def __init__(self, text: str, *, retry_after_ns: int | None = None) -> None:
        super().__init__(text)
        self.retry_after_ns = retry_after_ns


class DeadlineExceeded(SluiceError):
    """The request's time is up."""


class Cancelled(SluiceError):
    """The client went away before the answer."""


class Internal(SluiceError):
    """The server or the model failed, and the text may be shown to clients."""


class BackendError(Internal):
    """ONNX Runtime failed; `code` is its status code (1 = FAIL, 2 = INVALID_ARGUMENT, ...), `text` its own message."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"onnx runtime error {code}: {text}")
        self.code = code
        self.text = text
