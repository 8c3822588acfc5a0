"""A server behind a unix socket and behind TLS, as tritonclient and our own client reach it."""

from __future__ import annotations

import socket
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import trustme

import sluice_client
from sluice_server.repository.manager import ControlMode
from sluice_server.transport.options import Compression, TlsFiles, TransportOptions
from support import models
from support.relay import Relay
from support.server import CALL_TIMEOUT_S, LOOPBACK

ROWS = np.array([[1, 2, 3, 4]], np.float32)

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@dataclass(frozen=True)
class Certificates:
    """PEM files: the authority, the server's pair, and a client's pair of the same authority."""

    roots: Path
    server_certificate: Path
    server_key: Path
    client_certificate: Path
    client_key: Path

    @classmethod
    def make(cls, directory: Path) -> Certificates:
        authority = trustme.CA()
        files = cls(*(directory / f"{name}.pem" for name in ("roots", "server", "server-key", "client", "client-key")))
        authority.cert_pem.write_to_path(files.roots)
        for names, certificate, key in (
            (("localhost", LOOPBACK), files.server_certificate, files.server_key),
            (("client@models.test",), files.client_certificate, files.client_key),
        ):
            leaf = authority.issue_cert(*names)
            leaf.cert_chain_pems[0].write_to_path(certificate)
            leaf.private_key_pem.write_to_path(key)
        return files

    def listener(self, *, mutual: bool) -> TransportOptions:
        files = TlsFiles(self.server_certificate, self.server_key, self.roots if mutual else None)
        return TransportOptions(f"{LOOPBACK}:0", tls=files)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> Certificates:
    return Certificates.make(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def start(start_server, repository):
    """Start a server of one model on a gRPC listener; gives its address."""
    models.write_model(repository, "echo", models.identity(dims=("N", "M")), max_batch_size=8)

    def begin(options: TransportOptions, **changes) -> str:
        server = start_server(repository, grpc=options, http=None, metrics=None, **changes)
        target: str = server.target
        return target

    return begin


def ask_by_tritonclient(target: str, **tls) -> np.ndarray:
    tensor = triton.InferInput("X", list(ROWS.shape), "FP32")
    tensor.set_data_from_numpy(ROWS)
    with triton.InferenceServerClient(target, **tls) as client:
        array: np.ndarray = client.infer("echo", [tensor]).as_numpy("Y")
        return array


def ask_by_our_client(target: str, **options) -> np.ndarray:
    with sluice_client.Client(target, **options) as client:
        return client.infer("echo", {"X": ROWS})["Y"]


def test_tls_with_the_servers_certificate(start, certificates):
    target = start(certificates.listener(mutual=False))
    roots = certificates.roots
    np.testing.assert_array_equal(ask_by_tritonclient(target, ssl=True, root_certificates=str(roots)), ROWS)
    tls = sluice_client.Tls(root_certificates=roots.read_bytes())
    np.testing.assert_array_equal(ask_by_our_client(target, tls=tls), ROWS)


def test_mutual_tls_lets_nobody_in_without_a_certificate(start, certificates):
    target = start(certificates.listener(mutual=True))
    roots = str(certificates.roots)
    pair = {
        "private_key": str(certificates.client_key),
        "certificate_chain": str(certificates.client_certificate),
    }
    np.testing.assert_array_equal(ask_by_tritonclient(target, ssl=True, root_certificates=roots, **pair), ROWS)
    tls = sluice_client.Tls.from_files(root_certificates=roots, **pair)
    np.testing.assert_array_equal(ask_by_our_client(target, tls=tls), ROWS)
    without = sluice_client.Tls(root_certificates=certificates.roots.read_bytes())
    with pytest.raises(sluice_client.Unavailable):
        ask_by_our_client(target, tls=without, retry=sluice_client.RetryPolicy(max_attempts=1))


def test_a_client_without_tls_is_refused_by_a_listener_with_tls(start, certificates):
    target = start(certificates.listener(mutual=False))
    with pytest.raises(sluice_client.Unavailable):
        ask_by_our_client(target, retry=sluice_client.RetryPolicy(max_attempts=1))


def test_a_unix_socket_serves_and_its_peers_may_control(start, tmp_path):
    path = tmp_path / "socket"
    explicit = {"control_mode": ControlMode.EXPLICIT}
    target = start(TransportOptions(f"unix:{path}"), models=explicit)
    assert target == f"unix:{path}"
    with triton.InferenceServerClient(target) as client:
        client.load_model("echo")
    np.testing.assert_array_equal(ask_by_tritonclient(target), ROWS)
    np.testing.assert_array_equal(ask_by_our_client(f"unix://{path}"), ROWS)


def test_a_socket_that_an_earlier_server_left_is_replaced(start, tmp_path):
    path = tmp_path / "socket"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    np.testing.assert_array_equal(ask_by_tritonclient(start(TransportOptions(f"unix:{path}"))), ROWS)


@pytest.mark.parametrize("address", ["localhost", "0.0.0.0"])
def test_a_listener_on_a_name_or_on_every_address_is_reached_by_the_loopback(address, start):
    port = start(TransportOptions(f"{address}:0")).rpartition(":")[2]
    np.testing.assert_array_equal(ask_by_tritonclient(f"{LOOPBACK}:{port}"), ROWS)


def test_the_health_of_a_tls_listener_is_checked_over_tls(start, certificates):
    target = start(certificates.listener(mutual=False))
    credentials = grpc.ssl_channel_credentials(certificates.roots.read_bytes())
    with grpc.secure_channel(target, credentials) as channel:
        check = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert check(b"", timeout=20) == b"\x08\x01"


def test_a_unix_sockets_file_has_the_permissions_that_were_asked_for(start, tmp_path):
    path = tmp_path / "socket"
    target = start(TransportOptions(f"unix:{path}", unix_mode=0o620))
    assert stat.S_IMODE(path.stat().st_mode) == 0o620
    np.testing.assert_array_equal(ask_by_our_client(target), ROWS)


def test_a_changed_certificate_is_shown_to_new_connections_without_a_restart(start, tmp_path):
    files = Certificates.make(tmp_path)
    target = start(files.listener(mutual=False))
    before = sluice_client.Tls(root_certificates=files.roots.read_bytes())
    np.testing.assert_array_equal(ask_by_our_client(target, tls=before), ROWS)
    Certificates.make(tmp_path)  # of another authority
    after = sluice_client.Tls(root_certificates=files.roots.read_bytes())
    np.testing.assert_array_equal(ask_until_trusted(target, after), ROWS)
    with pytest.raises(sluice_client.Unavailable):
        ask_by_our_client(target, tls=before, retry=sluice_client.RetryPolicy(max_attempts=1))


def ask_until_trusted(target: str, tls: sluice_client.Tls) -> np.ndarray:
    """A transport may look at the files once a second only."""
    until_s = time.monotonic() + CALL_TIMEOUT_S
    while True:
        try:
            return ask_by_our_client(target, tls=tls, retry=sluice_client.RetryPolicy(max_attempts=1))
        except sluice_client.Unavailable:
            if time.monotonic() > until_s:
                raise


def test_headers_below_the_limit_are_taken_and_above_it_refused(start):
    target = start(TransportOptions(f"{LOOPBACK}:0", max_header_bytes=4096))
    with grpc.insecure_channel(target) as channel:
        ask = channel.unary_unary("/inference.GRPCInferenceService/ServerLive")
        assert ask(b"", metadata=[("key", "v" * 3000)], timeout=CALL_TIMEOUT_S) == b"\x08\x01"
        with pytest.raises(grpc.RpcError) as caught:
            ask(b"", metadata=[("key", "v" * 5000)], timeout=CALL_TIMEOUT_S)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert ask(b"", timeout=CALL_TIMEOUT_S) == b"\x08\x01"


def test_messages_above_the_limit_are_refused(start):
    target = start(TransportOptions(f"{LOOPBACK}:0", max_message_bytes=1000))
    np.testing.assert_array_equal(ask_by_our_client(target), ROWS)
    with sluice_client.Client(target) as client, pytest.raises(sluice_client.ResourceExhausted):
        client.infer("echo", {"X": np.zeros((8, 100), np.float32)})


@pytest.mark.parametrize("level", Compression)
def test_responses_are_compressed_for_clients_that_take_them(level, start):
    target = start(TransportOptions(f"{LOOPBACK}:0", compression=level))
    rows = np.zeros((1, 100_000), np.float32)
    with Relay(target) as relay, sluice_client.Client(relay.target) as client:
        np.testing.assert_array_equal(client.infer("echo", {"X": rows})["Y"], rows)
    assert (relay.bytes_answered < rows.nbytes / 10) == (level is not Compression.NONE)
