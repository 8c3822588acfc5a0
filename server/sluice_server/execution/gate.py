"""`max_inflight_requests` of an ensemble: so many requests are in one step at a time, and the others wait before it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from sluice_batching import BatchQueue

if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice_batching import BatchingError, QueuePolicy
    from sluice_server.execution.request import InferRequest


class Gate:
    """The places of one step, over all requests of the ensemble; for any thread.

    Who finds no place waits in a queue, in order of arrival, bounded as a model's own queue is. Nothing is taken of it
    but by `leave`; `cancel` and the deadlines of those who wait are the queue's.

    Lock: `_lock` guards the places; the queue's lock is taken with it held, and never the other way around.
    """

    __slots__ = ("_free", "_lock", "queue")

    def __init__(self, places: int, policy: QueuePolicy, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """`policy` bounds what waits; it merges nothing. `clock` is that of the deadlines, in ns."""
        self._free = places
        self._lock = threading.Lock()
        self.queue: BatchQueue[InferRequest] = BatchQueue(policy, clock)

    def __repr__(self) -> str:
        return f"<Gate {self._free} free, {self.queue!r}>"

    def enter(self, request: InferRequest) -> tuple[bool, BatchingError | None]:
        """Take a place, or wait for one: whether it has one, and why it may not even wait."""
        with self._lock:
            if self._free and not self.queue:
                self._free -= 1
                return True, None
            return False, self.queue.offer_many((request,))[0]

    def leave(self) -> tuple[list[InferRequest], list[InferRequest]]:
        """Give a place back: who has it now, if anybody, and who waited too long, to be answered."""
        with self._lock:
            taken = self.queue.take(timeout_ns=0)
            assert taken is not None, "the queue never drains"
            if not taken.batch:
                self._free += 1
            return taken.batch, taken.expired

    def cancel(self, request: InferRequest) -> bool:
        """Take out a request that waits; False when it does not."""
        return self.queue.cancel(request)
