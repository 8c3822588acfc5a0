"""The portable transport: grpcio's asyncio server on a thread and an event loop of its own.

Calls that arrive while the event loop has work go up as one list, on the loop's thread, which is therefore this
transport's intake thread: a separate one would add a hand-off for each request and save none. Ends come back through
one queue that is emptied on the loop once per wake-up, so that a batch costs one wake-up and not one per request.
A stream has two tasks: gRPC's own, which writes, and one that reads while the stream has room.
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

from sluice_server.status import Code, Status
from sluice_server.transport.call import STREAM_AHEAD, ListenError
from sluice_server.transport.gathering import CALLS_MAX, HOLD_S, IdleSelector
from sluice_server.transport.grpcio_calls import GrpcioCall, GrpcioMessage, GrpcioStream
from sluice_server.transport.grpcio_options import channel_args, server_credentials
from sluice_server.transport.listening import check_address
from sluice_server.transport.message import fit_message
from sluice_server.transport.options import UNIX_PREFIX

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sluice_server.transport.call import Handler
    from sluice_server.transport.options import TransportOptions

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


class _Handlers(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The behaviours by their methods' paths."""

    def __init__(self, handlers: Mapping[str, grpc.RpcMethodHandler]) -> None:
        self._handlers = handlers

    def service(self, handler_call_details: Any) -> grpc.RpcMethodHandler | None:
        """What serves a call; None, which gRPC answers with UNIMPLEMENTED, for a path that there is not."""
        return self._handlers.get(handler_call_details.method)


