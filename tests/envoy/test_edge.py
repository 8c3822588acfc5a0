"""What passes through Envoy and what does not: gRPC, REST, JSON, control, deadlines, limits, the access log."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import time

import grpc
import numpy as np
import pytest
from edges import call_with, echo, trailers
from grpc_health.v1 import health_pb2
from tritonclient.grpc import InferenceServerClient, InferInput

from deploy.envoy import bootstrap, descriptors
from sluice_proto import grpc_service_pb2 as pb
from support.conversation import Conversation
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request
from support.server import CALL_TIMEOUT_S, SERVICE

OPEN = {
    "ServerLive",
    "ServerReady",
    "ModelReady",
    "ServerMetadata",
    "ModelMetadata",
    "ModelInfer",
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
}
CLOSED = sorted({method.name for method in SERVICE.methods} - OPEN)

README = bootstrap.SOURCE.parent / "README.md"

WORKED = f"/{SERVICE.full_name}/"


def test_inference_passes_over_a_unix_socket_and_over_tcp(edge, start_replica, start_edge):
    overs = [edge.through, start_edge(start_replica(address="127.0.0.1:0")).through]
    for through in overs:
        assert answer_arrays(through.infer(echo(3)))["Y"].item() == 3


def test_a_message_of_many_windows_passes_both_ways_and_with_triton_s_own_client(edge):
    array = np.random.default_rng(0).standard_normal((2, 1_000_000)).astype(np.float32)
    np.testing.assert_array_equal(answer_arrays(edge.through.infer(infer_request("wide", {"X": array})))["Y"], array)
    with InferenceServerClient(edge.envoy.address) as client:
        tensor = InferInput("X", array.shape, "FP32").set_data_from_numpy(array)
        np.testing.assert_array_equal(client.infer("wide", [tensor]).as_numpy("Y"), array)


def test_streams_health_and_reflection_pass(edge):
    stream = Conversation(edge.through)
    stream.say(echo(1), echo(2))
    assert [stream.hear_value(), stream.hear_value()] == [1, 2]
    assert stream.end() is grpc.StatusCode.OK
    check = edge.through.channel.unary_unary("/grpc.health.v1.Health/Check")
    answer = check(health_pb2.HealthCheckRequest(service="echo").SerializeToString(), timeout=CALL_TIMEOUT_S)
    assert health_pb2.HealthCheckResponse.FromString(answer).status == health_pb2.HealthCheckResponse.SERVING
    reflection = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
    services = next(edge.through.channel.stream_stream(reflection)(iter([b"\x3a\x00"]), timeout=CALL_TIMEOUT_S))
    assert SERVICE.full_name.encode() in services


def test_metadata_with_underscores_passes_as_triton_s_clients_send_it(edge):
    stream = Conversation(edge.through, metadata=[("triton_grpc_error", "true")])
    stream.say(infer_request("nope", {}))
    assert stream.end() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("method", CLOSED)
def test_what_changes_the_server_or_its_memory_is_closed(method, edge):
    before = dict(edge.server.server.rpc_outcomes())
    code, text = edge.through.refusal(method, b"")
    assert (code, text.partition(":")[0]) == (
        grpc.StatusCode.PERMISSION_DENIED,
        "model control, shared memory and settings are closed at this proxy",
    )
    assert not any(method in path for path, _ in edge.server.server.rpc_outcomes().keys() - before.keys())
    assert edge.post_json(f"/{SERVICE.full_name}/{method}", {}).status == 404


def test_every_open_method_gets_to_the_server(edge):
    named = pb.ModelConfigRequest(name="echo")
    for method in sorted(OPEN - {"ModelInfer", "ModelStreamInfer"}):
        message = named if method.startswith("Model") else pb.ServerLiveRequest()
        assert call_with(edge, method, message).code() is grpc.StatusCode.OK, method


@pytest.mark.parametrize(
    ("verb", "path"),
    [
        ("POST", "/v2/repository/models/echo/unload"),
        ("POST", "/v2/repository/models/echo/load"),
        ("POST", "/v2/logging"),
        ("GET", "/v2/logging"),
        ("POST", "/v2/trace/setting"),
        ("POST", "/v2/models/echo/trace/setting"),
        ("POST", "/v2/systemsharedmemory/region/r/register"),
        ("POST", "/v2/cudasharedmemory/unregister"),
        ("POST", "//v2/logging"),
        ("POST", "/v2/models/../logging"),
        ("POST", "/v2/models/stats/../../logging"),
        ("POST", "/v2/logging?x=/v2/models/echo"),
    ],
)
def test_control_over_rest_is_closed_however_its_path_is_written(verb, path, edge):
    answer = edge.http(verb, path, b"{}")
    assert answer.status == 403
    assert "closed at this proxy" in answer.json()["error"]
    assert edge.server.model("echo")


@pytest.mark.parametrize("path", ["/v2/models/..%2Flogging", "/v2%2Flogging", "/v2/models/echo%5c..%5clogging"])
def test_escaped_slashes_are_refused(path, edge):
    assert edge.http("POST", path, b"{}").status == 400


def test_the_server_s_own_rest_passes(edge):
    assert edge.http("GET", "/v2/health/live").status == 200
    assert edge.http("GET", "/v2").json()["name"] == "triton"
    assert edge.http("GET", "/v2/models/echo/versions/1/ready").status == 200
    assert edge.http("GET", "/v2/models/nope").status == 404
    tensor = {"name": "X", "shape": [1, 1], "datatype": "FP32", "data": [4.5]}
    answer = edge.post_json("/v2/models/echo/infer", {"inputs": [tensor]})
    assert answer.json()["outputs"][0]["data"] == [4.5]


def test_without_rest_behind_it_rest_is_not_there(start_replica, start_edge):
    edge = start_edge(start_replica())
    assert [edge.http("GET", path).status for path in ("/v2/health/live", "/v2/logging")] == [404, 404]


def test_json_becomes_grpc_and_its_answer_json(edge):
    assert edge.http("GET", "/json/health/live").json() == {"live": True}
    assert edge.http("GET", "/json/models/echo").json()["inputs"][0]["name"] == "X"
    assert edge.http("GET", "/json/models/echo/versions/1/ready").json() == {"ready": True}
    tensor = {"name": "X", "datatype": "FP32", "shape": [1, 1], "contents": {"fp32_contents": [4.5]}}
    for path in ("/json/models/echo/infer", "/json/models/echo/versions/1/infer"):
        answer = edge.post_json(path, {"inputs": [tensor]})
        assert (answer.status, answer.json()["model_version"]) == (200, "1")
        raw = base64.b64decode(answer.json()["raw_output_contents"][0])
        assert np.frombuffer(raw, np.float32).tolist() == [4.5]


def test_errors_of_transcoded_calls_are_http_s(edge):
    missing = edge.http("GET", "/json/models/nope")
    assert (missing.status, missing.json()["code"]) == (404, grpc.StatusCode.NOT_FOUND.value[0])
    assert "'nope' is not found" in missing.json()["message"]
    assert edge.http("POST", "/json/models/echo/infer", b"{", {"content-type": "application/json"}).status == 400
    assert edge.http("GET", "/json/health/live?what=1").status == 400
    assert edge.http("GET", "/json/nope").status == 404


def test_the_committed_descriptors_are_of_now_and_have_a_path_for_all_that_is_open():
    assert descriptors.descriptor_set() == descriptors.DESCRIPTORS.read_bytes()
    assert {*descriptors.GETS, *descriptors.POSTS} == OPEN - {"ModelStreamInfer"}


def seconds_left(edge) -> float:
    """Until the deadline of what waits, as the server knows it."""
    deadline_ns = edge.server.model("echo").queue._queue.next_deadline_ns()
    return (deadline_ns - time.monotonic_ns()) / 1e9


@pytest.mark.parametrize(("asked_s", "least_s", "most_s"), [(60, 50, 60.1), (None, 290, 300.1), (900, 290, 300.1)])
def test_the_server_gets_the_client_s_deadline_and_one_of_five_minutes_without(asked_s, least_s, most_s, edge):
    model = edge.server.model("echo")
    with held(model) as session:
        first = call_with(edge, "ModelInfer", echo(1))
        session.wait_for_runs(1)
        waiting = call_with(edge, "ModelInfer", echo(2), timeout_s=asked_s)
        eventually(lambda: len(model.queue) == 1, "it waits")
        assert least_s < seconds_left(edge) < most_s
        waiting.cancel()
        eventually(lambda: len(model.queue) == 0, "it was cancelled at the server too")
        session.release()
        first.result()


def test_a_deadline_that_passes_ends_the_call_here_and_at_the_server(edge):
    model = edge.server.model("echo")
    with held(model) as session:
        first = call_with(edge, "ModelInfer", echo(1))
        session.wait_for_runs(1)
        hurried = call_with(edge, "ModelInfer", echo(2), timeout_s=0.3)
        assert hurried.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: len(model.queue) == 0, "nothing waits any more")
        session.release()
        first.result()


def test_clients_cannot_steer_the_proxy_and_are_told_nothing_of_it(edge):
    steering = [
        ("x-envoy-upstream-rq-timeout-ms", "1"),
        ("x-envoy-retry-on", "5xx,retriable-4xx,not-found"),
        ("x-envoy-retry-grpc-on", "invalid-argument,not-found"),
        ("x-envoy-max-retries", "9"),
        ("x-envoy-expected-rq-timeout-ms", "1"),
    ]
    with held(edge.server.model("echo")) as session:
        call = call_with(edge, "ModelInfer", echo(7), *steering)
        session.wait_for_runs(1)
        session.release()
        assert answer_arrays(pb.ModelInferResponse.FromString(call.result()))["Y"].item() == 7
    assert not [one.key for one in (*call.initial_metadata(), *call.trailing_metadata()) if "envoy" in one.key]
    missing = call_with(edge, "ModelMetadata", pb.ModelMetadataRequest(name="steered"), *steering)
    assert missing.code() is grpc.StatusCode.NOT_FOUND
    last = edge.logged(path=f"{WORKED}ModelMetadata", grpc_status="NotFound")[-1]
    assert last["attempts"] == 1


def test_the_access_log_says_what_became_of_a_call_and_where(start_replica, start_edge):
    edge = start_edge(start_replica())
    call_with(edge, "ModelInfer", echo(7), timeout_s=7).result()
    edge.through.refusal("RepositoryModelLoad", b"")
    (record,) = edge.logged(path=f"{WORKED}ModelInfer")
    (number, unit) = re.fullmatch(r"(\d+)([Sm])", record["deadline"]).groups()
    assert 0 < int(number) * {"S": 1000, "m": 1}[unit] <= 7000
    assert record["grpc_status"] == "OK"
    assert record["upstream"] == edge.server.target.removeprefix("unix:")
    assert record["attempts"] == 1
    assert record["duration_ms"] >= 0
    (refused,) = edge.logged(path=f"{WORKED}RepositoryModelLoad", grpc_status="PermissionDenied")
    assert (refused["upstream"], refused["details"]) == (None, "direct_response")


def test_a_rate_limit_refuses_what_is_above_it_and_says_when_to_come_back(start_replica, start_edge):
    edge = start_edge(start_replica(), rate=1)
    calls = [call_with(edge, "ModelInfer", echo(1)) for _ in range(20)]
    refused = [call for call in calls if call.code() is not grpc.StatusCode.OK]
    assert 0 < len(refused) < 20
    for call in refused:
        assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert trailers(call)["grpc-retry-pushback-ms"] == "100"
    assert 429 in {edge.post_json("/json/models/echo/infer", {}).status for _ in range(20)}
    check = edge.through.channel.unary_unary("/grpc.health.v1.Health/Check")
    assert [check(b"", timeout=CALL_TIMEOUT_S) for _ in range(6)] == [b"\x08\x01"] * 6


def test_a_circuit_breaker_refuses_as_a_full_queue_does(start_replica, start_edge):
    edge = start_edge(start_replica(), max_requests=2)
    with held(edge.server.model("echo")) as session:
        calls = [call_with(edge, "ModelInfer", echo(value)) for value in range(2)]
        eventually(lambda: edge.envoy.stat("cluster.sluice.upstream_rq_active") == 2, "two are in flight")
        third = call_with(edge, "ModelInfer", echo(3))
        assert third.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert trailers(third)["grpc-retry-pushback-ms"] == "100"
        session.release()
        assert [call.code() for call in calls] == [grpc.StatusCode.OK] * 2


def test_ready_follows_the_server_and_the_operator(start_replica, start_edge):
    edge = start_edge(start_replica())

    def ready() -> int:
        return edge.http("GET", "/ready", address=edge.envoy.readiness).status

    assert ready() == 200
    edge.server.server._health.set_serving("", serving=False)
    eventually(lambda: ready() == 503, "it is not ready when the server is not")
    code, _ = edge.through.refusal("ModelInfer", echo(1))
    assert code is grpc.StatusCode.UNAVAILABLE
    edge.server.server._health.set_serving("", serving=True)
    eventually(lambda: ready() == 200, "it is ready again")
    # As the hook in the README does it, from within the container.
    (hook,) = re.findall(r"bash -c '(.*?)\n +sleep 10'", README.read_text(), re.DOTALL)
    assert "/127.0.0.1/9901" in hook
    port = edge.envoy.admin.rpartition(":")[2]
    subprocess.run(["bash", "-c", hook.replace("/9901", f"/{port}")], check=True, stdout=subprocess.DEVNULL)
    assert ready() == 503
    assert json.loads(edge.envoy.get("/server_info"))["state"] == "DRAINING"


def test_a_proxy_that_drains_finishes_what_it_has_and_sends_its_clients_away(start_replica, start_edge):
    edge = start_edge(start_replica())
    with held(edge.server.model("echo")) as session:
        call = call_with(edge, "ModelInfer", echo(5))
        session.wait_for_runs(1)
        edge.envoy.drain()
        session.release()
        assert answer_arrays(pb.ModelInferResponse.FromString(call.result()))["Y"].item() == 5
    for value in range(20):
        assert answer_arrays(edge.through.infer(echo(value)))["Y"].item() == value
    # with GOAWAY, each time that an answer has gone over a connection
    assert edge.envoy.stat("http.edge.downstream_cx_drain_close") >= 1
