"""Whether a run should wait a moment for the clients who have just been answered, and for how many rows.

Clients that send their next request when they have the answer to the last one (a closed loop: most batch jobs, and
every pool of workers) come back right after a run. An instance that takes at once what waits then splits them into two
halves for ever: one runs while the other waits. Where two runs of half the size take clearly longer than one, a short
wait puts all of them into one batch. Disk schedulers do the same for the same reason, and call it anticipation.

The wait is at most half of what it would save, and a small share of the run. Whether the clients do come back is
learned: as long as most of the rows that were waited for do not come, as in an open loop, nothing is waited for, and it
is only tried again from time to time. No clock: the caller waits, and tells what came.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

SHARE: Final = 0.1
"""Of the time of the run that is waited for: what a request may have to wait longer than without."""

LEAST_NS: Final = 500_000
"""A shorter wait is not worth its wake-ups: clients need about as long to come back."""

WORTH: Final = 0.5
"""Of the rows waited for at least so many have come of late, on average, or nothing is waited for."""

WEIGHT: Final = 0.125
"""Of the newest wait in that average."""

RETRY_EVERY: Final = 64
"""So many runs go by without a wait, before it is tried whether clients come back by now."""


class Company(NamedTuple):
    """What to wait for: until so many rows wait in all, or for so long."""

    rows: int
    within_ns: int


class Anticipation:
    """What a model's only instance waits for after its runs. For one thread."""

    __slots__ = ("_came", "_runs_without", "_sizes", "_times_ns")

    def __init__(self, run_times_ns: Sequence[tuple[int, float]]) -> None:
        """(rows, nanoseconds of a run) of at least one batch size, by rising sizes."""
        self._sizes = [rows for rows, _ in run_times_ns]
        self._times_ns = [time_ns for _, time_ns in run_times_ns]
        self._came = 1.0
        self._runs_without = 0

    def __repr__(self) -> str:
        return f"<Anticipation: {self._came:.0%} of the rows waited for have come of late>"

    def can_pay(self, merge_rows: int) -> bool:
        """Whether there is anything to wait for with batches of up to so many rows."""
        return any(self._within_ns(alone, merge_rows) >= LEAST_NS for alone in {1, max(1, merge_rows // 2)})

    def expect(self, ran_rows: int, waiting_rows: int, merge_rows: int) -> Company | None:
        """What to wait for after a run of so many rows, when so many others wait already; None: run those now."""
        rows = min(waiting_rows + ran_rows, merge_rows)
        within_ns = self._within_ns(max(1, waiting_rows), rows)
        if within_ns < LEAST_NS:
            return None
        if self._came < WORTH and self._runs_without < RETRY_EVERY:
            self._runs_without += 1
            return None
        self._runs_without = 0
        return Company(rows, within_ns)

    def note(self, company: Company, waiting_rows: int, rows: int) -> None:
        """Learn from a wait: so many rows waited when it began, and so many at its end."""
        missing = company.rows - waiting_rows
        came = min(max(0, rows - waiting_rows), missing) / missing
        self._came += WEIGHT * (came - self._came)

    def _within_ns(self, alone: int, rows: int) -> int:
        """How long it pays to wait until `rows` are there, of which `alone` are."""
        if rows <= alone:
            return 0
        saved_ns = self._run_ns(alone) + self._run_ns(rows - alone) - self._run_ns(rows)
        return int(min(saved_ns / 2, SHARE * self._run_ns(rows)))

    def _run_ns(self, rows: int) -> float:
        """How long a run takes, on the line between the measured sizes; beyond them at the rate of the nearest."""
        place = bisect_left(self._sizes, rows)
        if place == len(self._sizes):
            return self._times_ns[-1] * rows / self._sizes[-1]
        size, time_ns = self._sizes[place], self._times_ns[place]
        if size == rows or not place:
            return time_ns
        smaller, smaller_ns = self._sizes[place - 1], self._times_ns[place - 1]
        return smaller_ns + (time_ns - smaller_ns) * (rows - smaller) / (size - smaller)
