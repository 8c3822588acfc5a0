"""Requests in the order of their ranks, where most come in that order: a dict by arrival, and a list of the others.

A request that comes with a lower rank than one before it *overtakes*. The dict has all requests, by `queue_order`, in
the order in which they came; the list has those that overtake, by rank. So as long as nobody overtakes, the order costs
nothing, and a request that does costs a search and a shift in the list.

What makes reading them together simple: the others stand in the dict by rising rank, and a request that overtakes has a
lower rank than any other that comes after it. So if the first of the dict overtakes, nobody's rank is lower than the
first of the list's.
"""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterator
from typing import TypeVar

from sluice_batching.request import Request

R = TypeVar("R", bound=Request)

Overtaking = list[tuple[int, int, R]]
"""(rank, queue_order, request), sorted; no two have the same order, so requests themselves are never compared."""


def insert(overtaking: Overtaking[R], request: R) -> None:
    """Add a request to those that overtake."""
    insort(overtaking, (request.rank, request.queue_order, request))


def discard(overtaking: Overtaking[R], request: R) -> None:
    """Take a request out of those that overtake, if it is one of them."""
    place = bisect_left(overtaking, (request.rank, request.queue_order))
    if place < len(overtaking) and overtaking[place][2] is request:
        del overtaking[place]


def first(requests: OrderedDict[int, R], overtaking: Overtaking[R]) -> R:
    """The request of the lowest rank, the earliest of equals; there is one."""
    head = next(iter(requests.values()))
    if overtaking and overtaking[0][:2] < (head.rank, head.queue_order):
        return overtaking[0][2]
    return head


def in_order(requests: OrderedDict[int, R], overtaking: Overtaking[R]) -> Iterator[R]:
    """All requests by rank, those of equal ranks by arrival."""
    if not overtaking:
        yield from requests.values()
        return
    passed = 0
    for request in requests.values():
        place = (request.rank, request.queue_order)
        while passed < len(overtaking) and overtaking[passed][:2] <= place:
            yield overtaking[passed][2]
            passed += 1
        # What has just passed is behind or at this place only if this request overtakes, and has passed as well.
        if not passed or overtaking[passed - 1][:2] < place:
            yield request
