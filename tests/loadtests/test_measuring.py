"""What a load came to, from made-up outcomes: latencies from the intended time, goodput, CPU, and the generator."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_up import REQUEST, outcome, series, write_repository, write_scenario

from loadtests.measuring import make_run, measure
from loadtests.outcome import LoadFailed, Outcome, Part, read_outcome, write_outcome, write_problem
from loadtests.scenario import read_scenario
from loadtests.server_watch import Series, ServerWatch, metric_sums
from sluice_client.load.latencies import CODES, NOT_SENT

LATE = CODES.index("DEADLINE_EXCEEDED")
NOTHING = Series.of([], 0.0)


@pytest.fixture
def scenario(tmp_path):
    write_repository(tmp_path)
    requests = f"{REQUEST}deadline_ms = 100\n{REQUEST}rows = 2\n"
    return read_scenario(write_scenario(tmp_path, requests, "[generator]\nmax_in_flight = 7"))


def test_response_time_counts_from_when_a_request_was_due(scenario):
    """Three of four meet a generator that was held up for half a second: service times alone would not tell."""
    found = measure(scenario, outcome([0, 1, 1.1, 1.2], [0, 0.5, 0.4, 0.3], [0.01] * 4, [0] * 4), NOTHING)
    assert found.p50_ms == pytest.approx(310)
    assert found.p99_ms == found.p999_ms == pytest.approx(510)
    assert found.arrival_error_p99_ms == pytest.approx(500)
    assert found.lone_p50_ms == pytest.approx(2)
    assert found.mean_gap_ms == pytest.approx(20)
    assert found.generator_cpu_us_per_request == pytest.approx(200_000)


def test_goodput_is_within_each_kind_s_own_deadline(scenario):
    """Deadlines: 100 ms of kind 0, none of kind 1; one failed, one was never sent."""
    times = [0.05, 0.15, 0.15, 0.05, math.nan]
    found = measure(
        scenario,
        outcome([0, 0.1, 0.2, 0.3, 0.4], [0] * 5, times, [0, 0, 0, LATE, NOT_SENT], kinds=[0, 0, 1, 1, 1]),
        NOTHING,
    )
    assert found.goodput_ratio == pytest.approx(2 / 5)
    assert found.error_ratio == pytest.approx(2 / 5)
    assert found.throughput_per_s == pytest.approx(3 / 2)


def test_throughput_is_over_the_time_until_the_last_answer(scenario):
    found = measure(scenario, outcome([0, 1], [0, 0], [0.1, 9.0], [0, 0]), NOTHING)
    assert found.throughput_per_s == pytest.approx(2 / 10)


def test_cpu_and_memory_are_those_of_the_load(scenario):
    """Two seconds of load, in which the CPU seconds go from 11 to 12; memory was higher before, and is not counted."""
    looks = series([5, 11, 11.5, 12, 20], [900, 100, 120, 110, 105], started_at_s=1_000.0)
    looks = replace(looks, at_s=looks.at_s - 1)
    found = measure(scenario, outcome([0, 1], [0, 0], [0.1, 0.1], [0, 0]), looks)
    assert found.server_cpu_cores == pytest.approx(0.5)
    assert found.server_cpu_us_per_request == pytest.approx(500_000)
    assert found.server_rss_mib == pytest.approx(120)
    assert found.envoy_cpu_us_per_request is None


def test_envoy_s_cpu_is_that_of_the_load_too(scenario):
    looks = series([1, 1, 1], [1, 1, 1])
    looks = replace(looks, envoy_cpu_s=np.array([3.0, 3.5, 4.0]))
    found = measure(scenario, outcome([0, 1], [0, 0], [0.1, 0.1], [0, 0]), looks)
    assert found.envoy_cpu_us_per_request == pytest.approx(500_000)
    assert found.server_cpu_us_per_request == 0


def test_nothing_answered_has_no_latency(scenario):
    found = measure(scenario, outcome([0, 1], [0, 0], [0.1, 0.1], [LATE, LATE], lone_s=()), NOTHING)
    assert (found.p50_ms, found.p999_ms, found.lone_p50_ms) == (None, None, None)
    assert (found.error_ratio, found.throughput_per_s, found.goodput_ratio) == (1.0, 0.0, 0.0)
    assert (found.server_cpu_cores, found.server_cpu_us_per_request, found.server_rss_mib) == (None, None, None)


def test_a_generator_that_was_the_bottleneck_says_so(scenario):
    def problems(made: Outcome) -> tuple[str, ...]:
        return make_run("direct", scenario, made, NOTHING).problems

    who = "the generator was the bottleneck: worker 1"
    assert problems(outcome([0, 1], [0.005, 0.005], [0.1, 0.1], [0, 0], cpu_share=0.9)) == ()
    assert problems(outcome([0, 1], [0.0, 0.0051], [0.1, 0.1], [0, 0])) == (
        f"{who} sent late, p99 of it is 5.1 ms (lag_p99_ms = 5)",
    )
    assert problems(outcome([0, 1], [0, 0], [0.1, 0.1], [0, 0], cpu_share=0.91)) == (
        f"{who} used 0.91 of a core (cpu_share = 0.9)",
    )
    assert problems(outcome([0, 1], [0, 0], [0.1, math.nan], [0, NOT_SENT])) == (
        f"{who} did not send 1 requests, as 7 were in flight (max_in_flight)",
    )


def part(index: int, *due_s: float) -> Part:
    due = np.array(due_s)
    codes = np.full(len(due), index, np.uint8)
    return Part(
        index, 1_000.5, 0.5, 2.0, 3, due, due + 0.001, due + 0.002, codes, codes + 1, np.array([0.5] * (1 - index))
    )


def test_an_outcome_is_read_as_it_was_written(tmp_path):
    write_outcome(tmp_path / "outcome", [part(1, 0.5, 1.5), part(0, 0.0, 1.0)])
    found = read_outcome(tmp_path / "outcome")

    assert found.started_at_s == 1_000.5
    assert found.records.intended_s.tolist() == [0.0, 0.5, 1.0, 1.5]
    assert found.records.codes.tolist() == [0, 1, 0, 1]
    assert found.kinds.tolist() == [1, 2, 1, 2]
    assert found.of_kind(2).intended_s.tolist() == [0.5, 1.5]
    assert found.lone_s.tolist() == [0.5]
    assert [(each.cpu_share, each.most_in_flight) for each in found.generators] == [(0.25, 3)] * 2
    assert found.cpu_s == 1.0
    assert found.generators[0].lag_p99_s == pytest.approx(0.001)


def test_a_problem_is_read_as_an_error(tmp_path):
    write_problem(tmp_path / "outcome", "PayloadError: no good")
    with pytest.raises(LoadFailed, match=r"^PayloadError: no good$"):
        read_outcome(tmp_path / "outcome")


def test_metrics_are_summed_over_models():
    text = '# TYPE nv_inference_count counter\nnv_inference_count{model="a"} 3\nnv_inference_count{model="b"} 4\n'
    text += "nv_inference_count_total 50\nplain 2.5\n"
    found = metric_sums(text, ("nv_inference_count", "plain", "missing"))
    assert found == {"nv_inference_count": 7.0, "plain": 2.5, "missing": pytest.approx(math.nan, nan_ok=True)}


def test_a_watch_of_nothing_sees_nothing_and_a_watch_of_what_has_ended_fails():
    with ServerWatch(None, None) as watch:
        pass
    looks = Series.of(watch.samples, 0.0)
    assert len(looks.at_s) == 2
    assert looks.cpu_between(0.0, 1.0) is None
    assert looks.most_rss_bytes(0.0, 1.0) is None

    pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
    with pytest.raises(FileNotFoundError), ServerWatch(pid_max, None):
        pass
