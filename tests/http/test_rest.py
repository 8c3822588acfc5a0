"""The HTTP port: health and readiness as probes ask them, paths, verbs, and connections that are kept."""

from __future__ import annotations

import contextlib
import http.client
import socket

import pytest

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.protocol.rpcs import EXTENSIONS
from sluice_server.repository.manager import ControlMode
from support import models
from support.server import LOOPBACK, RunningServer, running, server_settings

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture(scope="module")
def server(transport, tmp_path_factory) -> RunningServer:
    repository = tmp_path_factory.mktemp("models")
    models.write_model(repository, "m", models.identity(), max_batch_size=8, version=3)
    models.write_model(repository, "a name, with %", models.identity(), max_batch_size=8)
    with running(server_settings(repository), transport) as server:
        yield server


@pytest.mark.parametrize(
    "path",
    [
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/m/ready",
        "/v2/models/m/versions/3/ready",
        "/v2/models/a%20name,%20with%20%25/ready",
        "/v2/health/live?verbose=1",
    ],
)
def test_what_is_there_answers_200_with_an_empty_body(path, server, rest):
    assert rest(server, "GET", path)[:2] == (200, b"")
    assert rest(server, "HEAD", path)[:2] == (200, b"")


@pytest.mark.parametrize("path", ["/v2/models/nope/ready", "/v2/models/m/versions/1/ready", "/v2/models//ready"])
def test_a_model_that_is_not_served_answers_400_as_tritons_probes_expect(path, server, rest):
    answer = rest(server, "GET", path)
    assert answer[:2] == ((404, {"error": "Not Found"}) if "//" in path else (400, b""))


def test_the_metadata_is_that_of_the_rpc(server, rest):
    over_grpc = server.call("ServerMetadata", b"")
    assert rest(server, "GET", "/v2").body == {
        "name": "triton",
        "version": over_grpc.version,
        "extensions": [*EXTENSIONS],
    }
    assert list(over_grpc.extensions) == list(EXTENSIONS)


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("POST", "/v2", {"GET", "HEAD"}),
        ("POST", "/v2/health/live", {"GET", "HEAD"}),
        ("DELETE", "/v2/health/ready", {"GET", "HEAD"}),
        ("POST", "/v2/models/m/ready", {"GET", "HEAD"}),
        ("GET", "/v2/models/m/infer", {"POST"}),
        ("GET", "/v2/repository/index", {"POST"}),
        ("PUT", "/v2/models/m", {"GET", "HEAD"}),
    ],
)
def test_a_wrong_method_is_405(method, path, allowed, server, rest):
    answer = rest(server, method, path)
    assert (answer.status, answer.body) == (405, {"error": "Method Not Allowed"})
    assert set(answer.headers["allow"].split(", ")) == allowed


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v2/",
        "/v2/models",
        "/v2/models/",
        "/v2/health",
        "/v2/health/live/",
        "/v2/models/m/versions/abc/ready",
        "/v2/models/m/versions/-1/ready",
        "/v2/models/m/versions/abc",
        "/v2/models/m/nope",
        "/metrics",
        "/v2/../etc/passwd",
        "/" + "x" * 5000,
    ],
)
def test_an_unknown_path_is_404(path, server, rest):
    answer = rest(server, "GET", path)
    assert (answer.status, answer.body) == (404, {"error": "Not Found"})


def test_a_version_that_no_integer_holds_is_an_error_of_the_client(server, rest):
    answer = rest(server, "GET", f"/v2/models/m/versions/{'9' * 30}/ready")
    assert answer.status == 400
    assert "integral value" in answer.body["error"]


def test_a_connection_is_kept_after_answers_and_errors(server):
    connection = http.client.HTTPConnection(LOOPBACK, server.server.http_port, timeout=20)
    for path, status in (("/v2/health/live", 200), ("/nope", 404), ("/v2/models/nope/config", 404), ("/v2", 200)):
        connection.request("GET", path)
        response = connection.getresponse()
        response.read()
        assert response.status == status
        assert connection.sock is not None, "the server closed the connection"
    connection.close()


@pytest.mark.parametrize(
    "garbage", [b"\x00\xff\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"x" * 100_000, b"PRI * HTTP/2.0\r\n\r\n"]
)
def test_what_is_not_http_is_hung_up_on_and_harms_nobody(garbage, server, rest):
    # A server that hangs up before it has read everything resets the connection.
    gone = contextlib.suppress(ConnectionResetError, BrokenPipeError)
    with gone, socket.create_connection((LOOPBACK, server.server.http_port), timeout=20) as peer:
        peer.sendall(garbage)
        peer.shutdown(socket.SHUT_WR)
        while peer.recv(4096):
            pass
    assert rest(server, "GET", "/v2/health/live").status == 200


def test_readiness_follows_the_models(start_server, repository, rest):
    models.write_model(repository, "m", models.identity(), max_batch_size=8)
    broken = models.write_model(repository, "broken", models.identity(), max_batch_size=8) / "1" / "model.onnx"
    broken.write_bytes(b"no model")
    explicit = {"control_mode": ControlMode.EXPLICIT, "load_models": ("m",)}
    server = start_server(repository, models=explicit, metrics=None)

    def is_ready(path: str) -> bool:
        return {200: True, 400: False}[rest(server, "GET", path).status]

    assert is_ready("/v2/health/ready")
    assert is_ready("/v2/models/m/ready")
    server.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="m"))
    assert not is_ready("/v2/models/m/ready")
    assert is_ready("/v2/health/ready")
    server.refusal("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="broken"))
    assert not is_ready("/v2/health/ready")
    assert rest(server, "GET", "/v2/health/live").status == 200


def test_a_broken_model_leaves_a_strict_server_live_but_not_ready_and_another_one_ready(
    start_server, repository, rest, caplog
):
    models.write_model(repository, "m", models.identity(), max_batch_size=8)
    (models.write_model(repository, "broken", models.identity()) / "1" / "model.onnx").write_bytes(b"no model")
    strict = start_server(repository, exit_on_error=False, metrics=None)
    lenient = start_server(repository, exit_on_error=False, strict_readiness=False, metrics=None)
    for server, ready in ((strict, False), (lenient, True)):
        assert server.call("ServerReady", b"").ready is ready
        assert rest(server, "GET", "/v2/health/ready").status == (200 if ready else 400)
        assert rest(server, "GET", "/v2/health/live").status == 200
        assert server.call("ServerLive", b"").live
        assert server.call("ModelReady", pb.ModelReadyRequest(name="m")).ready
        assert not server.call("ModelReady", pb.ModelReadyRequest(name="broken")).ready
        states = {item.name: (item.state, bool(item.reason)) for item in server.call("RepositoryIndex", b"").models}
        assert states == {"m": ("READY", False), "broken": ("UNAVAILABLE", True)}
    caplog.clear()  # both said why


def test_http_can_be_switched_off(start_server, repository):
    server = start_server(repository, http=None, metrics=None)
    assert (server.server.http_port, server.server.metrics_port) == (0, 0)
    assert server.call("ServerLive", b"").live
