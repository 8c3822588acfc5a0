"""That a run finds what it is for: each kind of breakage, with the input that brought it out."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from fuzz.broken import BAD
from fuzz.runs import run

INPUTS = 500

HANG_S = 2.0

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
        ("hangs", "it hangs"),
    ],
)
def test_a_bad_input_is_told_and_saved(target, told, engine, tmp_path):
    result = run("fuzz.broken", target, engine, INPUTS, 1, tmp_path, HANG_S)
    assert told in result.problem
    assert result.saved is not None
    assert BAD in result.saved.read_bytes()
    if engine == "structure" and target in ("fails", "logs"):
        assert result.saved.read_bytes() == BAD  # the smallest there is


def test_what_a_hanging_run_does_is_told(tmp_path):
    assert "in hang" in run("fuzz.broken", "hangs", "structure", INPUTS, 1, tmp_path, HANG_S).problem


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell what a process has")
def test_memory_that_grows_is_told(tmp_path):
    inputs = 8000  # a few hundred of which have the byte
    assert "memory is not flat" in run("fuzz.broken", "leaks", "structure", inputs, 1, tmp_path).problem


def test_a_server_that_no_longer_answers_is_told(tmp_path):
    assert "AssertionError: a bad input" in run("fuzz.broken", "breaks", "structure", 1000, 1, tmp_path).problem


@needs_atheris
@pytest.mark.skipif(sys.platform != "linux", reason="its regions are files of Linux")
def test_atheris_sends_requests_to_the_server(tmp_path):
    result = run("fuzz.targets", "requests", "bytes", 1000, 1, tmp_path)
    assert (result.problem, result.inputs) == ("", 1000)
