"""What counts as worse between two runs: more than the spreads explain, to the bad side, of ratios in both."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.compare import ROUNDS_MIN, Verdict, compare, main
from loadtests.record import Record, to_json, write
from loadtests.results import Goal


def goal(*rounds: float, at_least: bool = True, text: str = "requests/s, over the echo") -> Goal:
    return Goal(text, rounds, 1.0, at_least)


def verdict(old: Goal, new: Goal) -> Verdict:
    (change,) = compare([old], [new])
    return change.verdict


@pytest.mark.parametrize("at_least", [True, False])
def test_a_move_beyond_the_spreads_is_worse_or_better_by_its_side(at_least: bool) -> None:
    low, high = goal(9.9, 10.0, 10.1, at_least=at_least), goal(11.9, 12.0, 12.1, at_least=at_least)
    assert verdict(low, high) is (Verdict.BETTER if at_least else Verdict.WORSE)
    assert verdict(high, low) is (Verdict.WORSE if at_least else Verdict.BETTER)


def test_a_move_that_the_spreads_explain_is_none() -> None:
    assert verdict(goal(8.0, 10.0, 12.0), goal(7.0, 8.0, 9.0)) is Verdict.SAME
    # Each spread is 0.5 on its own side, and the floor 0.3.
    assert verdict(goal(9.5, 10.0, 10.5), goal(8.25, 8.75, 9.25)) is Verdict.SAME
    assert verdict(goal(9.5, 10.0, 10.5), goal(8.15, 8.65, 9.15)) is Verdict.WORSE


def test_rounds_that_happen_to_agree_make_no_fact_of_three_percent() -> None:
    assert verdict(goal(10.0, 10.0, 10.0), goal(9.75, 9.75, 9.75)) is Verdict.SAME
    assert verdict(goal(10.0, 10.0, 10.0), goal(9.65, 9.65, 9.65)) is Verdict.WORSE


def test_what_was_zero_and_is_not_any_more_is_worse() -> None:
    was, now = (goal(*rounds, at_least=False) for rounds in ((0.0, 0.0, 0.0), (2.0, 2.0, 3.0)))
    assert verdict(was, now) is Verdict.WORSE
    assert verdict(was, was) is Verdict.SAME


def test_one_round_tells_no_spread_and_is_not_judged() -> None:
    assert verdict(goal(10.0), goal(5.0, 5.0, 5.0)) is Verdict.UNKNOWN
    assert verdict(goal(10.0, 10.0, 10.0), goal(5.0)) is Verdict.UNKNOWN


def test_a_round_that_could_not_be_measured_is_not_judged() -> None:
    assert verdict(goal(10.0, 10.0, 10.0), goal(5.0, math.nan, 5.0)) is Verdict.UNKNOWN


def test_ratios_of_one_run_alone_are_told_apart() -> None:
    found = compare([goal(1.0, text="gone"), goal(1.0, text="both")], [goal(1.0, text="both"), goal(1.0, text="new")])
    assert [(each.text, each.verdict) for each in found] == [
        ("gone", Verdict.GONE),
        ("both", Verdict.UNKNOWN),
        ("new", Verdict.NEW),
    ]


rounds = st.lists(st.floats(0.01, 100), min_size=ROUNDS_MIN, max_size=6)


@given(rounds, rounds, st.booleans())
def test_there_and_back_never_is_worse_twice_and_a_run_is_as_good_as_itself(
    first: list[float], second: list[float], at_least: bool
) -> None:
    one, other = goal(*first, at_least=at_least), goal(*second, at_least=at_least)
    assert verdict(one, one) is Verdict.SAME
    assert [verdict(one, other), verdict(other, one)].count(Verdict.WORSE) <= 1


def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], old: Record, new: Record) -> tuple[int, str, str]:
    write(tmp_path / "old.json", old)
    write(tmp_path / "new.json", new)
    code = main([str(tmp_path / "old.json"), str(tmp_path / "new.json")])
    return (code, *capsys.readouterr())


def test_a_regression_ends_with_1_and_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    limited = Goal("p50, over the echo", (0.5, 0.5, 0.5), 1.0, at_least=False, generator_was_limit=True)
    old = Record(commit="a" * 40, machine={"processor": "one"}, goals=(goal(10.0, 10.0, 10.0), limited))
    new = Record(commit="b" * 40 + "-dirty", machine={"processor": "two"}, goals=(goal(8.0, 8.0, 8.0), limited))
    code, out, _ = run(tmp_path, capsys, old, new)
    assert code == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert ["requests/s, over the echo", "WORSE", "10", "8", "-20.0%", "3.0%"] in cells
    assert ["p50, over the echo", "same (a load generator was the limit)", "0.5", "0.5", "+0.0%", "3.0%"] in cells
    assert "note: processor differs: one / two" in out
    assert f"commit {'b' * 12}-dirty" in out


def test_a_run_without_a_regression_ends_with_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = Record(goals=(goal(10.0, 10.0, 10.0),)), Record(goals=(goal(12.0, 12.0, 12.0),))
    code, out, _ = run(tmp_path, capsys, old, new)
    assert code == 0
    assert "+20.0%" in out


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (goal(1.0, 1.0, 1.0, text="another"), "no ratio in common"),
        (goal(1.0), "measure 3 rounds or more in both runs"),
    ],
)
def test_runs_that_cannot_be_compared_end_with_2(
    new: Goal, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(tmp_path, capsys, Record(goals=(goal(1.0, 1.0, 1.0),)), Record(goals=(new,)))
    assert code == 2
    assert why in err


def test_another_schema_is_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "old.json", Record())
    (tmp_path / "new.json").write_text(json.dumps(to_json(Record()) | {"schema": 7}))
    assert main([str(tmp_path / "old.json"), str(tmp_path / "new.json")]) == 2
    assert "new.json: it has schema 7" in capsys.readouterr().err
