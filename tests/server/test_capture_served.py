"""Servers that capture: what is in the file of requests, however they came, and that others have nothing of it."""

from __future__ import annotations

import functools
import stat
import urllib.request
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from sluice_proto.capture import CapturedRequest, read_capture
from sluice_proto.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from sluice_server.lifecycle import Server, StartError
from sluice_server.observability.capture import CaptureOptions
from sluice_server.observability.trace_control import TraceConfig
from sluice_server.observability.trace_sampling import TraceOptions
from sluice_server.protocol.dispatch import Dispatcher
from support import models
from support.conversation import Conversation
from support.fakes import PATIENCE_S, eventually, held
from support.requests import answer_arrays, infer_request
from support.rest import post_infer
from support.server import LOOPBACK, server_settings

if TYPE_CHECKING:
    from pathlib import Path

    from support.server import RunningServer

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture
def serve(start_server, repository, tmp_path):
    """Start a server that captures in `tmp_path / "c"`."""
    models.write_model(repository, "echo", models.identity("FP32", ("N", 4)), max_batch_size=16)

    def start(*, options: dict | None = None, **changes):
        capture = CaptureOptions(tmp_path / "c", **(options or {}))
        return start_server(repository, capture=capture, **changes)

    return start


def row(value: float, **how) -> ModelInferRequest:
    return infer_request("echo", {"X": np.full((1, 4), value, np.float32)}, **how)


def captured(server: RunningServer, path: Path) -> tuple[CapturedRequest, ...]:
    """What is in the file once the server has ended."""
    server.close()
    return read_capture(path).requests


def value_of(request: CapturedRequest) -> float:
    """The value in the answer, and that the request asked for it."""
    asked = ModelInferRequest.FromString(request.request)
    (array,) = answer_arrays(ModelInferResponse.FromString(request.response)).values()
    assert asked.raw_input_contents[0] == array.tobytes()
    return float(array[0, 0])


def test_requests_are_captured_however_they_come(serve, tmp_path):
    server = serve()
    server.infer(row(1, request_id="one"))
    stream = Conversation(server)
    stream.say(row(2))
    stream.hear()
    stream.end()
    tensor = {"name": "X", "datatype": "FP32", "shape": [1, 4], "data": [3, 3, 3, 3]}
    assert post_infer(server, "echo", {"inputs": [tensor]}).status == 200
    requests = captured(server, tmp_path / "c")
    assert [value_of(request) for request in requests] == [1, 2, 3]
    assert [request.model for request in requests] == ["echo"] * 3
    assert [request.code for request in requests] == [0] * 3
    assert bytes(requests[0].request) == row(1, request_id="one").SerializeToString()
    assert ModelInferResponse.FromString(requests[0].response).id == "one"
    # clients of gRPC have a deadline here, those of REST never do
    assert [request.deadline_ns > 0 for request in requests] == [True, True, False]
    assert all(request.service_ns > 0 for request in requests)
    assert stat.S_IMODE((tmp_path / "c").stat().st_mode) == 0o600


def test_requests_of_one_batch_and_large_ones_have_their_own_answers(serve, repository, tmp_path):
    models.write_model(repository, "wide", models.identity("FP32", ("N", 50_000)), max_batch_size=16)
    server = serve()
    with held(server.model("wide")) as session:
        rows = [infer_request("wide", {"X": np.full((1, 50_000), value, np.float32)}) for value in range(4)]
        calls = [server.begin("ModelInfer", rows[0])]
        session.wait_for_runs(1)
        calls += [server.begin("ModelInfer", each) for each in rows[1:]]
        eventually(lambda: len(server.model("wide").queue) == 3, "three wait")
        session.release()
        for call in calls:
            call.result()
    requests = captured(server, tmp_path / "c")
    assert sorted(value_of(request) for request in requests) == [0, 1, 2, 3]


