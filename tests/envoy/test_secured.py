"""Certificates, tokens and traces at the edge: all of the committed configuration that variants may leave out."""

from __future__ import annotations

import base64
import json
import os
import re
import socket
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from edges import Edge, call_with, echo, edge_of, need_envoy, serving, socket_folder
from grpc_health.v1 import health_pb2

from deploy.envoy import bootstrap
from deploy.envoy.bootstrap import TlsFiles, TokenIssuer, Upstream, Variant, address
from deploy.envoy.sidecar import SidecarError, sidecar, validate
from sluice_proto import grpc_service_pb2 as pb
from support import models
from support.fakes import PATIENCE_S, eventually
from support.otlp import Collector, attributes_of, collecting
from support.server import SERVICE

if TYPE_CHECKING:
    from collections.abc import Iterator

ISSUER, AUDIENCE = "https://issuer.example", "sluice"
HOUR_S = 3600


def base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


class Issuer:
    """Signs tokens (RFC 7519, RS256) and writes the key set (RFC 7517) that they can be checked by."""

    def __init__(self) -> None:
        self._key = rsa.generate_private_key(65537, 2048)

    def write_keys(self, path: Path) -> Path:
        numbers = self._key.public_key().public_numbers()
        modulus, exponent = (base64url(value.to_bytes(256)) for value in (numbers.n, numbers.e))
        path.write_text(json.dumps({"keys": [{"kty": "RSA", "alg": "RS256", "n": modulus, "e": exponent}]}))
        return path

    def token(self, **claims: Any) -> str:
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": "alice", "exp": int(time.time()) + HOUR_S, **claims}
        parts = ({"alg": "RS256", "typ": "JWT"}, {name: value for name, value in claims.items() if value is not None})
        signed = ".".join(base64url(json.dumps(part).encode()) for part in parts)
        return f"{signed}.{base64url(self._key.sign(signed.encode(), padding.PKCS1v15(), SHA256()))}"


ISSUED = Issuer()
AUTHORITY = trustme.CA()
CLIENT = AUTHORITY.issue_cert("client.example")


def credentials(client: trustme.LeafCert | None) -> grpc.ChannelCredentials:
    if client is None:
        return grpc.ssl_channel_credentials(AUTHORITY.cert_pem.bytes())
    return grpc.ssl_channel_credentials(
        AUTHORITY.cert_pem.bytes(), client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    )


def secured(folder: Path) -> dict[str, Any]:
    """The fields of a Variant with certificates and tokens, whose files are put into the folder."""
    own = AUTHORITY.issue_cert("127.0.0.1")
    tls = TlsFiles(folder / "tls.crt", folder / "tls.key", folder / "ca.crt")
    own.cert_chain_pems[0].write_to_path(tls.certificate)
    own.private_key_pem.write_to_path(tls.key)
    AUTHORITY.cert_pem.write_to_path(tls.client_ca)
    return {"tls": tls, "tokens": TokenIssuer(ISSUER, AUDIENCE, ISSUED.write_keys(folder / "jwks.json"))}


def open_channel(place: str) -> grpc.Channel:
    return grpc.secure_channel(place, credentials(CLIENT))


@pytest.fixture(scope="module")
def shared_edge(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """Envoy with certificates and tokens; the client has a certificate."""
    need_envoy()
    repository, files = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("secrets")
    models.write_model(repository, "echo", models.identity(dims=("N", 1)), max_batch_size=8)
    with (
        socket_folder() as sockets,
        serving(repository, transport, f"unix:{sockets}/grpc.sock", http=None) as server,
        edge_of(server, channel=open_channel, **secured(files)) as found,
    ):
        yield found


@pytest.fixture
def edge(shared_edge: Edge, no_errors_logged: None) -> Edge:
    return shared_edge


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    with collecting() as found:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", found.endpoint)
        monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        yield found


def bearing(token: str) -> tuple[str, str]:
    return "authorization", f"Bearer {token}"


def code_of(edge: Edge, *metadata: tuple[str, str]) -> grpc.StatusCode:
    return call_with(edge, "ModelInfer", echo(1), *metadata).code()


def test_a_client_needs_a_certificate_of_the_right_authority_and_a_token_of_the_right_issuer(edge):
    assert code_of(edge, bearing(ISSUED.token())) is grpc.StatusCode.OK
    for stranger in (None, trustme.CA().issue_cert("client.example")):
        with grpc.secure_channel(edge.envoy.address, credentials(stranger)) as channel:
            call = channel.unary_unary(f"/{SERVICE.full_name}/ServerLive").future(
                b"", metadata=(bearing(ISSUED.token()),), timeout=PATIENCE_S
            )
            assert call.code() is grpc.StatusCode.UNAVAILABLE
    record = edge.logged(grpc_status="OK", path=f"/{SERVICE.full_name}/ModelInfer")[0]
    assert record["subject"] == "alice"
    assert "trustme" in record["certificate"]


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": 1},
        {"exp": None},
        {"iss": "https://other.example"},
        {"nbf": int(time.time()) + HOUR_S},
    ],
    ids=lambda claims: next(iter(claims)),
)
def test_a_token_that_is_not_good_now_is_refused(claims, edge):
    assert code_of(edge, bearing(ISSUED.token(**claims))) is grpc.StatusCode.UNAUTHENTICATED


