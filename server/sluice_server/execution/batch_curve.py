"""Up to which size batches pay: rows per second by batch size, measured at load, and the cap that follows from it.

Batching is no law: a digits MLP gains 20 times from it, text detection on pictures loses a fifth, as a batch of large
tensors leaves the CPU's caches. So the rows of the batch proof run in batches of rising sizes, in turns, within some
time; the shortest run of each size counts, as what disturbs a run only makes it longer.

The cap is for merging. A request of more rows than that, up to `max_batch_size`, is run as it is.
"""

from __future__ import annotations

import itertools
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice_server.errors import SluiceError
from sluice_server.execution.batch_proof import merge
from sluice_server.execution.parameters import parameter_values, read_choice
from sluice_server.execution.providers import CPU

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.instance import Runnable
    from sluice_server.execution.probes import Row
    from sluice_server.execution.threads import ThreadPlan

PARAMETER = "batch_curve"
"""The key in a configuration's `parameters`: `off` has nothing measured, `on` also beside preferred batch sizes."""

BUDGET_NS = 2_000_000_000
"""What the runs of a measurement may take, as a load waits for it."""

WALL_NS = 4_000_000_000
"""And how long that may last on a machine that is busy with other things."""

ROUNDS_MIN, ROUNDS_ENOUGH = 2, 20
"""Runs of each size: two, which are few, of models whose runs are long and so vary little; 20 of fast ones. Where those
would give a cap all of the time is used, as a busy machine must not cap what it only disturbed."""

BATCH_BYTES_MAX = 64 << 20
"""Of one input: larger made-up batches are not measured."""

RUN_OVERHEAD_NS = 50_000
"""What the server adds to each run (a wake-up, a turn of the queue, a gather): small models are merged to save it."""

CLEARLY_SLOWER = 0.95
"""The largest size has a rate below this share of the best one's before anything is capped; less is noise."""

AS_FAST = 0.98
"""Then the cap is the smallest size with this share of the best rate: waiting for more rows gives nothing."""

_SWITCH = {"on": "on", "off": "off"}

_measuring = threading.Lock()
"""One model at a time: two would measure each other."""


@dataclass(frozen=True, slots=True)
class Point:
    """The rate of one batch size."""

    rows: int
    rows_per_s: float


@dataclass(frozen=True, slots=True)
class BatchCurve:
    """What was measured, by rising sizes; `cap` is the most rows that requests are merged to, 0: as configured."""

    points: tuple[Point, ...]
    cap: int = 0

    def __str__(self) -> str:
        rates = ", ".join(f"{point.rows}: {_rate(point.rows_per_s)}" for point in self.points)
        then = f"requests are merged to {self.cap} row(s) at most, as more are slower" if self.cap else "not capped"
        return f"rows/s by batch size: {rates}; {then}"


def _rate(rows_per_s: float) -> str:
    return f"{rows_per_s:,.0f}" if rows_per_s >= 10 else f"{rows_per_s:.2g}"


@dataclass(frozen=True, slots=True)
class CurveOptions:
    """Whether a curve is wanted, and whether it may cap: preferred sizes of a configuration are merged to anyway."""

    wanted: bool = True
    caps: bool = True


def curve_options(written: ModelConfig | None) -> CurveOptions:
    """Read a configuration as it was written, before preferred sizes are filled in. BadOption for an unknown word."""
    if written is None:
        return CurveOptions()
    prefers = bool(written.dynamic_batching.preferred_batch_size)
    default = "off" if prefers else "on"
    word = read_choice(written.name, PARAMETER, parameter_values(written).get(PARAMETER, default), _SWITCH)
    return CurveOptions(word == "on", not prefers)


def run_clock_for(providers: Sequence[str], threads: ThreadPlan) -> Callable[[], int]:
    """The clock that tells best what a run of such a session takes."""
    is_alone = set(providers) <= {CPU} and threads.intra_op_threads == 1 and threads.inter_op_threads == 1
    return time.thread_time_ns if is_alone else time.perf_counter_ns


