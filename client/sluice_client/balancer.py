"""Which endpoint gets the next call: round robin over the healthy ones. Pure: no clock, no I/O, not locked.

Invariants:
- `pick` always returns an endpoint: being set aside makes one less wanted, never forbidden.
- An endpoint that failed is set aside for a time that doubles with each failure in a row, up to a bound. Failures of
  calls that were already on their way when it was set aside change nothing.
- When that time is over, one call tries the endpoint, and the others follow only after an answer has come.
- Any answer makes an endpoint healthy at once.
"""

from collections.abc import Callable, Collection
from typing import Final

FIRST_ASIDE_NS: Final = 200_000_000  # about what a restarted process needs to bind its port
MAX_ASIDE_NS: Final = 10_000_000_000  # a server that came back is found within this time
_MAX_DOUBLINGS: Final = 16  # more than enough to reach the bound; keeps the shift small


class Balancer:
    """Health and order of `size` endpoints, known by their index."""

    __slots__ = ("_aside_until_ns", "_cursor", "_failed_at_ns", "_failures")

    def __init__(self, size: int, random: Callable[[], float]) -> None:
        # A random start, so that many clients that start together do not all begin with the same server.
        self._cursor = int(random() * size) % size
        self._failures = [0] * size
        self._failed_at_ns = [0] * size
        self._aside_until_ns = [0] * size

    def __repr__(self) -> str:
        return f"<Balancer failures={self._failures}>"

    def is_healthy(self, index: int) -> bool:
        """Whether the last thing heard from this endpoint was an answer (or nothing was tried yet)."""
        return self._failures[index] == 0

    def has_other(self, now_ns: int, tried: Collection[int]) -> bool:
        """Whether there is an endpoint that is not set aside and was not tried."""
        return any(until <= now_ns and index not in tried for index, until in enumerate(self._aside_until_ns))

    def pick(self, now_ns: int, tried: Collection[int] = ()) -> int:
        """The next endpoint: not set aside and not in `tried` if there is one, else the least bad one."""
        size = len(self._failures)
        order = [(self._cursor + step) % size for step in range(size)]
        usable = [index for index in order if self._aside_until_ns[index] <= now_ns]
        fresh = [index for index in usable if index not in tried]
        if fresh or usable:
            index = (fresh or usable)[0]
        else:
            index = min(order, key=lambda i: (i in tried, self._aside_until_ns[i]))
        self._cursor = (index + 1) % size
        if self._failures[index]:
            self._aside_until_ns[index] = now_ns + self._aside_ns(index)
        return index

    def answered(self, index: int) -> None:
        """The endpoint answered a call, with whatever status."""
        self._failures[index] = 0
        self._aside_until_ns[index] = 0

    def failed(self, index: int, now_ns: int, attempt_started_ns: int) -> None:
        """A call that started at `attempt_started_ns` could not be served there."""
        if attempt_started_ns < self._failed_at_ns[index]:
            return
        self._failures[index] += 1
        self._failed_at_ns[index] = now_ns
        self._aside_until_ns[index] = now_ns + self._aside_ns(index)

    def _aside_ns(self, index: int) -> int:
        doublings = min(max(self._failures[index] - 1, 0), _MAX_DOUBLINGS)
        return min(FIRST_ASIDE_NS << doublings, MAX_ASIDE_NS)
