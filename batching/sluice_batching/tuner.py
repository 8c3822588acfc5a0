"""Picks how much a queue merges and lets wait, so that requests keep a latency objective at the highest throughput.

What it knows is how long runs take, by size class of the batch, learned while they happen. Of each class it keeps the
last runs and looks at a high quantile of them, not at the mean: an objective for the 99th percentile is missed by the
slow ones.

A request that comes at the worst time waits for the run that has just begun, for the batches before its own, and for
its own. With `slow` the quantile for the batch size, `n` instances and `W` rows that wait, its own included:

    slow + ceil(W / (n x size)) x slow  <=  objective

* The size is the one with the most rows/s of those for which one batch keeps the objective: 2 x slow <= objective.
* `W` follows from it, and what comes when so much waits is refused at once. That is what keeps the promise to those who
  were let in, at any load.
* Sizes that have not been seen are tried from below, at most twice as large as the largest that keeps the objective,
  and as long as the line through two known sizes, which tells fixed from per-row costs, keeps it too. With one size
  known, all of its time is taken for that of its rows. Before the first run nobody is refused.
* A batch waits for others only where that was tried and brought more rows/s (`delay_trials.py`), until it has the rows
  that were found to come, and no longer than keeps the objective: while an instance runs the next batch grows by
  itself, and on a server that is not busy a delay costs latency and gains nothing.

Where the objective is hardly longer than two of the shortest runs, the quantile and the headroom cost throughput: there
the best fixed size that would just do it has no room for any disturbance.

A class that has not run for some time is forgotten, so that a slow spell does not rule out its size for ever.
"""

import sys
import threading
from collections.abc import Callable
from typing import Final

from sluice_batching.delay_trials import DelayTrials, Wait
from sluice_batching.run_times import RunTimes, smallest_of_class

HEADROOM_NS: Final = 1_000_000
"""What is kept of an objective for decoding, encoding and the network, which are not measured here."""

HEADROOM_SHARE: Final = 0.08
"""But no more of a short objective than this share."""

RUNS_KEPT: Final = 64
"""Of each class: enough for a quantile that three outliers do not move, few enough to follow a change in a second."""

QUANTILE: Final = 0.95
"""Of the runs kept. Two runs that are both slow are rarer than one: 2 x the 95th percentile is seldom exceeded."""

SAME_RATE: Final = 0.97
"""Sizes whose rows/s differ by less are equal, and the larger one is taken: it has more to spare at the next burst."""

DECIDE_AFTER_RUNS: Final = 4
"""A decision costs some 20 us, so not every run makes one; the first runs do."""

KNOWN_FOR_NS: Final = 10_000_000_000
"""A class that has not run for ten seconds is not known any more."""


