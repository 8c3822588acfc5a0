"""The arithmetic of the benchmark: quantiles of latencies, medians of rounds and their spread."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass


def quantile(ordered: Sequence[int], share: float) -> int:
    """The smallest value that at least this share of the values does not exceed (nearest rank); `ordered` ascends.

    Nearest rank gives a latency that really occurred, also at the thin upper end.
    """
    if not ordered:
        raise ValueError("no values to take a quantile of")
    if not 0 < share <= 1:
        raise ValueError(f"a share is above 0 and at most 1, got {share}")
    # Rounded first: 0.07 * 100 is a little more than 7 and would give the eighth value.
    return ordered[math.ceil(round(share * len(ordered), 9)) - 1]


@dataclass(frozen=True, slots=True)
class Summary:
    """What several rounds of one measurement have given."""

    median: float
    low: float
    high: float

    @property
    def spread(self) -> float:
        """Half the distance between the extremes, as a share of the median."""
        return (self.high - self.low) / 2 / self.median if self.median else 0.0


def summarize(values: Sequence[float]) -> Summary:
    """Median and extremes of at least one value."""
    return Summary(statistics.median(values), min(values), max(values))
