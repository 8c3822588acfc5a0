"""Groups of RPCs for clients with the right header only: `--grpc-restricted-protocol` and `--http-restricted-api`.

The groups, their names and what a refused client is told are Triton's.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

GROUPS: Final[Mapping[str, frozenset[str]]] = {
    # the last two are grpc.health.v1
    "health": frozenset(("ServerLive", "ServerReady", "ModelReady", "Check", "Watch")),
    "metadata": frozenset(("ServerMetadata", "ModelMetadata")),
    "inference": frozenset(("ModelInfer", "ModelStreamInfer")),
    "shared-memory": frozenset(
        f"{kind}SharedMemory{verb}" for kind in ("System", "Cuda") for verb in ("Status", "Register", "Unregister")
    ),
    "model-config": frozenset(("ModelConfig",)),
    "model-repository": frozenset(("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")),
    "statistics": frozenset(("ModelStatistics",)),
    "trace": frozenset(("TraceSetting",)),
    "logging": frozenset(("LogSettings",)),
}
"""The names of the RPCs of each group: every RPC there is, but for reflection, is in one."""


@dataclass(frozen=True, slots=True)
class Restriction:
    """The header that a client has to send, and its value; `what` is what the front calls a group's members."""

    what: str
    header: str
    value: str = field(repr=False)

    def admits(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether a request with these headers, whose names are in lower case, may pass."""
        name, wanted = self.header.lower(), self.value.encode()
        # How long it takes must not tell how much of a wrong value is right.
        return any(key == name and hmac.compare_digest(_bytes(value), wanted) for key, value in metadata)

    @property
    def refusal(self) -> str:
        """What a client without it is told: which header, and nothing of its value."""
        return f"This {self.what} is restricted, expecting header '{self.header}'"


def _bytes(value: str | bytes) -> bytes:
    return value if isinstance(value, bytes) else value.encode(errors="surrogateescape")
