"""Objectives: each kind passes and fails by what was measured, and nothing that was not measured passes."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.slo import BY_KEY, KINDS, Kind, Measured, Objective, judge

GOOD = Measured(
    p50_ms=2.0,
    p95_ms=4.0,
    p99_ms=8.0,
    p999_ms=16.0,
    error_ratio=0.01,
    throughput_per_s=100.0,
    goodput_ratio=0.95,
    lone_p50_ms=1.0,
    arrival_error_p99_ms=0.5,
    mean_gap_ms=10.0,
    generator_cpu_us_per_request=600.0,
    server_cpu_us_per_request=200.0,
    server_cpu_cores=0.5,
    server_rss_mib=100.0,
    envoy_cpu_us_per_request=None,
)

MEASURED = {
    "p50_ms": 2.0,
    "p95_ms": 4.0,
    "p99_ms": 8.0,
    "p999_ms": 16.0,
    "error_ratio": 0.01,
    "min_throughput_per_s": 100.0,
    "min_goodput_ratio": 0.95,
    "p99_over_lone_p50": 8.0,
    "arrival_error_p99_ms": 0.5,
    "arrival_error_over_gap": 0.05,
    "generator_cpu_us_per_request": 600.0,
    "server_cpu_us_per_request": 200.0,
    "server_cpu_cores": 0.5,
    "server_rss_mib": 100.0,
}

each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.key)


def passes(kind: Kind, limit: float, run: Measured) -> bool:
    (verdict,) = judge([Objective(kind, limit)], run)
    return verdict.passed


def test_kinds_are_those_of_the_table_above():
    assert list(BY_KEY) == list(MEASURED)


@each_kind
def test_each_kind_says_its_own_value(kind):
    (verdict,) = judge([Objective(kind, 1.0)], GOOD)
    assert verdict.value == pytest.approx(MEASURED[kind.key])


@each_kind
def test_each_kind_passes_at_its_limit_and_fails_beyond(kind):
    value = kind.value(GOOD)
    beyond, within = (1.01, 0.99) if kind.at_least else (0.99, 1.01)
    assert passes(kind, value, GOOD)
    assert passes(kind, value * within, GOOD)
    assert not passes(kind, value * beyond, GOOD)


@each_kind
@pytest.mark.parametrize("nothing", [None, math.nan])
def test_what_was_not_measured_fails(kind, nothing):
    nowhere = Measured(*[nothing for _ in fields(Measured)])
    assert not passes(kind, 1e-9 if kind.at_least else 1e9, nowhere)


@pytest.mark.parametrize(
    ("key", "lost"),
    [
        ("p99_over_lone_p50", {"lone_p50_ms": None}),
        ("p99_over_lone_p50", {"lone_p50_ms": 0.0}),
        ("p99_over_lone_p50", {"p99_ms": None}),
        ("arrival_error_over_gap", {"mean_gap_ms": None}),
        ("arrival_error_over_gap", {"arrival_error_p99_ms": None}),
    ],
)
def test_a_ratio_needs_both_of_its_parts(key, lost):
    assert passes(BY_KEY[key], 1e9, GOOD)
    assert not passes(BY_KEY[key], 1e9, replace(GOOD, **lost))


@each_kind
@given(value=st.floats(0, 1e6), limit=st.floats(0, 1e6), worse=st.floats(0, 1e6))
def test_what_fails_still_fails_when_it_is_worse(kind, value, limit, worse):
    by_value = replace_value(kind, value)
    by_worse = replace_value(kind, value - worse if kind.at_least else value + worse)
    if not passes(kind, limit, by_value):
        assert not passes(kind, limit, by_worse)


def replace_value(kind: Kind, value: float) -> Measured:
    """A run in which this kind has this value."""
    names = {"p99_over_lone_p50": "p99_ms", "arrival_error_over_gap": "arrival_error_p99_ms"}
    name = names.get(kind.key, kind.key.removeprefix("min_"))
    return replace(GOOD, lone_p50_ms=1.0, mean_gap_ms=1.0, **{name: value})


def test_verdicts_come_in_the_order_of_the_objectives():
    objectives = [Objective(BY_KEY["p99_ms"], 10.0), Objective(BY_KEY["p50_ms"], 1.0)]
    assert [(each.objective.kind.key, each.passed) for each in judge(objectives, GOOD)] == [
        ("p99_ms", True),
        ("p50_ms", False),
    ]
