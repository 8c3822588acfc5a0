"""The goals of the benchmark: each can be met and missed, and is told from the rows it is about."""

import math

import pytest

from loadtests.h2load import Load
from loadtests.peers import ECHO, GRPCIO, LOOP, NATIVE, Sample
from loadtests.plan import MEMORY, PARTS, Plan
from loadtests.record import Record
from loadtests.results import TARGETS, Goal, Key, Memory, Row, Target, goals, rate
from loadtests.table import LIMITED, render_goals, render_memory, render_report, render_rows

BASE = Load(2, 16)


def row(model: str, who: str, load: Load | None, *samples: Sample) -> Row:
    return Row(model, model, who, load.in_flight if load else 0, str(load or "batches"), samples)


def sample(requests_per_s: float = 1.0, cpu_us: float = 1.0, mean_batch_rows: float = math.nan) -> Sample:
    return Sample(requests_per_s, cpu_us, p50_ms=1.0, p99_ms=2.0, mean_batch_rows=mean_batch_rows)


def with_value(target: Target, of_row: float) -> list[Row]:
    """The rows of a target, whose value comes out as this; samples have the same number in all of their fields."""
    count = len(target.plus) + 1
    rows = [row(target.row.model, target.row.who, target.row.load, Sample(*[of_row * count] * 6))]
    worse = 0.5 if target.at_least else 2.0
    for number, over in enumerate(target.over_rows):
        rows.append(row(over.model, over.who, over.load, Sample(*[1.0 if number == 0 else worse] * 6)))
    return rows + [row(key.model, key.who, key.load, Sample(*[1.0] * 6)) for key in target.plus]


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.text)
def test_each_goal_is_met_at_its_limit_and_missed_beyond(target: Target) -> None:
    worse = target.limit * (0.99 if target.at_least else 1.01)
    for value, is_met in ((target.limit, True), (worse, False)):
        goal = target.goal(with_value(target, value))
        assert goal is not None
        assert (goal.text, goal.limit, goal.is_met) == (target.text, target.limit, is_met)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.text)
def test_a_goal_whose_rows_were_not_all_measured_is_left_out(target: Target) -> None:
    rows = with_value(target, 1.0)
    assert [target.goal(rows[:count]) for count in range(len(rows))] == [None] * len(rows)


def test_every_goal_has_its_rows_in_one_of_the_parts() -> None:
    for target in TARGETS:
        for key in (target.row, *target.over_rows, *target.plus):
            assert any(
                (case.model, case.who) == (key.model, key.who) and key.load in (None, case.load)
                for cases in PARTS.values()
                for case in cases
            ), target.text


def test_no_two_goals_say_the_same() -> None:
    assert len({target.text for target in TARGETS}) == len(TARGETS)


def test_memory_is_held_to_a_ratio() -> None:
    found = goals([], [Memory(GRPCIO, 100_000, 1000, 1050), Memory(NATIVE, 1_000_000, 1000, 1051)])
    assert [goal.is_met for goal in found] == [True, False]


def test_ratios_are_taken_round_by_round() -> None:
    rows = [
        row("identity", GRPCIO, BASE, sample(cpu_us=110), sample(cpu_us=330), sample(cpu_us=120)),
        row("identity", ECHO, BASE, sample(cpu_us=100), sample(cpu_us=300), sample(cpu_us=100)),
    ]
    (goal,) = goals(rows, [])

    assert (goal.value.low, goal.value.median, goal.value.high) == pytest.approx((1.1, 1.1, 1.2))


def test_a_row_is_found_by_its_load_and_a_bare_loop_without() -> None:
    rows = [row("m", NATIVE, BASE), row("m", NATIVE, Load(1, 32)), row("m", LOOP, None)]
    assert Key("m", NATIVE, Load(1, 32)).find(rows) is rows[1]
    assert Key("m", LOOP).find(rows) is rows[2]
    assert Key("m", NATIVE, Load(4, 8)).find(rows) is None


def test_a_case_of_two_parts_is_measured_once_and_a_missing_transport_not_at_all() -> None:
    cases = Plan(("identity", "crowd", MEMORY)).cases([GRPCIO, NATIVE])
    assert len(cases) == len(set(cases)) == 5
    assert {case.who for case in Plan().cases([GRPCIO])} == {GRPCIO, ECHO, LOOP}


