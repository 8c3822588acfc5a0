"""TraceSetting over the wire: what it tells and refuses, whom it has traced, and what the trace files say."""

from __future__ import annotations

import json
import os
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.observability.trace_control import TraceConfig, TraceMode
from sluice_server.observability.trace_sampling import TraceOptions
from sluice_server.observability.tracing import OtlpOptions
from support import models
from support.otlp import attributes_of, collecting
from support.requests import infer_request
from support.server import SERVICE

if TYPE_CHECKING:
    from pathlib import Path

    from support.server import RunningServer

START = {
    "trace_level": ["OFF"],
    "trace_rate": ["1000"],
    "trace_count": ["-1"],
    "log_frequency": ["0"],
    "trace_file": [""],
    "trace_mode": ["triton"],
}

INVALID, UNIMPLEMENTED = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED

pytestmark = pytest.mark.usefixtures("no_errors_logged")


def setting(model: str = "", **settings: list[str]) -> pb.TraceSettingRequest:
    request = pb.TraceSettingRequest(model_name=model)
    for key, values in settings.items():
        request.settings[key].value.extend(values)
    return request


def told(server: RunningServer, model: str = "", **settings: list[str]) -> dict[str, list[str]]:
    answer = server.call("TraceSetting", setting(model, **settings))
    return {key: list(value.value) for key, value in answer.settings.items()}


@pytest.fixture
def traced(start_server, repository, tmp_path):
    """A server with two models whose traces go to a file; gives it, and the file."""
    models.write_model(repository, "a", models.identity("FP32", ("N", 2)), max_batch_size=8)
    models.write_model(repository, "b", models.identity("FP32", ("N", 2)), max_batch_size=8)
    file = tmp_path / "trace.json"
    return start_server(repository, trace=TraceConfig(file=file)), file


def infer(server: RunningServer, model: str, times: int = 1, request_id: str = "") -> None:
    request = infer_request(model, {"X": np.array([[1.5, -2]], np.float32)})
    request.id = request_id
    for _ in range(times):
        server.infer(request)


def traces(file: Path) -> dict[int, dict[str, Any]]:
    """The traces in a file by their ids, each with everything that its entries say."""
    found: dict[int, dict[str, Any]] = {}
    for entry in json.loads(file.read_text()):
        trace = found.setdefault(entry["id"], {"tensors": []})
        if "tensor" in entry:
            trace["tensors"].append((entry["activity"], entry["tensor"]))
        else:
            trace.update(entry)
    return found


# --- telling and changing ---------------------------------------------------------------------------------------


def test_at_first_nothing_is_traced_and_every_setting_is_told(server):
    assert told(server) == told(server, "simple") == START


def test_a_model_keeps_its_own_values_and_follows_the_server_in_the_others(traced):
    server, file = traced
    start = START | {"trace_file": [str(file)]}
    assert told(server, trace_rate=["10"]) == start | {"trace_rate": ["10"]}
    own = told(server, "a", trace_rate=["5"], trace_level=["TENSORS", "TIMESTAMPS"])
    assert own == start | {"trace_rate": ["5"], "trace_level": ["TIMESTAMPS", "TENSORS"]}
    told(server, trace_rate=["7"], trace_count=["3"])
    assert told(server, "a") == own | {"trace_count": ["3"]}
    assert told(server, "b") == start | {"trace_rate": ["7"], "trace_count": ["3"]}
    assert told(server, "a", trace_rate=[], trace_level=[]) == told(server, "b")
    assert told(server, trace_rate=[], trace_count=[]) == told(server, "a") == start


