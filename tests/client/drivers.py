"""Both clients and their streams behind one blocking interface, so that one table of tests serves both."""

import asyncio
import inspect
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from sluice_client import AsyncClient, AsyncInferStream, SharedMemory

WAIT_S = 30  # only a broken test reaches it


class Loop:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(WAIT_S)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Blocking:
    """An AsyncClient, or what it gives out, whose methods block."""

    def __init__(self, client: AsyncClient | AsyncInferStream, loop: Loop) -> None:
        self.client = client
        self._loop = loop

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *how: object) -> None:
        self._loop.run(self.client.__aexit__(*how))  # type: ignore[arg-type]

    @contextmanager
    def shared_memory(self, *args: Any, **arguments: Any) -> Iterator[SharedMemory]:
        assert isinstance(self.client, AsyncClient)
        manager = self.client.shared_memory(*args, **arguments)
        memory = self._loop.run(manager.__aenter__())
        try:
            yield memory
        except BaseException as error:
            self._loop.run(manager.__aexit__(type(error), error, error.__traceback__))
            raise
        self._loop.run(manager.__aexit__(None, None, None))

    def stream(self, **arguments: Any) -> "Blocking":
        async def open_stream() -> AsyncInferStream:
            assert isinstance(self.client, AsyncClient)
            return self.client.stream(**arguments)

        return Blocking(self._loop.run(open_stream()), self._loop)

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self.client, name)
        if not inspect.iscoroutinefunction(attribute):
            return attribute
        return lambda *args, **kwargs: self._loop.run(attribute(*args, **kwargs))

    def __repr__(self) -> str:
        return repr(self.client)
