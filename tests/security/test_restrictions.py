"""Groups of RPCs that take a header: who passes, what the others are told, and that nothing else is touched."""

from __future__ import annotations

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tritonclient.utils import InferenceServerException

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.protocol import health
from sluice_server.protocol.restricted import RestrictedHandler
from sluice_server.protocol.rpcs import SERVICE, path_of
from sluice_server.security.restrictions import GROUPS, Restriction
from sluice_server.status import Code
from support import models, rest
from support.fakes import RecordingCall, RecordingStream, eventually
from support.server import CALL_TIMEOUT_S, LOOPBACK

KEY, VALUE = "triton-grpc-protocol-admin-key", "admin-value"
GRPC = Restriction("protocol", KEY, VALUE)
API = Restriction("API", "Admin-Key", VALUE)
REFUSED_GRPC = f"This protocol is restricted, expecting header '{KEY}'"
REFUSED_REST = "This API is restricted, expecting header 'Admin-Key'"
RIGHT = {KEY: VALUE}
ROWS = np.array([[1, 2, 3, 4]], np.float32)

REQUESTS = {
    "CudaSharedMemoryRegister": pb.CudaSharedMemoryRegisterRequest(name="r"),
    "ModelConfig": pb.ModelConfigRequest(name="echo"),
    "ModelReady": pb.ModelReadyRequest(name="echo"),
    "ModelStatistics": pb.ModelStatisticsRequest(name="echo"),
    "RepositoryIndex": pb.RepositoryIndexRequest(),
    "ServerLive": pb.ServerLiveRequest(),
    "ServerMetadata": pb.ServerMetadataRequest(),
    "TraceSetting": pb.TraceSettingRequest(),
    "LogSettings": pb.LogSettingsRequest(),
}


def restricting(restriction: Restriction, *groups: str) -> dict[str, Restriction]:
    return {name: restriction for group in groups for name in GROUPS[group]}


def test_every_rpc_is_in_one_group():
    grouped = [name for names in GROUPS.values() for name in names]
    expected = {*(method.name for method in SERVICE.methods), *(method.name for method in health.SERVICE.methods)}
    assert set(grouped) == expected - {"List"}
    assert len(grouped) == len(set(grouped))


@pytest.mark.parametrize(
    ("metadata", "passes"),
    [
        ((), False),
        (((KEY, VALUE),), True),
        ((("user-agent", "x"), (KEY, VALUE)), True),
        (((KEY, "admin-valu"),), False),
        (((KEY, "admin-value "),), False),
        (((KEY, ""),), False),
        ((("admin-key", VALUE),), False),
        (((KEY, "ädmin"),), False),
        (((KEY, VALUE.encode()),), True),
        (((KEY, "other"), (KEY, VALUE)), True),
    ],
)
def test_the_header_and_its_value_decide(metadata, passes):
    assert GRPC.admits(metadata) is passes


def test_a_refusal_and_a_repr_do_not_tell_the_value():
    assert VALUE not in f"{GRPC.refusal} {GRPC!r}"


def test_calls_of_one_list_pass_or_fail_each_on_its_own():
    passed = []

    def handler(calls, /, *, lend=False):
        passed.append((list(calls), lend))

    infer, config = path_of("ModelInfer"), path_of("ModelConfig")
    stream = RecordingStream(path_of("ModelStreamInfer"))
    restricted = RestrictedHandler(
        handler, [infer, config, stream.method], {"ModelConfig": GRPC, "ModelStreamInfer": GRPC}
    )
    free = RecordingCall(b"", infer)
    without = RecordingCall(b"", config)
    right = RecordingCall(b"", config, metadata=((KEY, VALUE),))
    restricted([free, without, right, stream.message(b"")], lend=True)
    assert passed == [([free, right], True)]
    assert [(status.code, status.message) for status, _ in without.ends] == [(Code.UNAVAILABLE, REFUSED_GRPC)]
    assert [(status.code, status.message) for status in stream.ends] == [(Code.UNAVAILABLE, REFUSED_GRPC)]


@pytest.fixture
def start(start_server, repository):
    models.write_model(repository, "echo", models.identity(), max_batch_size=8)
    return lambda **restricted: start_server(repository, metrics=None, **restricted)


