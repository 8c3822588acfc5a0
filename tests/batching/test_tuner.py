"""What a tuner makes of run times: the objective is kept at any load, and little throughput is given away for it."""

from __future__ import annotations

import itertools
import random
import sys
from collections.abc import Callable

import pytest

from sluice_batching import Arrival, QueuePolicy, Report, Simulation, SloTuner, Strategy
from sluice_batching.delay_trials import NO_WAIT
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


def test_where_only_most_runs_keep_the_objective_the_size_counts_at_which_they_do() -> None:
    # One run in five is slow, whatever its size.
    runs = [(rows, 60 if number == 4 else usual) for rows, usual in ((1, 10), (8, 20), (32, 45)) for number in range(5)]
    tuner = tuned(100 * MS, runs)
    assert tuner.merge_rows == 32
    # Two of 45 ms keep it, so 32 rows wait.
    assert tuner.queue_rows == 32


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


def test_what_was_measured_before_is_known_and_starts_no_trial_of_a_delay() -> None:
    tuner = SloTuner(100 * MS, MAX_ROWS)
    for rows in (1, 2, 4, 8, 16) * 20:
        tuner.learn(rows, (8 + rows) * MS, MS)
    assert (tuner.merge_rows, tuner.wait) == (32, NO_WAIT)
    assert tuner.predict_ns(8, MS) == 16 * MS


def test_who_follows_is_told_at_once_and_of_each_change() -> None:
    told = []
    tuner = SloTuner(100 * MS, MAX_ROWS)
    tuner.steer(lambda *limits: told.append(limits))
    for _ in range(3):
        tuner.record(1, 10 * MS, 0)
    assert told == [(1, sys.maxsize, NO_WAIT), (2, 6, NO_WAIT)]


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


def quantile_and_rate(report: Report, begin_s: float, end_s: float) -> tuple[int, float]:
    """The 99th percentile of the latencies of those that came in this time, and how many they were a second."""
    answered = zip(report.arrivals_ns, report.latencies_ns, strict=True)
    latencies_ns = sorted(latency for at_ns, latency in answered if begin_s * S <= at_ns < end_s * S)
    return latencies_ns[int(len(latencies_ns) * 0.99)], len(latencies_ns) / (end_s - begin_s)


def ask_by_turns(strategy: Strategy, run_ns: Callable[[int], int], clients: int, length_s: int) -> Report:
    """Clients who wait for an answer before they ask again, after up to a millisecond."""
    chance = random.Random(1)

    def again(now_ns: int) -> int | None:
        return now_ns + chance.randint(MS // 10, MS) if now_ns < length_s * S else None

    return Simulation(strategy, run_ns).run([Arrival(number * MS // 20) for number in range(clients)], again)


def batching(**policy: int) -> QueuePolicy:
    return QueuePolicy(max_batch_rows=MAX_ROWS, batching=True, **policy)


@pytest.mark.parametrize(
    ("slo_ms", "fixed_ms", "row_ms", "clients", "gain"),
    [(50, 8, 0.1, 16, 1.5), (50, 4, 0.25, 16, 1.25), (100, 8, 0.1, 32, 1.3), (50, 1, 1, 8, 1.0)],
)
def test_clients_who_wait_for_answers_get_the_delay_of_the_best_static_setting(
    slo_ms: int, fixed_ms: float, row_ms: float, clients: int, gain: float
) -> None:
    length_s, steady_s = 8, 4

    def rate(strategy: Strategy, length_s: int = 2, steady_s: int = 1) -> float:
        """In the steady time; 0 where the objective is not kept."""
        report = ask_by_turns(strategy, noisy(fixed_ms, row_ms), clients, length_s)
        slow_ns, found = quantile_and_rate(report, steady_s, length_s)
        return found if slow_ns <= slo_ms * MS else 0.0

    sizes, delays_ns = (clients // 2, clients, MAX_ROWS), (0, MS // 2, MS, 2 * MS, 4 * MS, 16 * MS)
    static = {
        (rows, delay_ns): rate(Strategy(policy=batching(merge_rows=rows, max_delay_ns=delay_ns)))
        for rows, delay_ns in itertools.product(sizes, delays_ns)
    }
    tuned = rate(Strategy(policy=batching(), slo_ns=slo_ms * MS), length_s, steady_s)
    assert tuned >= 0.9 * max(static.values())
    assert tuned >= gain * static[MAX_ROWS, 0] * 0.99


@pytest.mark.parametrize(("slo_ms", "fixed_ms", "row_ms"), [(50, 8, 0.1), (50, 1, 1)])
def test_no_static_size_and_delay_keeps_the_objective_at_a_higher_load(
    slo_ms: int, fixed_ms: float, row_ms: float
) -> None:
    capacity, window_s = best_static(slo_ms, fixed_ms, row_ms), 2
    loads = [0.1, 1.0, 0.3]

    def rates(strategy: Strategy) -> list[float]:
        """In each window, 0 where the objective is not kept."""
        report = run_at_loads(strategy, noisy(fixed_ms, row_ms), [load * capacity for load in loads], window_s)
        found = [quantile_and_rate(report, at * window_s + 1, (at + 1) * window_s) for at in range(len(loads))]
        return [rate if slow_ns <= slo_ms * MS else 0.0 for slow_ns, rate in found]

    grid = itertools.product((8, 24, MAX_ROWS), (0, 4 * MS))
    static = [rates(Strategy(policy=batching(merge_rows=rows, max_delay_ns=delay_ns))) for rows, delay_ns in grid]
    tuned = rates(Strategy(policy=batching(), slo_ns=slo_ms * MS))
    for place, rate in enumerate(tuned):
        assert rate >= 0.9 * max(each[place] for each in static)
        assert rate > 0


def test_without_an_objective_everything_that_waits_is_merged() -> None:
    policy = QueuePolicy(max_batch_rows=MAX_ROWS, batching=True)
    arrivals = list(itertools.repeat(Arrival(0), MAX_ROWS))
    assert Simulation(Strategy(policy=policy), linear(100, 0)).run(arrivals).batch_rows == [MAX_ROWS]
