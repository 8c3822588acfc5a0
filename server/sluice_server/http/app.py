"""The ASGI front: reads requests whole within bounds, makes exchanges of them, and sends their answers.

One coroutine serves each request: it reads the body, has the exchange taken, and waits for the answer or for the client
to leave. ASGI tells of the latter only who goes on receiving, which would take a second task for each request: the
connection tells it instead, and closes itself when a body does not come. Answers come from any thread; the first of a
batch wakes the event loop, the others ride along.
"""

from __future__ import annotations

import asyncio
import collections
import time
from typing import TYPE_CHECKING, Any, Protocol

from sluice_server.errors import ResourceExhausted
from sluice_server.http import body
from sluice_server.observability.metrics import CONTENT_TYPE
from sluice_server.protocol.rest import Exchange, HttpAnswer, plain_error, refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, MutableMapping

    from sluice_server.http.connection import HttpConnection, OneWrite
    from sluice_server.status import StatusMapper

    Scope = MutableMapping[str, Any]
    Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
    Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

SCRAPE_BYTES_MAX = 1 << 20
"""A scrape has no body; some clients send one all the same."""

HELD_BYTES_MAX = 2 << 30
"""Bytes of bodies in memory over all requests: thirty of the largest by default; the queues' own bounds are lower."""

INLINE_BYTES_MAX = 256 << 10
"""Up to this size (de)compressing takes a few milliseconds at most; larger bodies go to a thread, off the loop."""

JOINED_BYTES_MAX = 64 << 10
"""Up to this size an answer is sent as one piece: copying it costs less than another round through the front."""


class Handler(Protocol):
    """What exchanges are given to; both are called on the event loop."""

    def take(self, exchange: Exchange) -> None:
        """Answer the exchange now or later."""

    def flush(self) -> None:
        """Every exchange that is there for the moment has been taken."""


class HttpExchange(Exchange):
    """One request in progress on the event loop."""

    __slots__ = ("_front", "answered", "held_bytes")

    def __init__(self, front: HttpFront, scope: Scope, headers: dict[str, str]) -> None:
        self.verb = scope["method"]
        self.path = scope["raw_path"].decode("ascii")
        self.headers = headers
        self.body = b""
        host, port = scope["client"] or ("", 0)
        self.peer = f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
        self.received_ns = 0
        self.left = None
        self.held_bytes = 0
        self.answered: asyncio.Future[HttpAnswer | None] = front.loop.create_future()
        self._front = front

    def answer(self, answer: HttpAnswer) -> None:
        """Have the answer sent, unless the client has left."""
        if not self.answered.done():
            self.answered.set_result(answer)

    def leave(self) -> None:
        """The client has left."""
        if not self.answered.done():
            self.answered.set_result(None)

    def resume(self, step: Callable[[], None]) -> None:
        """Have a step called on the event loop; from any thread."""
        self._front.post(step)

    async def send(self, answer: HttpAnswer, send: Send, output: OneWrite) -> None:
        """Send the answer, compressed as the client wants it."""
        parts = answer.parts
        headers = [(name.encode(), value.encode("latin-1")) for name, value in answer.headers]
        size_bytes = sum(map(len, parts))  # type: ignore[arg-type] # every part is bytes, or a view of bytes
        encoding = body.choose_encoding(self.headers.get("accept-encoding", "")) if answer.compressible else None
        if encoding is not None:
            if size_bytes > INLINE_BYTES_MAX:
                packed = await asyncio.to_thread(body.deflate, encoding, parts)
            else:
                packed = body.deflate(encoding, parts)
            parts, size_bytes = (packed,), len(packed)
            headers.append((b"content-encoding", encoding.encode()))
        headers.append((b"content-length", b"%d" % size_bytes))
        start = {"type": "http.response.start", "status": answer.status, "headers": headers}
        if size_bytes <= JOINED_BYTES_MAX:
            output.keep()
            try:
                await send(start)
                await send({"type": "http.response.body", "body": b"".join(parts), "more_body": False})
            finally:
                output.flush()
            return
        await send(start)
        for piece in parts[:-1]:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        await send({"type": "http.response.body", "body": parts[-1], "more_body": False})


