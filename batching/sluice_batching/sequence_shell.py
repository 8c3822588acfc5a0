"""A queue of sequences that threads share: `shell.py` around the rules of `sequences.py`.

What is taken is under way until `finish`, which whoever ran it calls before it takes again or gives back what it was
lent: so `finish` wakes nobody. Sequences that are idle for too long end when `expire` is called, and that is reported
as a deadline is: an `ExpiryTimer` ends them in time.
"""

import time
from collections.abc import Callable, Sequence

from sluice_batching.queue import R, Taken
from sluice_batching.run_times import RunTimes
from sluice_batching.sequences import SequencePolicy, Sequencer
from sluice_batching.shell import BatchQueue, Clock


class _ToldSequencer(Sequencer[R]):
    """A sequencer that says what is taken, for those who want to know it: others do not even ask."""

    __slots__ = ("_on_taken",)

    def __init__(self, policy: SequencePolicy, on_taken: Callable[[list[R]], None]) -> None:
        super().__init__(policy)
        self._on_taken = on_taken

    def take(self, now_ns: int) -> Taken[R]:
        """As the base, and say so."""
        taken = super().take(now_ns)
        if taken.batch:
            self._on_taken(taken.batch)
        return taken


class SequenceQueue(BatchQueue[R]):
    """A thread-safe queue of batches of sequences for the instances of one model."""

    __slots__ = ("_sequencer",)

    def __init__(
        self,
        policy: SequencePolicy,
        clock: Clock = time.monotonic_ns,
        run_times: RunTimes | None = None,
        on_taken: Callable[[list[R]], None] | None = None,
    ) -> None:
        """`on_taken` is told of each batch in the order in which they are taken, with the queue's lock held: it may
        take a lock of its own, and calls nothing that takes this one.
        """
        super().__init__(policy.queue, clock, run_times)
        self._sequencer: Sequencer[R] = Sequencer(policy) if on_taken is None else _ToldSequencer(policy, on_taken)
        self._queue = self._sequencer

    @property
    def live(self) -> int:
        """The sequences that have begun and not ended."""
        return self._sequencer.live

    def finish(self, requests: Sequence[R]) -> None:
        """End what `take` or `offer_and_take` began: the sequences may go on. A second time has no effect."""
        with self._lock:
            self._sequencer.finish(requests, self._clock())
            if self._sequencer.draining:
                self._work.notify_all()
            report = self._on_earlier_deadline
            earlier_ns = None if report is None else self._earlier_deadline_ns()
        if report is not None and earlier_ns is not None:
            report(earlier_ns)

    def expire(self) -> list[R]:
        """As the base says; a slot that became free may go to a sequence that waits for one."""
        expired = super().expire()
        with self._lock:
            self._pass_the_watch_on()
        return expired

    def cancel(self, request: R) -> bool:
        """As the base says; it may free a slot too."""
        cancelled = super().cancel(request)
        with self._lock:
            self._pass_the_watch_on()
        return cancelled