def test_failures_are_captured_with_their_codes(serve, tmp_path):
    server = serve()
    server.refusal("ModelInfer", infer_request("nobody", {"X": np.ones((1, 4), np.float32)}))
    server.refusal("ModelInfer", infer_request("echo", {"X": np.ones((1, 3), np.float32)}))
    server.refusal("ModelInfer", b"\xff")
    with held(server.model("echo")) as session:
        running = server.begin("ModelInfer", row(1))
        session.wait_for_runs(1)
        waiting = server.begin("ModelInfer", row(2))
        eventually(lambda: len(server.model("echo").queue) == 1, "it waits")
        waiting.cancel()
        eventually(lambda: len(server.model("echo").queue) == 0, "it has left")
        session.release()
        running.result()
    requests = captured(server, tmp_path / "c")
    codes = [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.OK, grpc.StatusCode.CANCELLED]
    assert [request.code for request in requests] == [code.value[0] for code in codes]
    assert [bool(request.response) for request in requests] == [False, False, True, False]


def test_a_call_that_is_traced_too_is_both(serve, tmp_path):
    trace = TraceConfig(options=TraceOptions(("TIMESTAMPS",), rate=1), file=tmp_path / "t")
    server = serve(trace=trace)
    server.infer(row(1))
    tensor = {"name": "X", "datatype": "FP32", "shape": [1, 4], "data": [2, 2, 2, 2]}
    assert post_infer(server, "echo", {"inputs": [tensor]}).status == 200
    assert [value_of(request) for request in captured(server, tmp_path / "c")] == [1, 2]
    written = (tmp_path / "t").read_text()
    assert "GRPC_WAITREAD_START" in written
    assert "HTTP_RECV_START" in written


def metrics_of(server: RunningServer) -> dict[str, float]:
    with urllib.request.urlopen(f"http://{LOOPBACK}:{server.server.metrics_port}/metrics", timeout=PATIENCE_S) as body:
        lines = [line for line in body.read().decode().splitlines() if line.startswith("sluice_capture")]
    return {name: float(value) for name, value in (line.rsplit(maxsplit=1) for line in lines)}


def test_a_full_file_is_shown_by_the_metrics_and_the_server_goes_on(serve, tmp_path):
    server = serve(options={"max_bytes": 400})
    for value in range(5):
        server.infer(row(value))
    eventually(lambda: metrics_of(server)["sluice_capture_stopped"] == 1, "the file is full")
    shown = metrics_of(server)
    assert shown["sluice_capture_requests_total"] == len(read_capture(tmp_path / "c").requests) >= 1
    assert shown["sluice_capture_bytes"] == (tmp_path / "c").stat().st_size <= 400
    assert shown['sluice_capture_left_out_total{reason="full"}'] >= 1
    server.infer(row(9))


def leave_out_twos(request: ModelInferRequest) -> ModelInferRequest | None:
    if np.frombuffer(request.raw_input_contents[0], np.float32)[0] == 2:
        return None
    request.id = ""
    return request


def test_a_hook_decides_what_is_written_and_changes_no_answer(serve, tmp_path):
    server = serve(options={"redact": leave_out_twos})
    for value in (1, 2, 3):
        assert server.infer(row(value, request_id="secret")).id == "secret"
    requests = captured(server, tmp_path / "c")
    assert [value_of(request) for request in requests] == [1, 3]
    assert b"secret" not in (tmp_path / "c").read_bytes()


def test_a_server_that_captures_nothing_has_the_plain_dispatcher(start_server, repository):
    server = start_server(repository)
    assert type(server.server._dispatcher) is Dispatcher
    assert metrics_of(server) == {}


def test_a_file_in_the_way_ends_the_start_and_a_failed_start_leaves_none(repository, tmp_path):
    (tmp_path / "c").touch()
    settings = functools.partial(server_settings, repository, capture=CaptureOptions(tmp_path / "c"))
    with pytest.raises(StartError, match=r"--capture-file: '.*c' is there already"):
        Server(settings(), {})
    (tmp_path / "c").unlink()
    server = Server(settings(), {})
    (tmp_path / "c").touch()
    with pytest.raises(StartError, match=r"--capture-file: .*exists"):
        server.start()
    server.stop()
