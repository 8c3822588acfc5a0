"""The highest rate at which a server keeps its objectives: a search over measurements, and what one must show. Pure.

A measurement is one open-loop load at one rate, cut into windows; in each window all objectives are met or not.
Latencies of neighbouring requests depend on each other (they waited in the same queue), so bounds that take samples as
independent would promise too much. Windows long enough to hold many busy periods are nearly independent, and they are
counted by a sign test: if half of all windows missed the objectives, `k` or more of `n` would meet them by chance with
a probability of `sum(C(n, i) for i >= k) / 2**n`. A rate holds when that is at most 1 - confidence; it fails when so
many missed them. What is neither is measured again, and all windows together decide.

A server that takes in more than it answers is no server at its limit, however patient the objectives: a load during
which the number of open requests grows by more than a twentieth of the requests has no window that counts as met.

A miss is the generator's where it used up its core, or was late. It is the server's all the same, although the
generator was late, if that was no more than a tenth of what the server took, and the miss is there counted from the
real sending too, and by more than the generator was late.

Invariants of the search:
- A rate that is found has held twice, and the one above it, within the precision, has twice not held.
- What a generator could not send is never the server's limit: it is measured again, and ends the search then.
- No more than `MAX_STEPS` measurements are made.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from sluice_client.load.latencies import NOT_SENT, quantile, summarize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice_client.load.latencies import Generator, Quantiles, Records
    from sluice_client.load.objectives import Objective

GROWTH_MAX: Final = 0.05
"""Of the requests of a load, that may be open more at its end than at its begin: about the precision of the search."""

GROWTH_DEVIATIONS: Final = 3.0
"""What the number of open requests may differ by chance, in square roots of it (as of a Poisson distribution)."""

LAG_SHARE: Final = 0.1
"""Of a time that is judged: by so much the generator may be late, and it is still the server that is seen."""

WIDEST: Final = 2.0
"""The ratio of two rates that are tried one after the other where nothing is known yet."""

CLEAR_AFTER: Final = 2
"""Measurements of a rate that are not clear together have not shown that it holds."""

TRIES: Final = 3
"""Of a rate: what else runs on the generator's machine may spoil one measurement, or one more."""

MAX_STEPS: Final = 100
"""Ten doublings and ten bisections, each measured twice, and as much again where they contradict each other."""


class Verdict(enum.Enum):
    """What the windows of a rate say, with confidence."""

    HOLDS = "holds"
    FAILS = "fails"
    UNCLEAR = "unclear"


