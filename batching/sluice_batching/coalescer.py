"""Who runs for whom: of the requests with one key the first leads, and those that come before its end follow it.

A flight is a leader and its followers, in the order in which they came. The work that the leader stands for is done
once, in a queue of which nothing is known here. No lock, no clock, and no deadlines: whoever has those says who leaves.

Invariants
----------
* A key has at most one flight, and a flight exactly one leader.
* A follower leaves exactly once: with the flight when that lands, as its new leader, or by itself.
* A leader that leaves takes nobody with it: its work goes on as long as anybody wants the result.
* Memory is proportional to the requests that are in flight.
"""

from collections.abc import Hashable, Iterable, Sequence
from typing import Generic, TypeVar

R = TypeVar("R", bound=Hashable)


class Coalescer(Generic[R]):
    """The flights by their keys. Requests are told apart by identity or whatever their equality says."""

    __slots__ = ("_followers", "_leaders", "_unwanted")

    def __init__(self) -> None:
        self._leaders: dict[Hashable, R] = {}
        # Only of flights that have any.
        self._followers: dict[Hashable, dict[R, None]] = {}
        # The flights whose leader does not want the result itself any more.
        self._unwanted: set[Hashable] = set()

    def __len__(self) -> int:
        return len(self._leaders)

    def __repr__(self) -> str:
        return f"<Coalescer: {len(self)} flights, {sum(map(len, self._followers.values()))} followers>"

    @property
    def has_followers(self) -> bool:
        """Whether any flight has a follower."""
        return bool(self._followers)

    def has_none_of(self, keys: Iterable[Hashable]) -> bool:
        """Whether none of these keys has a flight."""
        return self._leaders.keys().isdisjoint(keys)

    def leader(self, key: Hashable) -> R | None:
        """Who leads the flight of a key; None when there is none."""
        return self._leaders.get(key)

    def lead(self, keys: Sequence[Hashable], requests: Sequence[R]) -> None:
        """Begin a flight for each key; none has one, and they differ from each other."""
        self._leaders.update(zip(keys, requests, strict=True))

    def follow(self, key: Hashable, request: R) -> None:
        """Let a request wait for the result of the flight of a key, which there is."""
        self._followers.setdefault(key, {})[request] = None

    def leave(self, key: Hashable, request: R) -> bool:
        """Let a request of a flight go: whether nobody wants the result any more.

        The flight goes on all the same, for those who may still come, until `land` ends it. Of a request that is not
        in the flight of this key nothing is changed, and the answer is False.
        """
        followers = self._followers.get(key, {})
        if self._leaders.get(key) is request:
            self._unwanted.add(key)
        elif request in followers:
            del followers[request]
            if not followers:
                del self._followers[key]
        else:
            return False
        return key in self._unwanted and key not in self._followers

    def promote(self, key: Hashable) -> R | None:
        """Have the first follower lead the flight of a key, whose leader is gone; None without one: the flight ends."""
        followers = self._followers.get(key)
        self._unwanted.discard(key)
        if followers is None:
            self._leaders.pop(key, None)
            return None
        first = next(iter(followers))
        del followers[first]
        if not followers:
            del self._followers[key]
        self._leaders[key] = first
        return first

    def land(self, keys: Iterable[Hashable]) -> list[R]:
        """End the flights of these keys, which there are, and give those who followed, in order."""
        leaders = self._leaders
        if not (self._followers or self._unwanted):
            for key in keys:
                del leaders[key]
            return []
        landed: list[R] = []
        for key in keys:
            del leaders[key]
            self._unwanted.discard(key)
            landed += self._followers.pop(key, ())
        return landed