class _Window:
    """The last runs of one size class; `rows` is the most rows of them."""

    __slots__ = ("_next", "_times_ns", "ended_ns", "rows")

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.ended_ns = 0
        self._times_ns: list[int] = []
        self._next = 0

    def record(self, rows: int, run_ns: int, now_ns: int) -> None:
        self.rows = max(self.rows, rows)
        self.ended_ns = now_ns
        if len(self._times_ns) < RUNS_KEPT:
            self._times_ns.append(run_ns)
        else:
            self._times_ns[self._next] = run_ns
            self._next = (self._next + 1) % RUNS_KEPT

    def quantiles_ns(self) -> tuple[int, int]:
        """The median and the high quantile."""
        ordered = sorted(self._times_ns)
        last = len(ordered) - 1
        return ordered[last // 2], ordered[min(last, int(len(ordered) * QUANTILE))]


class SloTuner(RunTimes):
    """The run times of a model with an objective, and what follows from them for its queue; for any thread.

    `_lock` is held while a run is recorded, and so while the queue is told: that one's lock is taken under it.
    """

    __slots__ = (
        "_budget_ns",
        "_delays",
        "_lock",
        "_max_rows",
        "_on_change",
        "_runs",
        "_slow_ns",
        "_windows",
        "merge_rows",
        "queue_rows",
    )

    def __init__(self, slo_ns: int, max_rows: int, instances: int = 1) -> None:
        """`slo_ns` is the objective for all but the slowest requests, `max_rows` what a batch may have at most."""
        super().__init__(instances)
        self._budget_ns = slo_ns - int(min(HEADROOM_NS, slo_ns * HEADROOM_SHARE))
        self._max_rows = max_rows
        self._windows: dict[int, _Window] = {}
        self._runs = 0
        self.merge_rows = 1
        """Up to how many rows requests are merged."""
        # How slow runs of so many are.
        self._slow_ns = 0
        self.queue_rows = sys.maxsize
        """How many rows may wait."""
        self._delays = DelayTrials(instances)
        self._lock = threading.Lock()
        self._on_change: Callable[[int, int, Wait], None] | None = None

    @property
    def wait(self) -> Wait:
        """What a batch waits for, and how long."""
        return self._delays.wait

    def steer(self, on_change: Callable[[int, int, Wait], None]) -> None:
        """Have `merge_rows`, `queue_rows` and `wait` followed: now, and whenever one of them changes."""
        self._on_change = on_change
        on_change(self.merge_rows, self.queue_rows, self.wait)

    def record(self, rows: int, run_ns: int, now_ns: int) -> None:
        """As the base does; every few runs decide anew."""
        with self._lock:
            super().record(rows, run_ns, now_ns)
            before = (self.merge_rows, self.queue_rows, self.wait)
            self._learn(rows, run_ns, now_ns)
            self._delays.record(rows, run_ns, now_ns, self.merge_rows, max(0, self._budget_ns - self._slow_ns))
            after = (self.merge_rows, self.queue_rows, self.wait)
            if self._on_change is not None and before != after:
                self._on_change(*after)

    def learn(self, rows: int, run_ns: int, now_ns: int) -> None:
        """Take a run into account that is none of the queue's: one that was measured before there were requests."""
        with self._lock:
            super().record(rows, run_ns, now_ns)
            self._learn(rows, run_ns, now_ns)

    def _learn(self, rows: int, run_ns: int, now_ns: int) -> None:
        smallest = smallest_of_class(rows)
        window = self._windows.get(smallest)
        if window is None:
            window = self._windows[smallest] = _Window(rows)
        window.record(rows, run_ns, now_ns)
        self._runs += 1
        if self._runs <= RUNS_KEPT or self._runs % DECIDE_AFTER_RUNS == 0:
            self._decide(now_ns)

    def _decide(self, now_ns: int) -> None:
        known = sorted(
            (window.rows, *window.quantiles_ns())
            for window in self._windows.values()
            if now_ns - window.ended_ns <= KNOWN_FOR_NS
        )
        merge_rows, slow_ns = self._best(known)
        self.merge_rows, self._slow_ns = merge_rows, slow_ns
        self.queue_rows = merge_rows * self._instances * max(1, self._budget_ns // slow_ns - 1)

    def _best(self, known: list[tuple[int, int, int]]) -> tuple[int, int]:
        """The size with the most rows/s that keeps the objective, or may, and how slow its runs are.

        `known` are (rows, median, high quantile) by rising size; there is one at least. Where none keeps it, a single
        row is tried. Where not even that one does, as on a machine that now and then has other things to do, the size
        counts of which most runs do: all smaller ones would answer fewer in time.
        """
        keeping = [each for each in known if 2 * each[2] <= self._budget_ns]
        if not keeping:
            mostly = [each for each in known if 2 * each[1] <= self._budget_ns]
            if not mostly or known[0][0] > 1:
                return 1, known[0][2]
            rows, median_ns, _ = max(mostly, key=lambda each: each[0] / each[1])
            return rows, median_ns
        best_rate = max(rows / median_ns for rows, median_ns, _ in keeping)
        best = [each for each in keeping if each[0] / each[1] >= SAME_RATE * best_rate][-1]
        rows, _, slow_ns = best
        if best is not keeping[-1]:
            return rows, slow_ns  # larger ones keep it too, and gain nothing
        above = next((each for each in known if each[0] > rows), None)
        row_ns = self._row_ns(best, above or (known[-2] if len(known) > 1 else None))
        size = rows + int((self._budget_ns / 2 - slow_ns) / row_ns)
        size = min(size, 2 * rows, self._max_rows, above[0] - 1 if above else self._max_rows)
        return size, slow_ns + int((size - rows) * row_ns)

    @staticmethod
    def _row_ns(one: tuple[int, int, int], other: tuple[int, int, int] | None) -> float:
        """What a row more costs by two sizes, at least a thousandth of a run; at most its share of one size alone."""
        if other is None:
            return one[2] / one[0]
        return max((other[2] - one[2]) / (other[0] - one[0]), one[2] / 1000)
