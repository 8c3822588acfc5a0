"""The batch curve: which cap follows from which rates, how sizes are measured in the time there is, how it is kept."""

from __future__ import annotations

import json
import logging
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.errors import BackendError
from sluice_server.execution.batch_curve import (
    AS_FAST,
    BATCH_BYTES_MAX,
    BUDGET_NS,
    CLEARLY_SLOWER,
    ROUNDS_ENOUGH,
    WALL_NS,
    BatchCurve,
    CurveOptions,
    Point,
    batch_sizes,
    choose_cap,
    curve_options,
    measure,
    run_clock_for,
)
from sluice_server.execution.curve_cache import CurveCache, default_directory, file_digest, processors
from sluice_server.execution.parameters import BadOption
from sluice_server.execution.providers import CPU, CUDA
from sluice_server.execution.threads import ThreadPlan

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sluice_server.execution.probes import Row

MS = 1_000_000


def points(*rates: float) -> tuple[Point, ...]:
    """Rates of 1, 2, 4, ... rows."""
    return tuple(Point(1 << power, rate) for power, rate in enumerate(rates))


@pytest.mark.parametrize(
    ("rates", "cap"),
    [
        ((), 0),
        ((50,), 0),
        ((50, 60, 70), 0),
        ((50, 50, 50), 0),
        ((50, 49, 48), 0),
        ((54.5, 45.4, 48.3), 1),
        ((36, 60, 40), 2),
        ((36, 60, 59.5, 40), 2),
        ((36, 58, 60, 40), 4),
        ((44, 44, 27), 1),
        ((40, 30, 20, 39), 0),
    ],
)
def test_the_cap_is_the_smallest_size_that_is_as_fast_as_the_best_where_larger_ones_are_clearly_slower(rates, cap):
    found = points(*rates)
    assert choose_cap(found, found[-1].rows if found else 4) == cap


@pytest.mark.parametrize(
    ("rates", "cap"),
    [((50,), 0), ((50, 60), 0), ((50, 50), 1), ((50, 52), 2), ((50, 60, 61), 2), ((50, 60, 40), 2)],
)
def test_sizes_that_were_not_measured_are_merged_to_only_where_rates_are_rising(rates, cap):
    assert choose_cap(points(*rates), 64) == cap


def test_small_models_are_merged_although_the_model_alone_is_a_little_faster_without():
    assert choose_cap(points(100_000, 80_000), 2) == 0
    assert choose_cap(points(1_000, 800), 2) == 1


@given(st.lists(st.floats(0.1, 1e7), min_size=1, max_size=10))
def test_a_cap_is_a_measured_size_below_the_largest_and_about_the_best(rates):
    found = points(*rates)
    cap = choose_cap(found, found[-1].rows)
    took_s = {point.rows: 1 / point.rows_per_s + 50e-6 / point.rows for point in found}
    best_s = min(took_s.values())
    if cap:
        assert cap < found[-1].rows
        assert took_s[cap] <= best_s / AS_FAST * 1.000001
        assert took_s[found[-1].rows] > best_s / CLEARLY_SLOWER * 0.999999
    else:
        assert took_s[found[-1].rows] <= best_s / CLEARLY_SLOWER * 1.000001