@pytest.mark.parametrize(("settings", "code", "fact"), [
    ({"trace_rate": ["abc"]}, INVALID, "Unable to parse 'trace_rate', got: abc"),
    ({"trace_rate": ["-1"]}, INVALID, "Unable to parse 'trace_rate', got: -1"),
    ({"trace_rate": ["4294967296"]}, INVALID, "Unable to parse 'trace_rate', got: 4294967296"),
    ({"trace_rate": ["9" * 10_000]}, INVALID, "Unable to parse 'trace_rate', got: 999"),
    ({"trace_rate": ["1", "2"]}, INVALID, "Unable to parse 'trace_rate', expecting one value"),
    ({"trace_count": ["-5"]}, INVALID, "Unable to parse 'trace_count'. Expecting value >= -1, got: -5"),
    ({"trace_count": [""]}, INVALID, "Unable to parse 'trace_count', got: "),
    ({"log_frequency": ["x"]}, INVALID, "Unable to parse 'log_frequency', got: x"),
    ({"trace_level": ["OFF", "TENSORS"]}, INVALID, "OFF"),
    ({"trace_file": ["/tmp/x"]}, UNIMPLEMENTED, "trace file location can not be updated through network protocol"),
    ({"trace_file": []}, UNIMPLEMENTED, "trace file location can not be updated through network protocol"),
    ({"trace_mode": ["opentelemetry"]}, UNIMPLEMENTED, "trace mode can not be updated through network protocol"),
])  # fmt: skip
def test_a_value_that_is_refused_changes_nothing(settings, code, fact, server, refused):
    assert fact in refused(setting("", trace_level=["TIMESTAMPS"], **settings) if "trace_level" not in settings
                           else setting("", **settings), code, "TraceSetting")  # fmt: skip
    assert told(server) == START


@pytest.mark.parametrize("model", ["nope", "x" * 1_000, "../simple"])
def test_a_model_that_is_not_served_has_no_settings(model, refused):
    assert refused(setting(model), INVALID, "TraceSetting") == f"Request for unknown model : {model}"


def test_unknown_settings_and_levels_are_passed_over(server):
    assert told(server, nonsense=["1"], trace_level=["NEVER"], trace_mode=["triton"]) == START


def test_tritonclient_updates_and_clears(traced):
    server, file = traced
    with tritonclient.grpc.InferenceServerClient(server.target) as client:
        client.update_trace_settings("a", {"trace_rate": "1", "trace_level": ["TIMESTAMPS"]})
        assert client.get_trace_settings("a", as_json=True)["settings"]["trace_rate"] == {"value": ["1"]}
        client.update_trace_settings("a", {"trace_rate": None, "trace_level": None})
        answer = client.get_trace_settings("a", as_json=True)["settings"]
        assert {key: value["value"] for key, value in answer.items()} == START | {"trace_file": [str(file)]}
        with pytest.raises(InferenceServerException, match="trace file location"):
            client.update_trace_settings(settings={"trace_file": "other"})


# --- trace files ------------------------------------------------------------------------------------------------

MOMENTS = [
    "GRPC_WAITREAD_START", "GRPC_WAITREAD_END", "REQUEST_START", "QUEUE_START", "COMPUTE_START", "COMPUTE_INPUT_END",
    "COMPUTE_OUTPUT_START", "COMPUTE_END", "REQUEST_END", "GRPC_SEND_START", "GRPC_SEND_END",
]  # fmt: skip


def test_a_traced_request_tells_its_moments_in_order(traced):
    server, file = traced
    told(server, trace_level=["TIMESTAMPS"], trace_rate=["1"])
    infer(server, "a", request_id="mine")
    infer(server, "b")
    server.close()
    first, second = traces(file).values()
    assert (first["model_name"], first["model_version"], first["request_id"]) == ("a", 1, "mine")
    assert second["model_name"] == "b"
    assert "request_id" not in second
    for trace in (first, second):
        assert [moment["name"] for moment in trace["timestamps"]] == MOMENTS
        times = [moment["ns"] for moment in trace["timestamps"]]
        assert times == sorted(times)
        assert not trace["tensors"]


def test_a_trace_with_tensors_has_the_rows_of_its_request(traced):
    server, file = traced
    told(server, "a", trace_level=["TENSORS"], trace_rate=["1"])
    infer(server, "a")
    server.close()
    (trace,) = traces(file).values()
    assert "timestamps" not in trace
    shown = {"data": "1.5,-2.0", "shape": "1,2", "dtype": "FP32"}
    assert trace["tensors"] == [
        ("TENSOR_QUEUE_INPUT", {"name": "X", **shown}),
        ("TENSOR_BACKEND_OUTPUT", {"name": "Y", **shown}),
    ]


