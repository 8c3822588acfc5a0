"""A queue that threads share: many offer, instance threads wait for batches. All rules are in `queue.py`.

Locks
-----
`BatchQueue._lock` guards every field; the condition belongs to it. Nothing is called with it held except the queue and
the clock, so it may be taken with any other lock held, and callbacks may call anything. The counts (`rows`,
`size_bytes`, `len`, `draining`, `watched_deadline_ns`) are single fields and are read without it.

Who is woken
------------
An offer wakes at most one waiting thread, and none while a woken one is still on its way: that one takes everything
into account that came meanwhile. Whoever leaves `take` passes the watch on: if something is left and due earlier than
what a waiting thread has set its alarm for, it wakes one. So there is one wake-up per batch, not per request, and no
thread is woken in vain by a request that is not due.

Lending
-------
Waking a thread takes longer than a small batch. So a thread that offers may run the batch itself (`offer_and_take`) in
the place of a taker that is idle: there are never more batches under way than takers, and as long as a place is lent,
one idle taker fewer counts. `give_back` ends it. Nothing is ever taken out of turn: only an empty queue lends.
"""

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, Generic, Protocol

from sluice_batching.delay_trials import NO_WAIT, Wait
from sluice_batching.errors import BatchingError, TooLate
from sluice_batching.policy import QueuePolicy
from sluice_batching.priority_queue import PriorityQueue
from sluice_batching.queue import Queue, R, Taken
from sluice_batching.request import NO_DEADLINE
from sluice_batching.run_times import RunTimes

NEVER_NS: Final = NO_DEADLINE
"""An instant that does not come."""

NOT_WATCHED_NS: Final = -1
"""`watched_deadline_ns` of a queue whose deadlines nobody watches: earlier than any deadline that a queue accepts."""

MAX_WAIT_S: Final = 3600.0
"""The longest single wait, well inside what every platform's condition variable can count; waits are in loops."""

Clock = Callable[[], int]
"""Nanoseconds that never go backwards."""


class _Core(Protocol[R]):
    """What a shared queue asks of the state machine in it, as `Queue` describes it; all of it under the lock."""

    @property
    def policy(self) -> QueuePolicy:
        """The settings that it was built with."""

    @property
    def rows(self) -> int:
        """The rows that wait."""

    @property
    def size_bytes(self) -> int:
        """The bytes that wait."""

    @property
    def draining(self) -> bool:
        """Whether `drain` has been called."""

    def __len__(self) -> int: ...

    def try_offer(self, request: R, now_ns: int) -> BatchingError | None:
        """Let a request wait: None when accepted, else why not."""

    def take(self, now_ns: int) -> Taken[R]:
        """The batch to run now, and the requests whose deadline has come."""

    def cancel(self, request: R) -> bool:
        """Take a request out, if it waits here."""

    def expire(self, now_ns: int) -> list[R]:
        """The requests whose deadline has come."""

    def drain(self) -> None:
        """Accept nothing more, and wait for no delay."""

    def next_wakeup_ns(self) -> int | None:
        """From when on `take` returns something if nothing more comes."""

    def next_deadline_ns(self) -> int | None:
        """From when on `expire` has something to do."""


def wait_until(condition: threading.Condition, wakeup_ns: int, now_ns: int) -> None:
    """Wait on a condition, whose lock is held, until about `wakeup_ns`; it may return earlier."""
    condition.wait(min((wakeup_ns - now_ns) / 1e9, MAX_WAIT_S))


