"""Finds out whether a queue delay raises the throughput of a busy model, by trying it: pure, and without a clock.

Where requests come whatever becomes of those before, no delay is needed: while an instance runs, the next batch grows
by itself. It is clients who wait for an answer before they ask again that make small batches: one part of them runs
while the other waits, and so for ever, as either finds the instance taken by the other when it comes back. A delay in
which all of them come together makes one run of two, and from then on a batch goes as soon as it has as many rows as
there are.

How many those are follows from the batches: with `n` instances there are n + 1 parts, of which one waits. So batches of
(n + 1) / n times the rows are tried, and a delay of `DELAY_RUNS` runs: it has to be longer than the run that keeps the
parts asunder. It is what whoever asks after a pause costs the others, and no more: a full batch waits for nothing.

Whether that pays is measured: in pairs of epochs of a few runs, the first without the delay and the second with it. A
trial ends when the second of a pair does not bring more rows/s than the first; it is won when all pairs say the same,
and together that it is worth it. Chance, bursts and changes of load hardly win it, and what they win does no harm: the
delay is within the objective, is tried anew after `REST_NS`, and ends as soon as the instances have time to spare.
"""

from typing import Final, NamedTuple

EPOCH_RUNS: Final = 8
"""Runs of an epoch: several turns of all clients, and an even number, as parts take turns."""

SETTLING_RUNS: Final = 3
"""Of each instance, that follow a change and are not counted, as they were made up before it."""

PAIRS: Final = 4
"""All of which have to agree."""

WORTH: Final = 1.08
"""The rows/s that a delay has to bring, over those without it."""

BUSY: Final = 0.8
"""The share of time in which instances run, from which on throughput is limited by them."""

BUSY_DELAYED: Final = 0.6
"""The same with a delay, as clients take some time to come back. Below it, too many batches wait in vain."""

FULL: Final = 0.9
"""Batches of this share of the most rows gain nothing from more."""

DELAY_RUNS: Final = 1.5
"""The delay that is tried, in runs of the batches so far."""

REST_NS: Final = 10_000_000_000
"""Between two trials: each costs throughput while it goes on, where it is lost."""


class Wait(NamedTuple):
    """What a batch waits for: so many rows (0: as many as are merged), but no longer than this; 0 ns is not at all."""

    rows: int = 0
    delay_ns: int = 0


NO_WAIT: Final = Wait()


class _Epoch:
    """Some runs under the same rule; the first ones are not counted."""

    __slots__ = ("_began_ns", "_ended_ns", "_settling", "busy_ns", "rows", "runs")

    def __init__(self, settling: int) -> None:
        self._settling = settling
        self._began_ns = self._ended_ns = 0
        self.busy_ns = self.rows = self.runs = 0

    def record(self, rows: int, run_ns: int, now_ns: int) -> bool:
        """Count a run; whether it was the last of the epoch."""
        if self._settling:
            self._settling -= 1
            self._began_ns = now_ns
            return False
        self.rows += rows
        self.busy_ns += run_ns
        self.runs += 1
        self._ended_ns = now_ns
        return self.runs == EPOCH_RUNS

    @property
    def length_ns(self) -> int:
        """From the end of the run before the first to that of the last."""
        return max(1, self._ended_ns - self._began_ns)

    @property
    def rate(self) -> float:
        """Rows per nanosecond."""
        return self.rows / self.length_ns


class DelayTrials:
    """What the batches of one queue wait for, by what its runs show. Not thread-safe; time never goes backwards."""

    __slots__ = ("_base", "_challenger", "_epoch", "_gains", "_instances", "_rest_until_ns", "wait")

    def __init__(self, instances: int = 1) -> None:
        self._instances = instances
        self.wait = NO_WAIT
        """In effect from now on."""
        # What is compared with no wait; the first epoch of the pair that is under way; what the pairs so far have said.
        self._challenger: Wait | None = None
        self._base: _Epoch | None = None
        self._gains: list[float] = []
        self._rest_until_ns = 0
        self._epoch = self._new_epoch()

    def __repr__(self) -> str:
        trial = "" if self._challenger is None else f", {self._challenger} is tried"
        return f"<DelayTrials: {self.wait}{trial}>"

    def record(self, rows: int, run_ns: int, now_ns: int, most_rows: int, most_delay_ns: int) -> None:
        """Note a run that has ended now; up to `most_rows` may be merged, and `most_delay_ns` waited for them."""
        epoch = self._epoch
        if not epoch.record(rows, run_ns, now_ns):
            return
        self._epoch = self._new_epoch()
        busy = BUSY_DELAYED if self.wait.delay_ns else BUSY
        if epoch.busy_ns < busy * epoch.length_ns * self._instances:
            self._end(NO_WAIT, now_ns)
        elif self._challenger is not None:
            self._compare(self._challenger, epoch, now_ns)
        elif now_ns >= self._rest_until_ns:
            if self.wait.delay_ns:
                self.wait = NO_WAIT  # and from the next epoch on it has to win again
            elif epoch.rows < FULL * most_rows * epoch.runs:
                self._begin(epoch, most_rows, most_delay_ns)

    def _begin(self, epoch: _Epoch, most_rows: int, most_delay_ns: int) -> None:
        """Begin a trial after an epoch without a wait, which is its first."""
        rows = round(epoch.rows / epoch.runs * (self._instances + 1) / self._instances)
        delay_ns = int(epoch.busy_ns / epoch.runs * DELAY_RUNS)
        self._challenger = self.wait = Wait(min(rows, most_rows), min(delay_ns, most_delay_ns))
        self._base = epoch

    def _compare(self, challenger: Wait, epoch: _Epoch, now_ns: int) -> None:
        """An epoch of a trial has ended."""
        if self._base is None:
            self._base, self.wait = epoch, challenger
            return
        self._gains.append(epoch.rate / self._base.rate)
        self._base, self.wait = None, NO_WAIT
        if self._gains[-1] <= 1:
            self._end(NO_WAIT, now_ns)
        elif len(self._gains) == PAIRS:
            self._end(challenger if sum(self._gains) >= PAIRS * WORTH else NO_WAIT, now_ns)

    def _end(self, wait: Wait, now_ns: int) -> None:
        self.wait = wait
        self._challenger = self._base = None
        self._gains = []
        self._rest_until_ns = now_ns + REST_NS

    def _new_epoch(self) -> _Epoch:
        return _Epoch(SETTLING_RUNS * self._instances)
