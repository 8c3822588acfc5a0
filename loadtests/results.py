"""What the benchmark found, as plain data: the rows of the table, a server's memory, and whether the goals are met."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtests.peers import ECHO, LOOP, SLUICE, Sample
from loadtests.summary import Summary, summarize

LOOP_RATIO_MIN = 0.90
"""Of the bare loop's rows/s: what is left for transport, queue, gather and scatter on the other core."""

ECHO_RATIO_MAX = 1.25
"""Of the bare echo's CPU: grpcio's machinery is most of a small request, and ours may add a quarter."""

MEAN_BATCH_MIN_ROWS = 16.0
"""With 100 in flight: far from what a queue that does not batch under load would give."""

MEMORY_GROWTH_MAX = 0.05
"""Allocators breathe by a few percent; a leak of 100 bytes per request would be 10 MB after 100,000."""


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of one measurement, in the order of the rounds; `in_flight` as in `Measurement`."""

    model: str
    title: str
    who: str
    in_flight: int
    load: str
    samples: tuple[Sample, ...]

    def summary(self, value: Callable[[Sample], float]) -> Summary:
        """Median and extremes of one value of the samples."""
        return summarize([value(sample) for sample in self.samples])


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of a server before and after many requests in a row."""

    requests: int
    before_bytes: int
    after_bytes: int

    @property
    def growth(self) -> float:
        """What was added, as a share of what it was."""
        return (self.after_bytes - self.before_bytes) / self.before_bytes


@dataclass(frozen=True, slots=True)
class Goal:
    """One promise: what is measured, what came out, and the limit it is held against."""

    text: str
    value: Summary
    limit: float
    at_least: bool

    @property
    def is_met(self) -> bool:
        """Whether the median keeps the limit."""
        return self.value.median >= self.limit if self.at_least else self.value.median <= self.limit


def goals(rows: Sequence[Row], memory: Memory) -> list[Goal]:
    """The goals whose rows were measured; ratios are taken round by round, as rounds share the machine's moods."""
    found = []
    loaded, loop = _find(rows, "large_mlp", SLUICE, 64), _find(rows, "large_mlp", LOOP)
    if loaded and loop:
        value = _ratio(loaded, loop, lambda sample: sample.requests_per_s)
        found.append(Goal("large MLP, 64 in flight: rows/s, of the bare loop's", value, LOOP_RATIO_MIN, at_least=True))
    ours, echo = _find(rows, "identity", SLUICE, 32), _find(rows, "identity", ECHO, 32)
    if ours and echo:
        value = _ratio(ours, echo, lambda sample: sample.cpu_us_per_request)
        text = "identity, 32 in flight: server CPU per request, of the bare echo's"
        found.append(Goal(text, value, ECHO_RATIO_MAX, at_least=False))
    if crowded := _find(rows, "large_mlp", SLUICE, 100):
        value = crowded.summary(lambda sample: sample.mean_batch_rows)
        found.append(Goal("large MLP, 100 in flight: mean batch, rows", value, MEAN_BATCH_MIN_ROWS, at_least=True))
    text = f"identity, {memory.requests:,} requests in a row: resident memory grows by"
    found.append(Goal(text, summarize([memory.growth]), MEMORY_GROWTH_MAX, at_least=False))
    return found


def _find(rows: Sequence[Row], model: str, who: str, in_flight: int | None = None) -> Row | None:
    for row in rows:
        if (row.model, row.who) == (model, who) and in_flight in (None, row.in_flight):
            return row
    return None


def _ratio(over: Row, under: Row, value: Callable[[Sample], float]) -> Summary:
    return summarize([value(a) / value(b) for a, b in zip(over.samples, under.samples, strict=True)])
