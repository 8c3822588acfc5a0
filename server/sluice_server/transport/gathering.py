"""Decides when calls that have arrived on an event loop go up: when the loop has nothing else to do, or soon.

Each list that goes up costs a fixed amount (waking an instance, running the model, waking the event loop), and under
load a list of one costs the server as much as all the rest of its request. So arrivals wait for company for as long as
the loop has other work, in the spirit of Nagle's algorithm for small packets: that work is what the next calls come
out of. A loop with time hands everything up at once, and what limits the server makes long lists by itself.
"""

from __future__ import annotations

import selectors
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

HOLD_S = 0.01
"""The longest wait for company, for a loop that never runs out of work: a fraction of the latency that it has then."""

CALLS_MAX = 64
"""As many calls go up without further waiting: by then the fixed cost is spread thinly enough."""


class IdleSelector(selectors.DefaultSelector):
    """An event loop's selector that looks for ready files first, and calls `on_idle` before it would have to wait.

    `on_idle` says whether it has done something: then the loop gets a turn, as it may have given it work. The second
    system call is made only by a loop that has time.
    """

    def __init__(self, on_idle: Callable[[], bool]) -> None:
        super().__init__()
        self._on_idle = on_idle

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """As every selector's: the files that are ready, after at most `timeout` seconds; None waits for ever."""
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0) or self._on_idle():
            return ready
        return super().select(timeout)
