"""How long the runs of a model take, learned from its runs: what work is refused by that would end too late.

Times are kept by size class of the batch: sizes that agree in their three highest bits, so 1 to 7 rows each have their
own, then 8 to 9, 10 to 11, 12 to 13, 14 to 15, 16 to 19 and so on. What is predicted for a batch is the median of the
last runs of its class: when it says that a request would end after its deadline, that is more likely than not. Of a
class that is not known the next smaller one speaks, as a larger batch hardly takes less time; where there is none, 0,
by which nothing is refused.

A wrong prediction must not confirm itself, as work that is refused is not measured. So a class is known after a few
runs only, one slow first run being no evidence, and for a while only: then the next request is run, and measured.

For any thread, without a lock: each field is written whole, and a reading that falls between two writes differs by one
run of the last sixteen.
"""

from typing import Final

RUNS_KEPT: Final = 16
"""Of a size class: enough for a median that one outlier does not move, few enough to follow a change soon."""

RUNS_NEEDED: Final = 3
"""Before a size class is known: the first run of a shape often takes much longer than all others."""

KNOWN_FOR_NS: Final = 1_000_000_000
"""A second without a run of its size, and eight runs' time on top, make a prediction doubtful."""

KNOWN_FOR_RUNS: Final = 8

DANGER_RUNS: Final = 64
"""Over so many runs a long one is forgotten as a sign of danger."""


def smallest_of_class(rows: int) -> int:
    """The smallest size of the class of a batch: its three highest bits."""
    shift = max(0, rows.bit_length() - 3)
    return rows >> shift << shift


class _SizeClass:
    """The last runs of batches of about one size; `rows` is the smallest of its sizes."""

    __slots__ = ("_median_ns", "_of_runs", "ended_ns", "rows", "runs", "times_ns")

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.times_ns = [0] * RUNS_KEPT
        self.runs = 0
        self.ended_ns = 0
        self._median_ns = 0
        self._of_runs = 0

    def median_ns(self) -> int:
        """The lower median of the runs kept; there is one."""
        if self._of_runs != self.runs:
            self._of_runs = self.runs
            kept = sorted(self.times_ns[: self.runs])
            self._median_ns = kept[(len(kept) - 1) // 2]
        return self._median_ns

    def is_known(self, now_ns: int) -> bool:
        """Whether there are runs enough, and recent ones."""
        if self.runs < RUNS_NEEDED:
            return False
        return now_ns - self.ended_ns <= KNOWN_FOR_NS + KNOWN_FOR_RUNS * self.median_ns()


class RunTimes:
    """The run times of one model version, on `instances` that run at the same time."""

    __slots__ = ("_by_rows", "_classes", "_instances", "danger_ns")

    def __init__(self, instances: int = 1) -> None:
        self._instances = instances
        self.danger_ns = 0
        """A request with more time left than this need not ask for predictions: twice the longest run of late."""
        # By falling size.
        self._classes: list[_SizeClass] = []
        # The same by every number of rows that has been recorded.
        self._by_rows: dict[int, _SizeClass] = {}

    def __repr__(self) -> str:
        known = ", ".join(f"{each.rows}: {each.median_ns() / 1e6:.3f} ms" for each in reversed(self._classes))
        return f"<RunTimes by rows: {known or 'none yet'}>"

    def record(self, rows: int, run_ns: int, now_ns: int) -> None:
        """Note a run that has ended now: the rows of its batch, and its time from being taken to its answers."""
        size = self._by_rows.get(rows)
        if size is None:
            size = self._by_rows[rows] = self._class_of(rows)
        size.times_ns[size.runs % RUNS_KEPT] = run_ns
        size.ended_ns = now_ns
        size.runs += 1
        twice_ns = 2 * run_ns
        if twice_ns > self.danger_ns:
            self.danger_ns = twice_ns
        else:
            self.danger_ns -= (self.danger_ns - twice_ns) // DANGER_RUNS

    def predict_ns(self, rows: int, now_ns: int) -> int:
        """How long a batch of so many rows will take if it starts now; 0 = not known."""
        for size in self._classes:
            if size.rows <= rows and size.is_known(now_ns):
                return size.median_ns()
        return 0

    def wait_ns(self, rows: int) -> int | None:
        """How long so many rows take that wait, on all instances, at the best throughput measured; None before a run.

        An old measurement is better here than none.
        """
        if not self._classes:
            return None
        row_ns = min(size.median_ns() / size.rows for size in self._classes)
        return round(rows * row_ns / self._instances)

    def _class_of(self, rows: int) -> _SizeClass:
        smallest = smallest_of_class(rows)
        for size in self._classes:
            if size.rows == smallest:
                return size
        added = _SizeClass(smallest)
        # A new list, so that who reads the old one meets no gap.
        self._classes = sorted([*self._classes, added], key=lambda each: -each.rows)
        return added
