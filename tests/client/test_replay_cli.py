"""`sluice replay` from real captures to real servers: the same, each kind of regression, baselines, and wrong usage."""

from __future__ import annotations

import json
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from fake_server import FakeServer

from sluice_client import cli
from sluice_client.load.open_loop import run_precisely
from sluice_client.replay.sending import replay
from sluice_proto.capture import CapturedRequest, CaptureHead, CaptureWriter, read_capture
from sluice_server.observability.capture import CaptureOptions
from support import models
from support.requests import infer_request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Replay = Callable[..., tuple[int, Any]]

pytestmark = pytest.mark.timed

COMMANDS = [EntryPoint("replay", "sluice_client.replay.cli:replay", cli.COMMANDS_GROUP)]

UNDECIDED = 3
"""What a replay without a difference ends with when this machine was too busy to send in time."""


def row(value: float, **how):
    return infer_request("echo", {"X": np.full((1, 4), value, np.float32)}, **how)


@pytest.fixture
def file(start_server, repository, tmp_path) -> Path:
    """What a real server has captured: floats, text, halves, typed contents, and a failure."""
    models.write_model(repository, "echo", models.identity("FP32", ("N", 4)), max_batch_size=16)
    models.write_model(repository, "text", models.identity("BYTES", ("N", 1)), max_batch_size=16)
    models.write_model(repository, "half", models.identity("FP16", ("N", 2)), max_batch_size=16)
    server = start_server(repository, capture=CaptureOptions(tmp_path / "capture"), http=None, metrics=None)
    for value in range(20):
        server.infer(row(value, typed=value % 2 == 0, request_id=str(value)))
    text = np.empty((1, 1), object)
    text[0, 0] = "größer".encode()
    server.infer(infer_request("text", {"X": text}))
    server.infer(infer_request("half", {"X": np.array([[np.nan, 65504]], np.float16)}))
    server.refusal("ModelInfer", infer_request("echo", {"X": np.ones((1, 3), np.float32)}))
    server.close()
    return tmp_path / "capture"


@pytest.fixture
def run(capsys) -> Replay:
    """Run the command; its exit status and the object that it prints."""

    def run(*arguments: Any) -> tuple[int, Any]:
        status = cli.main(["replay", *map(str, arguments), "--json"], COMMANDS)
        out = capsys.readouterr().out
        return status, json.loads(out) if out else None

    return run


def test_the_same_models_give_the_same_answers(start_server, repository, file, run):
    server = start_server(repository, http=None, metrics=None)
    status, found = run(file, "--endpoint", server.target, "--speed", 2)
    assert status in (0, UNDECIDED), found
    assert (found["requests"], found["compared"], found["differing"]) == (23, 23, 0)
    assert found["outcomes"] == {"OK": 22, "INVALID_ARGUMENT": 1}
    assert found["expected"] == "recorded"
    assert found["gap_error_p99_ms"] > 0


def test_what_has_changed_is_found(start_server, tmp_path, file, run):
    """Other values, another shape, and an error in the place of an answer."""
    changed = tmp_path / "changed"
    changed.mkdir()
    models.write_model(changed, "echo", models.affine(1.0, 0.001), max_batch_size=16)
    models.write_model(changed, "half", models.identity("FP32", ("N", 2)), max_batch_size=16)
    server = start_server(changed, http=None, metrics=None)
    status, found = run(file, "--endpoint", server.target)
    assert (status, found["verdict"], found["differing"]) == (1, "different", 22)
    reasons = {(each["model"], each["reason"], each["output"]) for each in found["differences"]}
    assert reasons == {("echo", "values", "Y"), ("text", "code", ""), ("half", "code", "")}
    status, found = run(file, "--endpoint", server.target, "--tolerance", "0/0.01")
    assert {each["model"] for each in found["differences"]} == {"text", "half"}


def test_another_shape_is_found(start_server, tmp_path, file, run):
    changed = tmp_path / "changed"
    changed.mkdir()
    models.write_model(changed, "echo", models.row_sums(), max_batch_size=16)
    server = start_server(changed, http=None, metrics=None)
    status, found = run(file, "--endpoint", server.target)
    assert status == 1
    (shape, *_) = [each for each in found["differences"] if each["model"] == "echo"]
    assert (shape["reason"], shape["expected"], shape["actual"]) == ("shape", "[1, 4]", "[1, 1]")


def test_a_baseline_is_asked_first_and_latencies_are_held_against_its_own(start_server, repository, file, run):
    server, baseline = (start_server(repository, http=None, metrics=None) for _ in range(2))
    ends = ["--endpoint", server.target, "--baseline-endpoint", baseline.target]
    status, found = run(file, *ends, "--latency-ratio", "p50=1000", "p99=1000")
    assert status in (0, UNDECIDED)
    assert (found["expected"], found["compared"], found["differing"]) == (baseline.target, 23, 0)
    assert [(each["percent"], each["limit"], each["met"]) for each in found["latency"]] == [
        (50, 1000, True), (95, None, True), (99, 1000, True),
    ]  # fmt: skip
    status, found = run(file, *ends, "--latency-ratio", "p50=0.001")
    assert status in (1, UNDECIDED)
    assert not found["latency"][0]["met"]
    for each in (server, baseline):
        assert each.model("echo").statistics.snapshot().success.count == 40


