"""What the rest of the server needs of a version that takes requests, whatever is behind it: a model or an ensemble."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.request import InferRequest
    from sluice_server.observability.statistics import ModelStatistics
    from sluice_server.protocol.interface import ModelInterface


class Waiting(NamedTuple):
    """What waits in a version at the moment: requests, their rows, and the bytes that they hold."""

    requests: int
    rows: int
    size_bytes: int


class Served(ABC):
    """A loaded version. Every method but `start` is for any thread."""

    config: ModelConfig
    interface: ModelInterface
    statistics: ModelStatistics
    properties: dict[str, str]
    notice: str = ""
    """What RepositoryIndex says of it while it is ready."""
    batch_rates: tuple[tuple[int, float], ...] = ()
    """(rows, rows/s) of the batch sizes that were measured at load."""
    parts: tuple[Served, ...] = ()
    """The versions that it needs for as long as it has requests; none but for an ensemble."""

    @property
    def merge_rows(self) -> int:
        """Up to how many rows requests are merged now, where that was measured or is tuned; else 0."""
        return 0

    @abstractmethod
    def start(self) -> None:
        """Begin to take requests."""

    @abstractmethod
    def submit(self, requests: Sequence[InferRequest]) -> list[InferRequest]:
        """Take requests; each is answered later, or here when it is refused.

        Returns those that came too late because this version is being unloaded: the caller finds the version that
        took its place.
        """

    @abstractmethod
    def submit_one(self, request: InferRequest) -> tuple[list[InferRequest], Callable[[], None] | None]:
        """Take one request as `submit` does, or give what the caller's thread is to do for it, soon.

        Returns what came too late, and the work, if any; neither raises.
        """

    @abstractmethod
    def cancel(self, request: InferRequest) -> bool:
        """Let a request go whose client has left; whether nobody will end it any more."""

    @abstractmethod
    def answers_in_arrays(self) -> bool:
        """Have the requests of ensembles answered with arrays from now on; False: all answers are bytes, theirs too."""

    @abstractmethod
    def waiting(self) -> Waiting:
        """What waits to be run."""

    @abstractmethod
    def drain(self) -> None:
        """Refuse new requests; what is accepted is still run."""

    @abstractmethod
    def join(self, timeout_s: float | None) -> bool:
        """Wait until everything that was accepted is answered; False when time ran out first. Needs `drain`."""