def code_of(server, method, metadata=()) -> tuple[grpc.StatusCode, str]:
    call = server.channel.unary_unary(path_of(method), request_serializer=lambda message: message.SerializeToString())
    try:
        call(REQUESTS[method], metadata=metadata, timeout=CALL_TIMEOUT_S)
    except grpc.RpcError as error:
        return error.code(), error.details()
    return grpc.StatusCode.OK, ""


@pytest.mark.parametrize("method", REQUESTS)
def test_a_restricted_protocol_needs_its_header_over_grpc(method, start):
    group = next(group for group, names in GROUPS.items() if method in names)
    server = start(grpc_restricted=restricting(GRPC, group), http=None)
    for metadata in ((), ((KEY, "wrong"),), (("admin-key", VALUE),)):
        assert code_of(server, method, metadata) == (grpc.StatusCode.UNAVAILABLE, REFUSED_GRPC)
    assert code_of(server, method, ((KEY, VALUE),))[1] != REFUSED_GRPC
    for other in REQUESTS.keys() - GROUPS[group]:
        assert code_of(server, other)[1] != REFUSED_GRPC, other
    outcomes = server.server.rpc_outcomes()
    assert outcomes[path_of(method), Code.UNAVAILABLE] == 3


def test_health_covers_the_health_checking_protocol(start):
    server = start(grpc_restricted=restricting(GRPC, "health"), http=None)
    stub = health_pb2_grpc.HealthStub(server.channel)
    for call in (stub.Check, lambda *args, **options: next(stub.Watch(*args, **options))):
        with pytest.raises(grpc.RpcError) as caught:
            call(health_pb2.HealthCheckRequest(), timeout=CALL_TIMEOUT_S)
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, REFUSED_GRPC)
        answer = call(health_pb2.HealthCheckRequest(), metadata=((KEY, VALUE),), timeout=CALL_TIMEOUT_S)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_tritonclient_passes_with_headers_and_is_told_without_over_grpc(start):
    server = start(grpc_restricted=restricting(GRPC, "inference", "model-repository"), http=None)
    given = triton_grpc.InferInput("X", list(ROWS.shape), "FP32").set_data_from_numpy(ROWS)
    with triton_grpc.InferenceServerClient(server.target) as client:
        assert client.is_server_ready()
        for refused in (lambda: client.infer("echo", [given]), client.get_model_repository_index):
            with pytest.raises(InferenceServerException, match=REFUSED_GRPC):
                refused()
        assert np.array_equal(client.infer("echo", [given], headers=RIGHT).as_numpy("Y"), ROWS)
        assert client.get_model_repository_index(headers=RIGHT).models[0].name == "echo"
        for headers, expected in ((None, REFUSED_GRPC), (RIGHT, None)):
            ends: list[InferenceServerException | None] = []

            def note(result, error, ends=ends):
                ends.append(error)

            client.start_stream(note, headers=headers)
            client.async_stream_infer("echo", [given])
            eventually(lambda ends=ends: ends, "the end of the request")
            client.stop_stream()
            assert ends[0] is None if expected is None else expected in str(ends[0])


def test_a_restricted_api_needs_its_header_over_rest_and_grpc_stays_open(start):
    server = start(http_restricted=restricting(API, "inference", "statistics", "metadata"))
    given = triton_http.InferInput("X", list(ROWS.shape), "FP32").set_data_from_numpy(ROWS)
    with triton_http.InferenceServerClient(f"{LOOPBACK}:{server.server.http_port}") as client:
        assert client.is_server_ready()
        for refused in (lambda: client.infer("echo", [given]), client.get_inference_statistics):
            with pytest.raises(InferenceServerException, match=REFUSED_REST):
                refused()
        answer = client.infer("echo", [given], headers={"admin-key": VALUE})
        assert np.array_equal(answer.as_numpy("Y"), ROWS)
        assert client.get_inference_statistics(headers={"ADMIN-KEY": VALUE})["model_stats"]
    for path in ("/v2", "/v2/openapi.json", "/v2/models/echo", "/v2/models/stats"):
        answer = rest.request(server, "GET", path, headers={"admin-key": "wrong"})
        assert (answer.status, answer.json()) == (403, {"error": REFUSED_REST})
        assert rest.request(server, "GET", path, headers={"admin-key": VALUE}).status == 200
    assert code_of(server, "ServerMetadata") == (grpc.StatusCode.OK, "")
    assert server.server.rpc_outcomes()[path_of("ModelInfer"), Code.PERMISSION_DENIED] == 1