@pytest.mark.parametrize(
    ("largest", "sizes"),
    [(2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (100, [1, 2, 4, 8, 16, 32, 64, 100])],
)
def test_sizes_double_up_to_the_largest(largest, sizes):
    assert batch_sizes(largest) == sizes


class TimedSession:
    """Runs that take what `run_ns(rows, number)` says, on a clock of their own; from `fails_at` rows on they fail."""

    def __init__(self, run_ns: Callable[[int, int], int], fails_at: int = 1 << 30) -> None:
        self.run_ns = run_ns
        self.fails_at = fails_at
        self.now_ns = 0
        self.sizes: list[int] = []

    def run(self, output_names: Sequence[str], feeds: Row) -> list[np.ndarray]:
        assert output_names == ["Y"]
        rows = len(feeds["X"])
        self.sizes.append(rows)
        if rows >= self.fails_at:
            raise BackendError(1, "no")
        self.now_ns += self.run_ns(rows, len(self.sizes))
        return []

    def clock(self) -> int:
        return self.now_ns

    def measure(self, max_batch_rows: int, columns: int = 2) -> dict[int, float]:
        rows = [{"X": np.full((1, columns), value, np.float32)} for value in (1, 2)]
        found = measure(self, ["Y"], rows, max_batch_rows, clock=self.clock, run_clock=self.clock)
        return {point.rows: round(point.rows_per_s) for point in found}


def test_sizes_are_run_in_turns_and_the_shortest_run_counts():
    session = TimedSession(lambda rows, number: (2 * MS if number < 9 else MS) * (2 + rows))
    assert session.measure(4) == {1: 333, 2: 500, 4: 667}
    assert session.sizes == [1, 2, 4] * ROUNDS_ENOUGH


def test_a_size_that_was_disturbed_is_measured_until_it_is_not_or_time_is_up():
    calm = 40 * 3

    def run_ns(rows: int, number: int) -> int:
        return MS * (2 if rows < 4 or number > calm else 20)

    session = TimedSession(run_ns)
    assert session.measure(4) == {1: 500, 2: 1000, 4: 2000}
    assert len(session.sizes) == calm + 3
    slower = TimedSession(lambda rows, _: MS * rows * rows)
    assert slower.measure(4) == {1: 1000, 2: 500, 4: 250}
    assert BUDGET_NS <= slower.now_ns < BUDGET_NS + 21 * MS


@pytest.mark.parametrize(
    ("row_ms", "sizes"),
    [(100, {1, 2, 4}), (250, {1, 2}), (500, {1}), (2000, {1})],
)
def test_slow_models_are_measured_in_the_sizes_that_there_is_time_for(row_ms, sizes):
    session = TimedSession(lambda rows, _: row_ms * MS * rows)
    assert session.measure(64).keys() == sizes
    assert session.now_ns <= max(BUDGET_NS * 1.5, 2 * row_ms * MS)
    assert all(session.sizes.count(size) > 1 for size in sizes)


def test_a_model_on_one_thread_is_timed_by_what_that_thread_takes_and_others_by_the_time_that_passes():
    def clock(providers: Sequence[str], intra_op: int = 1, inter_op: int = 1) -> object:
        return run_clock_for(providers, ThreadPlan(1, intra_op, inter_op))

    assert clock([CPU]) is time.thread_time_ns
    assert clock([CPU], intra_op=2) is clock([CPU], inter_op=2) is clock([CUDA, CPU]) is time.perf_counter_ns


def test_time_that_others_take_is_bounded_but_not_counted():
    session = TimedSession(lambda rows, _: 200 * MS * rows)
    rows = [{"X": np.zeros((1, 2), np.float32)}]
    found = measure(session, ["Y"], rows, 64, clock=session.clock, run_clock=lambda: session.now_ns // 10)
    assert [(point.rows, round(point.rows_per_s)) for point in found] == [(1, 50), (2, 50), (4, 50), (8, 50)]
    assert session.now_ns <= WALL_NS * 1.5


def test_sizes_that_fail_or_are_too_large_are_left_out():
    assert TimedSession(lambda rows, _: MS, fails_at=8).measure(64).keys() == {1, 2, 4}
    assert TimedSession(lambda rows, _: MS, fails_at=1).measure(64) == {}
    assert TimedSession(lambda rows, _: MS).measure(64, columns=BATCH_BYTES_MAX // 16).keys() == {1, 2, 4}


def test_a_curve_says_its_rates_and_its_cap():
    found = points(0.5, 54.4, 12_345.6)
    assert str(BatchCurve(found)) == "rows/s by batch size: 1: 0.5, 2: 54, 4: 12,346; not capped"
    capped = str(BatchCurve(found, 2))
    assert capped.endswith("; requests are merged to 2 row(s) at most, as more are slower")


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", CurveOptions(wanted=True, caps=True)),
        ("dynamic_batching { }", CurveOptions(wanted=True, caps=True)),
        ("dynamic_batching { preferred_batch_size: 4 }", CurveOptions(wanted=False, caps=False)),
        ("on", CurveOptions(wanted=True, caps=True)),
        ("off", CurveOptions(wanted=False, caps=True)),
        ("on dynamic_batching { preferred_batch_size: 4 }", CurveOptions(wanted=True, caps=False)),
    ],
)
def test_a_configuration_says_whether_batches_are_measured_and_capped(text, options):
    word, _, rest = text.partition(" ")
    if word in ("on", "off"):
        text = f'{rest} parameters {{ key: "batch_curve" value {{ string_value: "{word}" }} }}'
    assert curve_options(text_format.Parse(text, ModelConfig())) == options


def test_without_a_configuration_batches_are_measured():
    assert curve_options(None) == CurveOptions()


def test_another_word_is_refused():
    config = ModelConfig(name="m")
    config.parameters["batch_curve"].string_value = "auto"
    with pytest.raises(BadOption, match="'batch_curve' is 'auto', expected one of on, off"):
        curve_options(config)


FACTS = {"model": "abc", "max_batch_rows": 4, "inputs": {"X": ["float32", 1, 4]}}
CURVE = points(50, 60.5, 70)


def test_a_curve_comes_back_under_the_same_circumstances_only(tmp_path):
    cache = CurveCache(tmp_path / "not" / "yet")
    assert cache.get(FACTS) is None
    cache.put(FACTS, CURVE)
    assert CurveCache(tmp_path / "not" / "yet").get(FACTS) == CURVE
    for changed in ({"model": "abd"}, {"max_batch_rows": 8}, {"inputs": {"X": ["float32", 1, 8]}}):
        assert cache.get(FACTS | changed) is None
    assert len(list((tmp_path / "not" / "yet" / "batch-curves").iterdir())) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\x00",
        b"[" * 100_000,
        b"[]",
        b"{}",
        b"null",
        b'{"format": 1, "facts": {}, "points": []}',
        *(
            json.dumps({"format": form, "facts": FACTS, "points": bad}).encode()
            for form, bad in (
                (2, [[1, 5.0]]),
                (1, None),
                (1, [[1]]),
                (1, [["1", 5.0]]),
                (1, [[0, 5.0]]),
                (1, [[True, 5.0]]),
                (1, [[2, 5.0], [1, 5.0]]),
                (1, [[1, -5.0]]),
                (1, [[1, float("nan")]]),
                (1, [[1, "x"]]),
            )
        ),
    ],
)
def test_a_broken_file_is_ignored_and_written_again(tmp_path, content):
    cache = CurveCache(tmp_path)
    cache.put(FACTS, CURVE)
    (file,) = (tmp_path / "batch-curves").iterdir()
    file.write_bytes(content)
    assert cache.get(FACTS) is None
    cache.put(FACTS, CURVE)
    assert cache.get(FACTS) == CURVE