def test_tokens_that_are_forged_missing_or_for_others_are_refused_and_health_needs_none(edge):
    assert code_of(edge) is grpc.StatusCode.UNAUTHENTICATED
    assert code_of(edge, bearing(Issuer().token())) is grpc.StatusCode.UNAUTHENTICATED
    assert code_of(edge, bearing(ISSUED.token() + "x")) is grpc.StatusCode.UNAUTHENTICATED
    assert code_of(edge, bearing(ISSUED.token(aud="others"))) is grpc.StatusCode.PERMISSION_DENIED
    check = edge.through.channel.unary_unary("/grpc.health.v1.Health/Check")
    answer = health_pb2.HealthCheckResponse.FromString(check(b"", timeout=PATIENCE_S))
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    # What is closed stays closed, and with no token it is not even said to be.
    closed = call_with(edge, "RepositoryModelLoad", pb.RepositoryModelLoadRequest(), bearing(ISSUED.token()))
    assert closed.code() is grpc.StatusCode.PERMISSION_DENIED
    unknown = call_with(edge, "RepositoryModelLoad", pb.RepositoryModelLoadRequest())
    assert unknown.code() is grpc.StatusCode.UNAUTHENTICATED


def test_plain_text_is_not_answered(edge):
    host, _, port = edge.envoy.address.rpartition(":")
    with socket.create_connection((host, int(port)), PATIENCE_S) as plain:
        plain.sendall(b"GET /v2 HTTP/1.1\r\nhost: x\r\n\r\n")
        assert b"HTTP" not in plain.recv(100)


def test_a_call_is_one_trace_from_the_client_through_envoy_to_the_server(
    transport, collector, start_replica, start_edge, tmp_path
):
    server = start_replica(environ=dict(os.environ), grpc_header_pattern=re.compile("."))
    place = collector.endpoint.removeprefix("http://")
    edge = start_edge(server, channel=open_channel, collector=place, **secured(tmp_path))
    trace, span = f"{7:032x}", f"{9:016x}"
    traced = ("traceparent", f"00-{trace}-{span}-01")
    steered = ("x-envoy-max-retries", "9")
    assert code_of(edge, bearing(ISSUED.token()), traced, steered) is grpc.StatusCode.OK
    for _ in range(3):  # Envoy sends spans when it has five, or five seconds have passed
        assert code_of(edge, bearing(ISSUED.token())) is grpc.StatusCode.OK
    (record,) = edge.logged(trace_id=trace)
    assert record["grpc_status"] == "OK"

    def spans() -> dict[str, Any]:
        return {one.span_id.hex(): one for one in collector.all_spans if one.trace_id.hex() == trace}

    eventually(lambda: len(spans()) == 5, "two spans of Envoy and three of the server have come")
    found = spans()
    (ours,) = [one for one in found.values() if one.name == f"{SERVICE.full_name}/ModelInfer"]
    sent = found[ours.parent_span_id.hex()]
    received = found[sent.parent_span_id.hex()]
    assert received.parent_span_id.hex() == span
    assert attributes_of(sent.attributes)["upstream_cluster.name"] == "sluice"
    assert attributes_of(received.attributes)["grpc.status_code"] == "0"
    # What the server was sent: who the client is, but neither its token nor anything that steers proxies.
    prefix = "sluice.request.parameter."
    seen = {name.removeprefix(prefix): value for name, value in attributes_of(ours.attributes).items()}
    assert "trustme" in str(seen["x-forwarded-client-cert"])
    assert not seen.keys() & {"authorization", "x-envoy-max-retries"}


def test_the_committed_file_is_valid_as_it_is(tmp_path):
    need_envoy()
    secured(tmp_path)
    text = bootstrap.SOURCE.read_text()
    for place in ("/etc/envoy/tls", "/etc/envoy/jwt"):
        assert place in text
        text = text.replace(place, str(tmp_path))
    text = text.replace("/etc/envoy/descriptors.binpb", str(bootstrap.DESCRIPTORS))
    assert "/etc/envoy" not in text
    path = tmp_path / "envoy.yaml"
    path.write_text(text)
    validate(path)
    path.write_text(text.replace("lb_policy: MAGLEV", "lb_policy: MAGNET"))
    with pytest.raises(SidecarError, match="MAGNET"):
        validate(path)


@pytest.mark.parametrize("text", ["", "nowhere", "host:", ":80", "host:x"])
def test_what_is_no_address_is_refused_with_what_one_is(text):
    with pytest.raises(ValueError, match="expected host:port or unix:/path"):
        address(text)


def test_names_of_upstreams_are_looked_up_and_addresses_are_not():
    def kinds(*upstreams: Upstream) -> set[str]:
        clusters = bootstrap.bootstrap(Variant(upstreams))["static_resources"]["clusters"]
        return {cluster["type"] for cluster in clusters if cluster["name"].startswith("sluice")}

    assert kinds(Upstream("unix:/a"), Upstream("127.0.0.1:1", "[::1]:2")) == {"STATIC"}
    assert kinds(Upstream("replicas.example:8001")) == {"STRICT_DNS"}
    with pytest.raises(ValueError, match="at least one upstream"):
        kinds()


def test_an_envoy_that_does_not_start_says_why(tmp_path):
    need_envoy()
    variant = Variant((Upstream("127.0.0.1:1"),), descriptors=tmp_path / "nothing")
    with pytest.raises(SidecarError, match=r"has ended with 1.*nothing"), sidecar(variant):
        pass
