"""That a run finds what it is for: each kind of breakage, with the input that brought it out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from fuzz.broken import BAD
from fuzz.runs import run

INPUTS = 500

HANG_S = 4.0
"""Long enough for a busy machine to come from one input to the next."""

needs_atheris = pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="atheris is not installed (`make fuzz` does that)"
)
engines = pytest.mark.parametrize("engine", ["structure", pytest.param("bytes", marks=needs_atheris)])


@engines
def test_a_run_of_good_inputs_ends_with_its_report(engine, tmp_path):
    result = run("fuzz.broken", "good", engine, INPUTS, 1, tmp_path)
    assert (result.problem, result.inputs, result.saved) == ("", INPUTS, None)
    assert result.seconds > 0
    assert list(tmp_path.iterdir()) == []


@engines
@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("fails", "AssertionError: a bad input"),
        ("logs", "AssertionError: logged: went wrong"),
        ("dies", "Fatal Python error: Segmentation fault"),
    ],
)
def test_a_bad_input_is_told_and_saved(target, told, engine, tmp_path):
    result = run("fuzz.broken", target, engine, INPUTS, 1, tmp_path)
    assert told in result.problem
    assert result.saved is not None
    assert BAD in result.saved.read_bytes()
    if engine == "structure" and target in ("fails", "logs"):
        assert result.saved.read_bytes() == BAD  # the smallest there is


@engines
def test_an_input_that_never_ends_is_told_with_where_it_is_and_saved(engine, tmp_path):
    result = run("fuzz.broken", "hangs", engine, INPUTS, 1, tmp_path, HANG_S)
    assert result.problem.startswith("it hangs")
    assert "in hang" in result.problem
    assert result.saved is not None
    assert BAD in result.saved.read_bytes()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what a process has")
def test_memory_that_grows_is_told(tmp_path):
    assert "memory is not flat" in run("fuzz.broken", "leaks", "structure", INPUTS, 1, tmp_path).problem


def test_a_server_that_no_longer_answers_is_told(tmp_path):
    assert "AssertionError: a bad input" in run("fuzz.broken", "breaks", "structure", 1000, 1, tmp_path).problem


@needs_atheris
@pytest.mark.skipif(sys.platform != "linux", reason="its regions are files of Linux")
def test_atheris_sends_requests_to_the_server(tmp_path):
    result = run("fuzz.targets", "requests", "bytes", 1000, 1, tmp_path)
    assert (result.problem, result.inputs) == ("", 1000)
