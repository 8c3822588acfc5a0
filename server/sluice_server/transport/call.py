"""The transport seam: what one RPC is to everything above, and what a transport promises.

A transport owns sockets, HTTP/2, gRPC framing and TLS, and decides nothing. It is told which methods there are, by
their paths, and answers every other path with UNIMPLEMENTED itself. It hands calls upwards in lists, one list for
everything that arrived since the last one, and takes their ends back from any thread, in any order. A unary RPC is one
`Call`. Of a stream each message is one, and one more without a message when the client has sent its last. They share a
`Stream`, through which messages are sent back and the end is told; or a message enters it as a request that is answered
by its own `reply` or `fail`, and the stream keeps the order.

Promises of a transport:

* a unary call ends exactly once: by `reply`, by `fail`, or because its client went away; a stream by `finish` or
  because its client went away; the first of them counts, and is counted in `outcomes`; later ones are without effect;
* `on_cancel` is called at most once, on the transport's own thread, when the client went away (cancelled,
  disconnected, deadline passed) before the end, and never after it; it is called too when it is set only after that;
* the messages of a stream come in their order, and none comes after its end;
* the client gets what is sent in the order of the calls of `send`, all of it before the status of `finish`;
* the requests that entered a stream are answered in the order in which they did, each as soon as it and all earlier
  ones have answers; when the stream ends before, `on_cancel` of those that are not answered is called, at most once;
* no more than `STREAM_AHEAD` messages of a stream go up beyond those that were sent back and written: further ones
  stay unread, so that HTTP/2's flow control holds the client, one that does not read its answers too;
* the handler is never called from two threads at once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from sluice_server.status import OK, Code, Status

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

Metadata = tuple[tuple[str, str | bytes], ...]
"""Request headers in the order they came; keys that end in `-bin` have bytes."""

STREAM_AHEAD = 1024
"""Messages of one stream in the server at a time: fills the largest batches, and bounds what one stream holds."""

CLIENT_ROUNDING = 100
"""gRPC sends a timeout in three digits, rounded up: by its own clock the client leaves up to a hundredth earlier."""

CLIENT_EARLY_NS = 2_000_000
"""Both sides count deadlines in whole milliseconds, each with its own rounding."""


class Rpc(ABC):
    """What a call and a stream have in common: the RPC, and who asks."""

    __slots__ = ("deadline_ns", "method", "on_cancel")

    method: str
    """The RPC's path as on the wire, e.g. `/inference.GRPCInferenceService/ModelInfer`."""
    deadline_ns: int
    """When the client stops waiting for the call or the whole stream, on the monotonic clock;
    `sluice_batching.NO_DEADLINE` when it set none."""
    on_cancel: Callable[[], None] | None
    """Set by whoever holds a unary call for longer, or serves the stream; called when the client went away."""

    @property
    @abstractmethod
    def metadata(self) -> Metadata:
        """The request's headers."""

    @property
    @abstractmethod
    def peer(self) -> str:
        """The client's address, e.g. `ipv4:127.0.0.1:4711` or `unix:`."""

    @property
    @abstractmethod
    def peer_names(self) -> tuple[str, ...]:
        """The names in the client's certificate, e.g. `cn:NAME` and `dns:NAME`; empty when it has shown none."""