def test_the_text_goes_to_people(start_server, repository, file, capsys):
    server = start_server(repository, http=None, metrics=None)
    status = cli.main(["replay", str(file), "--endpoint", server.target], COMMANDS)
    told = capsys.readouterr()
    assert status in (0, UNDECIDED)
    assert told.err.startswith(f"sending 23 requests to {server.target}, the last one after ")
    assert "answers: 0 of 23 differ from the recorded ones" in told.out


def test_whole_sequences_have_the_same_answers(start_server, repository, tmp_path, run):
    models.write_accumulator(repository)
    captures = {"capture": CaptureOptions(tmp_path / "c"), "http": None, "metrics": None}
    server = start_server(repository, **captures)
    for step in range(5):
        parameters = {"sequence_id": 7, "sequence_start": step == 0, "sequence_end": step == 4}
        server.infer(infer_request("sums", {"INPUT": np.full((1, 1), step)}, parameters=parameters))
    server.close()
    server = start_server(repository, http=None, metrics=None)
    status, found = run(tmp_path / "c", "--endpoint", server.target)
    assert status in (0, UNDECIDED), found
    assert (found["compared"], found["differing"]) == (5, 0)


def written(path: Path, *requests: CapturedRequest) -> Path:
    writer = CaptureWriter(path, CaptureHead(0, 1.0), 1 << 20)
    writer.append(requests)
    writer.close()
    return path


def test_a_request_has_the_deadline_that_it_had(server: FakeServer, tmp_path):
    silent = infer_request("silent", {}).SerializeToString()
    file = written(
        tmp_path / "c",
        CapturedRequest(0, 50_000_000, 0, 0, "silent", silent),
        CapturedRequest(1, 0, 0, 0, "silent", silent),
    )
    done = run_precisely(replay(read_capture(file), server.address, speed=1.0, deadline_s=0.5))
    assert done.run.records.outcomes == {"DEADLINE_EXCEEDED": 2}
    first_s, second_s = done.run.records.ended_s
    assert 0.05 <= first_s < second_s
    assert second_s >= 0.5


@pytest.mark.parametrize("speed", [0.5, 1.0, 4.0])
def test_requests_are_due_at_their_times_from_the_first_on(speed, server: FakeServer, tmp_path):
    good = infer_request("identity", {}).SerializeToString()
    arrivals_ms = (500, 520, 560)
    requests = [CapturedRequest(ms * 1_000_000, 0, 0, 0, "identity", good) for ms in arrivals_ms]
    capture = read_capture(written(tmp_path / "c", *requests))
    done = run_precisely(replay(capture, server.address, speed=speed, deadline_s=10))
    np.testing.assert_allclose(done.run.records.intended_s, np.array([0, 0.02, 0.06]) / speed)
    assert (done.run.records.sent_s >= done.run.records.intended_s).all()
    assert done.run.records.outcomes == {"OK": 3}


ONE = CapturedRequest(0, 0, 0, 0, "m", b"")


def test_a_server_that_cannot_be_reached_is_told_once(tmp_path, capsys):
    file = written(tmp_path / "c", ONE)
    assert cli.main(["replay", str(file), "--endpoint", "127.0.0.1:1", "--deadline", "0.3"], COMMANDS) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sluice replay: UNAVAILABLE")


def test_nor_is_a_baseline_that_cannot_be_reached_taken_for_the_same(server: FakeServer, tmp_path, capsys):
    file = written(tmp_path / "c", ONE)
    ends = ["--endpoint", server.address, "--baseline-endpoint", "127.0.0.1:1", "--deadline", "0.3"]
    assert cli.main(["replay", str(file), *ends], COMMANDS) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("sluice replay: UNAVAILABLE")
    assert "127.0.0.1:1" in line


@pytest.mark.parametrize(("flags", "fact"), [
    (["--speed", "0"], "--speed is 0, must be above 0"),
    (["--speed", "nan"], "--speed is nan"),
    (["--speed", "inf"], "--speed is inf"),
    (["--latency-ratio", "p50"], "--latency-ratio 'p50'"),
    (["--tolerance", "x"], "--tolerance 'x'"),
    (["--against-recorded", "--baseline-endpoint", "x"], "not allowed with"),
])  # fmt: skip
def test_wrong_usage_is_told_before_anything_is_sent(flags, fact, tmp_path, capsys):
    assert cli.main(["replay", str(written(tmp_path / "c", ONE)), *flags], COMMANDS) == 2
    assert fact in capsys.readouterr().err


@pytest.mark.parametrize(("content", "fact"), [
    (None, "No such file"), (b"", "no capture file"), (b"GET / HTTP", "no capture file"),
])  # fmt: skip
def test_a_file_that_is_no_capture_is_wrong_usage(content, fact, tmp_path, capsys):
    file = tmp_path / "c"
    if content is not None:
        file.write_bytes(content)
    assert cli.main(["replay", str(file)], COMMANDS) == 2
    assert fact in capsys.readouterr().err


def test_a_file_without_requests_is_wrong_usage(tmp_path, capsys):
    assert cli.main(["replay", str(written(tmp_path / "c"))], COMMANDS) == 2
    assert "has no request in it" in capsys.readouterr().err
