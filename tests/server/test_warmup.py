"""Warm-up: samples are run on each instance before a version is ready, are counted, and fail the load if they fail."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.execution.warmup import RANDOM_INTEGERS, SEED
from sluice_server.repository.manager import ControlMode
from support import models
from support.requests import answer_arrays, infer_request

if TYPE_CHECKING:
    from pathlib import Path

    from support.server import RunningServer

EXPLICIT = {"control_mode": ControlMode.EXPLICIT}


@pytest.fixture
def serve(start_server, repository):
    """Start a server that loads nothing by itself."""
    return functools.partial(start_server, repository, models=EXPLICIT, http=None, metrics=None)


def sample(inputs: str, *, name: str = "first", more: str = "batch_size: 1") -> str:
    return f'model_warmup {{ name: "{name}" {more} {inputs} }}'


def data(name: str, datatype: str, dims: str, kind: str) -> str:
    return f'inputs {{ key: "{name}" value {{ data_type: TYPE_{datatype} dims: {dims} {kind} }} }}'


def load(server: RunningServer, name: str) -> None:
    server.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=name))


def refusal(server: RunningServer, name: str) -> tuple[grpc.StatusCode, str]:
    return server.refusal("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=name))


def statistics(server: RunningServer, name: str) -> pb.ModelStatistics:
    (found,) = server.call("ModelStatistics", pb.ModelStatisticsRequest(name=name)).model_stats
    return found


@pytest.mark.usefixtures("no_errors_logged")
@pytest.mark.parametrize("kind", ["zero_data: true", "random_data: true"])
@pytest.mark.parametrize("datatype", ["BOOL", "UINT8", "INT8", "INT64", "FP16", "BF16", "FP32", "FP64", "BYTES"])
def test_every_kind_of_data_is_made_for_every_data_type(datatype, kind, serve, repository):
    config_type = "STRING" if datatype == "BYTES" else datatype
    opset = 16 if datatype == "BF16" else 17
    more = sample(data("X", config_type, "[ 4 ]", kind), more="batch_size: 3")
    models.write_model(repository, "m", models.identity(datatype, opset=opset), max_batch_size=8, more=more)
    server = serve()
    load(server, "m")
    found = statistics(server, "m")
    assert (found.inference_count, found.execution_count) == (3, 1)


@pytest.mark.usefixtures("no_errors_logged")
def test_each_sample_runs_count_times_on_each_instance_and_is_counted(serve, repository):
    x = data("X", "FP32", "[ 4 ]", "zero_data: true")
    more = sample(x, name="one", more="batch_size: 1 count: 3") + sample(x, name="two", more="batch_size: 2")
    models.write_model(repository, "m", models.identity(), max_batch_size=8, instances=2, more=more)
    server = serve()
    load(server, "m")
    instances = int(server.model("m").properties["instances"])
    found = statistics(server, "m")
    assert {batch.batch_size: batch.compute_infer.count for batch in found.batch_stats} == {
        1: 3 * instances,
        2: instances,
    }
    assert found.inference_stats.success.count == 4 * instances
    assert found.last_inference > 0
    answer = answer_arrays(server.infer(infer_request("m", {"X": np.ones((1, 4), np.float32)})))
    np.testing.assert_array_equal(answer["Y"], np.ones((1, 4)))


@pytest.mark.usefixtures("no_errors_logged")
def test_files_hold_one_row_which_is_repeated(serve, repository):
    inputs = data("INDEX", "INT64", "[ 1 ]", 'input_data_file: "deep/row"')
    more = sample(inputs, more="batch_size: 4")
    directory = models.write_model(repository, "m", models.gather(), max_batch_size=8, more=more)
    row = directory / "warmup" / "deep" / "row"
    row.parent.mkdir(parents=True)
    row.write_bytes(np.int64(3).tobytes())
    server = serve()
    load(server, "m")
    assert statistics(server, "m").inference_count == 4


@pytest.mark.usefixtures("no_errors_logged")
def test_text_in_a_file_is_as_on_the_wire(serve, repository):
    more = sample(data("X", "STRING", "[ 2 ]", 'input_data_file: "words"'))
    directory = models.write_model(repository, "m", models.identity("BYTES", ("N", 2)), max_batch_size=8, more=more)
    (directory / "warmup").mkdir()
    (directory / "warmup" / "words").write_bytes(b"\x02\0\0\0ab\0\0\0\0")
    server = serve()
    load(server, "m")
    assert statistics(server, "m").inference_count == 1


@pytest.mark.usefixtures("no_errors_logged")
def test_models_without_a_batch_dimension_and_optional_inputs_are_warmed_up(serve, repository):
    models.write_model(repository, "m", models.add_bias(), more=sample(data("X", "FP32", "[ 2 ]", "random_data: true")))
    server = serve()
    load(server, "m")
    assert statistics(server, "m").execution_count == 1


@pytest.mark.usefixtures("no_errors_logged")
def test_a_version_with_a_response_cache_keeps_nothing_of_its_warm_up(start_server, repository):
    more = "response_cache { enable: true }" + sample(data("X", "FP32", "[ 4 ]", "zero_data: true"))
    models.write_model(repository, "m", models.identity(), max_batch_size=8, more=more)
    server = start_server(repository, models={"cache_bytes": 1 << 20}, http=None, metrics=None)
    server.infer(infer_request("m", {"X": np.zeros((1, 4), np.float32)}))
    found = statistics(server, "m")
    assert (found.execution_count, found.inference_stats.cache_hit.count) == (2, 0)
    assert found.inference_stats.cache_miss.count == 1


def test_random_data_is_the_same_at_each_load_and_small():
    random = np.random.default_rng(SEED)
    assert random.integers(0, RANDOM_INTEGERS, 1000).max() < 128


WRONG_WHEN_RUN = [
    (data("X", "FP32", "[ 5 ]", "zero_data: true"), "unexpected shape for input 'X'"),
    (data("X", "INT32", "[ 4 ]", "zero_data: true"), "data-type is 'INT32'"),
    (data("Z", "FP32", "[ 4 ]", "zero_data: true"), "unexpected inference input 'Z'"),
    ("", "expected 1 inputs but got 0"),
    (data("X", "FP32", "[ 4 ]", 'input_data_file: "missing"'), "'warmup/missing' of input 'X': No such file"),
    (data("X", "FP32", "[ 4 ]", 'input_data_file: "short"'), "Expected 16, got 3"),
    (data("X", "FP32", "[ 1000000000 ]", "zero_data: true"), "take more than"),
]


@pytest.mark.parametrize(("inputs", "reason"), WRONG_WHEN_RUN, ids=lambda value: str(value)[:40])
def test_a_sample_that_is_no_request_to_the_model_fails_the_load(inputs, reason, serve, repository):
    directory = models.write_model(repository, "m", models.identity(), max_batch_size=8, more=sample(inputs))
    (directory / "warmup").mkdir()
    (directory / "warmup" / "short").write_bytes(b"abc")
    server = serve()
    code, text = refusal(server, "m")
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith("load failed for model 'm': version 1 is at UNAVAILABLE state: Invalid argument:")
    assert "model_warmup 'first' of model 'm'" in text
    assert reason in text


def test_a_run_that_fails_fails_the_load_and_the_version_that_served_goes_on(serve, repository):
    directory = models.write_model(repository, "m", models.gather(), max_batch_size=8)
    server = serve()
    load(server, "m")
    config = directory / "config.pbtxt"
    (directory / "warmup").mkdir()
    (directory / "warmup" / "beyond").write_bytes(np.int64(99).tobytes())
    config.write_text(config.read_text() + sample(data("INDEX", "INT64", "[ 1 ]", 'input_data_file: "beyond"')))
    code, text = refusal(server, "m")
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "model_warmup 'first' of model 'm': onnx runtime error" in text
    answer = answer_arrays(server.infer(infer_request("m", {"INDEX": np.array([[3]], np.int64)})))
    assert answer["Y"].item() == 30


WRONG_AS_WRITTEN = [
    (sample("", more=""), "model_warmup[0].batch_size"),
    (sample("", more="batch_size: 9"), "model_warmup[0].batch_size"),
    (sample(data("X", "FP32", "[ -1 ]", "zero_data: true")), 'model_warmup[0].inputs["X"].dims'),
    (sample(data("X", "FP32", "[ 4 ]", "")), 'model_warmup[0].inputs["X"]'),
    (sample('inputs { key: "X" value { dims: 4 zero_data: true } }'), 'model_warmup[0].inputs["X"].data_type'),
    (
        sample(data("X", "FP32", "[ 4 ]", 'input_data_file: "../secret"')),
        'model_warmup[0].inputs["X"].input_data_file',
    ),
]


@pytest.mark.parametrize(("more", "field"), WRONG_AS_WRITTEN, ids=lambda value: str(value)[-50:])
def test_what_is_written_wrong_is_refused_with_its_field(more: str, field: str, serve, repository: Path):
    models.write_model(repository, "m", models.identity(), max_batch_size=8, more=more)
    code, text = refusal(serve(), "m")
    assert code is grpc.StatusCode.INTERNAL
    assert "failed to load 'm', failed to poll from model repository" in text
    assert field in text
