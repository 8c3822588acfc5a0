"""What a tuner makes of run times: the objective is kept at any load, and little throughput is given away for it."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable

import pytest

from sluice_batching import Arrival, QueuePolicy, Report, Simulation, SloTuner, Strategy
from sluice_batching.simulate import arrive, linear

MS = 1_000_000
S = 1000 * MS
MAX_ROWS = 64


def tuned(slo_ns: int, runs: list[tuple[int, int]], *, instances: int = 1, max_rows: int = MAX_ROWS) -> SloTuner:
    """A tuner after these runs, (rows, ms) a millisecond apart."""
    tuner = SloTuner(slo_ns, max_rows, instances)
    for number, (rows, run_ms) in enumerate(runs):
        tuner.record(rows, run_ms * MS, number * MS)
    return tuner


# --- Decisions


def test_before_the_first_run_nothing_is_merged_and_nobody_is_refused() -> None:
    tuner = SloTuner(100 * MS, MAX_ROWS)
    assert (tuner.merge_rows, tuner.queue_rows) == (1, sys.maxsize)


def test_with_one_size_known_the_next_is_a_row_larger() -> None:
    assert tuned(100 * MS, [(1, 10)]).merge_rows == 2


def test_sizes_grow_by_the_line_through_two_and_at_most_double() -> None:
    assert tuned(100 * MS, [(1, 10), (2, 11)]).merge_rows == 4
    # 2 x (22 + 4 a row more) <= 99, and at most twice as many.
    assert tuned(100 * MS, [(1, 10), (4, 22)]).merge_rows == 8
    assert tuned(100 * MS, [(1, 10), (4, 40)]).merge_rows == 4


def test_a_size_between_one_that_keeps_the_objective_and_one_that_does_not_is_found_on_their_line() -> None:
    # 8 rows take 20 ms and 32 take 68: 49.5 are allowed, which 22 rows take; at most twice as many are tried.
    assert tuned(100 * MS, [(8, 20), (32, 68)]).merge_rows == 16
    assert tuned(100 * MS, [(8, 20), (16, 36), (32, 68)]).merge_rows == 22


def test_where_larger_batches_gain_nothing_the_smaller_ones_stay() -> None:
    assert tuned(1000 * MS, [(1, 10), (2, 12), (4, 40), (8, 90)]).merge_rows == 2


def test_equal_rates_take_the_larger_size() -> None:
    assert tuned(1000 * MS, [(4, 40), (8, 81)], max_rows=8).merge_rows == 8


def test_where_nothing_keeps_the_objective_rows_run_alone() -> None:
    tuner = tuned(10 * MS, [(4, 50), (1, 20)])
    assert (tuner.merge_rows, tuner.queue_rows) == (1, 1)


def test_so_many_rows_wait_as_end_in_time_on_all_instances() -> None:
    # Of 99 ms a run of 10 leaves room for 8 more.
    tuner = tuned(100 * MS, [(8, 10)] * 3, instances=2, max_rows=8)
    assert (tuner.merge_rows, tuner.queue_rows) == (8, 8 * 2 * 8)


def test_a_few_slow_runs_change_nothing_and_many_do() -> None:
    quick, slow = [(8, 10)] * 61, [(8, 90)] * 3
    assert tuned(100 * MS, [*quick, *slow], max_rows=8).merge_rows == 8
    assert tuned(100 * MS, [*quick, *slow * 4], max_rows=8).merge_rows == 1


def test_a_slow_spell_is_forgotten_after_ten_seconds() -> None:
    tuner = SloTuner(100 * MS, 8)
    for number in range(8):
        tuner.record(8, 90 * MS, number * MS)
    assert tuner.merge_rows == 1
    for number in range(8):
        tuner.record(1, 10 * MS, 11 * S + number * MS)
    assert tuner.merge_rows == 2


def test_who_follows_is_told_at_once_and_of_each_change() -> None:
    told = []
    tuner = SloTuner(100 * MS, MAX_ROWS)
    tuner.steer(lambda *limits: told.append(limits))
    for _ in range(3):
        tuner.record(1, 10 * MS, 0)
    assert told == [(1, sys.maxsize), (2, 16)]


# --- Promises, simulated with the real queue


def noisy(fixed_ms: float, row_ms: float, seed: int = 0) -> Callable[[int], int]:
    """Run times of which each is up to 10 % longer."""
    exact, chance = linear(fixed_ms, row_ms), random.Random(seed)
    return lambda rows: round(exact(rows) * (1 + chance.random() / 10))


def run_at_loads(strategy: Strategy, run_ns: Callable[[int], int], rates: list[float], window_s: int) -> Report:
    """One window of arrivals after the other."""
    arrivals: list[Arrival] = []
    for number, rate in enumerate(rates):
        window = arrive("poisson", round(rate * window_s), rate, None, seed=number)
        arrivals += [Arrival(number * window_s * S + each.arrival_ns, 1) for each in window]
    return Simulation(strategy, run_ns).run(sorted(arrivals, key=lambda each: each.arrival_ns))


def best_static(slo_ms: int, fixed_ms: float, row_ms: float) -> float:
    """Rows/s of the best batch size, by grid, of which two runs end within the objective."""
    runs = ((rows, 1.1 * linear(fixed_ms, row_ms)(rows)) for rows in range(1, MAX_ROWS + 1))
    return max(rows / run_ns * S * 1.1 / 1.05 for rows, run_ns in runs if 2 * run_ns <= slo_ms * MS)


@pytest.mark.parametrize(
    ("slo_ms", "fixed_ms", "row_ms"),
    [(20, 4, 0.25), (20, 1, 1), (50, 4, 0.25), (50, 8, 0.1), (50, 1, 1), (100, 4, 0.25), (100, 8, 0.1), (100, 1, 1)],
)
def test_the_objective_is_kept_in_each_window_of_changing_loads_with_nine_tenths_of_the_throughput(
    slo_ms: int, fixed_ms: float, row_ms: float
) -> None:
    capacity, window_s = best_static(slo_ms, fixed_ms, row_ms), 4
    strategy = Strategy(policy=QueuePolicy(max_batch_rows=MAX_ROWS, batching=True), slo_ns=slo_ms * MS)
    loads = [0.1, 1.0, 0.3, 3.0]
    report = run_at_loads(strategy, noisy(fixed_ms, row_ms), [load * capacity for load in loads], window_s)
    answered = list(zip(report.arrivals_ns, report.latencies_ns, strict=True))
    for number, load in enumerate(loads):
        begin_ns, end_ns = (number * window_s + 1) * S, (number + 1) * window_s * S
        latencies_ns = sorted(latency for at_ns, latency in answered if begin_ns <= at_ns < end_ns)
        assert latencies_ns[int(len(latencies_ns) * 0.99)] <= slo_ms * MS
        assert len(latencies_ns) / (window_s - 1) >= 0.9 * min(load, 1) * capacity * 0.99


def test_without_an_objective_everything_that_waits_is_merged() -> None:
    policy = QueuePolicy(max_batch_rows=MAX_ROWS, batching=True)
    arrivals = list(itertools.repeat(Arrival(0), MAX_ROWS))
    assert Simulation(Strategy(policy=policy), linear(100, 0)).run(arrivals).batch_rows == [MAX_ROWS]
