"""What the benchmark found, as plain data: the rows of the table, servers' memory, and whether the goals are met."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loadtests.effort import is_limit
from loadtests.h2load import Load
from loadtests.models import OCR_SIZES, PIPELINE
from loadtests.peers import ECHO, FEATURES, GRPCIO, LOOP, NATIVE, REST, SHARED, STREAM, UNIQUE, Sample
from loadtests.plan import APART, BASE, BUSY, CROWD, IMAGES, LARGE, LARGER, LONE, MIXED
from loadtests.summary import Summary, summarize


@dataclass(frozen=True, slots=True)
class Row:
    """All rounds of one measurement, in the order of the rounds; `in_flight` as in `Measurement`."""

    model: str
    title: str
    who: str
    in_flight: int
    load: str
    samples: tuple[Sample, ...]
    generator: str = ""
    """What made the load; a bare loop makes its own."""

    def summary(self, value: Callable[[Sample], float]) -> Summary:
        """Median and extremes of one value of the samples."""
        return summarize([value(sample) for sample in self.samples])

    @property
    def generator_was_limit(self) -> bool:
        """Whether the load generator was the bottleneck in most rounds: the row then measures the generator."""
        limited = [is_limit(sample.generator_busy, sample.generator_waiting) for sample in self.samples]
        return sum(limited) * 2 > len(limited)


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure of a part that is no row of the table, round by round: of what, whose, and in which unit."""

    case: str
    who: str
    figure: str
    unit: str
    rounds: tuple[float, ...]

    @property
    def value(self) -> Summary:
        """Median and extremes over the rounds."""
        return summarize(self.rounds)


@dataclass(frozen=True, slots=True)
class Memory:
    """Resident memory of one of our transports: after its warm-up, and after this many requests more in a row."""

    who: str
    requests: int
    before_bytes: int
    after_bytes: int

    @property
    def ratio(self) -> float:
        """What it was in the end, over what it was after the warm-up."""
        return self.after_bytes / self.before_bytes


@dataclass(frozen=True, slots=True)
class Goal:
    """One promise: what is measured, what came out, and the limit it is held against."""

    text: str
    rounds: tuple[float, ...]
    limit: float | None
    """None: nothing is promised, as about a server that is not ours."""
    at_least: bool
    generator_was_limit: bool = False
    """In a row that it is about: what it holds then is partly the generator's."""

    @property
    def value(self) -> Summary:
        """Median and extremes over the rounds."""
        return summarize(self.rounds)

    @property
    def is_met(self) -> bool | None:
        """Whether the median keeps the limit; None without one."""
        if self.limit is None:
            return None
        return self.value.median >= self.limit if self.at_least else self.value.median <= self.limit


@dataclass(frozen=True, slots=True)
class Key:
    """Which row; a bare loop is found without its load, as it chooses its batch size itself."""

    model: str
    who: str
    load: Load | None = None

    def find(self, rows: Sequence[Row]) -> Row | None:
        """The row, when it was measured."""
        for row in rows:
            if (row.model, row.who) == (self.model, self.who) and (self.load is None or row.load == str(self.load)):
                return row
        return None


@dataclass(frozen=True, slots=True)
class Target:
    """A goal before it is measured: one row's value, over another row's where there is one, or over a sum of rows."""

    text: str
    value: Callable[[Sample], float]
    row: Key
    over: Key | tuple[Key, ...] | None
    """Of several rows the one with the best median."""
    limit: float | None
    at_least: bool
    plus: tuple[Key, ...] = ()
    """The other rows of the sum that it is held against."""

    @property
    def over_rows(self) -> tuple[Key, ...]:
        """The rows that the value is held against."""
        if self.over is None:
            return ()
        return self.over if isinstance(self.over, tuple) else (self.over,)

    def goal(self, rows: Sequence[Row]) -> Goal | None:
        """None when its rows were not measured. Ratios are taken round by round: rounds share the machine's moods."""
        row, others = self.row.find(rows), [key.find(rows) for key in (*self.over_rows, *self.plus)]
        found = [other for other in others if other is not None]
        if row is None or len(found) < len(others):
            return None
        values = [self.value(sample) for sample in row.samples]
        if self.plus:
            rounds = zip(*(other.samples for other in found), strict=True)
            sums = [sum(map(self.value, samples)) for samples in rounds]
            values = [value / whole for value, whole in zip(values, sums, strict=True)]
        elif found:
            best = max if self.at_least else min
            over = best(found, key=lambda other: other.summary(self.value).median)
            values = [value / self.value(under) for value, under in zip(values, over.samples, strict=True)]
        was_limit = any(each.generator_was_limit for each in (row, *found))
        return Goal(self.text, tuple(values), self.limit, self.at_least, was_limit)


def rate(sample: Sample) -> float:
    """Requests/s."""
    return sample.requests_per_s


def _cpu(sample: Sample) -> float:
    return sample.cpu_us_per_request


def p50(sample: Sample) -> float:
    """The median latency, ms."""
    return sample.p50_ms


def p99(sample: Sample) -> float:
    """The 99th percentile of the latency, ms."""
    return sample.p99_ms


def _batch(sample: Sample) -> float:
    return sample.mean_batch_rows


_PARTS = tuple(Key(name, NATIVE, LONE) for name in PIPELINE)
_IDENTITY, _LOOP = Key("identity", NATIVE, BASE), Key("large_mlp", LOOP)