class GrpcioTransport:
    """grpcio's asyncio server behind the seam. Everything but `post` and the public methods runs on its one thread."""

    name = "grpcio"

    def __init__(
        self,
        handler: Handler,
        methods: Mapping[str, bool],
        options: TransportOptions,
    ) -> None:
        """`methods` maps the path of each RPC to whether it streams."""
        self._handler = handler
        self._methods = methods
        self._options = options
        self._inbox: list[GrpcioCall | GrpcioMessage] = []
        self._hold: asyncio.TimerHandle | None = None
        self._open: set[GrpcioCall | GrpcioStream] = set()
        self._outbox: collections.deque[tuple[GrpcioCall | GrpcioStream, Status | None, bytes]] = collections.deque()
        self._wake_is_due = False
        self._outcomes: collections.Counter[tuple[str, Code]] = collections.Counter()
        self._endpoints: tuple[str, ...] = ()
        self._bound: concurrent.futures.Future[None] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name="grpcio-transport", daemon=True)
        self._stopping: asyncio.Future[float]
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

    def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, wait up to `grace_s` seconds for accepted ones, cancel the rest."""
        self._call_on_loop(lambda: self._begin_to_stop(grace_s))
        if self._thread.ident is not None:
            self._thread.join()

    def post(self, rpc: GrpcioCall | GrpcioStream, status: Status | None, payload: bytes) -> None:
        """Queue a message or an end; from any thread. The first of a batch wakes the loop, the others ride along."""
        self._outbox.append((rpc, status, payload))
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
            with asyncio.Runner(loop_factory=self._make_loop) as runner:
                runner.run(self._serve())
        except BaseException as error:
            if self._bound.done():
                raise
            self._bound.set_exception(error)

    def _make_loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.SelectorEventLoop(IdleSelector(self._on_idle))

    async def _serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        self._stopping = self.loop.create_future()
        server = grpc.aio.server(options=channel_args(self._options))
        server.add_generic_rpc_handlers((self._rpc_handlers(),))
        self._endpoints = (self._bind(server),)
        await server.start()
        self._bound.set_result(None)
        await self._end_all(server, await self._stopping)
        self._flush()

    async def _end_all(self, server: grpc.aio.Server, grace_s: float) -> None:
        """Let accepted calls finish; those that take too long get a status here, as gRPC would log a trace for each."""
        stopped = self.loop.create_task(server.stop(grace_s + LAST_ENDS_S))
        await asyncio.wait({stopped}, timeout=grace_s)
        for rpc in self._open:
            self.post(rpc, _TIME_IS_UP, b"")
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
        return _Handlers(
            {
                path: grpc.stream_stream_rpc_method_handler(self._stream_behaviour(path))
                if streams
                else grpc.unary_unary_rpc_method_handler(self._unary_behaviour(path))
                for path, streams in self._methods.items()
            }
        )

    def _unary_behaviour(self, method: str) -> Callable[[bytes, Any], Any]:
        async def behave(message: bytes, context: Any) -> bytes:
            call = GrpcioCall(self, method, message, context)
            self._open.add(call)
            self._accept(call)
            try:
                status, payload = await call.future
            except asyncio.CancelledError:
                self._client_left(call)
                raise
            if status.code is not Code.OK:
                await context.abort(_CODES[status.code], fit_message(status.message), status.trailers)
            return payload

        return behave

    def _stream_behaviour(self, method: str) -> Callable[[Any, Any], Any]:
        async def behave(_requests: Any, context: Any) -> None:
            stream = GrpcioStream(self, method, context)
            self._open.add(stream)
            reader = self.loop.create_task(self._read(stream, context))
            try:
                status = await self._write(stream, context)
            finally:
                reader.cancel()
                self._client_left(stream)  # unless it has ended
            if status.code is not Code.OK:
                await context.abort(_CODES[status.code], fit_message(status.message), status.trailers)

        return behave

    async def _read(self, stream: GrpcioStream, context: Any) -> None:
        """Hand the client's messages up while the stream has room, and None behind the last one."""
        while (message := await context.read()) is not grpc.aio.EOF:
            if stream.ended:
                return
            stream.ahead += 1
            self._accept(GrpcioMessage(stream, message))
            while stream.ahead >= STREAM_AHEAD:
                stream.room.clear()
                await stream.room.wait()
        # A client that has cancelled looks the same at first; behind another reading that has become known.
        await context.read()
        self._accept(GrpcioMessage(stream, None))

    async def _write(self, stream: GrpcioStream, context: Any) -> Status:
        """Write what is sent until the stream has a status, which is given."""
        while True:
            stream.changed.clear()
            while stream.outgoing:
                await context.write(stream.outgoing.popleft())
                if stream.ahead:
                    stream.ahead -= 1
                    stream.room.set()
            if stream.status is not None:
                return stream.status
            await stream.changed.wait()

    def _accept(self, call: GrpcioCall | GrpcioMessage) -> None:
        self._inbox.append(call)
        if self._hold is None:
            self._hold = self.loop.call_later(HOLD_S, self._deliver)
        elif len(self._inbox) >= CALLS_MAX:
            self._deliver()

    def _on_idle(self) -> bool:
        if self._hold is None:
            return False
        self.loop.call_soon(self._deliver)
        return True

    def _deliver(self) -> None:
        if self._hold is None:  # a full list has gone meanwhile
            return
        self._hold.cancel()
        self._hold = None
        calls = [call for call in self._inbox if not call.ended]
        self._inbox = []
        self._handler(calls)

    def _flush(self) -> None:
        # Cleared first: what is posted from here on makes a wake-up of its own.
        self._wake_is_due = False
        outbox = self._outbox
        while outbox:
            rpc, status, payload = outbox.popleft()
            if not rpc.ended and (code := rpc.deliver(status, payload)) is not None:
                self._end(rpc, code)

    def _client_left(self, rpc: GrpcioCall | GrpcioStream) -> None:
        if rpc.ended:
            return
        on_cancel = rpc.on_cancel
        self._end(rpc, rpc.code_of_leaving(time.monotonic_ns()))
        if on_cancel is not None:
            on_cancel()

    def _end(self, rpc: GrpcioCall | GrpcioStream, code: Code) -> None:
        """Mark the end of an RPC and count it."""
        rpc.ended = True
        rpc.on_cancel = None  # it leads back to the call: without it, memory is freed at once and not by the collector
        self._outcomes[rpc.method, code] += 1
        self._open.discard(rpc)
