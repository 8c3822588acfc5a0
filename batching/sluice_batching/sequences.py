"""The requests of sequences: who has a slot, whose turn it is, and which run together. No clock, no threads.

A sequence is what one `sequence_id` names from a request with the start flag to one with the end flag. The server keeps
something with it from run to run (its state), so its requests run one after the other, each on what the last one left.

Invariants
----------
* Every accepted request leaves exactly once: in a batch, as expired, or cancelled. A refused one never enters.
* The requests of a sequence leave in the order in which they came, and no two of them are under way at a time: what is
  taken is under way until `finish`.
* A batch has at most `max_batch_rows` requests, of one row each, with equal keys, of different sequences.
* A request whose deadline has come is in no batch. The rows and bytes that wait never exceed the bounds.
* No more sequences have a slot than there are slots. The others are in the backlog, in the order in which they began,
  and each of those has a request that waits: so the sequences are bounded by the slots and the bounds of the queue.

Slots
-----
Direct: every group (an instance, in Triton's words) has `max_batch_rows` slots, a sequence keeps its slot and so its
group and its row until it ends, and a group has one batch under way. Oldest: all slots are in one group of
`max_candidate_sequences`, and any number of batches may be under way.

A group does not belong to a thread: the instances of a model share its session and the state is the server's, so
whoever is free runs the next batch of any group.

When a batch goes
-----------------
A sequence is ready when it has a slot, a request that waits and none under way. Without a delay, whatever is ready in a
group goes as soon as somebody takes; with one, the ready requests of a key go when they are enough (direct: the least
utilization of the group's slots; oldest: a preferred size, or a full batch), or when the first of them has waited for
the delay. Of what is due the longest due goes first. A draining sequencer waits for no delay.

How a sequence ends
-------------------
By its last request, when that has run or has been dropped; by `max_idle_ns` without a request; by a drain, when it has
no more requests. A start flag in mid-sequence begins it anew in its slot. When a request with a start flag is dropped,
the next one of its sequence begins it; when there is none, and nothing of the sequence has run, the sequence is over.
"""

from __future__ import annotations

import heapq
import sys
from collections import OrderedDict
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Generic

from sluice_batching import deadlines
from sluice_batching.errors import (
    BatchingError,
    DeadlineExpired,
    Draining,
    QueueFull,
    RequestTooLarge,
    SequenceNotStarted,
)
from sluice_batching.policy import QueuePolicy
from sluice_batching.queue import R, Taken
from sluice_batching.request import NO_DEADLINE, SequenceId

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class SequencePolicy:
    """How sequences share slots; valid once built (ValueError names the field that is not).

    queue: what a batch may be and how much may wait. Its delay and its preferred sizes are those of the strategy.
    max_idle_ns: how long a sequence without a request keeps its slot.
    groups: direct: how many groups of `queue.max_batch_rows` slots there are; 0 = the strategy is oldest.
    min_utilization: direct: the part of a group's slots, 0 to 1, that goes without waiting for the delay; with 0
        nothing ever waits for it, as in Triton.
    max_candidates: oldest: how many sequences have a slot.
    """

    queue: QueuePolicy
    max_idle_ns: int
    groups: int = 0
    min_utilization: float = 0.0
    max_candidates: int = 0

    def __post_init__(self) -> None:
        if self.max_idle_ns < 1:
            raise ValueError(f"max_idle_ns must be at least 1, got {self.max_idle_ns}")
        if (self.groups > 0) == (self.max_candidates > 0):
            raise ValueError(f"one of groups and max_candidates, got {self.groups} and {self.max_candidates}")
        if not 0 <= self.min_utilization <= 1:
            raise ValueError(f"min_utilization must lie in 0..1, got {self.min_utilization}")

    @property
    def enough(self) -> int:
        """How many ready requests of a key do not wait for the delay."""
        if self.groups:
            return ceil(self.min_utilization * self.queue.max_batch_rows)
        return min(self.queue.preferred_batch_rows, default=self.queue.max_batch_rows)


