"""The queue of one model: which requests run next, and together. No clock, no threads: `now_ns` is an argument.

Invariants
----------
* Every accepted request leaves exactly once: in a batch, as expired, or cancelled. A refused one never enters.
* A batch has at most `merge_rows` rows, or is one request of up to `max_batch_rows`, and all its requests have equal
  keys. A request is never split.
* Requests of one key leave in the order in which they came. A later, smaller one never overtakes to fill a batch.
* A request whose deadline has come (`deadline_ns <= now_ns`) is in no batch.
* Waiting is counted from enqueueing.
* The rows and bytes that wait never exceed the bounds, and what leaves frees them at once.
* Memory is proportional to the requests that wait, whatever came before.

When a batch goes
-----------------
Requests of equal keys form a group. Without a delay, whatever the group of the oldest request holds goes as soon as
somebody takes. With a delay, a group is due as soon as one of these holds:

* it holds a preferred size (its first requests add up to one), or as much as the largest preferred size
  (`merge_rows` if there are none), or its next request would overflow `merge_rows`;
* its oldest request has waited for `max_delay_ns`.

Of the groups that are due the one with the oldest request goes first; a group that is not due holds up nobody. A
draining queue gets no more company for what waits, so it waits for no delay.

What goes is the largest preferred size that the first requests of the group add up to. Where they add up to none, or
the delay is over, it is as many as fit. So preferred sizes without a delay only choose where to cut: nothing waits for
them, and the rest goes with the next take. These are Triton's rules for its dynamic batcher.

A request that is over a bound on its own is refused as RequestTooLarge also when the queue is empty: QueueFull would
promise that trying again helps, and admitting it would make the bound untrue.

Costs
-----
Accepting, cancelling and taking a request are O(1), and a deadline adds a push to a heap. With a delay, a take looks at
every group that is due by its size, and a removal at the first rows of its group.
"""

import heapq
import sys
from collections import OrderedDict
from collections.abc import Hashable
from itertools import islice
from typing import Final, Generic, NamedTuple, TypeVar

from sluice_batching.errors import BatchingError, DeadlineExpired, Draining, QueueFull, RequestTooLarge
from sluice_batching.policy import QueuePolicy
from sluice_batching.request import NEVER_QUEUED, NO_DEADLINE, Request

R = TypeVar("R", bound=Request)

STALE_DEADLINES_KEPT: Final = 64
"""Heap entries of requests that have left are dropped when they outnumber the waiting requests by this: a short queue
then pays for a clean-up once in 64 requests, not on each."""


class Taken(NamedTuple, Generic[R]):
    """What left the queue: `batch` is to be run together, each of `expired` is to be told so; either may be empty."""

    batch: list[R]
    expired: list[R]


class _Group(Generic[R]):
    """The waiting requests of one key by order of arrival, and the sum of their rows."""

    __slots__ = ("key", "requests", "rows")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.requests: OrderedDict[int, R] = OrderedDict()
        self.rows = 0


def _head_order(group: _Group[R]) -> int:
    return next(iter(group.requests))


