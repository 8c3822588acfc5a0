"""The transport seam: what one RPC is to everything above, and what a transport promises.

A transport owns sockets, HTTP/2, gRPC framing and TLS, and decides nothing. It hands calls upwards in lists, one
list for everything that arrived since the last one, and takes their ends back from any thread, in any order.

Promises of a transport:

* a call ends exactly once: by `reply`, by `fail`, or because its client went away; the first of them counts, and is
  counted in `outcomes`; later ones are without effect;
* `on_cancel` is called at most once, on the transport's own thread, when the client went away (cancelled,
  disconnected, deadline passed) before the end, and never after it;
* the handler is never called from two threads at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sluice_server.status import Code

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Buffer

    from sluice_server.status import Status

Metadata = tuple[tuple[str, str | bytes], ...]
"""Request headers in the order they came; keys that end in `-bin` have bytes."""

CLIENT_ROUNDING = 100
"""gRPC sends a timeout in three digits, rounded up: by its own clock the client leaves up to a hundredth earlier."""

CLIENT_EARLY_NS = 2_000_000
"""Both sides count deadlines in whole milliseconds, each with its own rounding."""


class Call(ABC):
    """One unary RPC in progress, as its transport owns it."""

    __slots__ = ("deadline_ns", "message", "method", "on_cancel", "received_ns")

    method: str
    """The RPC's name without its service, e.g. `ModelInfer`."""
    message: bytes
    """The request message as it came, decompressed."""
    received_ns: int
    """When the message was complete, on the monotonic clock."""
    deadline_ns: int
    """When the client stops waiting, on the monotonic clock; `sluice_batching.NO_DEADLINE` when it set none."""
    sampled: ClassVar[bool] = False
    """Whether anybody listens to `describe`."""
    on_cancel: Callable[[], None] | None
    """Set by whoever holds the call for longer; called when the client went away."""

    @property
    @abstractmethod
    def metadata(self) -> Metadata:
        """The request's headers."""

    @property
    @abstractmethod
    def peer(self) -> str:
        """The client's address, e.g. `ipv4:127.0.0.1:4711` or `unix:`."""

    def describe(self, **facts: Any) -> None:  # noqa: B027 - doing nothing is right for a call that is not sampled
        """Tell what became of the request, for its trace; a call that is not sampled has nobody to tell."""

    def code_of_leaving(self, now_ns: int) -> Code:
        """Why a client left at this time: DEADLINE_EXCEEDED when its time was up by its own clock, else CANCELLED."""
        early_ns = CLIENT_EARLY_NS + (self.deadline_ns - self.received_ns) // CLIENT_ROUNDING
        return Code.DEADLINE_EXCEEDED if now_ns >= self.deadline_ns - early_ns else Code.CANCELLED

    @abstractmethod
    def reply(self, parts: Sequence[Buffer]) -> None:
        """End the call with the response message that `parts` make up when joined; from any thread."""

    @abstractmethod
    def fail(self, status: Status) -> None:
        """End the call with a status that is not OK; from any thread."""


class Transport(Protocol):
    """What the server needs of a transport, whichever library is behind it."""

    name: str
    service: str
    """The gRPC service that it serves, by its full name."""

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it listens, as a client would write it; known after `start`."""

    def start(self) -> None:
        """Bind and serve, or raise `ListenError`; returns when clients can connect."""

    def set_serving(self, service: str, *, serving: bool) -> None:
        """Say what grpc.health.v1 answers for a service or model name; `""` is the whole server."""

    def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, wait up to `grace_s` seconds for accepted ones, cancel the rest."""

    def outcomes(self) -> Mapping[tuple[str, Code], int]:
        """How many calls of each method have ended with each code since the start."""


class ListenError(Exception):
    """An address cannot be listened on; the text names it and the reason."""
