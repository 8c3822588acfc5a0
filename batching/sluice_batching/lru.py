"""A table that is bounded in bytes: when it is full, what has not been used for longest makes room. No lock, no clock.

Invariants
----------
* The sizes of the entries never add up to more than `max_bytes`; `size_bytes` is their sum.
* An entry that is larger than the bound on its own is not kept, and takes nobody's place.
* What leaves for want of room is what was put or got longest ago.
* Memory is proportional to the entries, however often they are used.

How it keeps the order
----------------------
`_order` has a key for each time that it was put or got; only the last of these counts, and `_stale` says how many
earlier ones are still to come. So using an entry appends to a deque, and putting many is one call in C: an OrderedDict
takes twice as long for it, and a plain dict would have to be searched from its front for the oldest key.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from operator import itemgetter
from typing import Any, Final, Generic, TypeVar

E = TypeVar("E", bound=tuple[Any, ...])

STALE_KEPT: Final = 64
"""Stale places are dropped when they outnumber the entries by this: a small table pays for it once in 64 uses."""

_size_of = itemgetter(0)


class LruTable(Generic[E]):
    """Entries by their keys. An entry is a tuple, and its first item is its size in bytes."""

    __slots__ = ("_entries", "_order", "_stale", "evictions", "max_bytes", "size_bytes")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.size_bytes = 0
        self.evictions = 0
        self._entries: dict[bytes, E] = {}
        self._order: deque[bytes] = deque()
        self._stale: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __repr__(self) -> str:
        return f"<LruTable: {len(self)} entries, {self.size_bytes} of {self.max_bytes} bytes>"

    def has_none_of(self, keys: Iterable[bytes]) -> bool:
        """Whether no entry has any of these keys; none of them counts as used."""
        return self._entries.keys().isdisjoint(keys)

    def keys(self) -> list[bytes]:
        """The keys of all entries, as they are now."""
        return list(self._entries)

    def peek(self, key: bytes) -> E | None:
        """The entry of a key, which does not count as used."""
        return self._entries.get(key)

    def use(self, key: bytes) -> None:
        """Count an entry, which is there, as used just now."""
        self._stale[key] = self._stale.get(key, 0) + 1
        self._order.append(key)
        if len(self._order) > 2 * len(self._entries) + STALE_KEPT:
            self._drop_stale()

    def put(self, keys: Sequence[bytes], entries: Sequence[E]) -> None:
        """Enter entries under keys that differ from each other; an entry that a key had before is replaced."""
        if not self._entries.keys().isdisjoint(keys):
            for key in keys:
                self.discard(key)
        sizes = list(map(_size_of, entries))
        if max(sizes, default=0) > self.max_bytes:
            kept = [(key, entry) for key, entry in zip(keys, entries, strict=True) if entry[0] <= self.max_bytes]
            self.put([key for key, _ in kept], [entry for _, entry in kept])
            return
        self._entries.update(zip(keys, entries, strict=True))
        self._order.extend(keys)
        self.size_bytes += sum(sizes)
        if self.size_bytes > self.max_bytes:
            self._make_room()

    def discard(self, key: bytes) -> bool:
        """Forget the entry of a key: whether there was one."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self.size_bytes -= entry[0]
        self._stale[key] = self._stale.get(key, 0) + 1
        if len(self._order) > 2 * len(self._entries) + STALE_KEPT:
            self._drop_stale()
        return True

    def _make_room(self) -> None:
        entries, stale, next_key = self._entries, self._stale, self._order.popleft
        size_bytes, before = self.size_bytes, len(entries)
        while size_bytes > self.max_bytes:
            key = next_key()
            if stale and key in stale:
                self._forget_stale(key)
            else:
                size_bytes -= entries.pop(key)[0]
        self.size_bytes = size_bytes
        self.evictions += before - len(entries)

    def _forget_stale(self, key: bytes) -> None:
        left = self._stale[key] - 1
        if left:
            self._stale[key] = left
        else:
            del self._stale[key]

    def _drop_stale(self) -> None:
        """Keep only the place that counts of each key; pays for at least as many uses as it looks at entries."""
        last_first = dict.fromkeys(reversed(self._order))
        entries = self._entries
        self._order = deque([key for key in reversed(last_first) if key in entries])
        self._stale.clear()
