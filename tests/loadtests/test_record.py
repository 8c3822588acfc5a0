"""A run as a file: that everything comes back, what it says of itself, and what is no such file."""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests import record as records
from loadtests.peers import NATIVE, Sample
from loadtests.record import Record, RecordError, from_json, read, to_json, write
from loadtests.results import Finding, Goal, Memory, Row

numbers = st.floats(0, 1e9)
rounds = st.lists(numbers, min_size=1, max_size=4).map(tuple)
words = st.text(max_size=8)


@st.composite
def rows(draw: st.DrawFn) -> Row:
    told = st.one_of(numbers, st.just(math.nan))
    samples = st.lists(st.builds(Sample, numbers, numbers, told, told, told, told, told, told), min_size=1, max_size=4)
    return Row(*(draw(words) for _ in range(3)), draw(st.integers(0, 99)), draw(words), tuple(draw(samples)), "h2load")


any_record = st.builds(
    Record,
    measured_at=words,
    commit=words,
    flags=st.lists(words, max_size=2).map(tuple),
    machine=st.dictionaries(words, words, max_size=2),
    versions=st.dictionaries(words, words, max_size=2),
    plan=st.just({"rounds": 3}),
    skipped=st.lists(words, max_size=2).map(tuple),
    rows=st.lists(rows(), max_size=3).map(tuple),
    findings=st.lists(st.builds(Finding, words, words, words, words, rounds), max_size=2).map(tuple),
    memories=st.lists(st.builds(Memory, words, *[st.integers(1, 9)] * 3), max_size=2).map(tuple),
    goals=st.lists(
        st.builds(Goal, words, rounds, st.one_of(st.none(), numbers), st.booleans(), st.booleans()), max_size=2
    ).map(tuple),
)


@given(any_record)
def test_what_is_written_comes_back(record: Record) -> None:
    text = json.dumps(to_json(record), allow_nan=False)
    # NaN is not equal to itself, and its text is.
    assert repr(from_json(json.loads(text))) == repr(record)


def test_a_spread_that_no_number_tells_is_null() -> None:
    """Half of the distance between extremes, over a median that is next to nothing."""
    (finding,) = to_json(Record(findings=(Finding("case", "who", "figure", "s", (5e-324, 5e-324, 1e9)),)))["findings"]
    assert finding["spread"] is None


def a_row(busy: float, waiting: float) -> Row:
    samples = tuple(
        Sample(value, 40.0, 1.0, 2.0, generator_busy=busy, generator_waiting=waiting) for value in (90.0, 100.0, 110.0)
    )
    return Row("identity", "identity 1x16", NATIVE, 32, "32 (2 x 16)", samples, "h2load")


def test_a_row_has_its_rounds_its_median_its_spread_and_what_its_generator_did() -> None:
    (row,) = to_json(Record(rows=(a_row(0.5, 0.1),)))["rows"]
    assert row["values"]["requests_per_s"] == {
        "rounds": [90.0, 100.0, 110.0],
        "median": 100.0,
        "low": 90.0,
        "high": 110.0,
        "spread": 0.1,
    }
    assert row["values"]["mean_batch_rows"]["rounds"] == [None, None, None]
    assert row["values"]["mean_batch_rows"]["median"] is None
    assert (row["generator"], row["generator_was_limit"]) == ("h2load", False)


def test_a_goal_says_whether_it_is_met_and_one_without_a_limit_does_not() -> None:
    goals = Goal("fast", (1.0, 3.0, 2.0), 2.0, at_least=True), Goal("beside a peer", (1.0,), None, at_least=True)
    met, open_ended = to_json(Record(goals=goals))["goals"]
    assert (met["met"], met["median"], met["limit"]) == (True, 2.0, 2.0)
    assert (open_ended["met"], open_ended["limit"]) == (None, None)


def test_a_file_is_written_into_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    path = tmp_path / "results" / "latest.json"
    record = Record(measured_at="2026-11-28T12:00:00+00:00", commit="abc", rows=(a_row(0.5, 0.1),))
    write(path, record)
    assert repr(read(path)) == repr(record)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is no JSON"),
        ("{}", "it has no schema, and this version reads 1: measure again"),
        ('{"schema": 2}', "it has schema 2, and this version reads 1: measure again"),
        ("[]", "is no result of this benchmark"),
        ('{"schema": 1}', "is no result of this benchmark"),
    ],
)
def test_another_file_is_refused_with_its_name(text: str, what: str, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=f"other.json.*{what}"):
        read(path)


def test_a_file_that_is_not_there_is_refused_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"latest.json cannot be read: No such file"):
        read(tmp_path / "latest.json")


def spoil_rounds(content: dict[str, Any]) -> None:
    content["goals"][0]["rounds"] = "many"


def spoil_a_row(content: dict[str, Any]) -> None:
    content["rows"][0]["values"]["p50_ms"]["rounds"].pop()


@pytest.mark.parametrize("spoil", [spoil_rounds, spoil_a_row])
def test_a_spoiled_file_is_refused(spoil: Callable[[dict[str, Any]], None], tmp_path: Path) -> None:
    content = to_json(Record(rows=(a_row(0.5, 0.1),), goals=(Goal("fast", (1.0,), 2.0, at_least=True),)))
    spoil(content)
    path = tmp_path / "spoiled.json"
    path.write_text(json.dumps(content))
    with pytest.raises(RecordError, match="is no result of this benchmark"):
        read(path)


def git(folder: Path, *words: str) -> None:
    settings = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    subprocess.run(["git", "-C", str(folder), *settings, *words], check=True, capture_output=True)


def test_the_commit_is_told_and_whether_files_differ_from_it(tmp_path: Path) -> None:
    assert records.commit(tmp_path) == "unknown"
    git(tmp_path, "init")
    (tmp_path / "file").write_text("one")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-m", "first")
    clean = records.commit(tmp_path)
    assert len(clean) == 40
    (tmp_path / "file").write_text("two")
    assert records.commit(tmp_path) == f"{clean}-dirty"