TARGETS = (
    Target("identity, 2 x 16: CPU per request, native over the bare echo", _cpu,
           _IDENTITY, Key("identity", ECHO, BASE), 0.10, at_least=False),
    Target("identity, 2 x 16: CPU per request, native over grpcio", _cpu,
           _IDENTITY, Key("identity", GRPCIO, BASE), 0.09, at_least=False),
    Target("digits MLP, 4 x 32: requests/s, native over grpcio", rate,
           Key("digits_mlp", NATIVE, BUSY), Key("digits_mlp", GRPCIO, BUSY), 8, at_least=True),
    Target("identity, one at a time: p50, native over the bare echo", p50,
           Key("identity", NATIVE, LONE), Key("identity", ECHO, LONE), 0.5, at_least=False),
    Target("600 KB images, 2 x 4: requests/s, native over grpcio", rate,
           Key("images", NATIVE, IMAGES), Key("images", GRPCIO, IMAGES), 2, at_least=True),
    Target("600 KB images, 2 x 4: requests/s, in shared memory over in messages, on native", rate,
           Key("images", SHARED, IMAGES), Key("images", NATIVE, IMAGES), 2, at_least=True),
    Target("identity, 32 x 1: requests/s, REST over gRPC, on native", rate,
           Key("identity", REST, APART), Key("identity", NATIVE, APART), 0.3, at_least=True),
    Target("identity, 2 x 16: requests/s, in streams over in unary calls, on native", rate,
           Key("identity", STREAM, BASE), _IDENTITY, 1.3, at_least=True),
    Target("identity, 1000 x 1: requests/s, native over its own 2 x 16", rate,
           Key("identity", NATIVE, CROWD), _IDENTITY, 0.6, at_least=True),
    Target("digits MLP, 4 x 32, unique inputs: requests/s, with a response cache over without", rate,
           Key("digits_cached", UNIQUE, BUSY), Key("digits_mlp", UNIQUE, BUSY), 0.97, at_least=True),
    Target("digits MLP, 4 x 32, unique inputs: CPU per request, with a response cache over without", _cpu,
           Key("digits_cached", UNIQUE, BUSY), Key("digits_mlp", UNIQUE, BUSY), 1.03, at_least=False),
    Target("identity, 2 x 16, unique inputs: CPU per request, with a response cache over without", _cpu,
           Key("identity_cached", UNIQUE, BASE), Key("identity", UNIQUE, BASE), 1.03, at_least=False),
    Target("identity, 2 x 16: requests/s, with the scheduling features on for other models, over off", rate,
           Key("identity", FEATURES, BASE), _IDENTITY, 0.97, at_least=True),
    Target("identity, 2 x 16: CPU per request, with the scheduling features on for other models, over off", _cpu,
           Key("identity", FEATURES, BASE), _IDENTITY, 1.03, at_least=False),
    Target("lengths 5 to 128, 4 x 16: requests/s, with shape buckets over without", rate,
           Key("lengths_bucketed", NATIVE, MIXED), Key("lengths", NATIVE, MIXED), 1.5, at_least=True),
    Target("lengths 5 to 128, 4 x 16: p99, with shape buckets over without", p99,
           Key("lengths_bucketed", NATIVE, MIXED), Key("lengths", NATIVE, MIXED), 1, at_least=False),
    # Three requests through the whole server, one for each part, cost three times what one costs beside the models: an
    # ensemble that hands tensors over cheaply is far below their sum.
    Target("ensemble of 3 MLPs, one at a time: p50, over the sum of its parts", p50,
           Key("pipeline", NATIVE, LONE), _PARTS[0], 1.15, at_least=False, plus=_PARTS[1:]),
    Target("ensemble of 3 MLPs, one at a time: CPU per request, over the sum of its parts", _cpu,
           Key("pipeline", NATIVE, LONE), _PARTS[0], 1.15, at_least=False, plus=_PARTS[1:]),
    Target("text detection, 2 x 4, no configuration: requests/s, over the best of the batch sizes", rate,
           Key("ocr", NATIVE, IMAGES), tuple(Key(f"ocr_{most}", NATIVE, IMAGES) for most in OCR_SIZES), 0.97,
           at_least=True),
    # 0.90 leaves the rest for transport, queue, gather and scatter on the other core.
    Target("large MLP, 4 x 16: rows/s, native over the bare loop", rate,
           Key("large_mlp", NATIVE, LARGE), _LOOP, 0.90, at_least=True),
    Target("large MLP, 4 x 16: rows/s, grpcio over the bare loop", rate,
           Key("large_mlp", GRPCIO, LARGE), _LOOP, 0.90, at_least=True),
    # grpcio's machinery is most of a small request, and ours may add a quarter.
    Target("identity, 2 x 16: CPU per request, grpcio over the bare echo", _cpu,
           Key("identity", GRPCIO, BASE), Key("identity", ECHO, BASE), 1.25, at_least=False),
    # Far from what a queue that does not batch under load would give.
    Target("large MLP, 4 x 25: mean batch, rows, on native", _batch,
           Key("large_mlp", NATIVE, LARGER), None, 16, at_least=True),
    Target("large MLP, 4 x 25: mean batch, rows, on grpcio", _batch,
           Key("large_mlp", GRPCIO, LARGER), None, 16, at_least=True),
)  # fmt: skip

MEMORY_RATIO_MAX = 1.05
"""Allocators breathe by a few percent; a leak of 100 bytes per request would be 100 MB after 1,000,000."""


def goals(rows: Sequence[Row], memories: Sequence[Memory], more: Sequence[Target] = ()) -> list[Goal]:
    """The goals whose rows were measured, and the comparisons asked for beside them."""
    found = [goal for target in (*TARGETS, *more) if (goal := target.goal(rows)) is not None]
    for memory in memories:
        text = f"identity, {memory.who}: resident memory after {memory.requests:,} requests more, over before"
        found.append(Goal(text, (memory.ratio,), MEMORY_RATIO_MAX, at_least=False))
    return found
