"""The portable transport: grpcio's asyncio server on a thread and an event loop of its own.

Calls that arrive during one turn of the event loop go up as one list, on the loop's thread, which is therefore this
transport's intake thread: a separate one would add a hand-off for each request and save none. Ends come back through
one queue that is emptied on the loop once per wake-up, so that a batch costs one wake-up and not one per request.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import logging
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from sluice_batching import NO_DEADLINE
from sluice_server.status import OK, Code, Status
from sluice_server.transport.call import Call, ListenError
from sluice_server.transport.gathering import HOLD_NS, Gathering
from sluice_server.transport.grpcio_options import channel_args, server_credentials
from sluice_server.transport.health import HealthService
from sluice_server.transport.listening import check_address
from sluice_server.transport.message import fit_message
from sluice_server.transport.options import UNIX_PREFIX
from sluice_server.transport.reflection import add_reflection

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Buffer

    from sluice_server.transport.call import Metadata
    from sluice_server.transport.options import TransportOptions

SERVICE = "inference.GRPCInferenceService"

BIND_TIMEOUT_S = 30.0
"""Binding takes milliseconds; past this the event loop is stuck and the start fails."""

LAST_ENDS_S = 1.0
"""How long calls that are failed because the server's time is up have to reach their clients."""

_TIME_IS_UP = Status(Code.UNAVAILABLE, "the server has shut down before this call was finished")

_CODES = {code: next(item for item in grpc.StatusCode if item.value[0] == code) for code in Code}


class _ClientLeftFilter(logging.Filter):
    """Drops what gRPC logs, with a stack trace, when a client goes in the middle of its answer.

    gRPC knows that case, but the failed write may come before its own news that the client has left.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Keep every record but those."""
        return record.exc_info is None or not isinstance(record.exc_info[1], grpc.aio.InternalError)


logging.getLogger("grpc._cython.cygrpc").addFilter(_ClientLeftFilter())


class GrpcioCall(Call):
    """One unary RPC of the grpcio server; its end is a future on the event loop."""

    __slots__ = ("_context", "_transport", "ended", "future")

    def __init__(self, transport: GrpcioTransport, method: str, message: bytes, context: Any) -> None:
        self.method = method
        self.message = message
        self.received_ns = time.monotonic_ns()
        remaining_s = context.time_remaining()
        self.deadline_ns = NO_DEADLINE if remaining_s is None else self.received_ns + int(remaining_s * 1e9)
        self.on_cancel = None
        self.ended = False
        self.future: asyncio.Future[tuple[Status, bytes]] = transport.loop.create_future()
        self._transport = transport
        self._context = context

    def __repr__(self) -> str:
        return f"<GrpcioCall {self.method} {'ended' if self.ended else 'open'}>"

    @property
    def metadata(self) -> Metadata:
        """The request's headers."""
        return tuple((key, value) for key, value in self._context.invocation_metadata())

    @property
    def peer(self) -> str:
        """The client's address as gRPC writes it."""
        return str(self._context.peer())

    def reply(self, parts: Sequence[Buffer]) -> None:
        """End the call with a message; the parts are joined here, on the caller's thread."""
        self._transport.end(self, OK, b"".join(parts))

    def fail(self, status: Status) -> None:
        """End the call with an error."""
        self._transport.end(self, status, b"")