class HttpFront:
    """An ASGI application that gives every request to a handler."""

    def __init__(self, handler: Handler, to_status: StatusMapper, max_input_bytes: int = SCRAPE_BYTES_MAX) -> None:
        self._handler = handler
        self._to_status = to_status
        self._max_input_bytes = max_input_bytes
        self._held_bytes = 0
        self._flush_is_due = False
        self._steps: collections.deque[Callable[[], None]] = collections.deque()
        self._wake_is_due = False
        self.loop: asyncio.AbstractEventLoop

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        self.loop = asyncio.get_running_loop()
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        exchange = HttpExchange(self, scope, headers)
        connection: HttpConnection = scope["connection"]
        connection.on_lost = exchange.leave
        try:
            await self._receive(exchange, receive)
            answer = await exchange.answered
            if answer is not None:
                await exchange.send(answer, send, connection.output)
        finally:
            connection.on_lost = None
            self._held_bytes -= exchange.held_bytes
            if exchange.left is not None:
                exchange.left()

    def post(self, step: Callable[[], None]) -> None:
        """Have a step called on the event loop; from any thread."""
        self._steps.append(step)
        if self._wake_is_due:
            return
        self._wake_is_due = True
        try:
            self.loop.call_soon_threadsafe(self._run_steps)
        except RuntimeError:  # the server has ended: nobody is left to hear
            if not self.loop.is_closed():
                raise

    def _run_steps(self) -> None:
        # Cleared first: what is posted from here on makes a wake-up of its own.
        self._wake_is_due = False
        while self._steps:
            self._steps.popleft()()

    async def _receive(self, exchange: HttpExchange, receive: Receive) -> None:
        try:
            is_whole = await self._read(exchange, receive)
        except Exception as error:
            exchange.answer(refusal(self._to_status(error)))
            return
        if is_whole:
            exchange.received_ns = time.monotonic_ns()
            self._take(exchange)

    async def _read(self, exchange: HttpExchange, receive: Receive) -> bool:
        """Read the body; False when the client left meanwhile."""
        limit_bytes = self._max_input_bytes
        length = exchange.headers.get("content-length", "")
        if length.isdecimal() and int(length) > limit_bytes:
            raise body.too_large(f"of {length}", limit_bytes)
        pieces: list[bytes] = []
        size_bytes = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                exchange.leave()
                return False
            piece = message.get("body", b"")
            more = message.get("more_body", False)
            pieces.append(piece)
            size_bytes += len(piece)
            if size_bytes > limit_bytes:
                raise body.too_large(f"of more than {limit_bytes}", limit_bytes)
            self._hold(exchange, len(piece))
        whole = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        encoding = exchange.headers.get("content-encoding")
        if encoding is not None:
            if size_bytes > INLINE_BYTES_MAX:
                whole = await asyncio.to_thread(body.inflate, encoding, whole, limit_bytes)
            else:
                whole = body.inflate(encoding, whole, limit_bytes)
            self._hold(exchange, len(whole))
        exchange.body = whole
        return True

    def _hold(self, exchange: HttpExchange, size_bytes: int) -> None:
        self._held_bytes += size_bytes
        exchange.held_bytes += size_bytes
        if self._held_bytes > HELD_BYTES_MAX:
            raise ResourceExhausted(f"the bodies of all requests together have more than {HELD_BYTES_MAX} bytes")

    def _take(self, exchange: HttpExchange) -> None:
        self._handler.take(exchange)
        if not self._flush_is_due:
            # At the end of this turn of the loop, with whatever arrives in the rest of it.
            self._flush_is_due = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        self._handler.flush()


class Metrics:
    """The handler of the metrics port: GET /metrics, in the Prometheus text format."""

    def __init__(self, render: Callable[[], bytes]) -> None:
        self._render = render

    def take(self, exchange: Exchange) -> None:
        """Answer at once."""
        if exchange.path != "/metrics":
            exchange.answer(plain_error(404, "Not Found"))
        elif exchange.verb not in ("GET", "HEAD"):
            exchange.answer(plain_error(405, "Method Not Allowed", ("allow", "GET, HEAD")))
        else:
            exchange.answer(HttpAnswer(200, (("content-type", CONTENT_TYPE),), (self._render(),)))

    def flush(self) -> None:
        """Nothing waits."""
