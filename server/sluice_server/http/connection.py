"""One HTTP/1.1 connection: uvicorn's on httptools, with the bounds on requests that it lacks, and word of its end."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

    from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

    from sluice_server.protocol.rest import HttpAnswer

HEAD_BYTES_MAX = 64 << 10
"""Path and headers together: what h11, the other parser of uvicorn, allows."""

HEAD_TIMEOUT_S = 30.0
"""How long a head may take from its first byte: clients send it in one piece."""

STALL_S = 60.0
"""How long a client may take for the next piece of its body: slow links send some of it every second."""


JOINED_BYTES_MAX = 64 << 10
"""Up to this size an answer is written in one piece: copying it costs less than another system call."""

HEADS_MAX = 256
"""Heads of answers that are kept: those of a model differ by the length of the JSON alone."""


class HeadTooLarge(ValueError):
    """A request's path and headers are above the bound; the connection ends."""


class Incoming(Protocol):
    """A request that an application has begun."""

    def feed(self, piece: bytes) -> None:
        """A piece of its body has come."""

    def complete(self) -> None:
        """Its body is whole."""

    def leave(self) -> None:
        """The connection has ended."""


@runtime_checkable
class Application(Protocol):
    """What takes requests from a connection without ASGI."""

    def begin(self, reply: Reply) -> Incoming:
        """A request whose head has come, and whose turn it is; its answer goes to `reply`."""


class Reply:
    """The place of one answer on its connection."""

    __slots__ = ("_connection", "_cycle", "loop", "scope")

    def __init__(self, connection: HttpConnection, cycle: RequestResponseCycle) -> None:
        self.loop = connection.loop
        self.scope = cycle.scope
        """As ASGI has it."""
        self._connection = connection
        self._cycle = cycle

    def go_on(self) -> None:
        """Ask for the body, of a client that waits for that."""
        if self._cycle.waiting_for_100_continue:
            self._cycle.waiting_for_100_continue = False
            self._connection.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def send(self, answer: HttpAnswer) -> None:
        """Send the one answer; the next request of the connection may begin."""
        cycle, connection = self._cycle, self._connection
        parts = answer.parts
        size_bytes = sum(map(len, parts))  # type: ignore[arg-type] # every part is bytes, or a view of bytes
        head = [encoded_head(answer.status, answer.headers), b"content-length: %d\r\n" % size_bytes]
        head += [b"%b: %b\r\n" % header for header in connection.server_state.default_headers]
        head.append(b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n")
        if cycle.scope["method"] == "HEAD":
            parts = ()
        write = connection.transport.write
        if size_bytes <= JOINED_BYTES_MAX:
            write(b"".join([*head, *parts]))
        else:
            write(b"".join(head))
            for part in parts:
                write(part)  # type: ignore[arg-type] # every part is bytes, or a view of bytes
        cycle.response_started = cycle.response_complete = True
        if not cycle.keep_alive:
            connection.transport.close()
        connection.on_response_complete()


@functools.lru_cache(HEADS_MAX)
def encoded_head(status: int, headers: tuple[tuple[str, str], ...]) -> bytes:
    """The status line and these headers."""
    lines = [f"{name}: {value}\r\n".encode("latin-1") for name, value in headers]
    return b"".join([STATUS_LINE[status], *lines])


class HttpConnection(HttpToolsProtocol):
    """A connection that ends when a head is too large, or what is to follow takes too long.

    An `Application` gets requests as they are parsed, one after the other; what waits for its turn is kept by uvicorn.
    ASGI applications, such as uvicorn's own for too many connections, are served as ever.
    """

    _application: Application | None = None
    """What the server was made for, unless that is an ASGI application."""

    _incoming: Incoming | None = None
    """The request in progress."""

    _incoming_cycle: RequestResponseCycle | None = None
    """uvicorn's view of the same."""

    _idle_since_s = math.inf
    """On the loop's clock."""

    _head_bytes = 0
    _in_head = False
    _in_body = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The beginning."""
        super().connection_made(transport)
        if isinstance(self.app, Application):
            self._application = self.app

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._head_bytes = 0
        self._in_head = True

    def on_url(self, url: bytes) -> None:
        """A piece of the path."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is whole."""
        self._in_head = False
        self._in_body = True
        self._stop_timer()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        if self._incoming is not None and self._incoming_cycle is self.cycle:
            self._incoming.feed(body)
        else:
            super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is whole."""
        self._in_body = False
        self._stop_timer()
        super().on_message_complete()
        if self._incoming is not None and self._incoming_cycle is self.cycle:
            self._incoming.complete()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Begin a request whose turn it is; of one that had to wait for it, more than the head may have come."""
        if self._application is None or app is not self._application:
            super()._start_asgi_task(cycle, app)
            return
        self._incoming_cycle = cycle
        self._incoming = incoming = self._application.begin(Reply(self, cycle))
        if cycle.body:
            incoming.feed(bytes(cycle.body))
        if not cycle.more_body:
            incoming.complete()

    def data_received(self, data: bytes) -> None:
        """Some bytes; most often a whole request, which needs no timer."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)  # of a header that has no end yet nobody else hears
            if self._head_bytes > 2 * HEAD_BYTES_MAX and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")
            elif self._timer is None:
                self._timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)
        elif self._in_body:
            self._stop_timer()
            self._timer = self.loop.call_later(STALL_S, self._end_stall)

    def on_response_complete(self) -> None:
        """The next request may begin; until it does, the connection is idle.

        As uvicorn does it, but with one timer for a connection, where that makes one for each answer.
        """
        self.server_state.total_requests += 1
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._start_asgi_task(*self.pipeline.pop())
            return
        self._idle_since_s = self.loop.time()
        if self.timeout_keep_alive_task is None:
            self._look_later(self.timeout_keep_alive)

    def _unset_keepalive_if_required(self) -> None:
        self._idle_since_s = math.inf  # the timer goes on, and finds the connection in use

    def _look_later(self, after_s: float) -> None:
        self.timeout_keep_alive_task = self.loop.call_later(after_s, self.timeout_keep_alive_handler)

    def timeout_keep_alive_handler(self) -> None:
        """End the connection if it has been idle for long enough, or look again when it may have been."""
        left_s = self.timeout_keep_alive - max(0.0, self.loop.time() - self._idle_since_s)
        if left_s > 0:
            self._look_later(left_s)
        else:
            super().timeout_keep_alive_handler()

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._stop_timer()
        if self.timeout_keep_alive_task is not None:
            self.timeout_keep_alive_task.cancel()
        super().connection_lost(exc)
        if self._incoming is not None:
            self._incoming.leave()

    def _end_stall(self) -> None:
        if not self.flow.read_paused:  # else it is this side that does not read
            self.transport.close()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _count(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > HEAD_BYTES_MAX:
            raise HeadTooLarge
