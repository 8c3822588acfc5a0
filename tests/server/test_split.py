"""Requests of more rows than max_batch_size, split and answered once: over gRPC, streams and REST."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient import http

from sluice_batching import NO_DEADLINE
from sluice_proto import grpc_service_pb2 as pb
from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.errors import Internal
from sluice_server.execution.parameters import BadOption
from sluice_server.execution.request import InferRequest
from sluice_server.execution.split import PARTS_MAX, SplittingRunner, Whole, joined, read_split
from sluice_server.protocol.encode import Encoder
from sluice_server.status import Code, StatusMapper
from support import models
from support.fakes import EchoSession, RecordingCall, eventually, held, served_model
from support.requests import answer_arrays, infer_request, parameter
from support.shared_memory import Object, put_into_region

SPLIT = 'parameters { key: "split_requests" value { string_value: "true" } }\n'
MAX_ROWS = 4
INVALID = grpc.StatusCode.INVALID_ARGUMENT


@pytest.fixture
def server(start_server, repository):
    models.write_model(repository, "split", models.gather(), max_batch_size=MAX_ROWS, more=SPLIT)
    models.write_model(repository, "text", models.identity("BYTES", ("N", "L")), max_batch_size=MAX_ROWS, more=SPLIT)
    models.write_model(repository, "whole", models.gather(), max_batch_size=MAX_ROWS)
    return start_server(repository, metrics=None, allow_client_shm=True, models={"queue_rows": 40})


def indices(rows: int) -> np.ndarray:
    return (np.arange(rows, dtype=np.int64) % 4).reshape(rows, 1)


def request(rows: int | np.ndarray, model: str = "split", **more: object) -> pb.ModelInferRequest:
    return infer_request(model, {"INDEX": indices(rows) if isinstance(rows, int) else rows}, **more)


def assert_answered(answer: pb.ModelInferResponse, rows: int) -> None:
    np.testing.assert_array_equal(answer_arrays(answer)["Y"], 10 * indices(rows).astype(np.float32))


def counted(server, model: str = "split"):
    """(successes, failures, rows, executions) so far."""
    (found,) = server.call("ModelStatistics", pb.ModelStatisticsRequest(name=model)).model_stats
    stats = found.inference_stats
    return stats.success.count, stats.fail.count, found.inference_count, found.execution_count


def test_a_large_request_gets_all_of_its_rows_and_counts_once(server):
    answer = server.infer(request(10, request_id="ten"))
    assert_answered(answer, 10)
    assert (answer.id, answer.model_version) == ("ten", "1")
    assert counted(server) == (1, 0, 10, 3)


def test_without_the_parameter_it_is_refused_as_in_triton(server):
    code, text = server.refusal("ModelInfer", request(5, "whole"))
    assert code is INVALID
    assert "inference request batch-size must be <= 4 for 'whole'" in text


def test_its_parts_share_batches_with_other_requests(server):
    served = server.model("split")
    with held(served) as session:
        first = server.begin("ModelInfer", request(1))
        session.wait_for_runs(1)
        large = server.begin("ModelInfer", request(6))
        eventually(lambda: len(served.queue) == 2, "both parts wait")
        small = server.begin("ModelInfer", request(2))
        eventually(lambda: len(served.queue) == 3, "all wait")
        session.release()
        assert_answered(first.result(), 1)
        assert_answered(large.result(), 6)
        assert_answered(small.result(), 2)
    assert [len(feeds["INDEX"]) for feeds in session.runs] == [1, 4, 4]
    assert counted(server) == (3, 0, 9, 3)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    kinds=st.lists(st.tuples(st.integers(1, 11), st.sampled_from(["", "id"])), min_size=1, max_size=3),
    words=st.lists(st.binary(max_size=5), min_size=1, max_size=12),
)
def test_any_mix_of_sizes_gives_each_request_its_own_rows(server, kinds, words):
    calls = [server.begin("ModelInfer", request(rows, request_id=request_id)) for rows, request_id in kinds]
    text = np.array([[word.hex().encode()] for word in words], object)
    of_text = server.begin("ModelInfer", infer_request("text", {"X": text}))
    for call, (rows, request_id) in zip(calls, kinds, strict=True):
        assert_answered(call.result(), rows)
        assert call.result().id == request_id
    assert answer_arrays(of_text.result())["Y"].tolist() == text.tolist()


def test_a_part_that_fails_fails_the_request_once_and_nobody_else(server):
    bad = indices(10)
    bad[5] = 99
    served = server.model("split")
    with held(served) as session:
        first = server.begin("ModelInfer", request(1))
        session.wait_for_runs(1)
        failing = server.begin("ModelInfer", request(bad))
        eventually(lambda: len(served.queue) == 3, "its parts wait")
        other = server.begin("ModelInfer", request(2))
        eventually(lambda: len(served.queue) == 4, "all wait")
        session.release()
        assert_answered(first.result(), 1)
        assert_answered(other.result(), 2)
    assert failing.code() is grpc.StatusCode.INTERNAL
    assert "onnx runtime error" in failing.details()
    success, fail, rows, _ = counted(server)
    assert (success, fail) == (2, 1)
    assert rows == 1 + 4 + 2, "its first part was run, its second failed, its third was taken out"
    assert len(served.queue) == 0


def test_a_cancelled_request_leaves_the_queue_with_all_of_its_parts(server):
    served = server.model("split")
    with held(served) as session:
        first = server.begin("ModelInfer", request(1))
        session.wait_for_runs(1)
        large = server.begin("ModelInfer", request(10))
        eventually(lambda: len(served.queue) == 3, "its parts wait")
        large.cancel()
        eventually(lambda: len(served.queue) == 0, "its parts have left")
        session.release()
        assert_answered(first.result(), 1)
    assert served.statistics.outcomes()["cancelled"] == 1
    assert counted(server) == (1, 1, 1, 1)


def test_one_that_is_cancelled_while_a_part_of_it_runs_is_not_run_further(server):
    served = server.model("split")
    with held(served) as session:
        large = server.begin("ModelInfer", request(6))
        session.wait_for_runs(1)
        large.cancel()
        eventually(lambda: len(served.queue) == 0, "what waits has left")
        session.release()
    assert_answered(server.infer(request(1)), 1)
    assert counted(server) == (1, 1, 5, 2)


def test_a_deadline_takes_out_all_parts_that_wait(server):
    served = server.model("split")
    with held(served) as session:
        first = server.begin("ModelInfer", request(1))
        session.wait_for_runs(1)
        code, _ = server.refusal("ModelInfer", request(10, parameters={"timeout": 20_000}))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: len(served.queue) == 0, "its parts have left")
        session.release()
        assert_answered(first.result(), 1)
    assert served.statistics.outcomes()["queue_timeout"] == 1
    assert counted(server) == (1, 1, 1, 1)


def test_the_bounds_of_the_queue_hold_for_all_parts_at_once(server):
    code, text = server.refusal("ModelInfer", request(41))
    assert code is INVALID
    assert "model 'split' never takes this" in text
    served = server.model("split")
    with held(served) as session:
        first = server.begin("ModelInfer", request(1))
        session.wait_for_runs(1)
        waiting = server.begin("ModelInfer", request(30))
        eventually(lambda: served.queue.rows == 30, "it waits")
        code, text = server.refusal("ModelInfer", request(11))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "Exceeds maximum queue size of model 'split'" in text
        assert served.queue.rows == 30, "no part of it was taken"
        session.release()
        assert_answered(first.result(), 1)
        assert_answered(waiting.result(), 30)
    outcomes = served.statistics.outcomes()
    assert (outcomes["ok"], outcomes["queue_full"], outcomes["invalid"]) == (2, 1, 1)


def test_more_parts_than_there_may_be_are_refused(server):
    limit = MAX_ROWS * PARTS_MAX
    code, text = server.refusal("ModelInfer", request(limit + 1))
    assert (code, f"batch-size must be <= {limit} for 'split'" in text) == (INVALID, True)


def test_a_stream_gets_large_answers_in_order(server):
    sizes = [1, 9, 2, 6]
    answers = server.stream("ModelStreamInfer", iter([request(rows, request_id=str(rows)) for rows in sizes]))
    for rows, answer in zip(sizes, answers, strict=True):
        assert not answer.error_message
        assert answer.infer_response.id == str(rows)
        assert_answered(answer.infer_response, rows)


def test_rest_is_split_too(server):
    with http.InferenceServerClient(f"127.0.0.1:{server.server.http_port}") as client:
        tensor = http.InferInput("INDEX", (7, 1), "INT64")
        tensor.set_data_from_numpy(indices(7))
        answer = client.infer("split", [tensor])
    np.testing.assert_array_equal(answer.as_numpy("Y"), 10 * indices(7))


def test_classes_are_joined(server):
    message = request(6, outputs=["Y"])
    message.outputs[0].parameters["classification"].CopyFrom(parameter(1))
    answer = answer_arrays(server.infer(message))["Y"]
    assert answer.tolist() == [[f"{10 * (row % 4)}.000000:0".encode()] for row in range(6)]


def test_shared_memory_is_refused_for_requests_that_would_be_split_and_for_no_others(server):
    with Object(64) as shared:
        shared.put(indices(6))
        server.call("SystemSharedMemoryRegister", shared.registration("r"))
        for rows in (6, 2):
            message = request(rows)
            del message.raw_input_contents[:]
            put_into_region(message.inputs[0], "r", 8 * rows)
            if rows == 2:
                assert_answered(server.infer(message), rows)
                continue
            code, text = server.refusal("ModelInfer", message)
            assert code is INVALID
            assert "batch-size must be <= 4 for 'split' with tensors in shared memory, got 6" in text


def test_the_version_that_takes_over_gets_a_large_request_that_came_too_late(server):
    served = server.model("split")
    served.drain()
    code, text = server.refusal("ModelInfer", request(6))
    assert (code, "is being replaced" in text) == (grpc.StatusCode.UNAVAILABLE, True)


def test_answers_that_do_not_fit_together_are_an_error():
    def part(columns: int) -> list[bytes]:
        response = pb.ModelInferResponse(model_name="m")
        response.outputs.add(name="Y", datatype="INT8", shape=[1, columns])
        return [response.SerializeToString(), b"", bytes(columns)]

    with pytest.raises(Internal, match=r"output 'Y' came out with shape \[1,2\] for the first rows, and with \[1,3\]"):
        joined(("Y",), [part(2), part(3)])
    whole = pb.ModelInferResponse.FromString(b"".join(joined(("Y",), [part(2), part(2)])))
    assert (list(whole.outputs[0].shape), whole.raw_output_contents[0]) == ([2, 2], bytes(4))


def test_a_request_whose_answers_cannot_be_joined_fails_once(start_server, repository):
    # A model whose output is as wide as its batch is long.
    node = models.helper.make_node("MatMul", ["X", "turned"], ["Y"])
    turn = models.helper.make_node("Transpose", ["X"], ["turned"], perm=[1, 0])
    model = models.build([turn, node], [models.tensor("X", dims=("N", 2))], [models.tensor("Y", dims=("N", "M"))])
    models.write_model(repository, "square", model, max_batch_size=MAX_ROWS, more=SPLIT)
    server = start_server(repository, http=None, metrics=None)
    code, text = server.refusal("ModelInfer", infer_request("square", {"X": np.ones((6, 2), np.float32)}))
    assert code is grpc.StatusCode.INTERNAL
    assert "such answers cannot be joined" in text
    assert counted(server, "square")[:2] == (0, 1)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"value": "yes"}, "is 'yes', expected 0, 1, true or false"),
        ({"max_batch_size": 0}, "is 'true', expected false, as max_batch_size is 0"),
        ({"cache": "true"}, "is 'true', expected false, as response_cache is enabled"),
    ],
)
def test_where_it_cannot_be_it_is_refused_at_load(changes, expected):
    values = {"value": "true", "max_batch_size": 4, "cache": "false"} | changes
    text = SPLIT.replace("true", values["value"]) + f"max_batch_size: {values['max_batch_size']}"
    config = text_format.Parse(f"name: 'm' {text} response_cache {{ enable: {values['cache']} }}", ModelConfig())
    with pytest.raises(BadOption) as refused:
        read_split(config)
    assert str(refused.value) == f"model 'm': parameter 'split_requests' {expected}"


def test_it_is_off_by_default_and_when_it_says_so():
    assert not read_split(ModelConfig(name="m"))
    assert not read_split(text_format.Parse(SPLIT.replace("true", "0"), ModelConfig()))


def test_a_bug_in_the_run_of_a_part_ends_the_request_and_takes_the_rest_of_it_out(timer):
    model = served_model(EchoSession(), timer, max_batch_rows=2)
    runner = SplittingRunner(Encoder(model.interface), model.statistics, StatusMapper(), has_batch_dimension=True)
    call = RecordingCall()
    array = np.zeros((5, 1), np.int64)
    large = InferRequest(call, "", {"X": array}, ("Y",), 5, ("Y",), NO_DEADLINE)
    large.model = model
    large.size_bytes = 100
    whole = Whole(large, 2)
    assert [(part.rows, part.size_bytes) for part in whole.parts] == [(2, 40), (2, 40), (1, 20)]
    assert model.queue.offer_together(whole.parts) is None
    taken = model.queue.take()
    runner.give_up(taken.batch, RuntimeError("a bug"))
    assert [status.code for status, _ in call.ends] == [Code.INTERNAL]
    assert len(model.queue) == 0
    assert whole.end() == ()
    assert whole.put(0, [b""]) is None
