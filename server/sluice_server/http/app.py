"""The HTTP front: reads requests whole within bounds, makes exchanges of them, and sends their answers.

It stands where uvicorn has an ASGI application, and takes requests from the connection as they are parsed: no task, no
messages and no copies in between, which cost more than all that is done for a small request here. Everything happens on
the event loop, but for (de)compressing large bodies. Answers come from any thread; the first of a batch wakes the event
loop, the others ride along.
"""

from __future__ import annotations

import asyncio
import collections
import functools
import time
from typing import TYPE_CHECKING, Protocol

from sluice_server.errors import ResourceExhausted
from sluice_server.http import body
from sluice_server.observability.metrics import CONTENT_TYPE
from sluice_server.protocol.rest import Exchange, HttpAnswer, plain_error, refusal

if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice_server.http.connection import Reply
    from sluice_server.status import StatusMapper

SCRAPE_BYTES_MAX = 1 << 20
"""A scrape has no body; some clients send one all the same."""

HELD_BYTES_MAX = 2 << 30
"""Bytes of bodies in memory over all requests: thirty of the largest by default; the queues' own bounds are lower."""

INLINE_BYTES_MAX = 256 << 10
"""Up to this size (de)compressing takes a few milliseconds at most; larger bodies go to a thread, off the loop."""


class Handler(Protocol):
    """What exchanges are given to; both are called on the event loop."""

    def take(self, exchange: Exchange) -> None:
        """Answer the exchange now or later."""

    def flush(self) -> None:
        """Every exchange that is there for the moment has been taken."""


class HttpExchange(Exchange):
    """One request in progress on the event loop: its body as it comes, and its answer.

    `feed`, `complete` and `leave` are for the connection; none of them raises.
    """

    __slots__ = ("_front", "_held_bytes", "_is_over", "_pieces", "_reply")

    def __init__(self, front: HttpFront, reply: Reply) -> None:
        scope = reply.scope
        self.verb = scope["method"]
        self.path = scope["raw_path"].decode("ascii")
        self.headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        self.body = b""
        host, port = scope["client"] or ("", 0)
        self.peer = f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"
        self.received_ns = 0
        self.left = None
        self._front = front
        self._reply = reply
        self._pieces: list[bytes] = []
        self._held_bytes = 0
        self._is_over = False

    def begin(self) -> None:
        """Refuse a body that is announced as too large, or have it sent."""
        length = self.headers.get("content-length", "")
        limit_bytes = self._front.max_input_bytes
        if length.isdecimal() and int(length) > limit_bytes:
            self._refuse(body.too_large(f"of {length}", limit_bytes))
        else:
            self._reply.go_on()

    def feed(self, piece: bytes) -> None:
        """A piece of the body has come."""
        if self._is_over:
            return
        self._pieces.append(piece)
        try:
            self._hold(len(piece))
            limit_bytes = self._front.max_input_bytes
            if self._held_bytes > limit_bytes:
                raise body.too_large(f"of more than {limit_bytes}", limit_bytes)
        except Exception as error:
            self._refuse(error)

    def complete(self) -> None:
        """The body is whole: it is inflated, and the request is taken."""
        if self._is_over:
            return
        whole = self._pieces[0] if len(self._pieces) == 1 else b"".join(self._pieces)
        self._pieces.clear()
        encoding = self.headers.get("content-encoding")
        if encoding is None:
            self._take(whole)
        else:
            inflate = functools.partial(body.inflate, encoding, whole, self._front.max_input_bytes)
            self._apart(inflate, len(whole), self._inflated)

    def _inflated(self, whole: bytes) -> None:
        self._hold(len(whole))
        self._take(whole)

    def _take(self, whole: bytes) -> None:
        self.body = whole
        self.received_ns = time.monotonic_ns()
        try:
            self._front.take(self)
        except Exception as error:
            self._refuse(error)

    def answer(self, answer: HttpAnswer) -> None:
        """Have the answer sent, unless the client has left."""
        if self._is_over:
            return
        accept = self.headers.get("accept-encoding") if answer.compressible else None
        encoding = None if accept is None else body.choose_encoding(accept)
        if encoding is None:
            self._send(answer)
            return
        size_bytes = sum(map(len, answer.parts))  # type: ignore[arg-type] # every part is bytes, or a view of bytes
        headers = (*answer.headers, ("content-encoding", encoding))
        deflate = functools.partial(body.deflate, encoding, answer.parts)
        self._apart(deflate, size_bytes, lambda packed: self._send(HttpAnswer(answer.status, headers, (packed,))))

    def leave(self) -> None:
        """The client has left."""
        if self._is_over:
            return
        self._end()
        if self.left is not None:
            self.left()

    def resume(self, step: Callable[[], None]) -> None:
        """Have a step called on the event loop; from any thread."""
        self._front.post(step)

    def _apart(self, work: Callable[[], bytes], size_bytes: int, then: Callable[[bytes], None]) -> None:
        """Do some work on so many bytes, on a thread if they are many, and go on with what it gives."""
        if size_bytes <= INLINE_BYTES_MAX:
            self._go_on(work, then)
            return
        done = self._front.loop.run_in_executor(None, work)
        done.add_done_callback(lambda done: self._go_on(done.result, then))

    def _go_on(self, work: Callable[[], bytes], then: Callable[[bytes], None]) -> None:
        try:
            result = work()
            if not self._is_over:
                then(result)
        except Exception as error:
            self._refuse(error)

    def _hold(self, size_bytes: int) -> None:
        self._held_bytes += size_bytes
        self._front.hold(size_bytes)

    def _refuse(self, error: Exception) -> None:
        if not self._is_over:
            self._send(refusal(self._front.to_status(error)))

    def _send(self, answer: HttpAnswer) -> None:
        self._end()
        self._reply.send(answer)

    def _end(self) -> None:
        self._is_over = True
        self._pieces.clear()
        self.body = b""
        self._front.hold(-self._held_bytes)


class HttpFront:
    """Gives every request to a handler."""

    def __init__(self, handler: Handler, to_status: StatusMapper, max_input_bytes: int = SCRAPE_BYTES_MAX) -> None:
        self.max_input_bytes = max_input_bytes
        self.to_status = to_status
        self._handler = handler
        self._held_bytes = 0
        self._flush_is_due = False
        self._steps: collections.deque[Callable[[], None]] = collections.deque()
        self._wake_is_due = False
        self.loop: asyncio.AbstractEventLoop

    def begin(self, reply: Reply) -> HttpExchange:
        """A request whose head has come; on the event loop."""
        self.loop = reply.loop
        exchange = HttpExchange(self, reply)
        exchange.begin()
        return exchange

    def hold(self, size_bytes: int) -> None:
        """Count bytes of bodies in memory, or, below 0, no longer there; ResourceExhausted when they are too many."""
        self._held_bytes += size_bytes
        if self._held_bytes > HELD_BYTES_MAX and size_bytes > 0:
            raise ResourceExhausted(f"the bodies of all requests together have more than {HELD_BYTES_MAX} bytes")

    def take(self, exchange: HttpExchange) -> None:
        """Have the handler take an exchange, and flush when all that came with it has been taken."""
        self._handler.take(exchange)
        if not self._flush_is_due:
            # At the end of this turn of the loop, with whatever arrives in the rest of it.
            self._flush_is_due = True
            self.loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._flush_is_due = False
        self._handler.flush()

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
