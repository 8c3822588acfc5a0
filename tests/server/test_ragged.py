"""Ragged batches through a real server: requests of different shapes share a run without padding."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tritonclient.grpc import InferenceServerClient, InferInput

from sluice_proto import grpc_service_pb2 as pb
from sluice_proto.model_config_pb2 import BatchInput
from sluice_proto.tensors import BY_NAME
from sluice_server.errors import Internal
from sluice_server.execution.ragged import MadeInput
from sluice_server.observability.trace_control import TraceConfig
from sluice_server.observability.trace_sampling import TraceOptions
from support import models
from support.fakes import run_together
from support.requests import answer_arrays, infer_request
from support.shared_memory import Object, put_into_region

if TYPE_CHECKING:
    from pathlib import Path

PER_ROW = ("SHAPE", "FLAT", "PICKED", "TWICE")
"""Outputs that any number of rows has; the others have one for each request."""

ALONE = (*PER_ROW, "SUM")
"""Outputs that do not depend on who else is in the batch."""


def add(repository: Path, name: str = "ragged", more: str = "dynamic_batching { }", max_batch_size: int = 8) -> None:
    text = models.RAGGED_INPUTS + models.RAGGED_OUTPUTS + models.RAGGED_MADE
    models.write_configured(repository, name, models.ragged(), f"max_batch_size: {max_batch_size}\n{text}{more}")


@pytest.fixture
def server(start_server, repository):
    add(repository)
    return start_server(repository, http=None, metrics=None)


def numbers(*shape: int) -> np.ndarray:
    """Whole numbers, whose sums are exact whatever their order."""
    return np.random.default_rng(shape).integers(-50, 50, shape).astype(np.float32)


def request(x: np.ndarray, index: int = 1, outputs: tuple[str, ...] = ALONE, model: str = "ragged"):
    return infer_request(model, {"X": x, "INDEX": np.full((len(x), 1), index)}, outputs=outputs)


def expected(x: np.ndarray, index: int = 1) -> dict[str, np.ndarray]:
    """What a request is to get, worked out without a server."""
    shape = np.array([x.shape[1:]] * len(x))
    return {
        "SUM": np.array([[x.sum()]], np.float32),
        "SHAPE": shape.astype(np.int32),
        "FLAT": shape.astype(np.int64),
        "PICKED": np.full((len(x), 1), 10 * index, np.float32),
        "TWICE": 2 * x,
    }


def assert_answered(answer: dict[str, np.ndarray], x: np.ndarray, index: int = 1) -> None:
    for name, array in answer.items():
        np.testing.assert_array_equal(array, expected(x, index)[name], err_msg=name)
        assert array.shape == expected(x, index)[name].shape


def together(server, requests: list[pb.ModelInferRequest]) -> tuple[list, list[dict[str, np.ndarray]]]:
    """Calls that wait while another one runs, and the feeds of the runs that they share, once those are over."""
    return run_together(server, "ragged", request(numbers(1, 1, 1)), requests)


def test_requests_of_any_shapes_share_a_run_in_which_the_ragged_input_is_flat(server):
    arrays = [numbers(1, 2, 3), numbers(1, 1, 4), numbers(1, 5, 1)]
    calls, runs = together(server, [request(x, index) for index, x in enumerate(arrays)])
    (feeds,) = runs
    assert feeds["X"].tolist() == [value for x in arrays for value in x.ravel().tolist()]
    assert feeds["INDEX"].tolist() == [[0], [1], [2]]
    for index, (call, x) in enumerate(zip(calls, arrays, strict=True)):
        assert_answered(answer_arrays(call.result()), x, index)


def test_each_kind_of_batch_input_is_as_triton_makes_it(server):
    _, (feeds,) = together(
        server, [request(numbers(2, 2, 3), outputs=PER_ROW), request(numbers(1, 1, 4), outputs=PER_ROW)]
    )
    made = {name: (array.dtype, array.tolist()) for name, array in feeds.items() if name not in ("X", "INDEX")}
    assert made == {
        "COUNT": (np.float32, [12, 4]),
        "ENDS": (np.float32, [12, 16]),
        "BOUNDS": (np.int32, [0, 12, 16]),
        "MOST": (np.int32, [0] * 12),
        "SIZES": (np.int32, [[2, 3], [2, 3], [1, 4]]),
        "SIZE_LIST": (np.int64, [2, 3, 2, 3, 1, 4]),
    }


def test_the_model_gets_them_all(server):
    calls, _ = together(
        server, [request(numbers(1, 2, 3), outputs=("COUNTS",)), request(numbers(1, 1, 4), outputs=("COUNTS",))]
    )
    # The elements of the request, those up to its end, and the largest request's added to both.
    assert [answer_arrays(call.result())["COUNTS"].tolist() for call in calls] == [[[12, 12]], [[10, 16]]]


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=6))
def test_any_mix_of_shapes_gives_each_request_what_it_gets_alone(server, shapes):
    arrays = [numbers(*shape) for shape in shapes]
    calls = [server.begin("ModelInfer", request(x, outputs=ALONE if len(x) == 1 else PER_ROW)) for x in arrays]
    for call, x in zip(calls, arrays, strict=True):
        assert_answered(answer_arrays(call.result()), x)


def test_a_request_that_fails_takes_nobody_down_with_it(server):
    arrays = [numbers(1, length, 2) for length in (1, 2, 3, 4)]
    indices = [1, 99, 2, 3]
    calls, runs = together(server, [request(x, index) for x, index in zip(arrays, indices, strict=True)])
    assert len(runs[0]["INDEX"]) == 4
    assert calls[1].code() is grpc.StatusCode.INTERNAL
    assert "onnx runtime error" in calls[1].details()
    for place in (0, 2, 3):
        assert_answered(answer_arrays(calls[place].result()), arrays[place], indices[place])


def test_a_request_of_several_rows_cannot_have_an_output_with_one_row_for_each_request(server):
    calls, _ = together(
        server, [request(numbers(2, 1, 1), outputs=("SUM",)), request(numbers(1, 2, 2), outputs=("SUM",))]
    )
    assert calls[0].code() is grpc.StatusCode.INTERNAL
    assert "output 'SUM' came out with shape [1, 1] for 2 rows" in calls[0].details()
    assert_answered(answer_arrays(calls[1].result()), numbers(1, 2, 2))


def test_the_shapes_of_other_inputs_are_still_checked_and_those_of_ragged_ones_by_their_dims(server):
    bad = infer_request("ragged", {"X": numbers(1, 4), "INDEX": np.ones((1, 1), np.int64)})
    code, text = server.refusal("ModelInfer", bad)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "unexpected shape for input 'X' for model 'ragged'. Expected [-1,-1,-1], got [1,4]." in text


def test_clients_see_the_configured_inputs_only_and_cannot_send_those_that_are_made(server):
    metadata = server.call("ModelMetadata", pb.ModelMetadataRequest(name="ragged"))
    assert [(item.name, list(item.shape)) for item in metadata.inputs] == [("X", [-1, -1, -1]), ("INDEX", [-1, 1])]
    inputs = {"X": numbers(1, 1, 1), "COUNT": np.ones(1, np.float32)}
    code, text = server.refusal("ModelInfer", infer_request("ragged", inputs))
    assert (code, "unexpected inference input 'COUNT'" in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    config = server.call("ModelConfig", pb.ModelConfigRequest(name="ragged")).config
    assert config.input[0].allow_ragged_batch
    assert [BatchInput.Kind.Name(item.kind) for item in config.batch_input] == BatchInput.Kind.keys()
    assert list(config.batch_output[0].target_name) == ["TWICE"]


def test_tritonclient_is_served(server):
    x = numbers(1, 3, 2)
    inputs = [InferInput("X", x.shape, "FP32"), InferInput("INDEX", (1, 1), "INT64")]
    inputs[0].set_data_from_numpy(x)
    inputs[1].set_data_from_numpy(np.ones((1, 1), np.int64))
    with InferenceServerClient(server.target) as client:
        answer = client.infer("ragged", inputs)
    assert_answered({name: answer.as_numpy(name) for name in ALONE}, x)


def test_a_cache_tells_requests_of_equal_bytes_and_other_shapes_apart(start_server, repository):
    add(repository, more="dynamic_batching { } response_cache { enable: true }")
    server = start_server(repository, http=None, metrics=None, models={"cache_bytes": 1 << 20})
    x = numbers(1, 2, 6)
    for _ in range(2):
        for shape in ((1, 2, 6), (1, 3, 4), (1, 12, 1)):
            assert_answered(answer_arrays(server.infer(request(x.reshape(shape)))), x.reshape(shape))
    (found,) = server.call("ModelStatistics", pb.ModelStatisticsRequest(name="ragged")).model_stats
    assert (found.inference_stats.cache_hit.count, found.inference_stats.cache_miss.count) == (3, 3)


def test_an_output_that_has_not_the_elements_of_its_source_fails_and_says_so(start_server, repository):
    text = 'max_batch_size: 4 dynamic_batching { } input { name: "X" data_type: TYPE_FP32 dims: 2 }'
    text += 'output { name: "Y" data_type: TYPE_FP32 dims: 3 }'
    text += 'batch_output { target_name: "Y" source_input: "X" }'
    models.write_configured(repository, "twice", models.twice(), text)
    server = start_server(repository, http=None, metrics=None)
    code, text = server.refusal("ModelInfer", infer_request("twice", {"X": np.ones((2, 2), np.float32)}))
    assert code is grpc.StatusCode.INTERNAL
    assert "output 'Y' came out with shape [2,4], and batch_output says that it has the 6 elements of [2,3]" in text


def test_ragged_text_and_outputs_of_text_are_cut_too(start_server, repository):
    text = "max_batch_size: 4 dynamic_batching { }"
    text += 'input { name: "X" data_type: TYPE_STRING dims: -1 allow_ragged_batch: true }'
    text += 'output { name: "Y" data_type: TYPE_STRING dims: -1 }'
    text += 'batch_output { target_name: "Y" source_input: "X" }'
    models.write_configured(repository, "text", models.identity("BYTES", ("T",)), text)
    server = start_server(repository, http=None, metrics=None)
    arrays = [np.array([[b"a", b"bc"]], object), np.array([[b""], [b"def"]], object)]
    calls = [server.begin("ModelInfer", infer_request("text", {"X": array})) for array in arrays]
    assert [answer_arrays(call.result())["Y"].tolist() for call in calls] == [array.tolist() for array in arrays]


def test_numbers_that_a_datatype_does_not_hold_are_an_error_of_that_batch():
    made = MadeInput(("N",), BY_NAME["INT32"], "X", lambda shapes: np.array([len(shapes) << 30], np.int64))
    assert made.of([(1,)]).tolist() == [1 << 30]
    with pytest.raises(Internal, match=r"batch input 'N' would hold 2147483648, which is more than INT32 does"):
        made.of([(1,), (1,)])


def test_ragged_tensors_in_shared_memory_are_read_and_written_there(start_server, repository):
    add(repository)
    server = start_server(repository, http=None, metrics=None, allow_client_shm=True)
    arrays = [numbers(1, 2, 3), numbers(1, 5, 1)]
    with Object(256) as shared:
        server.call("SystemSharedMemoryRegister", shared.registration("r"))
        messages = []
        for place, x in enumerate(arrays):
            shared.put(x, 64 * place)
            message = request(x, outputs=("TWICE", "SUM"))
            del message.raw_input_contents[0]
            put_into_region(message.inputs[0], "r", x.nbytes, 64 * place)
            put_into_region(message.outputs[0], "r", x.nbytes, 128 + 64 * place)
            messages.append(message)
        calls, (feeds,) = together(server, messages)
        assert feeds["X"].size == 11
        for place, (call, x) in enumerate(zip(calls, arrays, strict=True)):
            answer = call.result()
            assert list(answer.outputs[0].shape) == list(x.shape)
            assert shared.get(128 + 64 * place, x.nbytes) == (2 * x).tobytes()
            assert np.frombuffer(answer.raw_output_contents[1], np.float32) == x.sum()


def test_a_trace_shows_a_requests_own_tensors(start_server, repository, tmp_path):
    add(repository)
    file = tmp_path / "trace.json"
    options = TraceOptions(levels=("TENSORS",), rate=1)
    server = start_server(repository, http=None, metrics=None, trace=TraceConfig(file=file, options=options))
    together(server, [request(numbers(1, 2, 3), outputs=("TWICE",)), request(numbers(1, 5, 1), outputs=("TWICE",))])
    server.server._traces.close()
    tensors = [entry["tensor"] for entry in json.loads(file.read_text()) if "tensor" in entry]
    for name in ("X", "TWICE"):
        shapes = [tensor["shape"] for tensor in tensors if tensor["name"] == name]
        assert sorted(shapes) == ["1,1,1", "1,2,3", "1,5,1"]


def test_large_requests_are_split_where_asked_for(start_server, repository):
    split = 'parameters { key: "split_requests" value { string_value: "true" } }'
    add(repository, more=f"dynamic_batching {{ }} {split}", max_batch_size=4)
    server = start_server(repository, http=None, metrics=None)
    arrays = [numbers(10, 2, 3), numbers(7, 1, 4), numbers(2, 1, 1)]
    calls = [server.begin("ModelInfer", request(x, outputs=PER_ROW)) for x in arrays]
    for call, x in zip(calls, arrays, strict=True):
        assert_answered(answer_arrays(call.result()), x)
