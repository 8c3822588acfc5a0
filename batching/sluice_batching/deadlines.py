"""The deadlines of waiting requests: a heap whose entries outlive their requests, and are dropped lazily.

A request that leaves before its deadline costs nothing here: its entry is passed over when it comes up, or dropped with
others when those of requests that have left outnumber what waits.
"""

import heapq
from collections.abc import Iterator, Mapping
from typing import Final, TypeVar

R = TypeVar("R")

STALE_KEPT: Final = 64
"""Heap entries of requests that have left are dropped when they outnumber the waiting requests by this: a short queue
then pays for a clean-up once in 64 requests, not on each."""

Deadlines = list[tuple[int, int]]
"""(deadline_ns, queue_order), a heap; `waiting` of the functions below is what waits, by `queue_order`."""


def add(deadlines: Deadlines, deadline_ns: int, order: int) -> None:
    """Note a deadline."""
    heapq.heappush(deadlines, (deadline_ns, order))


def first_ns(deadlines: Deadlines, waiting: Mapping[int, R]) -> int | None:
    """The earliest deadline of what waits; None = there is none."""
    while deadlines and deadlines[0][1] not in waiting:
        heapq.heappop(deadlines)
    return deadlines[0][0] if deadlines else None


def pop_due(deadlines: Deadlines, waiting: Mapping[int, R], now_ns: int) -> Iterator[tuple[int, R]]:
    """Each deadline that has come with the request that still waits, earliest first; they are noted no longer."""
    while deadlines and deadlines[0][0] <= now_ns:
        deadline_ns, order = heapq.heappop(deadlines)
        request = waiting.get(order)
        if request is not None:
            yield deadline_ns, request


def drop_stale(deadlines: Deadlines, waiting: Mapping[int, R]) -> None:
    """Keep the heap proportional to what waits; each clean-up pays for at least as many entries as it leaves."""
    if len(deadlines) > 2 * len(waiting) + STALE_KEPT:
        deadlines[:] = [entry for entry in deadlines if entry[1] in waiting]
        heapq.heapify(deadlines)
