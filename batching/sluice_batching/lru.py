"""A table that is bounded in bytes: when it is full, what has not been used for longest makes room. No lock, no clock.

Invariants
----------
* The sizes of the entries never add up to more than `max_bytes`; `size_bytes` is their sum. An entry's size is its
  `len`, and what each takes besides.
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
from collections.abc import Iterable, Sequence, Sized
from typing import Final, Generic, TypeVar

E = TypeVar("E", bound=Sized)

STALE_KEPT: Final = 64
"""Stale places are dropped when they outnumber the entries by this: a small table pays for it once in 64 uses."""


class LruTable(Generic[E]):
    """Entries by their keys. The `len` of an entry is in bytes, and `entry_bytes` are added to that of each."""

    __slots__ = ("_entries", "_entry_bytes", "_order", "_stale", "evictions", "max_bytes", "size_bytes")

    def __init__(self, max_bytes: int, *, entry_bytes: int = 0) -> None:
        self.max_bytes = max_bytes
        self._entry_bytes = entry_bytes
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
        added_bytes = sum(map(len, entries)) + len(keys) * self._entry_bytes
        if added_bytes > self.max_bytes:
            self._put_each(keys, entries)
            return
        self._entries.update(zip(keys, entries, strict=True))
        self._order.extend(keys)
        self.size_bytes += added_bytes
        if self.size_bytes > self.max_bytes:
            self._make_room()

    def _put_each(self, keys: Sequence[bytes], entries: Sequence[E]) -> None:
        """Put what together is larger than the bound; what is so on its own is left out."""
        for key, entry in zip(keys, entries, strict=True):
            if len(entry) + self._entry_bytes <= self.max_bytes:
                self.put((key,), (entry,))

    def discard(self, key: bytes) -> bool:
        """Forget the entry of a key: whether there was one."""
        entry = self._entries.pop(key, None)
        if entry is None:
            return False
        self.size_bytes -= len(entry) + self._entry_bytes
        self._stale[key] = self._stale.get(key, 0) + 1
        if len(self._order) > 2 * len(self._entries) + STALE_KEPT:
            self._drop_stale()
        return True

    def _make_room(self) -> None:
        entries, stale, next_key = self._entries, self._stale, self._order.popleft
        size_bytes, before, entry_bytes = self.size_bytes, len(entries), self._entry_bytes
        while size_bytes > self.max_bytes:
            key = next_key()
            if stale and key in stale:
                self._forget_stale(key)
            else:
                size_bytes -= len(entries.pop(key)) + entry_bytes
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