def test_what_cannot_be_kept_is_logged_and_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    cache = CurveCache(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        cache.put(FACTS, CURVE)
    (record,) = caplog.records
    assert "cannot be kept" in record.getMessage()
    assert record.reason == "Not a directory"
    assert cache.get(FACTS) is None


def test_without_a_directory_nothing_is_kept():
    cache = CurveCache(None)
    cache.put(FACTS, CURVE)
    assert (cache.get(FACTS), cache.keeps) == (None, False)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({"XDG_CACHE_HOME": "/c", "HOME": "/h"}, "/c/sluice"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/sluice"),
        ({"XDG_CACHE_HOME": "c", "HOME": "/h"}, "/h/.cache/sluice"),
        ({"HOME": "h"}, None),
        ({}, None),
    ],
)
def test_caches_are_where_the_user_has_them(environ, expected):
    found = default_directory(environ)
    assert (None if found is None else str(found)) == expected


def test_processors_are_told_by_their_names(tmp_path):
    assert processors(tmp_path) == ""
    (tmp_path / "proc" / "driver" / "nvidia" / "gpus" / "0").mkdir(parents=True)
    (tmp_path / "proc" / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Fast CPU\n\nmodel name\t: Fast CPU\n")
    (tmp_path / "proc" / "driver" / "nvidia" / "gpus" / "0" / "information").write_text("Model: \t Big GPU\nIRQ: 5\n")
    assert processors(tmp_path) == "Fast CPU, Big GPU"


def test_a_model_file_is_known_by_its_content(tmp_path: Path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"a")
    other.write_bytes(b"a")
    assert file_digest(one) == file_digest(other)
    other.write_bytes(b"b")
    assert file_digest(one) != file_digest(other)
