"""When requests come, for simulations and for load: open-loop arrival processes, as seconds from the start.

A process is a rate over time and a spacing. The rate says how many requests are due until a time; the spacing says how
far apart they are in units of one request: `even`, `exponential` (with a constant rate: Poisson), `grouped` (bursts).
Each arrival is where the expected number of requests reaches the sum of the spacings (a change of the time scale, as
for inhomogeneous Poisson processes), so every spacing goes with every rate, and no answer holds the next request back.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator

STRAIGHT_S: Final = 1e-5
"""In so short a time a rate is as good as constant."""


class Rate(Protocol):
    """Requests a second as a function of time; every one of them goes on for ever."""

    def until(self, time_s: float) -> float:
        """How many requests are expected from the start until `time_s`; grows without bound."""
        ...


@dataclass(frozen=True)
class Constant:
    """Always the same number of requests a second."""

    per_s: float

    def __post_init__(self) -> None:
        _above_zero(per_s=self.per_s)

    def until(self, time_s: float) -> float:
        """As `Rate`."""
        return self.per_s * time_s


@dataclass(frozen=True)
class Ramp:
    """From one rate to another in a straight line, and then on at the last."""

    first_per_s: float
    last_per_s: float
    over_s: float

    def __post_init__(self) -> None:
        _above_zero(last_per_s=self.last_per_s, over_s=self.over_s)
        _not_negative(first_per_s=self.first_per_s)

    def until(self, time_s: float) -> float:
        """As `Rate`."""
        rising_s = min(time_s, self.over_s)
        slope = (self.last_per_s - self.first_per_s) / self.over_s
        return (self.first_per_s + slope * rising_s / 2) * rising_s + self.last_per_s * (time_s - rising_s)


@dataclass(frozen=True)
class Diurnal:
    """A day in short: lowest at the start, highest after half a period, and so on (a sine)."""

    lowest_per_s: float
    highest_per_s: float
    period_s: float

    def __post_init__(self) -> None:
        _above_zero(highest_per_s=self.highest_per_s, period_s=self.period_s)
        _not_negative(lowest_per_s=self.lowest_per_s)
        if self.lowest_per_s > self.highest_per_s:
            raise ValueError(f"lowest_per_s is {self.lowest_per_s}, above highest_per_s, {self.highest_per_s}")

    def until(self, time_s: float) -> float:
        """As `Rate`."""
        mean, swing = (self.highest_per_s + self.lowest_per_s) / 2, (self.highest_per_s - self.lowest_per_s) / 2
        turn = 2 * math.pi / self.period_s
        return mean * time_s - swing * math.sin(turn * time_s) / turn


def even() -> Iterator[float]:
    """Spacings of exactly one request; the first comes at once."""
    yield 0.0
    while True:
        yield 1.0


def exponential(seed: int) -> Iterator[float]:
    """Independent spacings of one request on average, as of clients that do not know of each other."""
    chance = random.Random(seed)  # noqa: S311 # reproducible, not secret
    while True:
        yield chance.expovariate(1.0)


def grouped(size: int) -> Iterator[float]:
    """`size` requests at once, and then none until as many more are due."""
    _above_zero(size=size)
    yield from repeat(0.0, size)
    while True:
        yield float(size)
        yield from repeat(0.0, size - 1)


def arrivals(rate: Rate, spacing: Iterator[float]) -> Iterator[float]:
    """The times at which requests come, in seconds from the start, ascending and as long as `spacing` goes on."""
    due, now_s = 0.0, 0.0
    for gap in spacing:
        due += gap
        now_s = _when(rate, due, now_s)
        yield now_s


def _when(rate: Rate, due: float, earliest_s: float) -> float:
    """The first time from `earliest_s` on until which `due` requests are expected."""
    low_s = earliest_s
    if rate.until(low_s) >= due:
        return low_s
    step_s = 1e-3
    while rate.until(low_s + step_s) < due:
        low_s += step_s
        step_s *= 2
    high_s = low_s + step_s
    while high_s - low_s > STRAIGHT_S:
        middle_s = (low_s + high_s) / 2
        if rate.until(middle_s) < due:
            low_s = middle_s
        else:
            high_s = middle_s
    missing = (due - rate.until(low_s)) / (rate.until(high_s) - rate.until(low_s))
    return low_s + missing * (high_s - low_s)


def _above_zero(**values: float) -> None:
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, expected a number above 0")


def _not_negative(**values: float) -> None:
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} is {value}, expected 0 or more")
