"""Distributions of one model version's latencies, for `--metrics-config`: quantiles of the last minute, a histogram.

Only servers that were asked for them have any: `ModelStatistics.latencies` is None otherwise. What is kept of a value
is which of many narrow bins it fell into, as HdrHistogram does: so adding takes no sorting, and a quantile is within
`QUANTILE_ERROR` of its value whatever the distribution is. A window is a ring of slices, of which the oldest is dropped
as a whole. One lock guards all of it; it is taken once per batch.
"""

from __future__ import annotations

import math
import threading
import time
from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

WINDOW_NS = 60_000_000_000
"""Quantiles are over the last minute, as Triton's client library for Prometheus has it."""

SLICES = 5
"""Parts in which a window forgets, as there: values leave it up to a fifth of it too early."""

BITS = 7
"""Of a value's leading binary digits that tell its bin: 64 bins from one power of two to the next."""

QUANTILE_ERROR = 1 / 128
"""The middle of a bin is no further from any of its values than this share of the value."""

QUANTILES_DEFAULT = (0.5, 0.9, 0.95, 0.99, 0.999)
"""Triton's."""

HISTOGRAM_MS = (100, 500, 2000, 5000)
"""Triton's upper bounds of its histogram of latencies, in milliseconds."""

MEASURED = ("request", "queue", "compute_input", "compute_infer", "compute_output")
"""What has a summary, by its name in Triton's metrics."""

_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class LatencyOptions:
    """What to keep of latencies: `quantiles` (0..1) of summaries, none for no summaries; whether a histogram too."""

    quantiles: tuple[float, ...] = ()
    histogram: bool = False


@dataclass(frozen=True, slots=True)
class Summary:
    """A window's quantiles in nanoseconds, in the order of the options, NaN without any value; count and sum of all."""

    quantiles: tuple[tuple[float, float], ...]
    count: int
    sum_ns: int


@dataclass(frozen=True, slots=True)
class Histogram:
    """How many values were at most `HISTOGRAM_MS` each, cumulative; count and sum of all."""

    at_most: tuple[int, ...]
    count: int
    sum_ns: int


@dataclass(frozen=True, slots=True)
class LatencySnapshot:
    """The distributions at one moment: those of `MEASURED`, or none; None for no histogram."""

    summaries: Mapping[str, Summary] = field(default_factory=dict)
    first_response: Histogram | None = None


class Window:
    """The values of the last `WINDOW_NS`, in bins. Not for several threads at once; `now_ns` never goes back."""

    __slots__ = ("_slices", "count", "sum_ns")

    def __init__(self) -> None:
        self._slices: deque[tuple[int, dict[int, int]]] = deque()
        self.count = self.sum_ns = 0

    def add(self, now_ns: int, values_ns: Iterable[int], times: int = 1) -> None:
        """Add values, each so many times; negative ones count as 0."""
        number = self._forget(now_ns)
        if not self._slices or self._slices[-1][0] != number:
            self._slices.append((number, {}))
        bins = self._slices[-1][1]
        for value_ns in values_ns:
            # The value's leading digits behind how many follow them: bins are in the order of their values.
            shift = value_ns.bit_length() - BITS
            place = (shift << BITS) | (value_ns >> shift) if shift > 0 else max(0, value_ns)
            bins[place] = bins.get(place, 0) + times
            self.count += times
            self.sum_ns += value_ns * times

    def summary(self, now_ns: int, wanted: Sequence[float]) -> Summary:
        """The quantiles of what the window has now, in any order."""
        self._forget(now_ns)
        merged: dict[int, int] = {}
        for _, bins in self._slices:
            for place, count in bins.items():
                merged[place] = merged.get(place, 0) + count
        places = sorted(merged)
        ranks = list(accumulate(merged[place] for place in places))
        return Summary(
            tuple((quantile, _at_rank(places, ranks, quantile)) for quantile in wanted), self.count, self.sum_ns
        )

    def _forget(self, now_ns: int) -> int:
        number = now_ns * SLICES // WINDOW_NS
        while self._slices and self._slices[0][0] <= number - SLICES:
            self._slices.popleft()
        return number


def _at_rank(places: Sequence[int], ranks: Sequence[int], quantile: float) -> float:
    if not places:
        return math.nan
    rank = max(1, math.ceil(quantile * ranks[-1]))
    place = places[bisect_left(ranks, rank)]
    shift = place >> BITS
    if not shift:
        return float(place)
    lowest = (place & ((1 << BITS) - 1)) << shift
    return lowest + ((1 << shift) - 1) / 2


class Latencies:
    """The distributions of one version. For any thread."""

    __slots__ = ("_buckets", "_clock", "_histogram", "_lock", "_quantiles", "_sum_ns", "_windows")

    def __init__(self, options: LatencyOptions, *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._quantiles = options.quantiles
        self._windows = tuple(Window() for _ in MEASURED) if options.quantiles else ()
        self._histogram = options.histogram
        self._buckets = [0] * (len(HISTOGRAM_MS) + 1)
        self._sum_ns = 0

    def record(
        self, request_ns: Sequence[int], queue_ns: Sequence[int], input_ns: int, infer_ns: int, output_ns: int
    ) -> None:
        """Count one executed batch: of each request its time in the server and in the queue; the batch's own times.

        Each request is charged with the whole of the batch's, as in the counters.
        """
        requests = len(request_ns)
        with self._lock:
            if self._windows:
                now_ns = self._clock()
                of_request, of_queue, of_input, of_infer, of_output = self._windows
                of_request.add(now_ns, request_ns)
                of_queue.add(now_ns, queue_ns)
                of_input.add(now_ns, (input_ns,), requests)
                of_infer.add(now_ns, (infer_ns,), requests)
                of_output.add(now_ns, (output_ns,), requests)
            if self._histogram:
                for value_ns in request_ns:
                    self._buckets[bisect_left(HISTOGRAM_MS, value_ns / _NS_PER_MS)] += 1
                self._sum_ns += sum(request_ns)

    def snapshot(self) -> LatencySnapshot:
        """The distributions as they are now."""
        with self._lock:
            now_ns = self._clock()
            summaries = [window.summary(now_ns, self._quantiles) for window in self._windows]
            *at_most, count = accumulate(self._buckets)
            histogram = Histogram(tuple(at_most), count, self._sum_ns) if self._histogram else None
        return LatencySnapshot(dict(zip(MEASURED, summaries, strict=False)), histogram)
