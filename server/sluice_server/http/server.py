"""Serves the HTTP applications on uvicorn: one thread and one event loop for all of them, off the inference path."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from typing import TYPE_CHECKING

import uvicorn

from sluice_server.transport.call import ListenError
from sluice_server.transport.listening import listen, reason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from starlette.applications import Starlette

CONNECTIONS_MAX = 512
"""Probes and scrapes need a handful; past this a listener answers 503 instead of holding more."""

KEEP_ALIVE_S = 75
"""Longer than the usual scrape interval, so that a scraper keeps its connection."""

START_TIMEOUT_S = 30.0
"""Starting takes milliseconds; past this the event loop is stuck and the start fails."""


class HttpListener:
    """One application on one bound socket."""

    def __init__(self, app: Starlette, address: str, port: int) -> None:
        """Bind at once, or raise `ListenError`; port 0 takes any that is free."""
        try:
            self.socket = listen(address, port)
        except OSError as error:
            raise ListenError(f"cannot listen on {address}:{port} for HTTP: {reason(error)}") from error
        self.port: int = self.socket.getsockname()[1]
        config = uvicorn.Config(
            app,
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=CONNECTIONS_MAX,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=1,
        )
        self.server = uvicorn.Server(config)


class HttpServer:
    """Runs listeners until `stop`."""

    def __init__(self, listeners: Sequence[HttpListener]) -> None:
        self._listeners = listeners
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)
        self._started: concurrent.futures.Future[asyncio.AbstractEventLoop] = concurrent.futures.Future()

    def start(self) -> None:
        """Serve; the sockets were bound before."""
        self._thread.start()
        self._started.result(START_TIMEOUT_S)

    def stop(self) -> None:
        """End all listeners and wait for them."""
        for listener in self._listeners:
            listener.server.should_exit = True
        self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._started.set_result(asyncio.get_running_loop())
        await asyncio.gather(*(listener.server.serve(sockets=[listener.socket]) for listener in self._listeners))
