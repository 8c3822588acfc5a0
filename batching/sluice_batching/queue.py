"""The queue of one model: which requests run next, and together. No clock, no threads: `now_ns` is an argument.

Invariants
----------
* Every accepted request leaves exactly once: in a batch, as expired, or cancelled. A refused one never enters.
* A batch has at most `merge_rows` rows, or is one request, and all its requests have equal keys. None is ever split.
* Requests of one key leave in the order of their ranks: by the time at which they are due, those that are due at the
  same time in the order in which they came. A smaller one never overtakes to fill a batch.
* A request whose deadline has come (`deadline_ns <= now_ns`) is in no batch; nor is one that would end after it.
* Waiting is counted from enqueueing.
* The rows and bytes that wait never exceed the bounds, and what leaves frees them at once.
* Memory is proportional to the requests that wait, whatever came before.

What goes first
---------------
A request is due at its deadline, but no later than `HORIZON_NS` after it came. So those without a deadline, and those
with a distant one, keep the order in which they came, and wait for none that comes later by more than that: nobody
starves. Without `deadline_first` the order is that of arrival throughout. `priority_queue.py` puts priorities above it.

Work that would end after its deadline, by how long runs have taken of late (`run_times.py`), leaves as expired work
does: when it is offered, or when the batch is made that it would be part of (`lateness.py`).

When a batch goes
-----------------
Requests of equal keys form a group. Without a delay, whatever the group of the oldest request holds goes as soon as
somebody takes. With a delay, a group is due as soon as one of these holds:

* it holds a preferred size (its first requests add up to one), or as much as the largest preferred size
  (`merge_rows` if there are none), or its next request would overflow `merge_rows`;
* its oldest request has waited for `max_delay_ns`.

Of the groups that are due the one with the first request goes first; a group that is not due holds up nobody. A
draining queue gets no more company for what waits, so it waits for no delay.

What goes is the largest preferred size that the first requests of the group add up to. Where they add up to none, or
the delay is over, it is as many as fit. So preferred sizes without a delay only choose where to cut: nothing waits for
them, and the rest goes with the next take. These are Triton's rules for its dynamic batcher.

A request that is over a bound on its own is refused as RequestTooLarge also when the queue is empty: QueueFull would
promise that trying again helps, and admitting it would make the bound untrue.

Costs
-----
Accepting, cancelling and taking a request are O(1), and a deadline adds a push to a heap. A request that overtakes
others adds a search among all that do (`overtaking.py`). With a delay, a take may look at every group, and a removal at
the first rows of its group. How long runs take is asked for those requests only whose deadline is near.
"""

import sys
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice
from typing import Final, Generic, NamedTuple, TypeVar

from sluice_batching import deadlines, lateness, overtaking
from sluice_batching.delay_trials import NO_WAIT, Wait
from sluice_batching.errors import BatchingError, DeadlineExpired, Draining, QueueFull, RequestTooLarge, TooLate
from sluice_batching.policy import QueuePolicy
from sluice_batching.request import NEVER_QUEUED, NO_DEADLINE, Request
from sluice_batching.run_times import RunTimes

HORIZON_NS: Final = 1_000_000_000
"""Requests without a deadline are due after this time: longer than interactive clients wait, so that these go first,
and short enough for the others."""

R = TypeVar("R", bound=Request)


class Taken(NamedTuple, Generic[R]):
    """What left the queue: `batch` is to be run together, each of `expired` is to be told so; either may be empty.

    Of the latter those whose deadline has not come yet would have ended after it.
    """

    batch: list[R]
    expired: list[R]


class Group(Generic[R]):
    """The waiting requests of one key by order of arrival, those of them that overtake, and the sum of their rows."""

    __slots__ = ("key", "overtaking", "requests", "rows")

    def __init__(self, key: Hashable) -> None:
        self.key = key
        self.requests: OrderedDict[int, R] = OrderedDict()
        self.overtaking: overtaking.Overtaking[R] = []
        self.rows = 0

    @property
    def oldest_ns(self) -> int:
        """Since when its oldest request waits."""
        return next(iter(self.requests.values())).enqueued_ns

    def in_order(self) -> Iterator[R]:
        """Its requests in order of service."""
        return overtaking.in_order(self.requests, self.overtaking)


def _place_of_first(group: Group[R]) -> tuple[int, int]:
    first = overtaking.first(group.requests, group.overtaking)
    return first.rank, first.queue_order


