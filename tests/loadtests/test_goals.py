"""The goals of the benchmark: each can be met and missed, and is told from the rows it is about."""

import math

import pytest

from loadtests.peers import ECHO, LOOP, SLUICE, Sample
from loadtests.results import Memory, Row, goals
from loadtests.table import render_goals, render_memory, render_rows


def row(model: str, who: str, in_flight: int, *samples: Sample) -> Row:
    return Row(model, model, who, in_flight, str(in_flight), samples)


def sample(requests_per_s: float = 1.0, cpu_us: float = 1.0, mean_batch_rows: float = math.nan) -> Sample:
    return Sample(requests_per_s, cpu_us, p50_ms=1.0, p99_ms=2.0, mean_batch_rows=mean_batch_rows)


def measured(rows_per_s: float, cpu_us: float, batch_rows: float, after_bytes: int) -> dict[str, bool]:
    rows = [
        row("identity", SLUICE, 32, sample(cpu_us=cpu_us)),
        row("identity", ECHO, 32, sample(cpu_us=100)),
        row("large_mlp", SLUICE, 64, sample(requests_per_s=rows_per_s)),
        row("large_mlp", SLUICE, 100, sample(mean_batch_rows=batch_rows)),
        row("large_mlp", LOOP, 32, sample(requests_per_s=1000)),
    ]
    found = goals(rows, Memory(100_000, 1000, after_bytes))
    return {goal.text.partition(":")[0]: goal.is_met for goal in found}


LOOP_GOAL, ECHO_GOAL, BATCH_GOAL, MEMORY_GOAL = GOALS = (
    "large MLP, 64 in flight",
    "identity, 32 in flight",
    "large MLP, 100 in flight",
    "identity, 100,000 requests in a row",
)


def test_goals_are_met_at_their_limits() -> None:
    assert measured(900, 125, 16, 1050) == dict.fromkeys(GOALS, True)


@pytest.mark.parametrize(
    ("values", "missed"),
    [
        ((899, 125, 16, 1050), LOOP_GOAL),
        ((900, 126, 16, 1050), ECHO_GOAL),
        ((900, 125, 15.9, 1050), BATCH_GOAL),
        ((900, 125, 16, 1051), MEMORY_GOAL),
    ],
)
def test_each_goal_can_be_missed(values: tuple[float, float, float, int], missed: str) -> None:
    assert measured(*values) == dict.fromkeys(GOALS, True) | {missed: False}


def test_ratios_are_taken_round_by_round() -> None:
    rows = [
        row("identity", SLUICE, 32, sample(cpu_us=110), sample(cpu_us=330), sample(cpu_us=120)),
        row("identity", ECHO, 32, sample(cpu_us=100), sample(cpu_us=300), sample(cpu_us=100)),
    ]
    goal = goals(rows, Memory(1, 1, 1))[0]

    assert (goal.value.low, goal.value.median, goal.value.high) == pytest.approx((1.1, 1.1, 1.2))


def test_goals_of_models_that_were_not_measured_are_left_out() -> None:
    assert [goal.text.partition(":")[0] for goal in goals([], Memory(500, 1, 1))] == ["identity, 500 requests in a row"]


def test_the_table_shows_medians_and_spread_and_leaves_out_what_was_not_measured() -> None:
    text = render_rows([row("identity", ECHO, 32, sample(2000, 12.34), sample(2200, 12.34), sample(1800, 12.34))])

    header, rule, line = text.splitlines()
    assert len({len(header), len(rule), len(line)}) == 1
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "identity",
        ECHO,
        "32",
        "2,000 ±10%",
        "12.3 ±0%",
        "1.00",
        "2.00",
        "",
        "",
    ]


def test_a_goal_is_printed_with_its_value_and_its_limit() -> None:
    (goal,) = goals([], Memory(1000, 1000, 1200))

    words = render_goals([goal]).split()
    assert words == "MISS identity, 1,000 requests in a row: resident memory grows by 0.2, at most 0.05".split()  # noqa: SIM905


def test_memory_is_printed_before_and_after() -> None:
    text = render_memory(Memory(1000, 100 * 2**20, 105 * 2**20))

    assert text == "resident memory before 100.0 MiB, after 1,000 requests 105.0 MiB (+5.0%)"
