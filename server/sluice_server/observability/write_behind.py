"""A thread that writes what others hand it, so that no request waits for a disk; what does not fit is lost and counted.

`WriteBehind._lock` guards what waits, its bytes, and how much was lost.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")

PENDING_MAX = 4096
"""Items that wait for the disk; further ones are lost, as a disk that stands must not hold requests up."""

PENDING_BYTES_MAX = 64 << 20
"""Bytes in them, and in those that are being written."""

GATHER_S = 0.01
"""How long the first of a list waits for company: waking a thread for each item costs more than writing it."""


class WriteBehind(Generic[T]):
    """Items from any thread, written in order on a thread of its own, in lists. `close` ends it."""

    def __init__(self, name: str, write: Callable[[Sequence[T]], None], finish: Callable[[], None]) -> None:
        """`write` and `finish`, which comes last, are called on the thread of this name, and raise nothing."""
        self._write = write
        self._finish = finish
        self._lock = threading.Lock()
        self._pending: list[tuple[T, int]] = []
        self.pending_bytes = self.lost = 0
        self._there_are_some = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name=name, daemon=True)
        self._thread.start()

    def put(self, item: T, size_bytes: int) -> None:
        """Have an item of this size in memory written."""
        with self._lock:
            # One is always taken, so that what is larger than the bound can be written at all.
            too_large = self.pending_bytes and self.pending_bytes + size_bytes > PENDING_BYTES_MAX
            if too_large or len(self._pending) >= PENDING_MAX:
                self.lost += 1
                return
            self.pending_bytes += size_bytes
            self._pending.append((item, size_bytes))
        if not self._there_are_some.is_set():
            self._there_are_some.set()

    def close(self, timeout_s: float) -> bool:
        """Write what is left and end; False when that took longer. What is put later is lost."""
        self._closing.set()
        self._there_are_some.set()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _write_all(self) -> None:
        while self._write_some():
            pass
        self._finish()

    def _write_some(self) -> bool:
        """Wait for items and write them; False when there are none and there will be none."""
        self._there_are_some.wait()
        closing = self._closing.wait(GATHER_S)
        # Before the list is taken: who adds to it later sees it unset.
        if not closing:
            self._there_are_some.clear()
        with self._lock:
            pending, self._pending = self._pending, []
        if pending:
            self._write([item for item, _ in pending])
            with self._lock:
                self.pending_bytes -= sum(size_bytes for _, size_bytes in pending)
        return bool(pending) or not closing