class LiveSequence(Generic[R]):
    """One sequence from its start to its end.

    sequence_id: what clients call it. row: its row in its group's batches, None in the backlog.
    state: whatever its owner keeps with it from run to run; None until something of it has run.

    The rest is the sequencer's own: what waits and what is under way; whether something of it has run (`begun`), the
    last accepted request had the end flag (`closed`), one with the start flag was dropped and none came behind it
    (`restarts`).
    """

    __slots__ = (
        "begun",
        "closed",
        "group",
        "idle_since_ns",
        "restarts",
        "row",
        "running",
        "sequence_id",
        "state",
        "waiting",
    )

    def __init__(self, sequence_id: SequenceId) -> None:
        self.sequence_id = sequence_id
        self.row: int | None = None
        self.state: object = None
        self.group: _Group[R] | None = None
        self.waiting: OrderedDict[int, R] = OrderedDict()
        self.running: R | None = None
        self.begun = False
        self.closed = False
        self.restarts = False
        self.idle_since_ns = 0

    def __repr__(self) -> str:
        return f"<LiveSequence {self.sequence_id!r} in row {self.row}, {len(self.waiting)} waiting>"


class _Group(Generic[R]):
    """Slots that share batches: the free ones, the sequences that are ready in that order, what is under way."""

    __slots__ = ("number", "ready", "under_way")

    def __init__(self, number: int) -> None:
        self.number = number
        self.ready: OrderedDict[SequenceId, LiveSequence[R]] = OrderedDict()
        self.under_way = 0


