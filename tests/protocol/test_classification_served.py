"""The classification extension through a server: messages, tritonclient, streams, merged batches, label files."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.repository.manager import ControlMode
from support import models
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request, parameter
from support.server import running, server_settings

if TYPE_CHECKING:
    from pathlib import Path

    from support.server import RunningServer

pytestmark = pytest.mark.usefixtures("no_errors_logged")

SCORES = np.array([[0.1, 5.0, -2.0], [3.0, 3.0, 4.5]], np.float32)
BEST_TWO = [[b"5.000000:1:dog", b"0.100000:0:cat"], [b"4.500000:2", b"3.000000:0:cat"]]

LABELLED = """
max_batch_size: 8
dynamic_batching { }
input { name: "X" data_type: TYPE_FP32 dims: 3 }
output { name: "Y" data_type: TYPE_FP32 dims: 3 label_filename: "labels.txt" }
"""


@pytest.fixture(scope="module")
def server(transport, tmp_path_factory):
    repository = tmp_path_factory.mktemp("classified")
    write_labelled(repository, "scores")
    models.write_model(repository, "pair", models.sum_and_difference((4,)))
    with running(server_settings(repository), transport) as server:
        yield server


def write_labelled(repository: Path, name: str) -> None:
    directory = models.write_configured(repository, name, models.identity(dims=("N", 3)), LABELLED)
    (directory / "labels.txt").write_text("cat\ndog\n")


def classified(request: pb.ModelInferRequest, **counts: int) -> pb.ModelInferRequest:
    """The request, asking for that many classes of outputs; 0 for their values."""
    for name, count in counts.items():
        output = request.outputs.add(name=name)
        if count:
            output.parameters["classification"].CopyFrom(parameter(count))
    return request


def test_each_row_is_answered_with_its_classes(server):
    answer = server.infer(classified(infer_request("scores", {"X": SCORES}, request_id="7"), Y=2))
    assert (answer.id, answer.model_name, answer.model_version) == ("7", "scores", "1")
    assert (answer.outputs[0].datatype, list(answer.outputs[0].shape)) == ("BYTES", [2, 2])
    assert answer_arrays(answer)["Y"].tolist() == BEST_TWO


def test_more_classes_than_there_are_are_all_of_them(server):
    answer = server.infer(classified(infer_request("scores", {"X": SCORES[:1]}), Y=2**62))
    assert answer_arrays(answer)["Y"].tolist() == [[*BEST_TWO[0], b"-2.000000:2"]]


def test_an_output_with_classes_and_one_with_values_come_in_the_order_asked_for(server):
    a, b = np.array([1, 9, 3, 4], np.int32), np.ones(4, np.int32)
    request = classified(infer_request("pair", {"INPUT0": a, "INPUT1": b}), OUTPUT1=3, OUTPUT0=0)
    answer = answer_arrays(server.infer(request))
    assert list(answer) == ["OUTPUT1", "OUTPUT0"]
    assert answer["OUTPUT1"].tolist() == [b"8:1", b"3:3", b"2:2"]
    np.testing.assert_array_equal(answer["OUTPUT0"], a + b)


def test_values_and_classes_are_told_apart_however_often_either_is_asked_for(server):
    for count in (1, 0, 2) * 20:
        answer = server.infer(classified(infer_request("scores", {"X": SCORES}), Y=count))
        wanted = [row[:count] for row in BEST_TWO] if count else SCORES.tolist()
        assert answer_arrays(answer)["Y"].tolist() == wanted


def test_tritonclient_gets_classes(server):
    with triton.InferenceServerClient(server.target) as client:
        tensor = triton.InferInput("X", [2, 3], "FP32")
        tensor.set_data_from_numpy(SCORES)
        wanted = triton.InferRequestedOutput("Y", class_count=2)
        assert client.infer("scores", [tensor], outputs=[wanted]).as_numpy("Y").tolist() == BEST_TWO


def test_a_stream_gets_classes(server):
    request = classified(infer_request("scores", {"X": SCORES}), Y=2)
    answers = list(server.stream("ModelStreamInfer", iter([request] * 3)))
    assert [answer_arrays(answer.infer_response)["Y"].tolist() for answer in answers] == [BEST_TWO] * 3


def test_requests_that_wait_together_get_their_own_classes_and_values(server):
    requests = [
        classified(infer_request("scores", {"X": SCORES[row : row + 1]}, request_id=f"{row}{count}"), Y=count)
        for row in (0, 1, 0)
        for count in (0, 1, 2)
    ]
    queue = server.model("scores").queue
    with held(server.model("scores")) as session:
        calls = [server.begin("ModelInfer", infer_request("scores", {"X": SCORES}))]
        session.wait_for_runs(1)
        calls += [server.begin("ModelInfer", request) for request in requests]
        eventually(lambda: queue.rows == len(requests), "all requests wait")
        session.release()
        answers = [call.result() for call in calls[1:]]
    for request, answer in zip(requests, answers, strict=True):
        row, count = map(int, request.id)
        wanted = BEST_TWO[row][:count] if count else SCORES[row].tolist()
        assert (answer.id, answer_arrays(answer)["Y"].tolist()) == (request.id, [wanted])
    # Those with values ran together, and so did those with classes.
    assert sorted(len(feeds["X"]) for feeds in session.runs) == [2, 3, 6]


def test_a_label_file_that_is_missing_fails_the_load_and_can_be_put_there(start_server, repository):
    write_labelled(repository, "scores")
    labels = repository / "scores" / "labels.txt"
    labels.unlink()
    server = start_server(repository, models={"control_mode": ControlMode.EXPLICIT}, http=None, metrics=None)
    code, message = server.refusal("RepositoryModelLoad", load())
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "load failed for model 'scores'" in message
    assert "Internal: label file 'labels.txt' of output 'Y'" in message
    for names, second in (("cat\ndog\n", b"0.100000:0:cat"), ("Katze\nHund\n", b"0.100000:0:Katze")):
        labels.write_text(names)
        server.call("RepositoryModelLoad", load())
        assert best_two(server)[1] == second


def load() -> pb.RepositoryModelLoadRequest:
    return pb.RepositoryModelLoadRequest(model_name="scores")


def best_two(server: RunningServer) -> list[bytes]:
    answer = server.infer(classified(infer_request("scores", {"X": SCORES[:1]}), Y=2))
    elements: list[bytes] = answer_arrays(answer)["Y"][0].tolist()
    return elements