def test_every_nth_request_is_traced_until_the_count_is_used_up(traced):
    server, file = traced
    told(server, trace_level=["TIMESTAMPS"], trace_rate=["3"], trace_count=["2"])
    infer(server, "a", 4)
    assert told(server)["trace_count"] == ["1"]
    infer(server, "b", 20)
    assert told(server)["trace_count"] == ["0"]
    assert told(server, trace_count=[])["trace_count"] == ["-1"]
    infer(server, "a", 3)
    server.close()
    assert [trace["model_name"] for trace in traces(file).values()] == ["a", "b", "a"]


def test_with_a_log_frequency_the_traces_go_to_numbered_files(traced):
    server, file = traced
    told(server, trace_level=["TIMESTAMPS"], trace_rate=["1"], log_frequency=["2"])
    infer(server, "a", 5)
    server.close()
    assert [len(traces(file.with_name(f"trace.json.{number}"))) for number in range(3)] == [2, 2, 1]
    assert not file.exists()


def test_a_request_that_fails_is_traced_as_far_as_it_came(traced):
    server, file = traced
    told(server, trace_level=["TIMESTAMPS"], trace_rate=["1"])
    with pytest.raises(grpc.RpcError):
        server.infer(infer_request("a", {"WRONG": np.zeros((1, 2), np.float32)}))
    server.close()
    (trace,) = traces(file).values()
    assert [moment["name"] for moment in trace["timestamps"]] == [
        name for name in MOMENTS if "COMPUTE" not in name and "QUEUE" not in name
    ]


def test_requests_of_a_stream_are_traced_too(traced):
    server, file = traced
    told(server, trace_level=["TIMESTAMPS"], trace_rate=["1"])
    request = infer_request("a", {"X": np.zeros((1, 2), np.float32)})
    assert len(list(server.stream("ModelStreamInfer", iter([request] * 3)))) == 3
    server.close()
    assert len(traces(file)) == 3


# --- OpenTelemetry ----------------------------------------------------------------------------------------------


def test_in_mode_opentelemetry_the_settings_choose_and_a_sampled_caller_is_always_followed(
    start_server, repository, monkeypatch
):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    models.write_model(repository, "a", models.identity("FP32", ("N", 2)), max_batch_size=8)
    with collecting() as collector:
        config = TraceConfig(
            TraceMode.OPENTELEMETRY,
            TraceOptions(("TIMESTAMPS",), rate=2),
            otlp=OtlpOptions(url=collector.endpoint, resource=(("service.name", "mine"),)),
        )
        server = start_server(repository, trace=config)
        infer(server, "a", 4)
        told(server, trace_rate=["1000"])
        infer(server, "a", 4)
        message = infer_request("a", {"X": np.zeros((1, 2), np.float32)}).SerializeToString()
        call = server.channel.unary_unary(f"/{SERVICE.full_name}/ModelInfer")
        call(message, metadata=(("traceparent", f"00-{7:032x}-{7:016x}-01"),), timeout=10)
        assert told(server)["trace_mode"] == ["opentelemetry"]
        assert server.refusal("TraceSetting", setting(trace_level=["TENSORS"]))[0] is UNIMPLEMENTED
        told(server, trace_level=["OFF"])
        call(message, metadata=(("traceparent", f"00-{8:032x}-{8:016x}-01"),), timeout=10)
        server.close()
    requests = [span for span in collector.all_spans if span.name.endswith("/ModelInfer")]
    assert len(requests) == 3
    assert f"{7:032x}" in {span.trace_id.hex() for span in requests}
    assert attributes_of(requests[0].attributes)["sluice.model.name"] == "a"
    assert collector.resource["service.name"] == "mine"


def test_requests_over_rest_are_traced_with_the_moments_of_http(traced):
    server, file = traced
    told(server, trace_level=["TIMESTAMPS"], trace_rate=["1"])
    body = {"inputs": [{"name": "X", "shape": [1, 2], "datatype": "FP32", "data": [1, 2]}]}
    url = f"http://127.0.0.1:{server.server.http_port}/v2/models/a/infer"
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode()), timeout=10) as answer:
        assert answer.status == 200
    server.close()
    (trace,) = traces(file).values()
    assert [moment["name"] for moment in trace["timestamps"]] == [
        name.replace("GRPC_WAITREAD", "HTTP_RECV").replace("GRPC", "HTTP") for name in MOMENTS
    ]
