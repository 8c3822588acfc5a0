"""A thread that writes what others hand it, so that no request waits for a disk; what does not fit is lost and counted.

`WriteBehind._lock` guards how many bytes wait and how many items were lost.
"""

from __future__ import annotations

import queue
import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")

PENDING_MAX = 4096
"""Items that wait for the disk; further ones are lost, as a disk that stands must not hold requests up."""

PENDING_BYTES_MAX = 64 << 20
"""Bytes in them."""


class WriteBehind(Generic[T]):
    """Items from any thread, written in order on a thread of its own. `close` ends it."""

    def __init__(self, name: str, write: Callable[[T], None], finish: Callable[[], None]) -> None:
        """`write` and `finish`, which comes last, are called on the thread of this name, and raise nothing."""
        self._write = write
        self._finish = finish
        self._pending: queue.Queue[tuple[T, int] | None] = queue.Queue(PENDING_MAX)
        self._lock = threading.Lock()
        self.pending_bytes = self.lost = 0
        self._thread = threading.Thread(target=self._write_all, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T, size_bytes: int) -> None:
        """Have an item of this size in memory written."""
        with self._lock:
            # One is always taken, so that what is larger than the bound can be written at all.
            if self.pending_bytes and self.pending_bytes + size_bytes > PENDING_BYTES_MAX:
                self.lost += 1
                return
            self.pending_bytes += size_bytes
        try:
            self._pending.put_nowait((item, size_bytes))
        except queue.Full:
            with self._lock:
                self.pending_bytes -= size_bytes
                self.lost += 1

    def close(self, timeout_s: float) -> bool:
        """Write what is left and end; False when that took longer."""
        try:
            self._pending.put(None, timeout=timeout_s)
        except queue.Full:
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _write_all(self) -> None:
        while (pending := self._pending.get()) is not None:
            item, size_bytes = pending
            self._write(item)
            with self._lock:
                self.pending_bytes -= size_bytes
            # What was written must not stay alive while this thread waits.
            del item, pending
        self._finish()
