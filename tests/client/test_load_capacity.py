"""The search for a capacity: on servers whose capacity is known, with noise, without an end, and without a start."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice_client.load.capacity import (
    MAX_STEPS,
    End,
    Plan,
    Step,
    Verdict,
    Windows,
    falls_behind,
    find_capacity,
    judge,
    observe,
    replicas_needed,
    windows_needed,
)
from sluice_client.load.latencies import NOT_SENT, Generator, Quantiles, Records, quantile
from sluice_client.load.objectives import parse_objectives
from support.simulated_load import single_server

if TYPE_CHECKING:
    from collections.abc import Callable

WINDOWS = 5

GOOD = Generator(lag_p99_s=0.0, cpu_share=0.1, most_in_flight=1, not_sent=0)
LATE = replace(GOOD, lag_p99_s=0.1)
BUSY = replace(LATE, cpu_share=1.0)


def step(rate_per_s: float, met: int, problem: str = "", windows: int = WINDOWS) -> Step:
    return Step(rate_per_s, met, windows, False, Quantiles(0, 0, 0, 0, 0), 0.0, problem)


def up_to(capacity_per_s: float) -> Callable[[float], Step]:
    """A server of this capacity, measured without noise."""
    return lambda rate_per_s: step(rate_per_s, WINDOWS if rate_per_s <= capacity_per_s else 0)


def search(measure, **changes):
    told: list[tuple[float, Verdict]] = []
    plan = Plan(**{"start_per_s": 100.0, "least_per_s": 1.0, "most_per_s": 100_000.0} | changes)
    capacity = find_capacity(measure, plan, lambda step, verdict: told.append((step.rate_per_s, verdict)))
    assert [rate for rate, _ in told] == [each.rate_per_s for each in capacity.steps]
    return capacity, told


@given(st.floats(1, 99_999), st.floats(0.001, 0.5), st.floats(1, 100_000))
def test_without_noise_the_capacity_is_found_within_the_precision(capacity_per_s, precision, start_per_s):
    capacity, told = search(up_to(capacity_per_s), precision=precision, start_per_s=start_per_s)
    assert capacity.end is End.FOUND
    assert capacity.rate_per_s <= capacity_per_s < capacity.rate_per_s * (1 + precision) * (1 + 1e-9)
    (low, held), (high, missed) = told[-2:]
    assert (low, held, missed) == (capacity.rate_per_s, Verdict.HOLDS, Verdict.FAILS)
    assert capacity_per_s < high <= low * (1 + precision) * (1 + 1e-6)
    # They were measured twice, as the first time chose them.
    assert [told.count(each) for each in told[-2:]] == [2, 2]


def test_the_trace_of_a_search():
    _, told = search(up_to(333), precision=0.1)
    assert [(round(rate), verdict.value) for rate, verdict in told] == [
        (100, "holds"),
        (200, "holds"),
        (400, "fails"),
        (283, "holds"),
        (336, "fails"),
        (308, "holds"),
        (308, "holds"),
        (336, "fails"),
    ]


@given(st.floats(0.001, 0.9), st.floats(1, 1000))
def test_objectives_that_are_never_met_end_the_search_at_the_lowest_rate(capacity_per_s, start_per_s):
    capacity, told = search(up_to(capacity_per_s), start_per_s=start_per_s)
    assert (capacity.rate_per_s, capacity.end) == (0, End.NEVER)
    assert min(rate for rate, _ in told) == 1.0


@given(st.floats(1, 5_000))
def test_objectives_that_are_always_met_end_the_search_at_the_highest_rate(most_per_s):
    capacity, told = search(up_to(math.inf), start_per_s=1.0, most_per_s=most_per_s)
    assert (capacity.rate_per_s, capacity.end) == (most_per_s, End.ALWAYS)
    assert max(rate for rate, _ in told) == most_per_s


@settings(max_examples=60)
@given(st.integers(0, 10_000), st.floats(20, 5_000), st.floats(0, 0.05))
def test_with_noisy_windows_the_capacity_is_still_found(seed, capacity_per_s, noise):
    """Each window lies with a probability. Seven of eight have to, twice, for a rate above the capacity to be found."""
    chance = random.Random(seed)

    def measure(rate_per_s: float) -> Step:
        truth = rate_per_s <= capacity_per_s
        return step(rate_per_s, sum((chance.random() >= noise) == truth for _ in range(8)), windows=8)

    capacity, told = search(measure)
    assert len(told) <= MAX_STEPS
    assert capacity.end is End.FOUND
    assert capacity_per_s / 1.3 <= capacity.rate_per_s <= capacity_per_s * (1 + 1e-9)


def test_a_search_among_coin_flips_ends():
    chance = random.Random(4)
    for _ in range(50):
        capacity, told = search(lambda rate_per_s: step(rate_per_s, chance.randint(0, WINDOWS)))
        assert len(told) <= MAX_STEPS
        assert capacity.end in (End.FOUND, End.NEVER, End.UNSTEADY)


def test_measurements_that_contradict_each_other_without_an_end_are_said_to():
    """What holds never does a second time: each step down is measured, until there were too many."""
    seen: set[float] = set()

    def measure(rate_per_s: float) -> Step:
        holds = rate_per_s < 1000 and rate_per_s not in seen
        seen.add(rate_per_s)
        return step(rate_per_s, WINDOWS if holds else 0)

    capacity, _ = search(measure, precision=0.01)
    assert capacity.end is End.UNSTEADY
    assert len(capacity.steps) == MAX_STEPS


def test_a_rate_that_held_by_luck_is_not_reported():
    seen: set[float] = set()

    def measure(rate_per_s: float) -> Step:
        lucky = 320 < rate_per_s < 350 and rate_per_s not in seen
        seen.add(rate_per_s)
        return step(rate_per_s, WINDOWS if lucky or rate_per_s <= 300 else 0)

    capacity, told = search(measure, precision=0.02)
    assert 290 < capacity.rate_per_s <= 300
    assert capacity.end is End.FOUND
    assert any(320 < rate < 350 and verdict is Verdict.HOLDS for rate, verdict in told)


def test_a_rate_that_was_missed_by_bad_luck_does_not_end_the_climb():
    bad_luck = [200.0]

    def measure(rate_per_s: float) -> Step:
        if rate_per_s in bad_luck:
            bad_luck.remove(rate_per_s)
            return step(rate_per_s, 0)
        return up_to(5000)(rate_per_s)

    capacity, told = search(measure)
    assert told[1] == (200, Verdict.FAILS)
    assert (200, Verdict.HOLDS) in told
    assert 5000 / 1.05 <= capacity.rate_per_s <= 5000


def test_what_is_unclear_is_measured_again_and_all_windows_decide():
    answers = {100.0: [4, 5], 200.0: [3, 4]}

    def measure(rate_per_s: float) -> Step:
        left = answers.get(rate_per_s)
        return step(rate_per_s, left.pop(0) if left else (5 if rate_per_s < 150 else 0))

    _, told = search(measure)
    assert told[:4] == [
        (100, Verdict.UNCLEAR),
        (100, Verdict.HOLDS),
        (200, Verdict.UNCLEAR),
        (200, Verdict.UNCLEAR),
    ]
    assert told[4][0] < 150


def test_a_generator_that_is_the_bottleneck_each_time_ends_the_search():
    capacity, told = search(lambda rate: step(rate, 5 if rate < 300 else 0, "busy" if rate > 300 else ""))
    assert (capacity.rate_per_s, capacity.end) == (200, End.GENERATOR)
    assert [rate for rate, _ in told] == [100, 200, 400, 400, 400]


def test_what_a_generator_could_not_send_once_does_not_count():
    """The first measurement of 200/s fails by the generator; its windows are not held against the server."""
    hiccups = ["busy"]

    def measure(rate_per_s: float) -> Step:
        if rate_per_s == 200 and hiccups:
            return step(rate_per_s, 0, hiccups.pop())
        return up_to(250)(rate_per_s)

    capacity, told = search(measure)
    assert capacity.end is End.FOUND
    assert 250 / 1.05 <= capacity.rate_per_s <= 250
    assert told[1:3] == [(200, Verdict.FAILS), (200, Verdict.HOLDS)]


def test_a_rate_that_stays_unclear_when_the_generator_is_itself_again_has_not_held():
    tries = [step(200, 0, "busy"), step(200, 0, "busy"), step(200, 3)]
    capacity, told = search(lambda rate: tries.pop(0) if tries and rate == 200 else up_to(190)(rate))
    assert told[1:4] == [(200, Verdict.FAILS), (200, Verdict.FAILS), (200, Verdict.UNCLEAR)]
    assert capacity.end is End.FOUND
    assert capacity.rate_per_s <= 190


def test_a_busy_generator_whose_load_holds_all_the_same_has_shown_that():
    """Its lag is inside of the response times, which are no shorter for it."""
    capacity, _ = search(lambda rate: step(rate, 5 if rate < 300 else 0, "busy" if rate < 300 else ""))
    assert capacity.end is End.FOUND


@pytest.mark.parametrize(
    ("windows", "confidence", "needed"),
    [(5, 0.95, 5), (8, 0.95, 7), (10, 0.95, 9), (20, 0.95, 15), (4, 0.95, None), (10, 0.99, 10), (1, 0.5, 1)],
)
def test_the_windows_needed_are_those_of_the_sign_test(windows, confidence, needed):
    assert windows_needed(windows, confidence) == needed


@given(st.integers(1, 40), st.floats(0.5, 0.999))
def test_the_windows_needed_are_the_fewest_that_chance_rarely_gives(windows, confidence):
    needed = windows_needed(windows, confidence)

    def by_chance(least: int) -> float:
        return sum(math.comb(windows, agreeing) for agreeing in range(least, windows + 1)) / 2**windows

    if needed is None:
        assert by_chance(windows) > 1 - confidence
        return
    assert by_chance(needed) <= 1 - confidence + 1e-9
    assert by_chance(needed - 1) > 1 - confidence
    assert judge(needed, windows, confidence) is Verdict.HOLDS
    assert judge(needed - 1, windows, confidence) is not Verdict.HOLDS
    assert judge(windows - needed, windows, confidence) is Verdict.FAILS


def test_a_server_that_takes_in_more_than_it_answers_has_no_window_that_counts():
    """1.3 times what it can do, for ten seconds: no answer takes three seconds yet, but none would end there."""
    windows = Windows(1.0, 2.0, 5)
    records = single_server(130, 0.01, windows.end_s, seed=1)
    shown = observe(130, records, windows, parse_objectives(["p99=5s"]), GOOD)
    assert shown.is_behind
    assert (shown.met, shown.windows) == (0, 5)
    assert shown.response.max_s < 5


@pytest.mark.parametrize(
    ("generator", "limit", "lag_s", "is_generators"),
    [
        (GOOD, "p99=200ms", 0.0, False),
        # It falls behind, by 30 requests a second, counted from whenever they were sent.
        (LATE, "p99=5s", 0.1, False),
        (BUSY, "p99=5s", 0.1, True),
    ],
)
def test_a_miss_of_the_server_is_its_own_though_the_generator_was_late(generator, limit, lag_s, is_generators):
    windows = Windows(1.0, 2.0, 5)
    true = single_server(130, 0.01, windows.end_s, seed=1)
    records = Records.of(true.intended_s, true.intended_s + lag_s, true.ended_s + lag_s, true.codes)
    shown = observe(130, records, windows, parse_objectives([limit]), generator)
    assert shown.met == 0
    assert bool(shown.problem) == is_generators


@pytest.mark.parametrize(
    ("lag_s", "service_s", "limit", "is_generators"),
    [
        (0.1, 0.03, "p99=50ms", True),  # without the lag it would be met
        (0.1, 0.03, "p99=1ms", True),  # missed from the real sending too; but all that was held up has come at once
        (0.1, 0.9, "p99=850ms", True),  # the server takes long, but not longer by more than the lag
        (0.1, 0.9, "p99=950ms", True),
        (0.1, 1.1, "p99=900ms", False),  # that the lag cannot be
        (0.006, 0.1, "p99=50ms", False),
        (0.011, 0.1, "p99=50ms", True),
    ],
)
def test_a_miss_that_the_lag_may_explain_is_the_generators(lag_s, service_s, limit, is_generators):
    windows = Windows(1.0, 2.0, 5)
    due = np.arange(0, 11, 0.01)
    records = Records.of(due, due + lag_s, due + lag_s + service_s, np.zeros(len(due)))
    late = replace(GOOD, lag_p99_s=lag_s)
    shown = observe(100, records, windows, parse_objectives([limit]), late)
    assert (shown.met, shown.is_behind) == (0, False)
    assert shown.problem == (late.problem if is_generators else "")


@pytest.mark.parametrize(("service_s", "is_generators"), [(1.5, False), (0.1, True)])
def test_errors_of_a_slow_server_are_its_own_though_the_generator_was_late(service_s, is_generators):
    due = np.arange(0, 11, 0.01)
    codes = np.where(np.arange(len(due)) % 2, 0, 14)
    records = Records.of(due, due + 0.1, due + 0.1 + service_s, codes)
    shown = observe(100, records, Windows(1.0, 2.0, 5), parse_objectives(["errors=1%"]), LATE)
    assert (shown.met, bool(shown.problem)) == (0, is_generators)


@given(st.integers(0, 1000), st.floats(0.1, 0.8), st.floats(50, 500))
def test_a_server_with_room_does_not_fall_behind(seed, utilisation, rate_per_s):
    assert not falls_behind(single_server(rate_per_s, utilisation / rate_per_s, 11.0, seed), 1.0, 11.0)


def test_what_was_never_sent_is_no_backlog_but_an_error():
    due = np.arange(0, 11, 0.01)
    nan = np.full(len(due), math.nan)
    records = Records.of(due, nan, nan, [NOT_SENT] * len(due))
    shown = observe(100, records, Windows(1, 2, 5), parse_objectives([]), GOOD)
    assert (shown.is_behind, shown.met, shown.error_ratio) == (False, 0, 1.0)


def test_a_window_without_requests_is_not_met():
    records = Records.of([1.5], [1.5], [1.6], [0])
    assert observe(1, records, Windows(1, 1, 3), parse_objectives(["p99=1s"]), GOOD).met == 1


@settings(max_examples=10)
@given(st.integers(0, 10_000), st.floats(0.0005, 0.05), st.sampled_from([3, 6, 12]))
def test_the_capacity_of_a_simulated_server_is_found(seed, service_s, patience):
    """M/D/1 with a p99 of a few service times: what is found is held against one long load of the same server."""
    limit_s = service_s * patience
    objectives = parse_objectives([f"p99={limit_s:.9f}s"])
    windows = Windows(200 * service_s, 8_000 * service_s, 5)
    seeds = count(seed)

    def measure(rate_per_s: float) -> Step:
        records = single_server(rate_per_s, service_s, windows.end_s, next(seeds))
        return observe(rate_per_s, records, windows, objectives, GOOD)

    capacity, _ = search(measure, start_per_s=0.5 / service_s, least_per_s=0.01 / service_s, most_per_s=10 / service_s)
    assert capacity.end is End.FOUND

    def p99_s(rate_per_s: float) -> float:
        return quantile(single_server(rate_per_s, service_s, 200_000 * service_s, seed).response_s, 0.99)

    assert capacity.rate_per_s < 1 / service_s
    assert p99_s(capacity.rate_per_s * 0.9) <= limit_s
    assert p99_s(capacity.rate_per_s * 1.3) > limit_s


@pytest.mark.parametrize(
    ("target_per_s", "capacity_per_s", "headroom", "replicas"),
    [(1000, 1000, 0, 1), (1001, 1000, 0, 2), (3000, 412, 0.3, 11), (700, 1000, 0.3, 1), (1400, 1000, 0.3, 2)],
)
def test_replicas_for_a_rate(target_per_s, capacity_per_s, headroom, replicas):
    assert replicas_needed(target_per_s, capacity_per_s, headroom) == replicas
