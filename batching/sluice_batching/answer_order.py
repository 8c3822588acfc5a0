"""The order in which answers leave: that in which their requests came, whenever they are ready. No lock, no clock.

Invariants
----------
* What has entered leaves exactly once: with its answer (`pop`), or by giving up its place (`leave`).
* Answers leave in the order in which their keys entered: one that is ready is held until all before it have left.
* Of several answers to one key the first counts.
* Memory is proportional to what has entered and has not left. What waits to run is bounded by its queue; what has run
  and is held is bounded here: `overflow` says when nothing more should enter.
"""

import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, NamedTuple, TypeVar

from sluice_batching.errors import QueueFull

K = TypeVar("K", bound=Hashable)
A = TypeVar("A")


class _Held(NamedTuple, Generic[A]):
    answer: A
    size_bytes: int


class AnswerOrder(Generic[K, A]):
    """Answers of type A in the order of their keys, each of which is in here once at a time."""

    __slots__ = ("_held", "_held_bytes", "_max_bytes", "_max_held", "_places")

    def __init__(self, max_held: int = 0, max_bytes: int = 0) -> None:
        """How many answers, of how many bytes together, may be held before nothing more enters; 0 = unbounded."""
        self._max_held = max_held or sys.maxsize
        self._max_bytes = max_bytes or sys.maxsize
        self._places: OrderedDict[K, _Held[A] | None] = OrderedDict()
        self._held = 0
        self._held_bytes = 0

    def __len__(self) -> int:
        return len(self._places)

    def __repr__(self) -> str:
        return f"<AnswerOrder: {len(self)} places, {self._held} answers of {self._held_bytes} bytes held>"

    def overflow(self) -> QueueFull | None:
        """Why nothing more should enter: too many answers are held, or too large ones."""
        if self._held >= self._max_held:
            return QueueFull("answers", self._max_held, self._held, 1)
        if self._held_bytes >= self._max_bytes:
            return QueueFull("bytes of answers", self._max_bytes, self._held_bytes, 1)
        return None

    def enter(self, keys: Iterable[K]) -> None:
        """Give each key the last place; none of them has one."""
        for key in keys:
            self._places[key] = None

    def put(self, key: K, answer: A, size_bytes: int = 0) -> bool:
        """Hold an answer until its turn; False when the key has no place (any more), and so nothing to wait for."""
        if key not in self._places:
            return False
        if self._places[key] is None:
            self._places[key] = _Held(answer, size_bytes)
            self._held += 1
            self._held_bytes += size_bytes
        return True

    def leave(self, keys: Iterable[K]) -> None:
        """Give up the places of keys, with the answers that are held for them; of those without a place nothing."""
        for key in keys:
            self._let_go(self._places.pop(key, None))

    def pop(self) -> tuple[K, A] | None:
        """The first answer with its key, which leaves; None when the first place has none yet, or nobody has one."""
        if not self._places:
            return None
        key, held = next(iter(self._places.items()))
        if held is None:
            return None
        del self._places[key]
        self._let_go(held)
        return key, held.answer

    def _let_go(self, held: _Held[A] | None) -> None:
        if held is not None:
            self._held -= 1
            self._held_bytes -= held.size_bytes
