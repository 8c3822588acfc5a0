"""What several rounds of a measurement come to: their median, their extremes and their spread."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


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