class Stream(Rpc):
    """One stream in progress, as its transport owns it: the same object for all of its messages."""

    __slots__ = ("__weakref__", "state")

    state: Any
    """Belongs to whoever serves the stream; None at first."""

    @abstractmethod
    def send(self, parts: Sequence[Buffer]) -> None:
        """Send one message, which `parts` make up when joined; from any thread."""

    @abstractmethod
    def finish(self, status: Status = OK) -> None:
        """End the stream behind everything that was sent; from any thread."""

    @abstractmethod
    def answer_in_turn(self, *, before: Before | None = None, on_failure: OnFailure | None = None) -> None:
        """Say how the requests that enter the stream are answered; to be called once, before the first enters.

        `before` gives what is sent before a `reply` of so many bytes, in one message with it. `on_failure` gives the
        parts of the message that a `fail` is answered with, or None, as without it: the stream ends with that status.
        """

    @abstractmethod
    def enter(self, message: Call, suffix: bytes | None = None) -> bool:
        """Give a message its turn, behind all that entered before; on the thread that the message came up on.

        `suffix` is sent behind the parts of its `reply`. False: the stream takes no requests any more.
        """

    @abstractmethod
    def close(self, status: Status = OK) -> None:
        """Take no more requests, and end the stream behind the answers that are due; from any thread."""


class Call(Rpc):
    """One unary RPC in progress, or one message of a stream, as its transport owns it."""

    __slots__ = ("message", "received_ns")

    message: Any
    """The request message as it came, decompressed: `bytes`, or, when it is large, any buffer that has a length. None,
    of a stream: the client has sent its last one."""
    received_ns: int
    """When the message was complete, on the monotonic clock."""
    sampled: ClassVar[bool] = False
    """Whether anybody listens to `describe`."""
    stream: Stream | None = None
    """The stream that this is a message of. None: a unary RPC."""

    def describe(self, **facts: Any) -> None:
        """Tell what became of the request, for its trace; a call that is not sampled has nobody to tell."""

    def code_of_leaving(self, now_ns: int) -> Code:
        """Why a client left at this time: DEADLINE_EXCEEDED when its time was up by its own clock, else CANCELLED."""
        return code_of_leaving(self.received_ns, self.deadline_ns, now_ns)

    @abstractmethod
    def reply(self, parts: Sequence[Buffer]) -> None:
        """End the call with the response message that `parts` make up when joined; from any thread.

        Of a stream's message: send one back, in turn if this one has entered.
        """

    @abstractmethod
    def fail(self, status: Status) -> None:
        """End the call with a status that is not OK; from any thread.

        Of a stream's message: end the stream, unless it has entered and the stream tells of failures otherwise.
        """


Before = Callable[[int], bytes]
"""What goes before an answer of so many bytes."""

OnFailure = Callable[[Call, Status], "Sequence[Buffer] | None"]
"""The message that tells of the failure of a request in a stream, in parts; None when it is to end the stream."""


class Handler(Protocol):
    """What a transport hands its lists to; it never raises."""

    def __call__(self, calls: Sequence[Call], /) -> object:
        """Take every call of the list over."""


class LendingHandler(Protocol):
    """A handler that can use the thread which called it."""

    def __call__(self, calls: Sequence[Call], /, *, lend: bool = False) -> Callable[[], None] | None:
        """Take every call of the list over. With `lend`, what is returned is done next, on the same thread, while
        another thread brings the next list."""


class Transport(Protocol):
    """What the server needs of a transport, whichever library is behind it.

    It is made with the handler of its lists and with `methods`: the path of every RPC that there is, and whether that
    streams.
    """

    name: str

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it listens, as a client would write it; known after `start`."""

    def start(self) -> None:
        """Bind and serve, or raise `ListenError`; returns when clients can connect."""

    def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, wait up to `grace_s` seconds for accepted ones, cancel the rest."""

    def outcomes(self) -> Mapping[tuple[str, Code], int]:
        """How many calls of each method, by its path, have ended with each code since the start; a stream is one."""


class ListenError(Exception):
    """An address cannot be listened on; the text names it and the reason."""


def code_of_leaving(began_ns: int, deadline_ns: int, now_ns: int) -> Code:
    """Why a client left at `now_ns`: DEADLINE_EXCEEDED when its time was up by its own clock, else CANCELLED."""
    early_ns = CLIENT_EARLY_NS + (deadline_ns - began_ns) // CLIENT_ROUNDING
    return Code.DEADLINE_EXCEEDED if now_ns >= deadline_ns - early_ns else Code.CANCELLED
