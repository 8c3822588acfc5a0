"""Objectives as --slo writes them: what is understood, what is refused, and that each of them can be missed."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sluice_client import InvalidRequest
from sluice_client.load.latencies import NOT_SENT, Records
from sluice_client.load.objectives import Objective, parse_objectives, slowest_limit_s


def load(*response_ms: float, failed: int = 0) -> Records:
    ended = np.array([ms / 1e3 for ms in response_ms] + [1.0] * failed)
    times = np.zeros(len(ended))
    return Records.of(times, times, ended, [0] * len(response_ms) + [14] * failed)


@pytest.mark.parametrize(
    ("text", "share", "limit"),
    [
        ("p99=50ms", 0.99, 0.05),
        ("p99.9=0.2s", 0.999, 0.2),
        ("p50=250us", 0.5, 0.00025),
        ("p5=1s", 0.05, 1.0),
        ("errors=0.1%", 0, 0.001),
        ("errors=0%", 0, 0),
        ("errors=100%", 0, 1),
    ],
)
def test_an_objective_is_read(text, share, limit):
    objective = parse_objectives([text])[0]
    assert (objective.text, objective.share) == (text, share)
    assert objective.limit == pytest.approx(limit)


def test_errors_are_limited_where_nothing_is_said_of_them():
    assert [each.text for each in parse_objectives(["p99=1s"])] == ["p99=1s", "errors=0.1%"]
    assert [each.text for each in parse_objectives(["errors=5%", "p50=1s"])] == ["errors=5%", "p50=1s"]


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["p99=50"], "--slo 'p99=50': write a time above 0 with its unit (us, ms or s), like p99=50ms"),
        (["p99"], "--slo 'p99': write a time above 0 with its unit (us, ms or s), like p99=50ms"),
        (["p99=0ms"], "--slo 'p99=0ms': write a time above 0 with its unit (us, ms or s), like p99=50ms"),
        (["p99=-1ms"], "--slo 'p99=-1ms': write a time above 0 with its unit (us, ms or s), like p99=50ms"),
        (["p99=1e3ms"], "--slo 'p99=1e3ms': write a time above 0 with its unit (us, ms or s), like p99=50ms"),
        (
            ["speed=3"],
            "--slo 'speed=3': no such objective; there are pN=TIME for the response time (p50, p99, p99.9, ...) "
            "and errors=N%",
        ),
        (
            ["p0=1ms"],
            "--slo 'p0=1ms': no such objective; there are pN=TIME for the response time (p50, p99, p99.9, ...) "
            "and errors=N%",
        ),
        (
            ["p100=1ms"],
            "--slo 'p100=1ms': no such objective; there are pN=TIME for the response time (p50, p99, p99.9, ...) "
            "and errors=N%",
        ),
        (["errors=1"], "--slo 'errors=1': write the share of requests that may fail, like errors=0.1%"),
        (["errors=101%"], "--slo 'errors=101%': write the share of requests that may fail, like errors=0.1%"),
        (["p99=1s", "p99=2s"], "--slo gives 'p99' twice"),
        (["errors=1%", "errors=2%"], "--slo gives 'errors' twice"),
    ],
)
def test_an_objective_that_is_wrong_is_refused(texts, reason):
    with pytest.raises(InvalidRequest) as caught:
        parse_objectives(texts)
    assert str(caught.value) == reason


def test_a_latency_objective_is_met_up_to_its_limit_and_missed_above():
    (objective, _) = parse_objectives(["p50=20ms"])
    assert objective.value(load(10, 20, 30)) == pytest.approx(0.02)
    assert objective.is_met(load(10, 20, 30))
    assert not objective.is_met(load(10, 21, 30))
    # Failed requests are no slow answers, and no fast ones either.
    assert objective.value(load(10, 20, 30, failed=5)) == pytest.approx(0.02)


def test_an_objective_for_errors_is_met_up_to_its_limit_and_missed_above():
    (objective,) = parse_objectives(["errors=25%"])
    assert objective.is_met(load(1, 1, 1, failed=1))
    assert not objective.is_met(load(1, 1, failed=1))
    not_sent = Records.of([0.0], [math.nan], [math.nan], [NOT_SENT])
    assert objective.value(not_sent) == 1


@pytest.mark.parametrize("objective", parse_objectives(["p99=1s", "errors=100%"]), ids=lambda each: each.name)
def test_no_objective_is_met_by_no_requests(objective):
    assert math.isnan(objective.value(load()))
    assert not objective.is_met(load())


def test_no_latency_objective_is_met_by_no_answers():
    assert not parse_objectives(["p99=1s"])[0].is_met(load(failed=3))


@pytest.mark.parametrize(("text", "samples"), [("p99=1s", 100), ("p99.9=1s", 1000), ("p50=1s", 10), ("errors=1%", 10)])
def test_a_window_needs_as_many_requests_as_its_quantile_can_tell_apart(text, samples):
    assert parse_objectives([text])[0].samples == samples


def test_the_slowest_limit_is_that_of_latencies():
    assert slowest_limit_s(parse_objectives(["p50=10ms", "p99=2s", "errors=100%"])) == 2
    assert slowest_limit_s([Objective("errors=0%", 0, 0)]) == 0