def choose_cap(points: Sequence[Point], max_batch_rows: int) -> int:
    """The most rows to merge requests to; 0 where the largest size is about as good as any.

    Where the largest was not measured, as it takes too long or fails, the rates have to be rising still.
    """
    if not points:
        return 0
    rates = [point.rows / (point.rows / point.rows_per_s + RUN_OVERHEAD_NS / 1e9) for point in points]
    best = max(rates)
    if points[-1].rows == max_batch_rows:
        is_worth_it = rates[-1] >= CLEARLY_SLOWER * best
    else:
        is_worth_it = CLEARLY_SLOWER * rates[-1] >= max(rates[:-1], default=0.0)
    if is_worth_it:
        return 0
    return min(point.rows for point, rate in zip(points, rates, strict=True) if rate >= AS_FAST * best)


def batch_sizes(max_batch_rows: int) -> list[int]:
    """Powers of two, and the largest."""
    powers = (1 << power for power in range(max_batch_rows.bit_length()))
    return [*(size for size in powers if size < max_batch_rows), max_batch_rows]


def measure(
    session: Runnable,
    output_names: Sequence[str],
    rows: Sequence[Row],
    max_batch_rows: int,
    *,
    clock: Callable[[], int] = time.perf_counter_ns,
    run_clock: Callable[[], int] = time.perf_counter_ns,
) -> tuple[Point, ...]:
    """Run the rows in batches of rising sizes; those that fail, or for which there is no time, are left out.

    `run_clock` is what a run is timed by, in ns: for a session that computes on the calling thread alone, the CPU time
    of that thread shows what the model takes however busy the machine is (`run_clock_for`).
    """
    with _measuring:
        until_ns = clock() + WALL_NS
        spent_ns: list[int] = []

        def run_ns(feeds: Row) -> int:
            began_ns = run_clock()
            session.run(output_names, dict(feeds))
            spent_ns.append(max(1, run_clock() - began_ns))
            return spent_ns[-1]

        shortest_ns: dict[int, int] = {}
        batches: dict[int, Row] = {}
        try:
            for size, feeds in _batches(rows, max_batch_rows):
                if not _fits(spent_ns) or clock() >= until_ns - WALL_NS // ROUNDS_MIN:
                    break
                shortest_ns[size] = run_ns(feeds)
                batches[size] = feeds
            for number in itertools.count(1):
                if number >= ROUNDS_MIN and (sum(spent_ns) >= BUDGET_NS or clock() >= until_ns):
                    break
                if number >= ROUNDS_ENOUGH and not choose_cap(_points(shortest_ns), max_batch_rows):
                    break
                for size, feeds in batches.items():
                    shortest_ns[size] = min(shortest_ns[size], run_ns(feeds))
        except SluiceError:
            # The sizes below the one that failed have run.
            pass
        return _points(shortest_ns)


def _points(shortest_ns: dict[int, int]) -> tuple[Point, ...]:
    return tuple(Point(size, size * 1e9 / run_ns) for size, run_ns in shortest_ns.items())


def _batches(rows: Sequence[Row], max_batch_rows: int) -> Iterator[tuple[int, Row]]:
    """The sizes with their inputs, as long as those are not too large."""
    widest_bytes = max(array.nbytes for array in rows[0].values())
    for size in batch_sizes(max_batch_rows):
        if size > 1 and size * widest_bytes > BATCH_BYTES_MAX:
            return
        yield size, merge(list(itertools.islice(itertools.cycle(rows), size)))


def _fits(spent_ns: Sequence[int]) -> bool:
    """Whether the next size, of about twice the time of the last, can be run as often as all must be."""
    next_ns = 2 * spent_ns[-1] if spent_ns else 0
    return (sum(spent_ns) + next_ns) * ROUNDS_MIN <= BUDGET_NS
