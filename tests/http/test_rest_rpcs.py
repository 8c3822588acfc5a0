"""Every path of the REST protocol but inference: what it answers is what the RPC answers, as JSON."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.protocol import rest_routes
from sluice_server.protocol.rest_json import to_json
from sluice_server.protocol.rpcs import path_of
from sluice_server.repository.manager import ControlMode
from support import models
from support.requests import infer_request
from support.rest import request

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture
def server(start_server, repository):
    models.write_model(repository, "m", models.identity(), max_batch_size=8)
    models.write_model(repository, "spare", models.identity(), max_batch_size=8)
    return start_server(repository, models={"control_mode": ControlMode.EXPLICIT, "load_models": ("m",)})


def get(server, path):
    answer = request(server, "GET", path)
    return answer.status, answer.json()


def post(server, path, body=b""):
    answer = request(server, "POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
    return answer.status, json.loads(answer.body) if answer.body else None


def test_a_models_metadata_are_those_of_the_rpc(server):
    for path in ("/v2/models/m", "/v2/models/m/versions/1", "/v2/models/m?query=ignored"):
        status, metadata = get(server, path)
        assert status == 200
        assert metadata["name"] == "m"
        assert metadata["versions"] == ["1"]
        assert metadata["platform"] == "onnxruntime_onnx"
        assert metadata["inputs"] == [{"name": "X", "datatype": "FP32", "shape": [-1, 4]}]
        assert metadata["outputs"] == [{"name": "Y", "datatype": "FP32", "shape": [-1, 4]}]


def test_the_configuration_has_all_fields_enums_by_name_and_numbers_as_numbers(server):
    status, config = get(server, "/v2/models/m/config")
    assert status == 200
    assert config == to_json(server.call("ModelConfig", pb.ModelConfigRequest(name="m")).config)
    assert config["max_batch_size"] == 8
    assert config["runtime"] == ""
    assert config["batch_input"] == []
    assert config["metric_tags"] == {}
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert config["input"][0]["dims"] == [4]
    assert config["instance_group"][0]["kind"] == "KIND_CPU"
    assert config["version_policy"] == {"latest": {"num_versions": 1}}


def test_statistics_are_numbers(server):
    server.infer(infer_request("m", {"X": np.zeros((3, 4), np.float32)}))
    for path in ("/v2/models/m/stats", "/v2/models/stats", "/v2/models/m/versions/1/stats"):
        status, told = get(server, path)
        assert status == 200
        (statistics,) = told["model_stats"]
        assert (statistics["name"], statistics["version"]) == ("m", "1")
        assert statistics["inference_count"] == 3
        assert statistics["inference_stats"]["success"]["count"] == 1
        assert statistics["batch_stats"][0]["batch_size"] == 3
        assert isinstance(statistics["last_inference"], int)


@pytest.mark.parametrize(
    ("path", "status", "text"),
    [
        ("/v2/models/nope", 404, "'nope' is not found"),
        ("/v2/models/spare/config", 404, "'spare' is not found"),
        ("/v2/models/m/versions/9", 404, "version 9 is not found"),
        ("/v2/models/nope/stats", 400, "'nope' is not available"),
    ],
)
def test_what_is_not_there_gets_the_code_of_the_rpc(path, status, text, server):
    got, body = get(server, path)
    assert (got, text in body["error"]) == (status, True), body


def test_models_are_loaded_listed_and_unloaded(server):
    assert post(server, "/v2/repository/index") == (
        200,
        [{"name": "m", "version": "1", "state": "READY"}, {"name": "spare"}],
    )
    assert request(server, "POST", "/v2/repository/models/spare/load")[:2] == (200, b"")
    assert post(server, "/v2/repository/index", {"ready": True})[1][1] == {
        "name": "spare",
        "version": "1",
        "state": "READY",
    }
    assert get(server, "/v2/models/spare")[0] == 200
    unload = {"parameters": {"unload_dependents": True}}
    assert post(server, "/v2/repository/models/spare/unload", unload) == (200, None)
    assert get(server, "/v2/models/spare")[0] == 404


def test_a_load_may_bring_its_configuration_and_files(server):
    parameters = {
        "config": json.dumps({"backend": "onnxruntime", "max_batch_size": 2}),
        "file:1/model.onnx": base64.b64encode(models.identity()).decode(),
    }
    assert post(server, "/v2/repository/models/brought/load", {"parameters": parameters}) == (200, None)
    assert get(server, "/v2/models/brought/config")[1]["max_batch_size"] == 2


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ({"config": 7}, "invalid value type for load parameter 'config', expected string_param"),
        ({"file:1/model.onnx": 7}, "invalid value type for load parameter 'file:1/model.onnx', expected bytes_param"),
        ({"file:1/model.onnx": "not base64!"}, "is not base64"),
        ({"k": "v"}, "unrecognized load parameter 'k'"),
        ({"config": None}, "parameter 'config' has invalid type"),
    ],
)
def test_load_parameters_of_a_wrong_kind_are_refused(parameters, text, server):
    status, body = post(server, "/v2/repository/models/spare/load", {"parameters": parameters})
    assert (status, text in body["error"]) == (400, True), body


def test_a_load_that_fails_says_why(server):
    status, body = post(server, "/v2/repository/models/nope/load")
    assert status == 500
    assert "failed to load 'nope'" in body["error"]


@pytest.mark.parametrize("body", [b"{broken", b"[1]", b'{"\\ud800": NaN}', b"\xff"])
def test_bodies_that_are_no_json_object_never_end_in_a_stack_trace(body, server):
    for route in rest_routes.routes().routes:
        if "POST" in route.endpoints:
            path = route.path.replace("{model}", "m").replace("{version}", "1").replace("{region}", "r")
            answer = request(server, "POST", path, body)
            assert answer.status in (200, 400, 404, 500, 501), path
            assert b"incident" not in answer.body


def test_every_rpc_of_the_service_has_a_path_but_the_streaming_one():
    named = {endpoint.rpc for route in rest_routes.routes().routes for endpoint in route.endpoints.values()}
    service = {method.name for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods}
    assert service - named == {"ModelStreamInfer"}
    assert named - service == {None}


def test_what_the_server_lacks_is_501_as_the_rpc_says(start_server, repository):
    models.write_model(repository, "m", models.identity(), max_batch_size=8)
    server = start_server(repository)
    for path, rpc in (("/v2/systemsharedmemory/status", "SystemSharedMemoryStatus"),):
        code, text = server.refusal(rpc, b"")
        assert code.name == "UNIMPLEMENTED"
        assert get(server, path) == (501, {"error": text})


def test_rest_calls_are_counted_with_the_rpcs(server):
    get(server, "/v2/models/m")
    get(server, "/v2/models/nope")
    post(server, "/v2/models/m/infer", b"{broken")
    outcomes = {(method, code.name): count for (method, code), count in server.server.rpc_outcomes().items()}
    assert outcomes[path_of("ModelMetadata"), "OK"] == 1
    assert outcomes[path_of("ModelMetadata"), "NOT_FOUND"] == 1
    assert outcomes[path_of("ModelInfer"), "INTERNAL"] == 1
