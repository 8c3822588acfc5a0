"""The seam's objects of the grpcio transport: a unary call, a stream, and a message of a stream.

What is sent and how it ends is handed to the transport from any thread, by `post`; `deliver` and everything else here
runs on the transport's event loop.
"""

from __future__ import annotations

import asyncio
import collections
import time
from typing import TYPE_CHECKING, Any, Protocol

from sluice_batching import NO_DEADLINE
from sluice_server.status import OK, Status
from sluice_server.transport.call import Call, code_of_leaving
from sluice_server.transport.turns import MessageInTurn, StreamInTurn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from sluice_server.status import Code
    from sluice_server.transport.call import Metadata


_NAME_KINDS = {"x509_common_name": "cn", "peer_dns": "dns", "peer_uri": "uri", "peer_email": "email", "peer_ip": "ip"}
"""C core's properties of a peer, and what its names are called here."""


class Loop(Protocol):
    """What calls need of their transport."""

    loop: asyncio.AbstractEventLoop

    def post(self, rpc: GrpcioCall | GrpcioStream, status: Status | None, payload: bytes) -> None:
        """Have `deliver` called on the event loop, in the order of the calls; from any thread."""


class _OfContext:
    """What gRPC's context tells of the client."""

    __slots__ = ()

    _context: Any

    @property
    def metadata(self) -> Metadata:
        """The request's headers."""
        return tuple((key, value) for key, value in self._context.invocation_metadata())

    @property
    def peer(self) -> str:
        """The client's address as gRPC writes it."""
        return str(self._context.peer())

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The names in the client's certificate."""
        properties = self._context.auth_context()
        return tuple(
            f"{kind}:{name.decode(errors='replace')}"
            for property_name, kind in _NAME_KINDS.items()
            for name in properties.get(property_name, ())
        )


class GrpcioCall(_OfContext, Call):
    """One unary RPC of the grpcio server; its end is a future on the event loop."""

    __slots__ = ("_context", "_transport", "ended", "future")

    def __init__(self, transport: Loop, method: str, message: bytes, context: Any) -> None:
        self.method = method
        self.message = message
        self.received_ns = time.monotonic_ns()
        self.deadline_ns = _deadline_ns(context, self.received_ns)
        self.on_cancel = None
        self.ended = False
        self.future: asyncio.Future[tuple[Status, bytes]] = transport.loop.create_future()
        self._transport = transport
        self._context = context

    def __repr__(self) -> str:
        return f"<GrpcioCall {self.method} {'ended' if self.ended else 'open'}>"

    def reply(self, parts: Sequence[Buffer]) -> None:
        """End the call with a message; the parts are joined here, on the caller's thread."""
        self._transport.post(self, OK, b"".join(parts))

    def fail(self, status: Status) -> None:
        """End the call with an error."""
        self._transport.post(self, status, b"")

    def deliver(self, status: Status | None, payload: bytes) -> Code | None:
        """Take what was posted; gives the code that the call has ended with."""
        # A future that is cancelled already is a client that has left; the transport hears of it later in this turn.
        if status is None or self.future.cancelled():
            return None
        self.future.set_result((status, payload))
        return status.code


class GrpcioStream(_OfContext, StreamInTurn):
    """One stream of the grpcio server: what is still to be written, and the two tasks that wait for a change."""

    __slots__ = ("_context", "_transport", "ahead", "began_ns", "changed", "ended", "outgoing", "room", "status")

    def __init__(self, transport: Loop, method: str, context: Any) -> None:
        super().__init__()
        self.method = method
        self.began_ns = time.monotonic_ns()
        self.deadline_ns = _deadline_ns(context, self.began_ns)
        self.ended = False
        self.status: Status | None = None
        self.outgoing: collections.deque[bytes] = collections.deque()
        self.changed = asyncio.Event()
        self.ahead = 0
        self.room = asyncio.Event()
        self._transport = transport
        self._context = context

    def __repr__(self) -> str:
        return f"<GrpcioStream {self.method} {'ended' if self.ended else 'open'} {self.ahead} ahead>"

    def send(self, parts: Sequence[Buffer]) -> None:
        """Send one message; the parts are joined here, on the caller's thread."""
        self._transport.post(self, None, b"".join(parts))

    def finish(self, status: Status = OK) -> None:
        """End the stream behind everything that was sent."""
        self._transport.post(self, status, b"")

    def deliver(self, status: Status | None, payload: bytes) -> Code | None:
        """Take what was posted; gives the code that the stream has ended with."""
        self.changed.set()
        if status is None:
            self.outgoing.append(payload)
            return None
        self.status = status
        return status.code

    def code_of_leaving(self, now_ns: int) -> Code:
        """Why the client left at this time."""
        return code_of_leaving(self.began_ns, self.deadline_ns, now_ns)


class GrpcioMessage(MessageInTurn):
    """One message of a stream, or None for the end of the client's side."""

    __slots__ = ()

    stream: GrpcioStream

    def __init__(self, stream: GrpcioStream, message: bytes | None) -> None:
        super().__init__(stream, message, time.monotonic_ns())

    @property
    def ended(self) -> bool:
        """Whether the stream has ended."""
        return self.stream.ended


def _deadline_ns(context: Any, now_ns: int) -> int:
    remaining_s = context.time_remaining()
    return NO_DEADLINE if remaining_s is None else now_ns + int(remaining_s * 1e9)
