"""A client of asyncio with the blocking one's methods, so that one test can try both."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class Blocking:
    """The client that `make` makes, on an event loop of its own."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._runner = asyncio.Runner()
        self._client = self._runner.run(self._await(make, (), {}))

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        return lambda *args, **kwargs: self._runner.run(self._await(method, args, kwargs))

    @staticmethod
    async def _await(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        answer = method(*args, **kwargs)
        if hasattr(answer, "__aiter__"):
            return [each async for each in answer]
        return await answer if inspect.isawaitable(answer) else answer

    def close(self) -> None:
        """Close the client and its loop."""
        self.__getattr__("close")()
        self._runner.close()