class Queue(Generic[R]):
    """A bounded queue that hands out batches. Not thread-safe; `now_ns` must never go backwards between calls."""

    __slots__ = (
        "_batching",
        "_deadlines",
        "_draining",
        "_due_after",
        "_full_rows",
        "_groups",
        "_hurry_ns",
        "_last_rank",
        "_level_rank",
        "_max_bytes",
        "_max_delay_ns",
        "_max_rows",
        "_merge_rows",
        "_next_order",
        "_overtaking",
        "_policy",
        "_preferred",
        "_ready",
        "_rows",
        "_run_times",
        "_size_bytes",
        "_waiting",
        "_waits",
    )

    def __init__(self, policy: QueuePolicy, run_times: RunTimes | None = None) -> None:
        """`run_times` is what others record runs in; without it no work is refused for the time that it takes."""
        self._policy = policy
        self._run_times = run_times or RunTimes()
        self._preferred = frozenset(policy.preferred_batch_rows)
        self._batching = policy.batching
        self._max_bytes = policy.max_queue_bytes or sys.maxsize
        self._draining = False
        self._next_order = 0
        self._rows = 0
        self._size_bytes = 0
        # Everything that waits, in order of arrival, and the same by group.
        self._waiting: OrderedDict[int, R] = OrderedDict()
        self._groups: dict[Hashable, Group[R]] = {}
        # Those of them that overtake, and a rank that nobody of the others exceeds.
        self._overtaking: overtaking.Overtaking[R] = []
        self._last_rank = 0
        # The part of the rank that is above the due time, and that and the latest due time after an arrival.
        self._level_rank = 0
        self._due_after = HORIZON_NS if policy.deadline_first else 0
        # The groups that are due by their size; kept only while the policy waits.
        self._ready: set[Group[R]] = set()
        self._deadlines: deadlines.Deadlines = []
        self.tune(policy.most_merged_rows, sys.maxsize)

    @property
    def policy(self) -> QueuePolicy:
        """The settings that the queue was built with."""
        return self._policy

    @property
    def rows(self) -> int:
        """The rows that wait."""
        return self._rows

    @property
    def merge_rows(self) -> int:
        """Up to how many rows requests are merged now."""
        return self._merge_rows

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

        Draining, DeadlineExpired, TooLate, RequestTooLarge or QueueFull is returned, in this order of precedence, and
        nothing changes. ValueError is raised for a bug of the caller: no rows, more rows than a batch may have, or a
        request that waits here already.
        """
        rows, size_bytes, deadline_ns = request.rows, request.size_bytes, request.deadline_ns
        if not 0 < rows <= self._policy.max_batch_rows:
            raise ValueError(f"a request must have 1 to {self._policy.max_batch_rows} rows, got {rows}")
        if request.queue_order != NEVER_QUEUED and self._waiting.get(request.queue_order) is request:
            raise ValueError("the request waits in this queue already")
        if self._draining:
            return Draining()
        rank = now_ns + self._due_after
        if deadline_ns != NO_DEADLINE:
            if deadline_ns - now_ns <= self._run_times.danger_ns and (late := self._lateness(request, now_ns)):
                return late
            if deadline_ns + self._level_rank < rank:
                rank = deadline_ns + self._level_rank
        crowded = self._rows + rows > self._max_rows or self._size_bytes + size_bytes > self._max_bytes
        if crowded and (full := self._overflow(rows, size_bytes)) is not None:
            return full
        self._enter(request, rank, now_ns)
        return None

    def _enter(self, request: R, rank: int, now_ns: int) -> None:
        """Let a request wait that is not refused."""
        rows, deadline_ns = request.rows, request.deadline_ns
        order = self._next_order
        self._next_order = order + 1
        request.queue_order = order
        request.enqueued_ns = now_ns
        request.rank = rank
        key = request.key if self._batching else None
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = Group(key)
        self._waiting[order] = group.requests[order] = request
        group.rows += rows
        self._rows += rows
        self._size_bytes += request.size_bytes
        if rank < self._last_rank:
            self._overtake(group, request)
        else:
            self._last_rank = rank
            if self._waits and (group.rows >= self._full_rows or group.rows in self._preferred):
                self._ready.add(group)
        if deadline_ns != NO_DEADLINE:
            deadlines.add(self._deadlines, deadline_ns, order)
            if deadline_ns - now_ns <= self._hurry_ns:
                self._ready.add(group)

    def try_offer_together(self, requests: Sequence[R], now_ns: int) -> BatchingError | None:
        """Let all of several requests wait, or none: None when accepted, else why not, as `try_offer`.

        Of the bounds it is told with the sums of all. They are no batch of their own: each leaves like any other.
        """
        if self._draining:
            return Draining()
        for request in requests:
            if request.deadline_ns != NO_DEADLINE and (late := self._lateness(request, now_ns)):
                return late
        rows = sum(request.rows for request in requests)
        size_bytes = sum(request.size_bytes for request in requests)
        crowded = self._rows + rows > self._max_rows or self._size_bytes + size_bytes > self._max_bytes
        if crowded and (full := self._overflow(rows, size_bytes)) is not None:
            return full
        for request in requests:
            self._let_in(request, now_ns)
        return None

    def _let_in(self, request: R, now_ns: int) -> None:
        """Let a request wait, in its place, that is not refused whatever the bounds are."""
        rank = min(request.deadline_ns + self._level_rank, now_ns + self._due_after)
        self._enter(request, rank, now_ns)

    def _overtake(self, group: Group[R], request: R) -> None:
        """Have a request that came last go before others."""
        overtaking.insert(self._overtaking, request)
        overtaking.insert(group.overtaking, request)
        self._sort_in(group)

    def _lateness(self, request: R, now_ns: int) -> BatchingError | None:
        """Why a request is refused that has no time left, or less than a run takes."""
        left_ns = request.deadline_ns - now_ns
        if left_ns <= 0:
            return DeadlineExpired(request.deadline_ns, now_ns)
        run_ns = self._run_times.predict_ns(request.rows, now_ns)
        return TooLate(left_ns, run_ns) if left_ns < run_ns else None

    def _overflow(self, rows: int, size_bytes: int) -> BatchingError | None:
        """Why a request is refused that would take the queue over a bound; None: it is alone, and so it is let in."""
        bound = self._policy.max_queue_rows
        if bound and self._rows + rows > bound:
            return RequestTooLarge("rows", bound, rows) if rows > bound else QueueFull("rows", bound, self._rows, rows)
        if self._size_bytes + size_bytes > self._max_bytes:
            if size_bytes > self._max_bytes:
                return RequestTooLarge("bytes", self._max_bytes, size_bytes)
            return QueueFull("bytes", self._max_bytes, self._size_bytes, size_bytes)
        # What it is tuned to is no bound for a request alone.
        return QueueFull("rows", self._max_rows, self._rows, rows) if self._waiting else None

    def tune(self, merge_rows: int, queue_rows: int, wait: Wait = NO_WAIT) -> None:
        """Merge up to so many rows from now on, and let so many wait, within the policy's bounds (both at least 1).

        What waits already stays. A request that finds the queue empty is let in whatever its rows. `wait` is how long a
        batch of fewer rows than it says waits for others, where the policy has no delay of its own; one with a request
        that has less than twice that time left does not wait.
        """
        policy = self._policy
        if policy.max_delay_ns or not policy.batching:
            wait = Wait(0, policy.max_delay_ns)
        self._hurry_ns = 0 if policy.max_delay_ns else 2 * wait.delay_ns
        self._max_delay_ns = wait.delay_ns
        self._waits = wait.delay_ns > 0 and not self._draining
        self._merge_rows = min(merge_rows, policy.most_merged_rows)
        full_rows = wait.rows or max(policy.preferred_batch_rows, default=policy.max_batch_rows)
        self._full_rows = min(full_rows, self._merge_rows)
        self._max_rows = min(queue_rows, policy.max_queue_rows or sys.maxsize)
        for group in self._groups.values():
            self._sort_in(group)

    def take(self, now_ns: int) -> Taken[R]:
        """The batch to run now, and the requests whose deadline has come or would; both leave the queue."""
        expired = self.expire(now_ns) if self._deadlines else []
        while (group := self._due_group(now_ns)) is not None:
            length = self._batch_length(group, self._waits and self._is_overdue(group, now_ns))
            if not self._deadlines or self._deadlines[0][0] - now_ns > self._run_times.danger_ns:
                return Taken(self._remove_first(group, length), expired)
            batch, late = self._in_time(group, length, now_ns)
            for request in (*late, *batch):
                self._remove(request)
            deadlines.drop_stale(self._deadlines, self._waiting)
            expired += late
            if batch:
                return Taken(batch, expired)
        return Taken([], expired)

    def _due_group(self, now_ns: int) -> Group[R] | None:
        """The group that goes next, if any is due."""
        if not self._waiting:
            return None
        first = next(iter(self._waiting.values()))
        if self._overtaking:
            first = overtaking.first(self._waiting, self._overtaking)
        group = self._groups[first.key if self._batching else None]
        if not self._waits or group in self._ready or self._is_overdue(group, now_ns):
            return group
        oldest = next(iter(self._waiting.values()))
        if not self._ready and oldest.enqueued_ns + self._max_delay_ns > now_ns:
            return None
        due = [each for each in self._groups.values() if each in self._ready or self._is_overdue(each, now_ns)]
        return min(due, key=_place_of_first)

    def _is_overdue(self, group: Group[R], now_ns: int) -> bool:
        """Whether a group has waited for its delay."""
        return group.oldest_ns + self._max_delay_ns <= now_ns

    def _in_time(self, group: Group[R], length: int, now_ns: int) -> tuple[list[R], list[R]]:
        """Of the next `length` requests of a group those that end in time when they run now, and those that do not."""
        rows = sum([request.rows for request in islice(group.in_order(), length)])
        predict_ns = self._run_times.predict_ns
        batch, late = lateness.split(
            group.in_order(), rows, group.rows - rows, lambda rows: now_ns + predict_ns(rows, now_ns)
        )
        return batch if self._batching else batch[:1], late

    def expire(self, now_ns: int) -> list[R]:
        """The requests whose deadline has come, earliest first; they leave the queue."""
        expired: list[R] = []
        for _, request in deadlines.pop_due(self._deadlines, self._waiting, now_ns):
            self._remove(request)
            expired.append(request)
        if expired:
            deadlines.drop_stale(self._deadlines, self._waiting)
        return expired

    def cancel(self, request: R) -> bool:
        """Take a request out: True if it was waiting here; False if it never was or has left, and nothing changes."""
        if self._waiting.get(request.queue_order) is not request:
            return False
        self._remove(request)
        deadlines.drop_stale(self._deadlines, self._waiting)
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
        due_ns = oldest_ns + self._max_delay_ns
        deadline_ns = self.next_deadline_ns()
        return due_ns if deadline_ns is None else min(due_ns, deadline_ns)

    def next_deadline_ns(self) -> int | None:
        """The earliest deadline of the waiting requests; None = none of them has one."""
        return deadlines.first_ns(self._deadlines, self._waiting)

    def _batch_length(self, group: Group[R], overdue: bool) -> int:
        """How many requests of the group, from its first on, are the next batch."""
        if not self._batching:
            return 1
        preferred = frozenset() if overdue else self._preferred
        if not preferred and group.rows <= self._merge_rows:
            return len(group.requests)
        rows = fitting = best = 0
        for request in group.in_order():
            rows += request.rows
            if rows > self._merge_rows and fitting:
                break
            fitting += 1
            if rows in preferred:
                best = fitting
        return best or fitting

    def _remove_first(self, group: Group[R], length: int) -> list[R]:
        """Take the first `length` requests out of a group."""
        if length == len(self._waiting):
            return self._remove_all()
        batch = list(islice(group.in_order(), length))
        rows = size_bytes = 0
        for request in batch:
            rows += request.rows
            size_bytes += request.size_bytes
            del self._waiting[request.queue_order], group.requests[request.queue_order]
        if self._overtaking:
            for request in batch:
                overtaking.discard(self._overtaking, request)
                overtaking.discard(group.overtaking, request)
        self._left(group, rows, size_bytes)
        deadlines.drop_stale(self._deadlines, self._waiting)
        return batch

    def _remove_all(self) -> list[R]:
        """Take out everything that waits, which is the usual batch, at no cost for each request."""
        if self._overtaking:
            batch = list(overtaking.in_order(self._waiting, self._overtaking))
            self._overtaking.clear()
        else:
            batch = list(self._waiting.values())
        for container in (self._waiting, self._groups, self._ready, self._deadlines):
            container.clear()
        self._rows = self._size_bytes = self._last_rank = 0
        return batch

    def _remove(self, request: R) -> None:
        """Take one request out, wherever it stands in its group."""
        group = self._groups[request.key if self._batching else None]
        del self._waiting[request.queue_order], group.requests[request.queue_order]
        overtaking.discard(self._overtaking, request)
        overtaking.discard(group.overtaking, request)
        self._left(group, request.rows, request.size_bytes)

    def _left(self, group: Group[R], rows: int, size_bytes: int) -> None:
        """Account for requests that have just left a group."""
        group.rows -= rows
        self._rows -= rows
        self._size_bytes -= size_bytes
        if not self._waiting:
            self._last_rank = 0
        if not group.requests:
            del self._groups[group.key]
            self._ready.discard(group)
        else:
            self._sort_in(group)

    def _sort_in(self, group: Group[R]) -> None:
        """Find out anew whether a group is due by its size."""
        if self._waits and self._is_ready(group):
            self._ready.add(group)
        else:
            self._ready.discard(group)

    def _is_ready(self, group: Group[R]) -> bool:
        """Whether a group is due by its size."""
        if group.rows >= self._full_rows:
            return True
        rows = 0
        for request in group.in_order() if self._preferred else ():
            rows += request.rows
            if rows in self._preferred:
                return True
        return False
