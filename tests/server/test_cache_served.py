"""The response cache through a server: unary, streams, REST, shared memory, classes, reloads, and what is counted."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.observability.trace_control import TraceConfig
from sluice_server.observability.trace_sampling import TraceOptions
from sluice_server.repository.manager import ControlMode
from support import models
from support.conversation import Conversation
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request, parameter
from support.rest import post_infer, split_answer
from support.shared_memory import Object, put_into_region

if TYPE_CHECKING:
    from pathlib import Path

    from support.server import RunningServer

CACHED = "response_cache { enable: true }"
CALLERS = 100
A, B = np.arange(16, dtype=np.int32), np.full(16, 7, np.int32)

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture
def serve(start_server, repository):
    """Start a server with a cache of 1 MiB on the repository."""
    return functools.partial(start_server, repository, models={"cache_bytes": 1 << 20})


def add(repository: Path, name: str = "echo", model: bytes | None = None, more: str = "", **how) -> Path:
    model = models.identity("INT64", ("N", 1)) if model is None else model
    return models.write_model(repository, name, model, more=f"{CACHED} {more}", **{"max_batch_size": 16, **how})


def number(value: int, model: str = "echo", **how) -> pb.ModelInferRequest:
    return infer_request(model, {"X": np.array([[value]], np.int64)}, **how)


def value_of(answer: pb.ModelInferResponse) -> int:
    return answer_arrays(answer)["Y"].item()


def statistics(server: RunningServer, model: str = "echo") -> pb.ModelStatistics:
    (found,) = server.call("ModelStatistics", pb.ModelStatisticsRequest(name=model)).model_stats
    return found


def hits_and_misses(server: RunningServer, model: str = "echo") -> tuple[int, int]:
    stats = statistics(server, model).inference_stats
    return stats.cache_hit.count, stats.cache_miss.count


def test_a_hit_has_the_id_of_its_own_request_and_costs_no_execution(serve, repository):
    add(repository)
    server = serve()
    for request_id in ("a", "", "longer"):
        answer = server.infer(number(5, request_id=request_id))
        assert (answer.id, value_of(answer), answer.model_version) == (request_id, 5, "1")
    # What a request says besides what it asks makes no difference, and neither does its form.
    for request in (
        number(5, version="1", parameters={"other": 1, "timeout": 10**7}),
        number(5, outputs=["Y"]),
        number(5, typed=True),
    ):
        assert value_of(server.infer(request)) == 5
    found = statistics(server)
    assert (found.inference_count, found.execution_count) == (1, 1)
    stats = found.inference_stats
    assert (stats.success.count, stats.queue.count, stats.compute_infer.count) == (6, 6, 1)
    assert (stats.cache_hit.count, stats.cache_miss.count) == (5, 1)
    assert 0 < stats.cache_hit.ns < stats.success.ns
    assert stats.cache_miss.ns > 0


def test_a_hundred_equal_calls_at_once_are_one_execution(serve, repository):
    add(repository)
    server = serve()
    model = server.model("echo")
    with held(model) as session:
        calls = [server.begin("ModelInfer", number(7, request_id=str(caller))) for caller in range(CALLERS)]
        session.wait_for_runs(1)
        eventually(lambda: len(model._cache.following) == CALLERS - 1, "the others wait for it")
        session.release()
        answers = [call.result() for call in calls]
    assert [answer.id for answer in answers] == [str(caller) for caller in range(CALLERS)]
    assert {value_of(answer) for answer in answers} == {7}
    found = statistics(server)
    assert (found.execution_count, found.inference_count) == (1, 1)
    assert found.inference_stats.success.count == CALLERS
    assert hits_and_misses(server) == (CALLERS - 1, 1)


def test_a_call_that_leads_may_be_cancelled_and_a_call_that_follows_too(serve, repository):
    add(repository)
    server = serve()
    model = server.model("echo")
    with held(model) as session:
        first = server.begin("ModelInfer", number(-1))
        session.wait_for_runs(1)
        leader = server.begin("ModelInfer", number(7))
        eventually(lambda: len(model.queue) == 1, "the leader waits")
        followers = [server.begin("ModelInfer", number(7)) for _ in range(3)]
        eventually(lambda: len(model._cache.following) == 3, "the followers wait")
        followers[1].cancel()
        eventually(lambda: len(model._cache.following) == 2, "one has left")
        leader.cancel()
        hurried = server.begin("ModelInfer", number(7), timeout_s=0.05)
        assert hurried.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: len(model._cache.following) == 2, "it waits no longer")
        session.release()
        assert [value_of(followers[place].result()) for place in (0, 2)] == [7, 7]
        assert value_of(first.result()) == -1
        assert len(session.runs) == 2


def test_the_requests_of_a_stream_are_answered_from_the_cache_in_their_order(serve, repository):
    add(repository)
    server = serve()
    server.infer(number(1))
    conversation = Conversation(server)
    values = [2, 1, 2, 1, 3]
    conversation.say(*(number(value, request_id=str(place)) for place, value in enumerate(values)))
    heard = [conversation.hear().infer_response for _ in values]
    assert [(answer.id, value_of(answer)) for answer in heard] == [(str(p), v) for p, v in enumerate(values)]
    conversation.say(number(3, parameters={"triton_enable_empty_final_response": True}))
    assert conversation.hear().infer_response.parameters["triton_final_response"].bool_param
    assert conversation.end() is grpc.StatusCode.OK
    assert hits_and_misses(server) == (4, 3)


def test_rest_and_grpc_share_the_answers(serve, repository):
    add(repository)
    server = serve()
    server.infer(number(5))
    told = post_infer(
        server,
        "echo",
        {"id": "r", "inputs": [{"name": "X", "shape": [1, 1], "datatype": "INT64", "data": [5]}]},
    ).json()
    assert (told["id"], told["outputs"][0]["data"]) == ("r", [5])
    binary = {"name": "X", "shape": [1, 1], "datatype": "INT64", "parameters": {"binary_data_size": 8}}
    head = {"inputs": [binary], "outputs": [{"name": "Y", "parameters": {"binary_data": True}}]}
    _, tensors = split_answer(post_infer(server, "echo", head, np.int64(5).tobytes()))
    assert tensors == {"Y": np.int64(5).tobytes()}
    assert hits_and_misses(server) == (2, 1)


def in_region(*, inputs: bool, outputs: bool, room: int = 64) -> pb.ModelInferRequest:
    """A request of the model `sums`, with its inputs, its outputs, or both in region r."""
    request = infer_request("sums", {"INPUT0": A[None], "INPUT1": B[None]})
    if inputs:
        del request.raw_input_contents[:]
        for place, tensor in enumerate(request.inputs):
            put_into_region(tensor, "r", 64, place * 64)
    for place, name in enumerate(("OUTPUT0", "OUTPUT1"), 2):
        output = request.outputs.add(name=name)
        if outputs:
            put_into_region(output, "r", room, place * 64)
    return request


@pytest.fixture
def shm():
    with Object(256) as made:
        made.put(A)
        made.put(B, 64)
        yield made


@pytest.fixture
def sharing(serve, repository, shm):
    add(repository, "sums", models.sum_and_difference())
    server = serve(allow_client_shm=True)
    server.call("SystemSharedMemoryRegister", shm.registration("r"))
    return server


@pytest.mark.parametrize("first", [(True, True), (True, False), (False, True), (False, False)])
def test_answers_are_shared_by_requests_in_messages_and_in_shared_memory(first, sharing, shm):
    for turn, (inputs, outputs) in enumerate([first, (True, True), (False, True), (True, False), (False, False)]):
        shm.put(bytes(128), 128)
        answer = sharing.infer(in_region(inputs=inputs, outputs=outputs))
        assert [output.name for output in answer.outputs] == ["OUTPUT0", "OUTPUT1"]
        assert [list(output.shape) for output in answer.outputs] == [[1, 16], [1, 16]]
        found = shm.get(128, 128) if outputs else b"".join(answer.raw_output_contents)
        assert found == (A + B).tobytes() + (A - B).tobytes()
        assert len(b"".join(answer.raw_output_contents)) == (0 if outputs else 128)
        assert hits_and_misses(sharing, "sums") == (turn, 1)
    shm.put(B)
    sharing.infer(in_region(inputs=True, outputs=False))
    assert hits_and_misses(sharing, "sums") == (4, 2), "what is there now is what counts"


def test_room_that_is_too_small_fails_its_own_request_only(sharing, shm):
    small = in_region(inputs=False, outputs=True, room=4)
    for _ in range(2):
        code, text = sharing.refusal("ModelInfer", small)
        assert code is grpc.StatusCode.INTERNAL
        assert "at least 64 bytes" in text
    model = sharing.model("sums")
    with held(model) as session:
        other = sharing.begin("ModelInfer", infer_request("sums", {"INPUT0": A[None], "INPUT1": A[None]}))
        session.wait_for_runs(1)
        leader = sharing.begin("ModelInfer", small)
        eventually(lambda: len(model.queue) == 1, "the one without room leads")
        follower = sharing.begin("ModelInfer", in_region(inputs=True, outputs=False))
        eventually(lambda: len(model._cache.following) == 1, "the other follows")
        session.release()
        assert leader.exception().code() is grpc.StatusCode.INTERNAL
        np.testing.assert_array_equal(answer_arrays(follower.result())["OUTPUT0"], [A + B])
        other.result()
    assert sharing.model("sums").statistics.snapshot().fail.count == 3


def test_inputs_that_are_not_there_any_more_fail_their_own_request(sharing, shm):
    asked = in_region(inputs=True, outputs=False)
    sharing.infer(asked)
    shm.cut(64)
    code, _ = sharing.refusal("ModelInfer", asked)
    assert code is grpc.StatusCode.INVALID_ARGUMENT


def test_classes_and_values_of_the_same_inputs_are_told_apart(serve, repository):
    add(repository, "scores", models.identity(dims=("N", 3)))
    server = serve()
    scores = {"X": np.array([[0.5, 5.0, -2.0]], np.float32)}
    classified = infer_request("scores", scores, outputs=["Y"])
    classified.outputs[0].parameters["classification"].CopyFrom(parameter(1))
    for _ in range(2):
        np.testing.assert_array_equal(answer_arrays(server.infer(infer_request("scores", scores)))["Y"], scores["X"])
        assert answer_arrays(server.infer(classified))["Y"].tolist() == [[b"5.000000:1"]]
    assert hits_and_misses(server, "scores") == (2, 2)


def test_text_and_several_rows_come_from_the_cache_as_from_the_model(serve, repository):
    add(repository, "text", models.identity("BYTES", ("N", 2)))
    server = serve()
    words = np.array([[b"a", b"\x00b"], [b"", b"long" * 2000]], object)
    for rows in (words, words[:1], words):
        np.testing.assert_array_equal(answer_arrays(server.infer(infer_request("text", {"X": rows})))["Y"], rows)
    assert hits_and_misses(server, "text") == (1, 2)


def test_large_tensors_come_from_the_cache_too(serve, repository):
    add(repository, "images", models.identity(dims=("N", 100, 100)))
    server = serve()
    image = np.random.default_rng(0).random((1, 100, 100), np.float32)
    for _ in range(3):
        np.testing.assert_array_equal(answer_arrays(server.infer(infer_request("images", {"X": image})))["Y"], image)
    assert hits_and_misses(server, "images") == (2, 1)


def test_an_error_is_not_kept(serve, repository):
    add(repository, "picky", models.gather())
    server = serve()
    bad = infer_request("picky", {"INDEX": np.array([[9]], np.int64)})
    for _ in range(2):
        assert server.refusal("ModelInfer", bad)[0] is grpc.StatusCode.INTERNAL
    assert hits_and_misses(server, "picky") == (0, 2)


def test_a_reload_drops_the_answers_of_the_version_it_replaces(start_server, repository):
    directory = add(repository)
    settings = {"cache_bytes": 1 << 20, "control_mode": ControlMode.EXPLICIT, "load_models": ("echo",)}
    server = start_server(repository, models=settings)
    server.infer(number(5))
    assert server.server._cache.usage().entries == 1
    (directory / "1" / "model.onnx").write_bytes(models.identity("INT64", ("N", 1), opset=16))
    server.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="echo"))
    eventually(lambda: server.server._cache.usage().entries == 0, "the old answers are dropped")
    assert value_of(server.infer(number(5))) == 5
    assert hits_and_misses(server) == (0, 1), "a loaded version counts from zero"
    server.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="echo"))
    eventually(lambda: server.server._cache.usage().entries == 0, "they leave with the model")


def test_models_without_the_field_use_no_cache_and_show_none(serve, repository):
    add(repository)
    models.write_model(repository, "plain", models.identity("INT64", ("N", 1)), max_batch_size=16)
    server = serve()
    for model in ("echo", "plain"):
        for _ in range(2):
            server.infer(number(5, model))
    assert hits_and_misses(server, "plain") == (0, 0)
    assert statistics(server, "plain").execution_count == 2
    lines = server.server.render_metrics().decode().splitlines()
    cached = [line for line in lines if line.startswith(("nv_cache", "sluice_cache"))]
    values = dict(line.rsplit(" ", 1) for line in cached)
    assert values['nv_cache_num_hits_per_model{model="echo",version="1"}'] == "1"
    assert values['nv_cache_num_misses_per_model{model="echo",version="1"}'] == "1"
    assert values["sluice_cache_entries"] == "1"
    assert {"nv_cache_hit_duration_per_model", "nv_cache_miss_duration_per_model"} <= {
        name.partition("{")[0] for name in values
    }
    assert not [line for line in cached if "plain" in line]


def test_the_field_without_the_flag_is_served_without_a_cache_and_with_a_warning(start_server, repository, caplog):
    add(repository)
    server = start_server(repository)
    for _ in range(2):
        server.infer(number(5))
    assert statistics(server).execution_count == 2
    warnings = [record for record in caplog.records if "response_cache" in record.getMessage()]
    assert [record.levelname for record in warnings] == ["WARNING"]
    assert "--cache-config" in warnings[0].getMessage()
    assert "cache" not in server.server.render_metrics().decode()
    config = server.call("ModelConfig", pb.ModelConfigRequest(name="echo")).config
    assert config.response_cache.enable


def test_tritonclient_reads_hits_as_triton_counts_them(serve, repository):
    add(repository)
    server = serve()
    with triton.InferenceServerClient(server.target) as client:
        tensor = triton.InferInput("X", [1, 1], "INT64")
        tensor.set_data_from_numpy(np.array([[3]], np.int64))
        for request_id in ("1", "2", "3"):
            result = client.infer("echo", [tensor], request_id=request_id)
            assert result.get_response().id == request_id
            assert result.as_numpy("Y").item() == 3
        (found,) = client.get_inference_statistics("echo", as_json=True)["model_stats"]
    assert found["execution_count"] == found["inference_count"] == "1"
    assert found["inference_stats"]["cache_hit"]["count"] == "2"
    assert found["inference_stats"]["success"]["count"] == "3"


def test_a_hit_that_is_traced_has_no_queue_and_no_compute_in_its_trace(serve, repository, tmp_path):
    add(repository)
    file = tmp_path / "trace.json"
    options = TraceOptions(levels=("TIMESTAMPS", "TENSORS"), rate=1)
    server = serve(trace=TraceConfig(file=file, options=options))
    for request_id in ("run", "hit"):
        assert value_of(server.infer(number(3, request_id=request_id))) == 3
    server.server._traces.close()
    names = [stamp["name"] for entry in json.loads(file.read_text()) for stamp in entry.get("timestamps", ())]
    assert names.count("REQUEST_START") == names.count("REQUEST_END") == 2
    assert names.count("COMPUTE_START") == names.count("QUEUE_START") == 1
