"""A relay between a client and a server on TCP, that counts the bytes of the answers."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from types import TracebackType

CHUNK_BYTES = 1 << 16


class Relay:
    """Clients connect to `target` instead of the server; at the end of the `with` all of their connections are cut."""

    def __init__(self, server: str) -> None:
        """`server` is its address, `host:port`."""
        host, _, port = server.rpartition(":")
        self._server = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.target = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.bytes_answered = 0
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts; close would not
        self._threads[0].join()
        self._listener.close()
        for one in self._sockets:
            _shut(one)
        for thread in self._threads[1:]:
            thread.join()
        for one in self._sockets:
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:  # the end
                return
            server = socket.create_connection(self._server)
            self._sockets += [client, server]
            for source, sink, is_answer in ((client, server, False), (server, client, True)):
                thread = threading.Thread(target=self._pump, args=(source, sink, is_answer), daemon=True)
                self._threads.append(thread)
                thread.start()

    def _pump(self, source: socket.socket, sink: socket.socket, is_answer: bool) -> None:
        try:
            while chunk := source.recv(CHUNK_BYTES):
                if is_answer:
                    self.bytes_answered += len(chunk)
                sink.sendall(chunk)
        except OSError:  # the other side has gone
            pass
        _shut(sink)


def _shut(one: socket.socket) -> None:
    with suppress(OSError):  # it is shut already
        one.shutdown(socket.SHUT_RDWR)
