"""Which requests a batch leaves out, as they would end after their deadlines. Pure; how long runs take is an argument.

A request that would be late even in a run of its own is late: it is not worth running. Where more waits than the batch
holds, so is one that would be late in the whole batch: a smaller batch would serve it at the cost of all those behind
it, and with every batch cut like that a server that is behind would fall back further. Where all that waits fits into
the batch, nobody is given up for the others: the batch ends before the request that would make it too long for one in
it, and the rest goes with the next.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

from sluice_batching.request import NO_DEADLINE, Request

R = TypeVar("R", bound=Request)


def split(
    requests: Iterable[R], batch_rows: int, spare_rows: int, end_ns: Callable[[int], int]
) -> tuple[list[R], list[R]]:
    """The requests of a batch that all end in time, and those before or among them that would not.

    `requests` are in order of service; `batch_rows` is what the batch would have without a look at deadlines,
    `spare_rows` what waits behind it. `end_ns(rows)`: when a batch of so many rows ends that starts now.
    """
    batch: list[R] = []
    late: list[R] = []
    whole_ends_ns = end_ns(batch_rows)
    rows, tightest_ns = 0, NO_DEADLINE
    for request in requests:
        if rows + request.rows > batch_rows:
            break
        crowded = request.rows <= spare_rows
        if request.deadline_ns < (whole_ends_ns if crowded else end_ns(request.rows)):
            late.append(request)
            spare_rows -= request.rows
            continue
        tightest_ns = min(tightest_ns, request.deadline_ns)
        if batch and end_ns(rows + request.rows) > tightest_ns:
            break
        batch.append(request)
        rows += request.rows
    return batch, late