class Queue(Generic[R]):
    """A bounded queue that hands out batches. Not thread-safe; `now_ns` must never go backwards between calls."""

    __slots__ = (
        "_batching",
        "_deadlines",
        "_draining",
        "_full_rows",
        "_groups",
        "_max_bytes",
        "_max_rows",
        "_merge_rows",
        "_next_order",
        "_policy",
        "_preferred",
        "_ready",
        "_rows",
        "_size_bytes",
        "_waiting",
        "_waits",
    )

    def __init__(self, policy: QueuePolicy) -> None:
        self._policy = policy
        self._preferred = frozenset(policy.preferred_batch_rows)
        self._merge_rows = policy.most_merged_rows
        self._full_rows = max(policy.preferred_batch_rows, default=self._merge_rows)
        self._waits = policy.max_delay_ns > 0
        self._batching = policy.batching
        self._max_rows = policy.max_queue_rows or sys.maxsize
        self._max_bytes = policy.max_queue_bytes or sys.maxsize
        self._draining = False
        self._next_order = 0
        self._rows = 0
        self._size_bytes = 0
        # Everything that waits, in order of arrival, and the same by group.
        self._waiting: OrderedDict[int, R] = OrderedDict()
        self._groups: dict[Hashable, _Group[R]] = {}
        # The groups that are due by their size; kept only while the policy waits.
        self._ready: set[_Group[R]] = set()
        # (deadline_ns, order) of those with a deadline; entries of requests that have left are dropped lazily.
        self._deadlines: list[tuple[int, int]] = []

    @property
    def policy(self) -> QueuePolicy:
        """The settings that the queue was built with."""
        return self._policy

    @property
    def rows(self) -> int:
        """The rows that wait."""
        return self._rows

    @property
    def size_bytes(self) -> int:
        """The bytes that wait."""
        return self._size_bytes

    @property
    def draining(self) -> bool:
        """Whether `drain` has been called."""
        return self._draining

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        state = ", draining" if self._draining else ""
        return (
            f"<Queue: {len(self._waiting)} requests, {self._rows} rows, {self._size_bytes} bytes,"
            f" {len(self._groups)} groups{state}>"
        )

    def offer(self, request: R, now_ns: int) -> None:
        """Let a request wait; raises what `try_offer` would return."""
        error = self.try_offer(request, now_ns)
        if error is not None:
            raise error

    def try_offer(self, request: R, now_ns: int) -> BatchingError | None:
        """Let a request wait: None when accepted, else why not.

        Draining, DeadlineExpired, RequestTooLarge or QueueFull is returned, in this order of precedence, and nothing
        changes. ValueError is raised for a bug of the caller: no rows, more rows than a batch may have, or a request
        that waits here already.
        """
        rows, size_bytes = request.rows, request.size_bytes
        if not 0 < rows <= self._policy.max_batch_rows:
            raise ValueError(f"a request must have 1 to {self._policy.max_batch_rows} rows, got {rows}")
        if request.queue_order != NEVER_QUEUED and self._waiting.get(request.queue_order) is request:
            raise ValueError("the request waits in this queue already")
        if self._draining:
            return Draining()
        if request.deadline_ns <= now_ns:
            return DeadlineExpired(request.deadline_ns, now_ns)
        if self._rows + rows > self._max_rows or self._size_bytes + size_bytes > self._max_bytes:
            return self._overflow(rows, size_bytes)
        order = self._next_order
        self._next_order = order + 1
        request.queue_order = order
        request.enqueued_ns = now_ns
        key = request.key if self._batching else None
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(key)
        self._waiting[order] = group.requests[order] = request
        group.rows += rows
        self._rows += rows
        self._size_bytes += size_bytes
        if request.deadline_ns != NO_DEADLINE:
            heapq.heappush(self._deadlines, (request.deadline_ns, order))
        if self._waits and (group.rows >= self._full_rows or group.rows in self._preferred):
            self._ready.add(group)
        return None

    def _overflow(self, rows: int, size_bytes: int) -> BatchingError:
        """Why a request is refused that would take the queue over a bound."""
        if self._rows + rows > self._max_rows:
            if rows > self._max_rows:
                return RequestTooLarge("rows", self._max_rows, rows)
            return QueueFull("rows", self._max_rows, self._rows, rows)
        if size_bytes > self._max_bytes:
            return RequestTooLarge("bytes", self._max_bytes, size_bytes)
        return QueueFull("bytes", self._max_bytes, self._size_bytes, size_bytes)

    def take(self, now_ns: int) -> Taken[R]:
        """The batch to run now, and the requests whose deadline has come; both leave the queue."""
        expired = self.expire(now_ns) if self._deadlines else []
        if not self._waiting:
            return Taken([], expired)
        oldest = next(iter(self._waiting.values()))
        overdue = self._waits and oldest.enqueued_ns + self._policy.max_delay_ns <= now_ns
        if self._waits and not overdue:
            if not self._ready:
                return Taken([], expired)
            group = min(self._ready, key=_head_order)
        else:
            # Groups become due by age in the order of their oldest requests, so this one is the first of them.
            group = self._groups[oldest.key if self._batching else None]
        return Taken(self._remove_first(group, self._batch_length(group, overdue)), expired)

    def expire(self, now_ns: int) -> list[R]:
        """The requests whose deadline has come, earliest first; they leave the queue."""
        expired: list[R] = []
        deadlines = self._deadlines
        while deadlines and deadlines[0][0] <= now_ns:
            request = self._waiting.get(heapq.heappop(deadlines)[1])
            if request is not None:
                self._remove(request)
                expired.append(request)
        if expired:
            self._drop_stale_deadlines()
        return expired

    def cancel(self, request: R) -> bool:
        """Take a request out: True if it was waiting here; False if it never was or has left, and nothing changes."""
        if self._waiting.get(request.queue_order) is not request:
            return False
        self._remove(request)
        self._drop_stale_deadlines()
        return True

    def drain(self) -> None:
        """Accept nothing more, and wait for no delay: takes hand out what is left."""
        self._draining = True
        self._waits = False

    def next_wakeup_ns(self) -> int | None:
        """From when on `take` returns something if nothing more comes; in the past = at once, None = nothing waits."""
        if not self._waiting:
            return None
        oldest_ns = next(iter(self._waiting.values())).enqueued_ns
        if not self._waits or self._ready:
            return oldest_ns
        due_ns = oldest_ns + self._policy.max_delay_ns
        deadline_ns = self.next_deadline_ns()
        return due_ns if deadline_ns is None else min(due_ns, deadline_ns)

    def next_deadline_ns(self) -> int | None:
        """The earliest deadline of the waiting requests; None = none of them has one."""
        deadlines = self._deadlines
        while deadlines and deadlines[0][1] not in self._waiting:
            heapq.heappop(deadlines)
        return deadlines[0][0] if deadlines else None

    def _batch_length(self, group: _Group[R], overdue: bool) -> int:
        """How many requests of the group, from its oldest on, are the next batch."""
        if not self._batching:
            return 1
        preferred = frozenset() if overdue else self._preferred
        if not preferred and group.rows <= self._merge_rows:
            return len(group.requests)
        rows = fitting = best = 0
        for request in group.requests.values():
            rows += request.rows
            if rows > self._merge_rows:
                break
            fitting += 1
            if rows in preferred:
                best = fitting
        return best or fitting or 1

    def _remove_first(self, group: _Group[R], length: int) -> list[R]:
        """Take the oldest `length` requests out of a group."""
        if length == len(self._waiting):
            return self._remove_all()
        batch = list(islice(group.requests.values(), length))
        rows = size_bytes = 0
        for request in batch:
            rows += request.rows
            size_bytes += request.size_bytes
            del self._waiting[request.queue_order], group.requests[request.queue_order]
        self._left(group, rows, size_bytes)
        self._drop_stale_deadlines()
        return batch

    def _remove_all(self) -> list[R]:
        """Take out everything that waits, which is the usual batch, at no cost for each request."""
        batch = list(self._waiting.values())
        for container in (self._waiting, self._groups, self._ready, self._deadlines):
            container.clear()
        self._rows = self._size_bytes = 0
        return batch

    def _remove(self, request: R) -> None:
        """Take one request out, wherever it stands in its group."""
        group = self._groups[request.key if self._batching else None]
        del self._waiting[request.queue_order], group.requests[request.queue_order]
        self._left(group, request.rows, request.size_bytes)

    def _left(self, group: _Group[R], rows: int, size_bytes: int) -> None:
        """Account for requests that have just left a group."""
        group.rows -= rows
        self._rows -= rows
        self._size_bytes -= size_bytes
        if not group.requests:
            del self._groups[group.key]
            self._ready.discard(group)
        elif self._waits and not self._is_ready(group):
            self._ready.discard(group)
        elif self._waits:
            self._ready.add(group)

    def _is_ready(self, group: _Group[R]) -> bool:
        """Whether a group is due by its size."""
        if group.rows >= self._full_rows:
            return True
        rows = 0
        for request in group.requests.values() if self._preferred else ():
            rows += request.rows
            if rows in self._preferred:
                return True
        return False

    def _drop_stale_deadlines(self) -> None:
        """Keep the heap proportional to what waits; each clean-up pays for at least as many entries as it leaves."""
        if len(self._deadlines) > 2 * len(self._waiting) + STALE_DEADLINES_KEPT:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._waiting]
            heapq.heapify(self._deadlines)
