"""Serves the HTTP applications on uvicorn: one event loop for all of them, and threads for large bodies."""

from __future__ import annotations

import asyncio
import concurrent.futures
import socket
import threading
from typing import TYPE_CHECKING

import uvicorn

from sluice_server.http.connection import HttpConnection
from sluice_server.transport.call import ListenError
from sluice_server.transport.listening import listen, reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_server.http.app import HttpFront

CONNECTIONS_MAX = 1024
"""REST clients have a connection for each request in flight; past this a listener answers 503."""

KEEP_ALIVE_S = 75
"""Longer than the usual scrape interval, so that a scraper keeps its connection."""

START_TIMEOUT_S = 30.0
"""Starting takes milliseconds; past this the event loop is stuck and the start fails."""


class HttpListener:
    """One application on one address; port 0 takes any that is free."""

    def __init__(self, app: HttpFront, address: str, port: int, *, reuse_port: bool = False) -> None:
        self._address = address
        self._reuse_port = reuse_port
        self.port = port
        self.socket: socket.socket | None = None
        config = uvicorn.Config(
            app,  # type: ignore[arg-type] # HttpConnection knows what it is
            http=HttpConnection,
            ws="none",
            interface="asgi3",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        self.server = uvicorn.Server(config)

    def bind(self) -> None:
        """Take the port, or raise `ListenError`; `port` is then the real one."""
        try:
            self.socket = listen(self._address, self.port, reuse_port=self._reuse_port)
        except OSError as error:
            raise ListenError(f"cannot listen on {self._address}:{self.port} for HTTP: {reason(error)}") from error
        # Connections inherit it: the second packet of an answer, its body, must not wait for the client.
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.port = self.socket.getsockname()[1]

    async def serve(self) -> None:
        """Answer until `server.should_exit`."""
        await self.server.serve(sockets=None if self.socket is None else [self.socket])
        for connection in list(self.server.server_state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)  # until they have heard of it, and let go what they wait for

    def close(self) -> None:
        """Give the port back."""
        if self.socket is not None:
            self.socket.close()


class HttpServer:
    """Runs listeners until `stop`."""

    def __init__(self, listeners: Sequence[HttpListener], workers: int) -> None:
        """`workers` is how many threads there may be beside the event loop's for what its applications hand off."""
        self._listeners = listeners
        self._workers = workers
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()

    def start(self) -> None:
        """Bind all of them, or raise `ListenError`, and serve."""
        for listener in self._listeners:
            listener.bind()
        self._thread.start()
        self._started.result(START_TIMEOUT_S)

    def stop(self) -> None:
        """End all listeners and wait for them."""
        for listener in self._listeners:
            listener.server.should_exit = True
        if self._thread.ident is not None:
            self._thread.join()
        for listener in self._listeners:
            listener.close()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(concurrent.futures.ThreadPoolExecutor(self._workers, "http-worker"))
        self._started.set_result(loop)
        await asyncio.gather(*(listener.serve() for listener in self._listeners))
