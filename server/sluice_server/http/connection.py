"""One HTTP/1.1 connection: uvicorn's on httptools, with the bounds on requests that it lacks, and word of its end."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

HEAD_BYTES_MAX = 64 << 10
"""Path and headers together: what h11, the other parser of uvicorn, allows."""

HEAD_TIMEOUT_S = 30.0
"""How long a head may take from its first byte: clients send it in one piece."""

STALL_S = 60.0
"""How long a client may take for the next piece of its body: slow links send some of it every second."""


class HeadTooLarge(ValueError):
    """A request's path and headers are above the bound; the connection ends."""


class OneWrite:
    """A transport that can keep what is written for one system call: an answer's head and its body."""

    __slots__ = ("_pieces", "_transport")

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._pieces: list[bytes] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def keep(self) -> None:
        """Keep what is written from here on, until `flush`."""
        self._pieces = []

    def write(self, data: bytes) -> None:
        """Write, now or with the rest."""
        if self._pieces is None:
            self._transport.write(data)
        else:
            self._pieces.append(data)

    def flush(self) -> None:
        """Write what was kept."""
        pieces, self._pieces = self._pieces, None
        if pieces:
            self._transport.write(b"".join(pieces))

    def close(self) -> None:
        """Close behind everything that was written."""
        self.flush()
        self._transport.close()


class HttpConnection(HttpToolsProtocol):
    """A connection that ends when a head is too large, or what is to follow takes too long.

    Applications find it as `scope["connection"]`.
    """

    on_lost: Callable[[], None] | None = None
    """Set by the application for the request in progress; called when the connection has ended."""

    _head_bytes = 0
    _in_head = False
    _in_body = False
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The beginning."""
        self.output = OneWrite(transport)
        super().connection_made(cast("asyncio.Transport", self.output))

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self.scope["connection"] = self  # type: ignore[typeddict-unknown-key]
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

    def on_message_complete(self) -> None:
        """The body is whole."""
        self._in_body = False
        self._stop_timer()
        super().on_message_complete()

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

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        self._stop_timer()
        super().connection_lost(exc)
        if self.on_lost is not None:
            self.on_lost()

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