class GrpcioTransport:
    """grpcio's asyncio server behind the seam. Everything but `end` and the public methods runs on its one thread."""

    name = "grpcio"
    service = SERVICE

    def __init__(
        self,
        handler: Callable[[Sequence[Call]], None],
        methods: Mapping[str, bool],
        options: TransportOptions,
    ) -> None:
        """`methods` maps each RPC's name to whether it streams."""
        self._handler = handler
        self._methods = methods
        self._options = options
        self._gathering = Gathering()
        self._inbox: list[GrpcioCall] = []
        self._hold: asyncio.TimerHandle | None = None
        self._delivery_is_due = False
        self._open: set[GrpcioCall] = set()
        self._outbox: collections.deque[tuple[GrpcioCall, Status, bytes]] = collections.deque()
        self._wake_is_due = False
        self._outcomes: collections.Counter[tuple[str, Code]] = collections.Counter()
        self._endpoints: tuple[str, ...] = ()
        self._bound: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="grpcio-transport", daemon=True)
        self._stopping: asyncio.Future[float]
        self._health = HealthService()
        self.loop: asyncio.AbstractEventLoop

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it listens; known after `start`."""
        return self._endpoints

    def outcomes(self) -> Mapping[tuple[str, Code], int]:
        """How many calls of each method have ended with each code."""
        return dict(self._outcomes)

    def start(self) -> None:
        """Bind and serve, or raise `ListenError`; returns when clients can connect."""
        self._thread.start()
        self._bound.result(BIND_TIMEOUT_S)

    def set_serving(self, service: str, *, serving: bool) -> None:
        """Say what grpc.health.v1 answers for a name; from any thread, also before `start` and after `stop`."""
        self._health.set_serving(service, serving=serving)
        self._call_on_loop(self._health.notify)

    def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, wait up to `grace_s` seconds for accepted ones, cancel the rest."""
        self._call_on_loop(lambda: self._begin_to_stop(grace_s))
        if self._thread.ident is not None:
            self._thread.join()

    def end(self, call: GrpcioCall, status: Status, payload: bytes) -> None:
        """Queue the end of a call; from any thread. The first end of a batch wakes the loop, the others ride along."""
        self._outbox.append((call, status, payload))
        if not self._wake_is_due:
            self._wake_is_due = True
            self._call_on_loop(self._flush)

    def _begin_to_stop(self, grace_s: float) -> None:
        if not self._stopping.done():
            self._stopping.set_result(grace_s)

    def _call_on_loop(self, callback: Callable[[], object]) -> None:
        if not self._thread.is_alive():
            return
        try:
            self.loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop closed between the two lines: nobody is left to hear
            if not self.loop.is_closed():
                raise

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._bound.done():
                raise
            self._bound.set_exception(error)

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stopping = self.loop.create_future()
        server = grpc.aio.server(options=channel_args(self._options))
        server.add_generic_rpc_handlers((self._rpc_handlers(),))
        self._health.add_to(server)
        add_reflection(server, SERVICE)
        self._endpoints = (self._bind(server),)
        await server.start()
        self._bound.set_result(None)
        await self._end_all(server, await self._stopping)
        self._flush()

    async def _end_all(self, server: grpc.aio.Server, grace_s: float) -> None:
        """Let accepted calls finish; those that take too long get a status here, as gRPC would log a trace for each."""
        self._health.close()
        stopped = self.loop.create_task(server.stop(grace_s + LAST_ENDS_S))
        await asyncio.wait({stopped}, timeout=grace_s)
        for call in self._open:
            self.end(call, _TIME_IS_UP, b"")
        await stopped

    def _bind(self, server: grpc.aio.Server) -> str:
        address, tls = self._options.address, self._options.tls
        check_address(address, reuse_port=self._options.reuse_port)
        try:
            if tls is None:
                port = server.add_insecure_port(address)
            else:
                port = server.add_secure_port(address, server_credentials(tls))
        except RuntimeError as error:
            what = "the address" if tls is None else "the address, the certificate or the key"
            raise ListenError(f"cannot listen on {address}: gRPC does not take {what}") from error
        if not address.startswith(UNIX_PREFIX):
            return f"{address.rpartition(':')[0]}:{port}"
        if self._options.unix_mode is not None:
            Path(address.removeprefix(UNIX_PREFIX)).chmod(self._options.unix_mode)
        return address

    def _rpc_handlers(self) -> grpc.GenericRpcHandler:
        handlers = {
            name: grpc.stream_stream_rpc_method_handler(self._stream_behaviour(name))
            if streams
            else grpc.unary_unary_rpc_method_handler(self._unary_behaviour(name))
            for name, streams in self._methods.items()
        }
        return grpc.method_handlers_generic_handler(SERVICE, handlers)

    def _unary_behaviour(self, method: str) -> Callable[[bytes, Any], Any]:
        async def behave(message: bytes, context: Any) -> bytes:
            call = GrpcioCall(self, method, message, context)
            self._accept(call)
            try:
                status, payload = await call.future
            except asyncio.CancelledError:
                self._client_left(call)
                raise
            if status.code is not Code.OK:
                await context.abort(_CODES[status.code], fit_message(status.message))
            return payload

        return behave

    def _stream_behaviour(self, method: str) -> Callable[[Any, Any], Any]:
        """A stream is one call without a message: enough to be answered with a status."""
        unary = self._unary_behaviour(method)

        async def behave(_requests: Any, context: Any) -> None:
            await unary(b"", context)

        return behave

    def _accept(self, call: GrpcioCall) -> None:
        self._inbox.append(call)
        self._open.add(call)
        if self._gathering.arrived(len(self._open)):
            self._gathering.sampled(call.received_ns, time.thread_time_ns())
        if self._gathering.holds(len(self._inbox)):
            if self._hold is None:
                self._hold = self.loop.call_later(HOLD_NS / 1e9, self._deliver)
        elif not self._delivery_is_due:
            # At the end of this turn of the loop, with whatever arrives in the rest of it.
            self._delivery_is_due = True
            self.loop.call_soon(self._deliver)

    def _deliver(self) -> None:
        self._delivery_is_due = False
        if self._hold is not None:
            self._hold.cancel()
            self._hold = None
        calls = [call for call in self._inbox if not call.ended]
        self._inbox = []
        self._handler(calls)

    def _flush(self) -> None:
        # Cleared first: an end that is queued from here on makes a wake-up of its own.
        self._wake_is_due = False
        outbox = self._outbox
        while outbox:
            call, status, payload = outbox.popleft()
            # A future that is cancelled already is a client that has left; `_client_left` comes later in this turn.
            if call.future.cancelled() or self._has_ended(call, status.code):
                continue
            call.future.set_result((status, payload))

    def _client_left(self, call: GrpcioCall) -> None:
        on_cancel = call.on_cancel
        if not self._has_ended(call, call.code_of_leaving(time.monotonic_ns())) and on_cancel is not None:
            on_cancel()

    def _has_ended(self, call: GrpcioCall, code: Code) -> bool:
        """Mark the end of a call and count it; True when another end came first."""
        if call.ended:
            return True
        call.ended = True
        call.on_cancel = None  # it leads back to the call: without it, memory is freed at once and not by the collector
        self._outcomes[call.method, code] += 1
        self._open.discard(call)
        return False
