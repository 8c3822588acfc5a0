"""Why a model cannot be served: two families, as in Triton, because clients see different codes for them.

SluiceError
├── Internal
│   └── ConfigError         what is written is wrong: config.pbtxt, a `config` override, the folder itself
└── InvalidArgument
    └── ModelLoadError      what is written is sound, but the model file or this machine does not fit it
"""

from typing import Literal

from sluice_server.errors import Internal, InvalidArgument

TritonCode = Literal["Invalid argument", "Internal", "Not found", "Unavailable"]
"""How Triton names a code in the reason of a version that failed to load (`Invalid argument: ...`)."""


class ConfigError(Internal):
    """A configuration that cannot be used, found before the model file is looked at.

    `model` and `field` (`input[0].dims`) say where as far as they are known; `source`, `line` and `column`
    (from 1) where it stands in the text. All of it is in the message too.
    """

    def __init__(
        self,
        message: str,
        *,
        model: str = "",
        field: str = "",
        source: str = "",
        line: int | None = None,
        column: int | None = None,
    ) -> None:
        place = ":".join(str(part) for part in (source, line, column) if part not in ("", None))
        super().__init__(f"{place}: {message}" if place else message)
        self.model = model
        self.field = field
        self.source = source
        self.line = line
        self.column = column


class ModelLoadError(InvalidArgument):
    """A model file that does not fit its configuration, or this machine.

    `reason` is the text of RepositoryIndex for the version: the name of the code, then the message.
    """

    def __init__(self, message: str, *, model: str, triton_code: TritonCode = "Invalid argument") -> None:
        super().__init__(message)
        self.model = model
        self.triton_code: TritonCode = triton_code

    @property
    def reason(self) -> str:
        """`Invalid argument: model 'X', tensor 'T': ...`, as Triton reports it."""
        return f"{self.triton_code}: {self}"