def test_the_table_shows_medians_and_spread_and_leaves_out_what_was_not_measured() -> None:
    text = render_rows([row("identity", ECHO, BASE, sample(2000, 12.34), sample(2200, 12.34), sample(1800, 12.34))])

    header, rule, line = text.splitlines()
    assert len({len(header), len(rule), len(line)}) == 1
    assert [cell.strip() for cell in line.strip("|").split("|")] == [
        "identity",
        ECHO,
        "32 (2 x 16)",
        "2,000 ±10%",
        "12.3 ±0%",
        "1.00",
        "2.00",
        "",
        "",
    ]


def test_a_goal_is_printed_with_its_limit_its_value_and_whether_it_is_met() -> None:
    met = Goal("fast", (0.5, 0.4, 0.6), 0.5, at_least=False)
    missed = Goal("faster", (7.5,), 8, at_least=True)

    lines = render_goals([met, missed]).splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == [
        "fast",
        "met",
        "at most 0.5",
        "0.5",
        "0.4 to 0.6",
    ]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["faster", "MISSED", "at least 8", "7.5", ""]


def test_memory_is_printed_before_and_after() -> None:
    text = render_memory(Memory(NATIVE, 1000, 100 * 2**20, 105 * 2**20))

    assert text == f"{NATIVE}: resident memory after the warm-up 100.0 MiB, after 1,000 requests more 105.0 MiB (+5.0%)"


def test_a_report_leaves_out_what_was_not_measured() -> None:
    assert render_report(Record(machine={"cores": "2"})).split() == ["cores", "2"]


def busy_sample(busy: float, waiting: float) -> Sample:
    return Sample(1.0, 1.0, 1.0, 1.0, generator_busy=busy, generator_waiting=waiting)


@pytest.mark.parametrize(
    ("shares", "was_limit"),
    [
        ([(0.5, 0.1)], False),
        ([(0.95, 0.0)], True),
        ([(0.5, 0.45)], True),
        ([(math.nan, math.nan)], False),
        ([(0.95, 0.0), (0.5, 0.1)], False),
        ([(0.95, 0.0), (0.5, 0.1), (0.9, 0.0)], True),
    ],
)
def test_a_row_whose_generator_was_the_limit_in_most_rounds_says_so(
    shares: list[tuple[float, float]], was_limit: bool
) -> None:
    measured = row("identity", NATIVE, BASE, *(busy_sample(*share) for share in shares))
    assert measured.generator_was_limit is was_limit
    assert (LIMITED in render_rows([measured])) is was_limit
    text = render_report(Record(rows=(measured,)))
    assert ("the load generator was the limit" in text) is was_limit


def test_a_goal_says_so_for_each_of_its_rows() -> None:
    limited, free = busy_sample(0.95, 0.0), busy_sample(0.5, 0.0)
    rows = [row("identity", NATIVE, BASE, free), row("identity", ECHO, BASE, limited)]
    assert [goal.generator_was_limit for goal in goals(rows, [])] == [True]
    rows[1] = row("identity", ECHO, BASE, free)
    assert [goal.generator_was_limit for goal in goals(rows, [])] == [False]
    assert LIMITED in render_goals([Goal("fast", (1.0,), 1.0, at_least=True, generator_was_limit=True)])


def test_a_comparison_without_a_limit_has_no_verdict() -> None:
    target = Target("native over triton", rate, Key("m", NATIVE, BASE), Key("m", "triton", BASE), None, at_least=True)
    rows = [row("m", NATIVE, BASE, sample(200)), row("m", "triton", BASE, sample(100))]
    (goal,) = goals(rows, [], [target])
    assert (goal.is_met, goal.value.median) == (None, 2.0)
    cells = render_goals([goal]).splitlines()[2].strip("|").split("|")
    assert [cell.strip() for cell in cells] == ["native over triton", "", "", "2", ""]


def test_what_was_not_measured_is_told_below_the_tables() -> None:
    assert "Not measured: text detection: no package" in render_report(Record(skipped=("text detection: no package",)))
