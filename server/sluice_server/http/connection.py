"""One HTTP/1.1 connection: uvicorn's on httptools, with the bounds on a request's head that it lacks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

if TYPE_CHECKING:
    import asyncio

HEAD_BYTES_MAX = 64 << 10
"""Path and headers together: what h11, the other parser of uvicorn, allows."""

HEAD_TIMEOUT_S = 30.0
"""How long a head may take from its first byte: clients send it in one piece."""


class HeadTooLarge(ValueError):
    """A request's path and headers are above the bound; the connection ends."""


class HttpConnection(HttpToolsProtocol):
    """A connection that ends when a head is too large, or takes too long."""

    _head_bytes = 0
    _in_head = False
    _head_timer: asyncio.TimerHandle | None = None

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
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().on_headers_complete()

    def data_received(self, data: bytes) -> None:
        """Some bytes; most often a whole request."""
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)  # of a header that has no end yet nobody else hears
            if self._head_bytes > 2 * HEAD_BYTES_MAX and not self.transport.is_closing():
                self.send_400_response("The head of the request is too large.")
            elif self._head_timer is None:
                self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close)

    def connection_lost(self, exc: Exception | None) -> None:
        """The end."""
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        super().connection_lost(exc)

    def _count(self, size_bytes: int) -> None:
        self._head_bytes += size_bytes
        if self._head_bytes > HEAD_BYTES_MAX:
            raise HeadTooLarge
