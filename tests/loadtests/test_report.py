"""The report of runs that went wrong in every way: it is still written, and says what there is to say."""

from __future__ import annotations

import json
import math

import pytest
from made_up import outcome, series, write_repository, write_scenario

from loadtests.markdown import plain
from loadtests.measuring import make_run
from loadtests.plots import window_edges
from loadtests.report import as_json, render_html, render_text
from loadtests.scenario import read_scenario
from loadtests.server_watch import Series
from loadtests.slo import judge
from sluice_client.load.latencies import CODES, NOT_SENT

LATE = CODES.index("DEADLINE_EXCEEDED")
NOTHING = Series.of([], 0.0)


@pytest.fixture
def scenario(tmp_path):
    write_repository(tmp_path)
    top = 'title = "Less < more & \\"so\\""\nduration_s = 2'
    return read_scenario(write_scenario(tmp_path, top, "[slo]\nerror_ratio = 0\np99_ms = 5\nserver_cpu_cores = 1"))


def test_nothing_answered_and_nothing_seen_of_the_server(scenario):
    made = outcome([0, 1], [0, 0], [0.1, math.nan], [LATE, NOT_SENT], lone_s=())
    runs = [make_run("direct", scenario, made, NOTHING)]
    text = render_html(scenario, runs, {"processor": "<one>"})
    result = json.loads(json.dumps(as_json(scenario, runs, {}), allow_nan=False))

    assert [
        title for title in ("Latency over time", "Throughput", "Server CPU") if f"<h2>{title}</h2><svg" in text
    ] == [
        "Latency over time",
        "Throughput",
    ]
    assert "<h1>Less &lt; more &amp; &quot;so&quot;</h1>" in text
    assert "&lt;one&gt;" in text
    assert [(each["value"], each["passed"]) for each in result["objectives"]] == [
        (None, False),
        (1.0, False),
        (None, False),
    ]
    assert result["runs"][0]["response_ms"]["p99"] is None
    assert result["runs"][0]["outcomes"] == {"DEADLINE_EXCEEDED": 1, "NOT_SENT": 1}
    shown = render_text(scenario, runs, judge(scenario.objectives, runs[-1].measured))
    assert shown.count("FAIL") == 5
    assert "| response time p99, ms           | at most 5 |        - | FAIL |" in shown


def test_a_bottleneck_on_the_way_that_is_only_compared_with_fails_the_run_too(scenario):
    late = outcome([0, 1], [0.5, 0.5], [0.001, 0.001], [0, 0])
    good = outcome([0, 1], [0, 0], [0.002, 0.002], [0, 0])
    looks = series([1, 1.1, 1.2], [50, 50, 50])
    runs = [make_run(way, scenario, made, looks) for way, made in (("direct", late), ("via envoy", good))]
    result = as_json(scenario, runs, {})

    assert [each["passed"] for each in result["objectives"]] == [True, True, True]
    assert not result["passed"]
    shown = render_text(scenario, runs, judge(scenario.objectives, runs[-1].measured))
    assert "| response time p50, ms       |     501 |         2 |  -499 |" in shown
    assert "| Envoy's CPU per request, us |       - |         - |     - |" in shown
    assert "FAIL: direct: the generator was the bottleneck: worker 1 sent late" in shown


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (math.nan, "-"),
        (0.0, "0"),
        (0.00123456, "0.00123"),
        (99.96, "100"),
        (123.4, "123"),
        (12345.6, "12,346"),
    ],
)
def test_numbers_have_three_digits_or_all_before_the_point(value, text):
    assert plain(value) == text


def test_windows_are_not_narrower_than_a_quarter_of_a_second():
    assert window_edges(1.0).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert window_edges(0.1).tolist() == [0.0, 0.1]
    assert len(window_edges(600.0)) == 61