class End(enum.Enum):
    """Why a search ended."""

    FOUND = "found"
    NEVER = "the objectives are not met at the lowest rate either"
    ALWAYS = "the objectives are still met at the highest rate"
    GENERATOR = "the generator is the limit"
    UNSTEADY = "measurements of the same rate contradict each other"


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement: how many of its windows met all objectives, and its curve's point over all windows.

    `is_behind`: the server took in more than it answered, so no window counts. `problem`: why the generator was the
    bottleneck, "" when it was not.
    """

    rate_per_s: float
    met: int
    windows: int
    is_behind: bool
    response: Quantiles
    error_ratio: float
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a search found: the highest rate that held (0 when none did), why it ended, and all it measured."""

    rate_per_s: float
    end: End
    steps: tuple[Step, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """Where to look: from `start_per_s`, between the other two rates, until the highest that holds and the lowest that
    does not are within `precision` (0.05: five per cent) of each other."""

    start_per_s: float
    least_per_s: float
    most_per_s: float
    precision: float = 0.05
    confidence: float = 0.95


@dataclass(frozen=True, slots=True)
class Windows:
    """Which part of a load counts: `number` windows of `width_s` seconds each, after `warmup_s` that does not."""

    warmup_s: float
    width_s: float
    number: int

    @property
    def end_s(self) -> float:
        """When the last one ends, in seconds from the start of the load."""
        return self.warmup_s + self.width_s * self.number


def observe(
    rate_per_s: float, records: Records, windows: Windows, objectives: Sequence[Objective], generator: Generator
) -> Step:
    """What a load shows, and whether that is the generator's doing."""
    met = sum(
        all(objective.is_met(window) for objective in objectives)
        for window in records.windows(windows.warmup_s, windows.width_s, windows.number)
    )
    is_behind = falls_behind(records, windows.warmup_s, windows.end_s)
    inside = summarize(records.between(windows.warmup_s, windows.end_s), windows.end_s - windows.warmup_s)
    is_servers = not generator.is_busy and missed_beyond(records.as_sent(), windows, objectives, generator.lag_p99_s)
    return Step(
        rate_per_s=rate_per_s,
        met=0 if is_behind else met,
        windows=windows.number,
        is_behind=is_behind,
        response=inside.response,
        error_ratio=inside.error_ratio,
        problem="" if is_servers else generator.problem,
    )


def missed_beyond(as_sent: Records, windows: Windows, objectives: Sequence[Objective], lag_s: float) -> bool:
    """Whether a load is more than the server can do, also if the generator was late, and counted from the real sending.

    The lag has to be small next to what the server takes, or it is what the server takes that may be the generator's.
    What was held up comes all at once then, so the last of it waits for up to so much longer.
    """
    inside = as_sent.between(windows.warmup_s, windows.end_s)
    if not lag_s <= LAG_SHARE * quantile(inside.response_s, 0.99):
        return False
    return falls_behind(as_sent, windows.warmup_s, windows.end_s) or any(
        objective.value(inside) > objective.limit + (lag_s if objective.share else 0.0) for objective in objectives
    )


def falls_behind(records: Records, first_s: float, last_s: float) -> bool:
    """Whether clearly more requests were open at the end of this time than at its begin."""
    before, after = (_open_at(records, at_s) for at_s in (first_s, last_s))
    allowed = GROWTH_MAX * len(records.between(first_s, last_s)) + GROWTH_DEVIATIONS * math.sqrt(before + 1)
    return after - before > allowed


def _open_at(records: Records, at_s: float) -> int:
    """How many requests were due by then and had not ended; those that were never sent are not open."""
    sent = records.codes != NOT_SENT
    return int(np.count_nonzero((records.intended_s < at_s) & (records.ended_s >= at_s) & sent))


def windows_needed(windows: int, confidence: float) -> int | None:
    """How many of so many windows must agree for this confidence; None when not even all of them are enough."""
    chance, needed = 0.0, None
    for agreeing in range(windows, 0, -1):
        chance += math.comb(windows, agreeing) / 2**windows
        if chance > 1 - confidence + 1e-12:
            break
        needed = agreeing
    return needed


def judge(met: int, windows: int, confidence: float) -> Verdict:
    """What `met` of `windows` say."""
    needed = windows_needed(windows, confidence)
    if needed is not None and met >= needed:
        return Verdict.HOLDS
    return Verdict.FAILS if needed is not None and windows - met >= needed else Verdict.UNCLEAR


def replicas_needed(target_per_s: float, capacity_per_s: float, headroom: float) -> int:
    """How many servers of this capacity a rate takes, if each keeps this share of its capacity free."""
    # Rounded first: 0.7 * 1000 is a little less than 700.
    return math.ceil(round(target_per_s / (capacity_per_s * (1 - headroom)), 9))


def find_capacity(measure: Callable[[float], Step], plan: Plan, tell: Callable[[Step, Verdict], None]) -> Capacity:
    """Search the highest rate that holds: double until one does not, halve the ratio between them, confirm both.

    `measure(rate_per_s)` loads the server and shows what came of it; `tell` hears of each measurement what it means,
    with those of the same rate before it where it was made again.
    """
    search = _Search(measure, plan, tell)
    try:
        return search.run()
    except _Stop as stop:
        return Capacity(search.low_per_s, stop.end, tuple(search.steps))


class _Stop(Exception):
    """The search cannot go on."""

    def __init__(self, end: End) -> None:
        super().__init__(end)
        self.end = end


class _Search:
    """The state of a search: all measurements, the highest rate that held (0 for none), the lowest that did not."""

    def __init__(self, measure: Callable[[float], Step], plan: Plan, tell: Callable[[Step, Verdict], None]) -> None:
        self._measure = measure
        self._plan = plan
        self._tell = tell
        self.steps: list[Step] = []
        self.low_per_s, self._high_per_s = 0.0, math.inf

    def run(self) -> Capacity:
        closest = 1 + self._plan.precision
        if self._holds(self._plan.start_per_s):
            self._climb(self._plan.start_per_s, WIDEST)
        else:
            self._descend(self._plan.start_per_s, WIDEST)
        while True:
            self._bisect(closest)
            # Both ends have been chosen by what they gave, so each may owe that to luck: both have to give it again.
            if not self._holds(self.low_per_s):
                self._descend(self.low_per_s, closest)
            elif self._holds(self._high_per_s):
                self._climb(self._high_per_s, closest)
            else:
                return Capacity(self.low_per_s, End.FOUND, tuple(self.steps))

    def _climb(self, held_per_s: float, ratio: float) -> None:
        """Go up from a rate that held, in growing steps, to one that does not."""
        self.low_per_s = held_per_s
        while self.low_per_s < self._plan.most_per_s:
            rate_per_s = min(self.low_per_s * ratio, self._plan.most_per_s)
            if not self._holds(rate_per_s):
                self._high_per_s = rate_per_s
                return
            self.low_per_s, ratio = rate_per_s, min(ratio**2, WIDEST)
        raise _Stop(End.ALWAYS)

    def _descend(self, missed_per_s: float, ratio: float) -> None:
        """Go down from a rate that did not hold, in growing steps, to one that does."""
        self._high_per_s, self.low_per_s = missed_per_s, 0.0
        while self._high_per_s > self._plan.least_per_s:
            rate_per_s = max(self._high_per_s / ratio, self._plan.least_per_s)
            if self._holds(rate_per_s):
                self.low_per_s = rate_per_s
                return
            self._high_per_s, ratio = rate_per_s, min(ratio**2, WIDEST)
        raise _Stop(End.NEVER)

    def _bisect(self, closest: float) -> None:
        """Bring the two ends together."""
        while self._high_per_s / self.low_per_s > closest * (1 + 1e-9):
            middle_per_s = math.sqrt(self.low_per_s * self._high_per_s)
            if self._holds(middle_per_s):
                self.low_per_s = middle_per_s
            else:
                self._high_per_s = middle_per_s

    def _holds(self, rate_per_s: float) -> bool:
        """Measure a rate, and again where that is not clear, or was the generator's doing."""
        counting: list[Step] = []
        for _ in range(TRIES):
            step = self._take(rate_per_s)
            met, windows = step.met + sum(s.met for s in counting), step.windows + sum(s.windows for s in counting)
            verdict = judge(met, windows, self._plan.confidence)
            self._tell(step, verdict)
            if verdict is Verdict.HOLDS:
                return True
            if not step.problem:
                counting.append(step)
                if verdict is Verdict.FAILS or len(counting) == CLEAR_AFTER:
                    return False
        if step.problem:
            raise _Stop(End.GENERATOR)
        return False

    def _take(self, rate_per_s: float) -> Step:
        if len(self.steps) >= MAX_STEPS:
            raise _Stop(End.UNSTEADY)
        self.steps.append(self._measure(rate_per_s))
        return self.steps[-1]
