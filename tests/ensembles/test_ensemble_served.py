"""Ensembles through a server: what is answered, by whom, and what an error of a step becomes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.observability.statistics import FailureReason, Outcome
from sluice_server.observability.trace_control import TraceConfig
from sluice_server.observability.trace_sampling import TraceOptions
from support import models
from support.conversation import Conversation
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request, parameter
from support.rest import post_infer
from support.shared_memory import Object, put_into_region

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_errors_logged")

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def write_diamond(repository: Path, **how) -> None:
    """2X + 1 and 3X in parallel, then their sum: Y = 5X + 1; and Z = 3X."""
    models.write_model(repository, "double", models.affine(2, 1), max_batch_size=8)
    models.write_model(repository, "triple", models.affine(3, 0), max_batch_size=8)
    models.write_model(repository, "sum", models.add_two(), max_batch_size=8)
    models.write_ensemble(
        repository,
        "diamond",
        models.port("input", "X") + models.port("output", "Y") + models.port("output", "Z"),
        [
            models.step("sum", {"A": "left", "B": "Z"}, {"Y": "Y"}),
            models.step("double", {"X": "X"}, {"Y": "left"}),
            models.step("triple", {"X": "X"}, {"Y": "Z"}),
        ],
        **how,
    )


def statistics(server, model: str) -> pb.ModelStatistics:
    (found,) = server.call("ModelStatistics", pb.ModelStatisticsRequest(name=model)).model_stats
    return found


def test_steps_run_when_their_inputs_are_there_and_the_batch_goes_whole(start_server, repository):
    write_diamond(repository)
    server = start_server(repository)
    answer = server.infer(infer_request("diamond", {"X": X}, request_id="7"))
    assert (answer.model_name, answer.model_version, answer.id) == ("diamond", "1", "7")
    arrays = answer_arrays(answer)
    assert list(arrays) == ["Y", "Z"]
    np.testing.assert_array_equal(arrays["Y"], 5 * X + 1)
    np.testing.assert_array_equal(arrays["Z"], 3 * X)
    for model in ("diamond", "double", "triple", "sum"):
        found = statistics(server, model)
        assert (found.inference_count, found.execution_count) == (2, 1), model
        assert found.inference_stats.success.count == 1
    stats = statistics(server, "diamond").inference_stats
    parts = [statistics(server, part).inference_stats for part in ("double", "triple", "sum")]
    assert stats.compute_infer.ns == sum(part.compute_infer.ns for part in parts)


def test_steps_that_no_requested_output_needs_do_not_run(start_server, repository):
    write_diamond(repository)
    server = start_server(repository)
    answer = server.infer(infer_request("diamond", {"X": X}, outputs=["Z"]))
    assert list(answer_arrays(answer)) == ["Z"]
    counts = [statistics(server, part).execution_count for part in ("double", "triple", "sum")]
    assert counts == [0, 1, 0]
    both = server.infer(infer_request("diamond", {"X": X}, outputs=["Z", "Y"]))
    assert list(answer_arrays(both)) == ["Z", "Y"]


def test_an_ensemble_is_one_model_for_tritonclient(start_server, repository):
    write_diamond(repository)
    server = start_server(repository)
    with triton.InferenceServerClient(server.target) as client:
        assert client.is_model_ready("diamond")
        metadata = client.get_model_metadata("diamond", as_json=True)
        assert metadata["platform"] == "ensemble"
        assert metadata["inputs"] == [{"name": "X", "datatype": "FP32", "shape": ["-1", "4"]}]
        config = client.get_model_config("diamond").config
        assert (config.platform, config.backend, list(config.instance_group)) == ("ensemble", "", [])
        assert not config.HasField("optimization")
        assert [step.model_name for step in config.ensemble_scheduling.step] == ["sum", "double", "triple"]
        tensor = triton.InferInput("X", [2, 4], "FP32")
        tensor.set_data_from_numpy(X)
        np.testing.assert_array_equal(client.infer("diamond", [tensor]).as_numpy("Y"), 5 * X + 1)
        wrong = triton.InferInput("X", [2, 5], "FP32")
        wrong.set_data_from_numpy(np.zeros((2, 5), np.float32))
        with pytest.raises(InferenceServerException, match="unexpected shape for input 'X' for model 'diamond'"):
            client.infer("diamond", [wrong])
        large = triton.InferInput("X", [9, 4], "FP32")
        large.set_data_from_numpy(np.zeros((9, 4), np.float32))
        with pytest.raises(InferenceServerException, match="batch-size must be <= 8 for 'diamond'"):
            client.infer("diamond", [large])
        assert server.call("ModelMetadata", pb.ModelMetadataRequest(name="diamond")).properties["steps"]


# --- errors, deadlines, clients that leave -------------------------------------------------------------------------


def write_lookup(repository: Path, name: str = "lookup", *, scheduling: str = "", more: str = "") -> None:
    """An index into a table, then doubled: an index out of range fails the first step."""
    models.write_model(repository, "table", models.gather(), max_batch_size=8, more=more)
    models.write_model(repository, "last", models.affine(2, 0, ("N", 1)), max_batch_size=8, more=more)
    models.write_ensemble(
        repository,
        name,
        models.port("input", "INDEX", (1,), "INT64") + models.port("output", "Y", (1,)),
        [models.step("table", {"INDEX": "INDEX"}, {"Y": "row"}), models.step("last", {"X": "row"}, {"Y": "Y"})],
        scheduling=scheduling,
    )


def lookup(index: int, model: str = "lookup") -> pb.ModelInferRequest:
    return infer_request(model, {"INDEX": np.array([[index]], np.int64)})


def value_of(answer: pb.ModelInferResponse) -> float:
    return answer_arrays(answer)["Y"].item()


def test_an_error_of_a_step_fails_its_request_and_no_other(start_server, repository):
    write_lookup(repository)
    server = start_server(repository)
    with held(server.model("table")) as session:
        first = server.begin("ModelInfer", lookup(0))
        session.wait_for_runs(1)
        calls = [server.begin("ModelInfer", lookup(index)) for index in (1, 77, 2)]
        eventually(lambda: len(server.model("table").queue) == 3, "one batch of three waits")
        session.release()
        assert value_of(first.result()) == 0
        assert [value_of(calls[place].result()) for place in (0, 2)] == [20, 40]
        error = calls[1].exception()
    assert error.code() is grpc.StatusCode.INTERNAL
    assert error.details().startswith("in ensemble 'lookup', onnx runtime error ")
    stats = statistics(server, "lookup")
    assert (stats.inference_stats.success.count, stats.inference_stats.fail.count) == (3, 1)
    assert (stats.inference_count, stats.execution_count) == (3, 3)
    assert statistics(server, "last").inference_stats.success.count == 3
    assert server.model("lookup").statistics.snapshot().failures[FailureReason.BACKEND] == 1


def test_a_client_that_leaves_takes_its_waiting_step_along(start_server, repository):
    write_lookup(repository)
    server = start_server(repository)
    ensemble, last = server.model("lookup"), server.model("last")
    with held(last) as session:
        running = server.begin("ModelInfer", lookup(1))
        session.wait_for_runs(1)
        waiting = server.begin("ModelInfer", lookup(2))
        eventually(lambda: len(last.queue) == 1, "the second step of the other waits")
        waiting.cancel()
        eventually(lambda: len(last.queue) == 0, "it was taken out")
        running.cancel()
        eventually(lambda: not ensemble._runs, "nothing is in flight")
        session.release()

    def ended() -> int:
        found = last.statistics.snapshot()
        return found.execution_count + found.failures[FailureReason.CANCELED]

    # The one that waited, and the one that ran, which may be ended with the last who waited for it.
    eventually(lambda: ended() == 2, "what ran has ended")
    assert ensemble.statistics.snapshot().failures[FailureReason.CANCELED] == 2
    assert value_of(server.infer(lookup(3))) == 60


def test_the_deadline_of_a_request_is_that_of_each_step(start_server, repository):
    write_lookup(repository)
    server = start_server(repository)
    last = server.model("last")
    with held(last) as session:
        first = server.begin("ModelInfer", lookup(1))
        session.wait_for_runs(1)
        request = lookup(2)
        request.parameters["timeout"].int64_param = 50_000
        code, text = server.refusal("ModelInfer", request)
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert text == "in ensemble 'lookup', Request timeout expired"
        assert len(last.queue) == 0
        session.release()
        first.result()
    assert server.model("lookup").statistics.snapshot().failures[FailureReason.REJECTED] == 1
    assert last.statistics.snapshot().failures[FailureReason.REJECTED] == 1


def test_a_full_queue_of_a_part_refuses_the_request_with_its_code(start_server, repository):
    write_lookup(repository)
    server = start_server(repository, models={"queue_rows": 1})
    last = server.model("last")
    with held(last) as session:
        calls = [server.begin("ModelInfer", lookup(1))]
        session.wait_for_runs(1)
        calls.append(server.begin("ModelInfer", lookup(2)))
        eventually(lambda: len(last.queue) == 1, "the queue is full")
        code, text = server.refusal("ModelInfer", lookup(3))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert text.startswith("in ensemble 'lookup', Exceeds maximum queue size of model 'last'")
        session.release()
        assert [value_of(call.result()) for call in calls] == [20, 40]
    assert server.model("lookup").statistics.snapshot().outcomes[Outcome.QUEUE_FULL] == 1


# --- max_inflight_requests -----------------------------------------------------------------------------------------


def test_no_more_than_so_many_requests_are_in_a_step_and_the_others_wait_in_order(start_server, repository):
    write_lookup(repository, scheduling="max_inflight_requests: 2")
    server = start_server(repository)
    ensemble, last = server.model("lookup"), server.model("last")
    with held(last) as session:
        calls = [server.begin("ModelInfer", lookup(1))]
        session.wait_for_runs(1)
        for index in (2, 3, 0, 1):
            calls.append(server.begin("ModelInfer", lookup(index)))
            waiting = len(calls) - 2
            eventually(lambda waiting=waiting: ensemble.waiting().requests == waiting, "it has come to the last step")
        assert len(last.queue) == 1
        assert f'nv_inference_pending_request_count{{model="lookup",version="1"}} {waiting}' in (
            server.server.render_metrics().decode()
        )
        calls[3].cancel()
        eventually(lambda: ensemble.waiting().requests == 2, "one of those who wait has left")
        hurried = lookup(2)
        hurried.parameters["timeout"].int64_param = 30_000
        assert server.refusal("ModelInfer", hurried)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        session.release()
        assert [value_of(call.result()) for place, call in enumerate(calls) if place != 3] == [20, 40, 60, 20]
    assert ensemble.waiting() == (0, 0, 0)
    assert [value_of(server.infer(lookup(index))) for index in (3, 2, 1)] == [60, 40, 20]


def test_those_who_wait_for_a_place_are_bounded_too(start_server, repository):
    write_lookup(repository, scheduling="max_inflight_requests: 1")
    server = start_server(repository, models={"queue_rows": 2})
    ensemble = server.model("lookup")
    with held(server.model("last")) as session:
        calls = [server.begin("ModelInfer", lookup(1))]
        session.wait_for_runs(1)
        for waiting in (1, 2):
            calls.append(server.begin("ModelInfer", lookup(2)))
            eventually(lambda waiting=waiting: ensemble.waiting().requests == waiting, "it waits for the place")
        code, text = server.refusal("ModelInfer", lookup(3))
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "in ensemble 'lookup', Exceeds maximum queue size of the step of model 'last'" in text
        session.release()
        assert [value_of(call.result()) for call in calls] == [20, 40, 40]


# --- shapes, types, and the forms of a request ---------------------------------------------------------------------


def test_a_batch_goes_through_a_model_without_a_batch_dimension_when_its_whole_shape_fits(start_server, repository):
    models.write_model(repository, "whole", models.row_sums(), max_batch_size=0)
    models.write_model(repository, "rows", models.affine(10, 0, ("N", 1)), max_batch_size=8)
    models.write_ensemble(
        repository,
        "mixed",
        models.port("input", "X", (4,)) + models.port("output", "Y", (1,)),
        [models.step("whole", {"X": "X"}, {"Y": "sums"}), models.step("rows", {"X": "sums"}, {"Y": "Y"})],
    )
    server = start_server(repository)
    answer = answer_arrays(server.infer(infer_request("mixed", {"X": X})))
    np.testing.assert_array_equal(answer["Y"], 10 * X.sum(axis=1, keepdims=True))


def test_an_ensemble_without_a_batch_dimension_gives_models_with_one_a_row(start_server, repository):
    models.write_model(repository, "rows", models.affine(10, 0), max_batch_size=8)
    models.write_ensemble(
        repository,
        "single",
        models.port("input", "X", (4,)) + models.port("output", "Y", (4,)),
        [models.step("rows", {"X": "X"}, {"Y": "Y"})],
        max_batch_size=0,
    )
    server = start_server(repository)
    row = np.arange(4, dtype=np.float32)
    np.testing.assert_array_equal(answer_arrays(server.infer(infer_request("single", {"X": row})))["Y"], 10 * row)


def test_what_open_dimensions_turn_out_to_be_is_checked_at_each_step(start_server, repository):
    models.write_model(repository, "open", models.identity(dims=("N", "M")), max_batch_size=8)
    models.write_model(repository, "fixed", models.identity(dims=("N", 4)), max_batch_size=8)
    models.write_ensemble(
        repository,
        "narrow",
        models.port("input", "X", (-1,)) + models.port("output", "Y", (4,)),
        [models.step("open", {"X": "X"}, {"Y": "between"}), models.step("fixed", {"X": "between"}, {"Y": "Y"})],
    )
    server = start_server(repository)
    np.testing.assert_array_equal(answer_arrays(server.infer(infer_request("narrow", {"X": X})))["Y"], X)
    code, text = server.refusal("ModelInfer", infer_request("narrow", {"X": X[:, :3]}))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text == "in ensemble 'narrow', unexpected shape for input 'X' for model 'fixed'. Expected [-1,4], got [2,3]"


def test_an_optional_input_may_be_left_out_and_the_model_file_counts(start_server, repository):
    models.write_model(repository, "bias", models.add_bias(), max_batch_size=0)
    ports = models.port("input", "X", (2,)) + models.port("input", "C", (2,), more="optional: true")
    models.write_ensemble(
        repository,
        "biased",
        ports + models.port("output", "Y", (2,)),
        [models.step("bias", {"X": "X", "B": "C"}, {"Y": "Y"})],
        max_batch_size=0,
    )
    server = start_server(repository)
    x, c = np.array([5, 5], np.float32), np.array([10, 20], np.float32)
    assert answer_arrays(server.infer(infer_request("biased", {"X": x})))["Y"].tolist() == [6, 7]
    assert answer_arrays(server.infer(infer_request("biased", {"X": x, "C": c})))["Y"].tolist() == [15, 25]


def test_text_and_reshapes_go_from_step_to_step(start_server, repository):
    models.write_model(repository, "text", models.identity("BYTES", ("N", 2)), max_batch_size=8)
    text = 'max_batch_size: 8 input { name: "X" data_type: TYPE_STRING dims: 2 reshape { shape: [ 1, 2 ] } }'
    text += ' output { name: "Y" data_type: TYPE_STRING dims: 2 reshape { shape: [ 1, 2 ] } }'
    models.write_configured(repository, "reshaped", models.identity("BYTES", ("N", 1, 2)), text)
    ports = models.port("input", "X", (1, 2), "STRING", "reshape { shape: [ 2 ] }")
    models.write_ensemble(
        repository,
        "texts",
        ports + models.port("output", "Y", (2, 1), "STRING", "reshape { shape: [ 2 ] }"),
        [models.step("text", {"X": "X"}, {"Y": "a"}), models.step("reshaped", {"X": "a"}, {"Y": "Y"})],
    )
    server = start_server(repository)
    words = np.array([[b"a", b"\x00b"], [b"", "ü".encode()]], object)
    answer = answer_arrays(server.infer(infer_request("texts", {"X": words.reshape(2, 1, 2)})))
    np.testing.assert_array_equal(answer["Y"], words.reshape(2, 2, 1))


def test_an_ensemble_may_be_a_part_of_another(start_server, repository):
    write_diamond(repository)
    models.write_ensemble(
        repository,
        "outer",
        models.port("input", "X") + models.port("output", "Y"),
        [
            models.step("diamond", {"X": "X"}, {"Y": "inner"}),
            models.step("double", {"X": "inner"}, {"Y": "Y"}),
        ],
    )
    server = start_server(repository)
    answer = answer_arrays(server.infer(infer_request("outer", {"X": X})))
    np.testing.assert_array_equal(answer["Y"], 2 * (5 * X + 1) + 1)
    assert statistics(server, "diamond").inference_count == 2
    assert statistics(server, "double").execution_count == 2
    with held(server.model("sum")) as session:
        call = server.begin("ModelInfer", infer_request("outer", {"X": X}))
        session.wait_for_runs(1)
        call.cancel()
        eventually(lambda: not server.model("diamond")._runs, "the inner one has ended with the outer one")
        session.release()
    assert server.model("diamond").statistics.snapshot().failures[FailureReason.CANCELED] == 1


def test_classes_and_labels_of_an_ensemble_are_its_own(start_server, repository):
    models.write_model(repository, "scores", models.identity(dims=("N", 3)), max_batch_size=8)
    directory = models.write_ensemble(
        repository,
        "labelled",
        models.port("input", "X", (3,)) + models.port("output", "Y", (3,), more='label_filename: "labels.txt"'),
        [models.step("scores", {"X": "X"}, {"Y": "Y"})],
    )
    (directory / "labels.txt").write_text("cat\ndog\nowl\n")
    server = start_server(repository)
    request = infer_request("labelled", {"X": np.array([[0.5, 5.0, -2.0]], np.float32)}, outputs=["Y"])
    request.outputs[0].parameters["classification"].CopyFrom(parameter(2))
    assert answer_arrays(server.infer(request))["Y"].tolist() == [[b"5.000000:1:dog", b"0.500000:0:cat"]]


def test_shared_memory_rest_and_streams_reach_an_ensemble(start_server, repository):
    write_diamond(repository)
    server = start_server(repository, allow_client_shm=True)
    with Object(128) as shm:
        shm.put(X)
        server.call("SystemSharedMemoryRegister", shm.registration("r"))
        request = infer_request("diamond", {"X": X}, outputs=["Y"])
        del request.raw_input_contents[:]
        put_into_region(request.inputs[0], "r", 32)
        put_into_region(request.outputs[0], "r", 32, 64)
        server.infer(request)
        assert shm.get(64, 32) == (5 * X + 1).tobytes()
        shm.cut(16)
        assert server.refusal("ModelInfer", request)[0] is grpc.StatusCode.INVALID_ARGUMENT
    told = post_infer(
        server,
        "diamond",
        {
            "inputs": [{"name": "X", "shape": [1, 4], "datatype": "FP32", "data": [0, 1, 2, 3]}],
            "outputs": [{"name": "Y"}],
        },
    ).json()
    assert told["outputs"][0]["data"] == [1, 6, 11, 16]
    talk = Conversation(server)
    for number in range(4):
        talk.say(infer_request("diamond", {"X": X + number}, outputs=["Z"], request_id=str(number)))
    for number in range(4):
        answer = talk.hear().infer_response
        assert answer.id == str(number)
        np.testing.assert_array_equal(answer_arrays(answer)["Z"], 3 * (X + number))
    assert talk.end() is grpc.StatusCode.OK


# --- parts with a response cache -----------------------------------------------------------------------------------


def test_parts_may_have_a_response_cache(start_server, repository):
    write_lookup(repository, more="response_cache { enable: true }")
    server = start_server(repository, models={"cache_bytes": 1 << 20})
    for _ in range(3):
        assert value_of(server.infer(lookup(2))) == 40
    assert value_of(server.infer(infer_request("table", {"INDEX": np.array([[2]], np.int64)}))) == 20
    found = statistics(server, "table")
    assert (found.execution_count, found.inference_stats.cache_hit.count) == (1, 3)
    ensemble = statistics(server, "lookup")
    assert (ensemble.inference_count, ensemble.inference_stats.success.count) == (3, 3)
    with held(server.model("table")) as session:
        calls = [server.begin("ModelInfer", lookup(1)) for _ in range(5)]
        session.wait_for_runs(1)
        eventually(lambda: len(server.model("table")._cache.following) == 4, "four follow the first")
        calls[2].cancel()
        eventually(lambda: len(server.model("table")._cache.following) == 3, "one has left")
        session.release()
        assert [value_of(call.result()) for call in calls if call is not calls[2]] == [20] * 4


def test_a_long_chain_of_steps_that_are_answered_at_once_needs_no_deep_stack(start_server, repository):
    steps = 400
    models.write_model(repository, "same", models.identity(), max_batch_size=8, more="response_cache { enable: true }")
    models.write_ensemble(
        repository,
        "chain",
        models.port("input", "t0") + models.port("output", f"t{steps}"),
        [models.step("same", {"X": f"t{number}"}, {"Y": f"t{number + 1}"}) for number in range(steps)],
    )
    server = start_server(repository, models={"cache_bytes": 1 << 20})
    for _ in range(2):
        answer = answer_arrays(server.infer(infer_request("chain", {"t0": X})))
        np.testing.assert_array_equal(answer[f"t{steps}"], X)
    assert statistics(server, "same").inference_stats.cache_hit.count == 2 * steps - 1


# --- many at once --------------------------------------------------------------------------------------------------


def test_many_requests_at_once_are_merged_in_the_parts_and_each_gets_its_own(start_server, repository):
    write_diamond(repository)
    server = start_server(repository)
    rows = np.arange(64, dtype=np.float32)[:, None] * np.ones(4, np.float32)
    with held(server.model("double")) as session:
        calls = [server.begin("ModelInfer", infer_request("diamond", {"X": rows[n : n + 1]})) for n in range(64)]
        session.wait_for_runs(1)
        eventually(lambda: len(server.model("double").queue) >= 56, "they wait for one step")
        session.release()
        for number, call in enumerate(calls):
            answer = answer_arrays(call.result())
            np.testing.assert_array_equal(answer["Y"], 5 * rows[number : number + 1] + 1)
            np.testing.assert_array_equal(answer["Z"], 3 * rows[number : number + 1])
    assert statistics(server, "double").execution_count < 64
    assert statistics(server, "double").inference_count == 64
    assert statistics(server, "diamond").execution_count == 64
    text = server.server.render_metrics().decode()
    assert 'nv_inference_count{model="diamond",version="1"} 64' in text
    assert 'nv_inference_request_success{model="diamond",version="1"} 64' in text


def test_a_part_serves_its_own_clients_next_to_the_ensemble(start_server, repository):
    write_lookup(repository)
    server = start_server(repository)
    table = server.model("table")
    with held(table) as session:
        first = server.begin("ModelInfer", lookup(0))
        session.wait_for_runs(1)
        steps = [server.begin("ModelInfer", lookup(index)) for index in (1, 2, 3)]
        own = [server.begin("ModelInfer", lookup(index, "table")) for index in (1, 2, 3)]
        eventually(lambda: len(table.queue) == 6, "all wait for the same model")
        session.release()
        assert [value_of(call.result()) for call in steps] == [20, 40, 60]
        assert [value_of(call.result()) for call in own] == [10, 20, 30]
        first.result()
    assert statistics(server, "table").inference_count == 7


def test_a_traced_request_has_the_times_of_the_ensemble(start_server, repository, tmp_path):
    write_lookup(repository)
    file = tmp_path / "trace.json"
    server = start_server(
        repository, trace=TraceConfig(file=file, options=TraceOptions(levels=("TIMESTAMPS",), rate=1))
    )
    assert value_of(server.infer(lookup(3))) == 60
    assert server.refusal("ModelInfer", lookup(77))[0] is grpc.StatusCode.INTERNAL
    server.close()
    told = json.loads(file.read_text())
    assert {entry["model_name"] for entry in told if "model_name" in entry} == {"lookup"}
    names = [stamp["name"] for entry in told for stamp in entry.get("timestamps", ())]
    assert names.count("REQUEST_START") == names.count("REQUEST_END") == 2
    assert names.count("QUEUE_START") == names.count("COMPUTE_START") == 1
