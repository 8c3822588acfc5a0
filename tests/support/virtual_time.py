"""An event loop on a clock of its own, on which a wait takes no time: whatever a test sleeps, it sleeps exactly."""

from __future__ import annotations

import asyncio
import selectors
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from typing import Any

T = TypeVar("T")


class _Selector(selectors.SelectSelector):
    """Finds what is ready now, and lets the time that it was to wait pass on the loop's clock."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("the loop waits for something that will never come")
        if not ready:
            self.now_s += timeout or 0
        return ready


class _Loop(asyncio.SelectorEventLoop):
    """A loop whose time is its selector's."""

    def __init__(self) -> None:
        self._clock = _Selector()
        super().__init__(self._clock)

    def time(self) -> float:
        return self._clock.now_s


def run_virtually(coroutine: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, in virtual time. Nothing in it may wait for another thread or process."""
    with asyncio.Runner(loop_factory=_Loop) as runner:
        return runner.run(coroutine)


async def passing(seconds: float) -> None:
    """Return when this time has passed on the running loop, virtual or real."""
    loop = asyncio.get_running_loop()
    passed = loop.create_future()
    timer = loop.call_later(seconds, passed.set_result, None)
    try:
        await passed
    finally:
        timer.cancel()
