"""What `sluice load` says of a search's end, of replicas, and of what servers count; each sentence once."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from sluice_client import Duration
from sluice_client.load import report
from sluice_client.load.capacity import Capacity, End, Plan, Step, Verdict
from sluice_client.load.counters import Counters, add_up
from sluice_client.load.latencies import Quantiles
from sluice_client.load.objectives import parse_objectives

PLAN = Plan(start_per_s=64, least_per_s=1, most_per_s=1000)
OBJECTIVES = parse_objectives(["p99=50ms"])
NAN = float("nan")


def step(rate_per_s: float, *, is_behind: bool = False, problem: str = "", p99_s: float = 0.04) -> Step:
    met = 0 if is_behind or problem else 5
    return Step(rate_per_s, met, 5, is_behind, Quantiles(0.01, 0.02, p99_s, 0.05, 0.06), 0.001, problem)


@pytest.mark.parametrize(
    ("end", "rate_per_s", "last", "text"),
    [
        (
            End.FOUND,
            412.3,
            step(430),
            "capacity: 412.3 requests/s keep p99=50ms errors=0.1% (5 of 5 windows, twice; 5% more do not)",
        ),
        (
            End.ALWAYS,
            1000,
            step(1000),
            "capacity: at least 1,000 requests/s keep p99=50ms errors=0.1%; try more with --max-rate",
        ),
        (End.NEVER, 0, step(1), "no capacity: p99=50ms errors=0.1% is not kept at 1 requests/s either"),
        (
            End.GENERATOR,
            200,
            step(400, problem="the generator was the bottleneck: reasons"),
            "no capacity found: the generator was the bottleneck: reasons, at 400 requests/s, so this is no limit of "
            "the server; 200 requests/s keep p99=50ms errors=0.1%",
        ),
        (
            End.GENERATOR,
            0,
            step(400, problem="the generator was the bottleneck: reasons"),
            "no capacity found: the generator was the bottleneck: reasons, at 400 requests/s, so this is no limit of "
            "the server",
        ),
        (
            End.UNSTEADY,
            100,
            step(100),
            "no capacity found: measurements of the same rate contradict each other, 1 times; is something else using "
            "the machine? Longer windows (--window) help",
        ),
    ],
)
def test_every_end_of_a_search_is_told(end: End, rate_per_s: float, last: Step, text: str) -> None:
    assert report.capacity_text(Capacity(rate_per_s, end, (last,)), PLAN, 5, OBJECTIVES) == text


def test_the_curve_has_a_line_for_each_measurement() -> None:
    counted = Counters(rows=300, runs=100, requests=300, queue_ns=0, compute_ns=0)
    titles = report.curve_head()
    rows = [
        report.curve_row(step(1234.5), Verdict.HOLDS, counted),
        report.curve_row(step(2469, is_behind=True, p99_s=NAN), Verdict.FAILS, None),
        report.curve_row(step(99, problem="the generator was the bottleneck: reasons"), Verdict.FAILS, None),
    ]
    assert [" ".join(line.split()) for line in (titles, *rows)] == [
        "requests/s p50 ms p95 ms p99 ms p99.9 ms errors mean batch windows met verdict",
        "1,234.5 10.00 20.00 40.00 50.00 0.10% 3.0 5 of 5 holds",
        "2,469.0 10.00 20.00 - 50.00 0.10% 0 of 5 fails, falls behind",
        "99.0 10.00 20.00 40.00 50.00 0.10% 0 of 5 fails; the generator was the bottleneck: reasons",
    ]
    assert len({line.rindex(end) for line, end in zip(rows, ("holds", "fails", "fails"), strict=True)}) == 1


def test_a_search_without_a_capacity_has_none_in_json_but_what_was_kept() -> None:
    last = step(400, problem="busy", p99_s=NAN)
    curve = [(step(200), Verdict.HOLDS, None), (last, Verdict.FAILS, None)]
    found = report.capacity_json(Capacity(200, End.GENERATOR, (last,)), OBJECTIVES, curve)
    assert (found["capacity_per_s"], found["kept_at_per_s"], found["end"]) == (None, 200, "generator")
    assert found["curve"][1]["generator_problem"] == "busy"
    assert json.loads(json.dumps(found, allow_nan=False))["curve"][1]["response"]["p99_s"] is None


def test_replicas_are_told_with_one_that_may_be_away() -> None:
    assert report.replicas_text(3000, Capacity(412.3, End.FOUND, ()), 0.3) == (
        "replicas: 3,000 requests/s take 11 at 30% headroom (272.7 requests/s each), 12 if one may be away"
    )


def statistics(rows: int, runs: int, requests: int, queue_ms: int, each_ms: int):
    part = Duration(requests, each_ms * 1_000_000)
    return SimpleNamespace(
        inference_count=rows,
        execution_count=runs,
        success=Duration(requests, 0),
        queue=Duration(requests, queue_ms * 1_000_000),
        compute_input=part,
        compute_infer=part,
        compute_output=part,
    )


def test_counters_are_added_up_over_servers_and_versions() -> None:
    before = add_up([statistics(10, 10, 10, 5, 1), statistics(0, 0, 0, 0, 0)])
    after = add_up([statistics(30, 15, 20, 15, 2), statistics(10, 5, 10, 30, 4)])
    difference = after.since(before)
    assert difference == Counters(rows=30, runs=10, requests=20, queue_ns=40_000_000, compute_ns=15_000_000)
    assert (difference.mean_batch_rows, difference.queue_ms, difference.compute_ms) == (3.0, 2.0, 0.75)


def test_counters_that_began_anew_tell_nothing() -> None:
    assert add_up([statistics(1, 1, 1, 1, 1)]).since(add_up([statistics(2, 1, 1, 1, 1)])) is None


def test_no_requests_have_no_batch_and_took_no_time() -> None:
    nothing = Counters(0, 0, 0, 0, 0)
    assert (nothing.mean_batch_rows, nothing.queue_ms, nothing.compute_ms) == (0, 0, 0)