class BatchQueue(Generic[R]):
    """A thread-safe queue of batches for the instances of one model."""

    __slots__ = (
        "_alarm_ns",
        "_clock",
        "_gathers",
        "_idle_takers",
        "_lent",
        "_lock",
        "_on_earlier_deadline",
        "_queue",
        "_run_times",
        "_wake_up_under_way",
        "_watched_deadline_ns",
        "_work",
    )

    def __init__(
        self, policy: QueuePolicy, clock: Clock = time.monotonic_ns, run_times: RunTimes | None = None
    ) -> None:
        """`run_times` is what others record the runs in, on the same clock."""
        self._run_times = run_times or RunTimes()
        self._clock = clock
        self._lock = threading.Lock()
        self._work = threading.Condition(self._lock)
        make_queue: type[Queue[R]] = Queue if policy.priorities is None else PriorityQueue
        self._queue: _Core[R] = make_queue(policy, self._run_times)
        self._idle_takers = 0
        self._lent = 0
        self._gathers = False
        self._wake_up_under_way = False
        # The earliest instant at which an idle taker wakes by itself. Too late a value costs a wake-up in vain, and
        # every taker that wakes sets it back, so it is never too early.
        self._alarm_ns = NEVER_NS
        self._on_earlier_deadline: Callable[[int], None] | None = None
        self._watched_deadline_ns = NOT_WATCHED_NS

    @property
    def policy(self) -> QueuePolicy:
        """The settings that the queue was built with."""
        return self._queue.policy

    @property
    def rows(self) -> int:
        """The rows that wait."""
        return self._queue.rows

    @property
    def size_bytes(self) -> int:
        """The bytes that wait."""
        return self._queue.size_bytes

    @property
    def predicted_wait_ns(self) -> int | None:
        """How long what waits will take, by the runs so far; None before the first."""
        return self._run_times.wait_ns(self._queue.rows)

    @property
    def draining(self) -> bool:
        """Whether `drain` has been called."""
        return self._queue.draining

    @property
    def merge_rows(self) -> int:
        """Up to how many rows requests are merged now; sequences have no such limit."""
        assert isinstance(self._queue, Queue)
        return self._queue.merge_rows

    @property
    def watched_deadline_ns(self) -> int:
        """No deadline of the queue is earlier, and an earlier one will be reported; see `watch_deadlines`."""
        return self._watched_deadline_ns

    def __len__(self) -> int:
        return len(self._queue)

    def __repr__(self) -> str:
        woken = ", one being woken" if self._wake_up_under_way else ""
        return f"<BatchQueue: {self._idle_takers} idle takers{woken}, {self._queue!r}>"

    def offer(self, request: R) -> None:
        """Let a request wait; raises what `Queue.try_offer` returns: Draining, DeadlineExpired, TooLate, ..."""
        error = self.offer_many((request,))[0]
        if error is not None:
            raise error

    def offer_many(self, requests: Iterable[R]) -> list[BatchingError | None]:
        """Let requests wait, each on its own: None for one that was accepted, else why not; in the order given.

        One reading of the clock, one hold of the lock and at most one wake-up for all of them.
        """
        with self._lock:
            now_ns = self._clock()
            try:
                errors = [self._queue.try_offer(request, now_ns) for request in requests]
            finally:
                # Also when one of them is a caller's bug, so that those before it are not left without a taker.
                self._pass_the_watch_on()
            report = self._on_earlier_deadline
            earlier_ns = None if report is None else self._earlier_deadline_ns()
        if report is not None and earlier_ns is not None:
            report(earlier_ns)
        return errors

    def offer_together(self, requests: Sequence[R]) -> BatchingError | None:
        """Let all of several requests wait, or none; see `Queue.try_offer_together`. No part of a sequence is split."""
        with self._lock:
            assert isinstance(self._queue, Queue)
            error = self._queue.try_offer_together(requests, self._clock())
            self._pass_the_watch_on()
            report = self._on_earlier_deadline
            earlier_ns = None if report is None else self._earlier_deadline_ns()
        if report is not None and earlier_ns is not None:
            report(earlier_ns)
        return error

    def offer_and_take(self, request: R) -> tuple[BatchingError | None, list[R]]:
        """Let one request wait, or give the batch that it makes to run here and now, if a taker is idle.

        Returns why it was not accepted, and the batch; empty: the takers see to the request as after `offer`. Whoever
        gets a batch runs it, answers it and calls `give_back`.
        """
        with self._lock:
            now_ns = self._clock()
            lends = self._idle_takers > self._lent and not self._wake_up_under_way and not self._queue
            error = self._queue.try_offer(request, now_ns)
            batch, late = self._queue.take(now_ns) if lends and error is None else ([], [])
            if batch:
                self._lent += 1
                return None, batch
            if late:
                # Between the offer and the take a run has ended elsewhere that took longer than those before.
                left_ns = request.deadline_ns - now_ns
                error = TooLate(left_ns, self._run_times.predict_ns(request.rows, now_ns))
            self._pass_the_watch_on()
            report = self._on_earlier_deadline
            earlier_ns = None if report is None else self._earlier_deadline_ns()
        if report is not None and earlier_ns is not None:
            report(earlier_ns)
        return error, batch

    def give_back(self) -> None:
        """End what `offer_and_take` began: the taker whose place was lent may go on."""
        with self._lock:
            self._lent -= 1
            if self._queue.draining:
                self._work.notify_all()
            else:
                self._pass_the_watch_on()

    def take(self, timeout_ns: int | None = None) -> Taken[R] | None:
        """Wait for a batch to run or for requests that have expired, and return both; the taker answers both.

        None: the queue is draining and empty, and no place is lent, so nothing will ever come and nothing is under way
        but what takers run. With a timeout, a Taken of two empty lists says that the time is over.
        """
        with self._lock:
            now_ns = self._clock()
            give_up_ns = NEVER_NS if timeout_ns is None else now_ns + timeout_ns
            while True:
                # A taker that woke by itself while every place is lent has none to take in.
                has_place = self._lent <= self._idle_takers
                taken = self._queue.take(now_ns) if has_place else Taken([], [])
                if taken.batch or taken.expired:
                    break
                # Of sequences something may wait for what other takers run.
                if self._queue.draining and not self._lent and not self._queue:
                    return None
                if now_ns >= give_up_ns:
                    break
                self._wait_for_work(give_up_ns, now_ns, watches=has_place)
                now_ns = self._clock()
            self._pass_the_watch_on()
            return taken

    def wait(self) -> bool:
        """Wait until something is due, and leave it there; False when the queue is draining and empty.

        For takers that need more than a batch to run: by the time they take, another one may have been faster. Nobody
        calls `offer_and_take` on their queue, as its place is not theirs to lend.
        """
        with self._lock:
            while True:
                now_ns = self._clock()
                wakeup_ns = self._queue.next_wakeup_ns()
                if wakeup_ns is not None and wakeup_ns <= now_ns:
                    # It stays due, so the next one is woken too: this one may have to wait for what it needs.
                    self._pass_the_watch_on()
                    return True
                if self._queue.draining and wakeup_ns is None:
                    return False
                self._wait_for_work(NEVER_NS, now_ns, watches=True)

    def gather(self, rows: int, within_ns: int) -> int:
        """Wait until so many rows wait, for so long at most, and give how many do; nothing leaves the queue.

        Less long where a deadline comes near, or the queue is draining. For the only taker of a queue, and nothing is
        lent meanwhile.
        """
        with self._lock:
            now_ns = self._clock()
            until_ns = now_ns + within_ns
            self._gathers = True
            while self._queue.rows < rows and not self._queue.draining:
                deadline_ns = self._queue.next_deadline_ns()
                if deadline_ns is not None:
                    until_ns = min(until_ns, deadline_ns - self._run_times.danger_ns)
                if now_ns >= until_ns:
                    break
                wait_until(self._work, until_ns, now_ns)
                now_ns = self._clock()
            self._gathers = False
            return self._queue.rows

    def cancel(self, request: R) -> bool:
        """Take a request out: True if it was waiting here, and nobody else will answer it; False if it has left."""
        with self._lock:
            return self._queue.cancel(request)

    def expire(self) -> list[R]:
        """The requests whose deadline has come, earliest first; they leave the queue, and the caller answers them."""
        with self._lock:
            expired = self._queue.expire(self._clock())
            if self._on_earlier_deadline is not None:
                self._watch()
        return expired

    def tune(self, merge_rows: int, queue_rows: int, wait: Wait = NO_WAIT) -> None:
        """As `Queue.tune`; sequences are not tuned."""
        with self._lock:
            assert isinstance(self._queue, Queue)
            self._queue.tune(merge_rows, queue_rows, wait)
            self._pass_the_watch_on()

    def watch_deadlines(self, on_earlier_deadline: Callable[[int], None] | None) -> None:
        """Have each deadline that is earlier than `watched_deadline_ns` reported to the callback; None ends it.

        The thread that offers calls it, with no lock held. `watched_deadline_ns` is then that deadline, until `expire`
        has been called and sets it to the earliest one that still waits.
        """
        with self._lock:
            self._on_earlier_deadline = on_earlier_deadline
            if on_earlier_deadline is None:
                self._watched_deadline_ns = NOT_WATCHED_NS
            else:
                self._watch()

    def drain(self) -> None:
        """Accept nothing more. Takers get what is left, without delay, and then None."""
        with self._lock:
            self._queue.drain()
            self._work.notify_all()

    def _wait_for_work(self, give_up_ns: int, now_ns: int, *, watches: bool) -> None:
        wakeup_ns = self._queue.next_wakeup_ns() if watches else None
        alarm_ns = give_up_ns if wakeup_ns is None else min(wakeup_ns, give_up_ns)
        self._alarm_ns = min(self._alarm_ns, alarm_ns)
        self._idle_takers += 1
        try:
            wait_until(self._work, alarm_ns, now_ns)
        finally:
            self._idle_takers -= 1
            self._wake_up_under_way = False
            self._alarm_ns = NEVER_NS

    def _pass_the_watch_on(self) -> None:
        """Wake an idle taker if something is due before any of them wakes by itself."""
        if self._idle_takers > self._lent and not self._wake_up_under_way:
            wakeup_ns = self._queue.next_wakeup_ns()
            if wakeup_ns is not None and wakeup_ns < self._alarm_ns:
                self._wake_up_under_way = True
                self._work.notify()
        elif self._gathers:
            self._work.notify()

    def _watch(self) -> None:
        deadline_ns = self._queue.next_deadline_ns()
        self._watched_deadline_ns = NO_DEADLINE if deadline_ns is None else deadline_ns

    def _earlier_deadline_ns(self) -> int | None:
        """The earliest deadline if it is earlier than the watched one; it is watched from now on."""
        deadline_ns = self._queue.next_deadline_ns()
        if deadline_ns is None or deadline_ns >= self._watched_deadline_ns:
            return None
        self._watched_deadline_ns = deadline_ns
        return deadline_ns