class Sequencer(Generic[R]):
    """A bounded queue of the requests of sequences. Not thread-safe; `now_ns` must never go backwards between calls."""

    __slots__ = (
        "_backlog",
        "_deadlines",
        "_delay_ns",
        "_draining",
        "_free",
        "_groups",
        "_idle",
        "_live",
        "_next_order",
        "_now_ns",
        "_policy",
        "_size_bytes",
        "_waiting",
    )

    def __init__(self, policy: SequencePolicy) -> None:
        self._policy = policy
        self._delay_ns = policy.queue.max_delay_ns if policy.enough else 0
        self._draining = False
        self._next_order = 0
        self._now_ns = 0
        self._size_bytes = 0
        self._waiting: dict[int, R] = {}
        self._live: dict[SequenceId, LiveSequence[R]] = {}
        self._backlog: OrderedDict[SequenceId, LiveSequence[R]] = OrderedDict()
        # Those with a slot and nothing to do, the longest idle first.
        self._idle: OrderedDict[SequenceId, LiveSequence[R]] = OrderedDict()
        self._groups: list[_Group[R]] = [_Group(number) for number in range(max(1, policy.groups))]
        # Low rows first, so that sequences spread over the groups and batches stay narrow.
        rows = policy.queue.max_batch_rows if policy.groups else policy.max_candidates
        self._free = [(row, group.number) for row in range(rows) for group in self._groups]
        self._deadlines: deadlines.Deadlines = []

    @property
    def policy(self) -> QueuePolicy:
        """What a batch may be and how much may wait."""
        return self._policy.queue

    @property
    def rows(self) -> int:
        """The rows that wait."""
        return len(self._waiting)

    @property
    def size_bytes(self) -> int:
        """The bytes that wait."""
        return self._size_bytes

    @property
    def draining(self) -> bool:
        """Whether `drain` has been called."""
        return self._draining

    @property
    def live(self) -> int:
        """The sequences that have begun and not ended, with those of the backlog."""
        return len(self._live)

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        state = ", draining" if self._draining else ""
        return (
            f"<Sequencer: {len(self._waiting)} requests, {self._size_bytes} bytes, {len(self._live)} sequences,"
            f" {len(self._backlog)} of them in the backlog{state}>"
        )

    def try_offer(self, request: R, now_ns: int) -> BatchingError | None:
        """Let a request wait: None when accepted, else why not.

        Draining, DeadlineExpired, SequenceNotStarted, RequestTooLarge or QueueFull is returned, in this order of
        precedence, and no request changes. ValueError is raised for a bug of the caller: not one row, or a request that
        waits here already.
        """
        step = request.step
        if request.rows != 1:
            raise ValueError(f"a request of a sequence must have 1 row, got {request.rows}")
        if self._waiting.get(request.queue_order) is request:
            raise ValueError("the request waits here already")
        self._end_idle(now_ns)
        if self._draining:
            return Draining()
        if request.deadline_ns <= now_ns:
            return DeadlineExpired(request.deadline_ns, now_ns)
        sequence = self._live.get(step.sequence_id)
        if not step.start and (sequence is None or sequence.closed):
            return SequenceNotStarted(step.sequence_id)
        error = self._overflow(request.size_bytes)
        if error is not None:
            return error
        if sequence is None:
            sequence = self._live[step.sequence_id] = LiveSequence(step.sequence_id)
            self._backlog[step.sequence_id] = sequence
        step.sequence = sequence
        sequence.closed = step.end
        self._admit(request, sequence, now_ns)
        self._place()
        return None

    def _admit(self, request: R, sequence: LiveSequence[R], now_ns: int) -> None:
        order = self._next_order
        self._next_order = order + 1
        request.queue_order = order
        request.enqueued_ns = now_ns
        self._waiting[order] = sequence.waiting[order] = request
        self._size_bytes += request.size_bytes
        if request.deadline_ns != NO_DEADLINE:
            deadlines.add(self._deadlines, request.deadline_ns, order)
        self._idle.pop(sequence.sequence_id, None)
        if sequence.group is not None and sequence.running is None:
            sequence.group.ready[sequence.sequence_id] = sequence

    def _overflow(self, size_bytes: int) -> BatchingError | None:
        """Why one more request would take the queue over a bound."""
        policy = self._policy.queue
        if policy.max_queue_rows and len(self._waiting) >= policy.max_queue_rows:
            return QueueFull("rows", policy.max_queue_rows, len(self._waiting), 1)
        max_bytes = policy.max_queue_bytes or sys.maxsize
        if size_bytes > max_bytes:
            return RequestTooLarge("bytes", max_bytes, size_bytes)
        if self._size_bytes + size_bytes > max_bytes:
            return QueueFull("bytes", max_bytes, self._size_bytes, size_bytes)
        return None

    def take(self, now_ns: int) -> Taken[R]:
        """The batch to run now, and the requests whose deadline has come; both leave the queue.

        A batch of direct sequences is in the order of their rows, one of oldest in that in which they became ready. It
        is under way until each of its requests has been given to `finish`.
        """
        expired = self.expire(now_ns)
        due = self._first_due()
        if due is None or due[0] > now_ns:
            return Taken([], expired)
        _, group, alike = due
        batch = []
        for sequence in alike[: self._batch_length(alike, now_ns)]:
            del group.ready[sequence.sequence_id]
            order, request = sequence.waiting.popitem(last=False)
            del self._waiting[order]
            self._size_bytes -= request.size_bytes
            request.step.start |= sequence.restarts
            sequence.restarts = False
            sequence.begun = True
            sequence.running = request
            group.under_way += 1
            batch.append(request)
        if self._policy.groups:
            batch.sort(key=_row_of)
        deadlines.drop_stale(self._deadlines, self._waiting)
        return Taken(batch, expired)

    def finish(self, requests: Iterable[R], now_ns: int) -> None:
        """End what `take` began: the sequences of these requests may go on. A second time has no effect."""
        self._now_ns = now_ns
        for request in requests:
            sequence: LiveSequence[R] | None = request.step.sequence
            if sequence is None or sequence.running is not request or sequence.group is None:
                continue
            sequence.running = None
            sequence.group.under_way -= 1
            self._settle(sequence)
        self._end_idle(now_ns)

    def expire(self, now_ns: int) -> list[R]:
        """The requests whose deadline has come, earliest first; they leave. Sequences that are idle too long end."""
        self._end_idle(now_ns)
        expired: list[R] = []
        for _, request in deadlines.pop_due(self._deadlines, self._waiting, now_ns):
            self._drop(request)
            expired.append(request)
        return expired

    def cancel(self, request: R) -> bool:
        """Take a request out: True if it was waiting here; False if it never was or has left, and nothing changes."""
        if self._waiting.get(request.queue_order) is not request:
            return False
        self._drop(request)
        deadlines.drop_stale(self._deadlines, self._waiting)
        return True

    def drain(self) -> None:
        """Accept nothing more, and wait for no delay: takes hand out what is left, and sequences end behind it."""
        self._draining = True
        self._delay_ns = 0
        for sequence in list(self._idle.values()):
            self._end(sequence)
        self._place()

    def next_wakeup_ns(self) -> int | None:
        """From when on `take` returns something if nothing more comes and nothing ends; in the past = at once."""
        wakeups_ns = []
        due = self._first_due()
        if due is not None:
            wakeups_ns.append(due[0])
        if self._waiting and (deadline_ns := deadlines.first_ns(self._deadlines, self._waiting)) is not None:
            wakeups_ns.append(deadline_ns)
        if self._backlog and self._idle:
            wakeups_ns.append(self._next_idle_end_ns())
        return min(wakeups_ns, default=None)

    def next_deadline_ns(self) -> int | None:
        """From when on `expire` has something to do: a deadline, or a sequence that has been idle for too long."""
        deadline_ns = deadlines.first_ns(self._deadlines, self._waiting)
        if not self._idle:
            return deadline_ns
        idle_end_ns = self._next_idle_end_ns()
        return idle_end_ns if deadline_ns is None else min(deadline_ns, idle_end_ns)

    def _next_idle_end_ns(self) -> int:
        return next(iter(self._idle.values())).idle_since_ns + self._policy.max_idle_ns

    def _first_due(self) -> tuple[int, _Group[R], list[LiveSequence[R]]] | None:
        """What is due first of all that is ready: when, and the sequences whose requests have one key."""
        first: tuple[int, _Group[R], list[LiveSequence[R]]] | None = None
        for group in self._groups:
            if self._policy.groups and group.under_way:
                continue
            by_key: dict[object, list[LiveSequence[R]]] = {}
            for sequence in group.ready.values():
                by_key.setdefault(_head(sequence).key, []).append(sequence)
            for alike in by_key.values():
                due_ns = _head(alike[0]).enqueued_ns
                if self._delay_ns and len(alike) < self._policy.enough:
                    due_ns += self._delay_ns
                if first is None or due_ns < first[0]:
                    first = due_ns, group, alike
        return first

    def _batch_length(self, alike: Sequence[LiveSequence[R]], now_ns: int) -> int:
        """How many of the sequences that are ready with one key go together: preferred sizes say where to cut."""
        fitting = min(len(alike), self._policy.queue.max_batch_rows)
        if self._delay_ns and _head(alike[0]).enqueued_ns + self._delay_ns <= now_ns:
            return fitting
        return max((rows for rows in self._policy.queue.preferred_batch_rows if rows <= fitting), default=fitting)

    def _drop(self, request: R) -> None:
        """Take a waiting request out, wherever it stands in its sequence."""
        order = request.queue_order
        sequence: LiveSequence[R] = request.step.sequence
        del self._waiting[order], sequence.waiting[order]
        self._size_bytes -= request.size_bytes
        if request.step.start:
            behind = next((each for place, each in sequence.waiting.items() if place > order), None)
            if behind is None:
                sequence.restarts = True
            else:
                behind.step.start = True
        if not sequence.waiting and sequence.group is not None:
            sequence.group.ready.pop(sequence.sequence_id, None)
        if sequence.running is None:
            self._settle(sequence)

    def _settle(self, sequence: LiveSequence[R]) -> None:
        """Decide what a sequence is that has nothing under way: ready, over, or idle."""
        if sequence.waiting:
            if sequence.group is not None:
                sequence.group.ready.setdefault(sequence.sequence_id, sequence)
        elif sequence.closed or not sequence.begun or self._draining:
            self._end(sequence)
            self._place()
        else:
            sequence.idle_since_ns = self._now_ns
            self._idle[sequence.sequence_id] = sequence

    def _end_idle(self, now_ns: int) -> None:
        self._now_ns = now_ns
        while self._idle and self._next_idle_end_ns() <= now_ns:
            self._end(next(iter(self._idle.values())))
        self._place()

    def _end(self, sequence: LiveSequence[R]) -> None:
        """Forget a sequence with nothing waiting and nothing under way, its state too, and free its slot."""
        del self._live[sequence.sequence_id]
        self._idle.pop(sequence.sequence_id, None)
        self._backlog.pop(sequence.sequence_id, None)
        sequence.state = None
        if sequence.group is not None and sequence.row is not None:
            heapq.heappush(self._free, (sequence.row, sequence.group.number))

    def _place(self) -> None:
        """Give free slots to the backlog, first come, first served."""
        while self._backlog and self._free:
            _, sequence = self._backlog.popitem(last=False)
            sequence.row, number = heapq.heappop(self._free)
            sequence.group = self._groups[number]
            sequence.group.ready[sequence.sequence_id] = sequence


def _head(sequence: LiveSequence[R]) -> R:
    return next(iter(sequence.waiting.values()))


def _row_of(request: R) -> int:
    row: int = request.step.sequence.row
    return row
