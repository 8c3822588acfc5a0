"""Who the client is, by its certificate or its socket, on every transport."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest
import trustme

from sluice_server.transport.grpcio import GrpcioTransport
from sluice_server.transport.native import NativeTransport
from sluice_server.transport.options import TlsFiles, TransportOptions
from support.server import CALL_TIMEOUT_S, LOOPBACK, need

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_server.transport.call import Call

WHO = "/test.Transport/Who"
TRANSPORTS = {"grpcio": GrpcioTransport, "native": NativeTransport}


def tell(calls: Sequence[Call]) -> None:
    """Answer with the names of whoever asks."""
    for call in calls:
        call.reply([" ".join(call.peer_names).encode()])


@pytest.fixture
def listen(transport):
    """Start a transport that answers WHO; stopped at the end."""
    need(transport)
    started = []

    def begin(options: TransportOptions) -> str:
        server = TRANSPORTS[transport](tell, {WHO: False}, options)
        server.start()
        started.append(server)
        return server.endpoints[0]

    yield begin
    for server in started:
        server.stop(0.0)


def test_the_names_of_a_client_certificate_are_handed_up(listen, tmp_path):
    authority = trustme.CA()
    server = authority.issue_cert("localhost", LOOPBACK)
    client = authority.issue_cert("models.test", "192.0.2.7", "client@models.test", common_name="trainer")
    authority.cert_pem.write_to_path(tmp_path / "roots.pem")
    server.cert_chain_pems[0].write_to_path(tmp_path / "server.pem")
    server.private_key_pem.write_to_path(tmp_path / "server-key.pem")
    files = TlsFiles(tmp_path / "server.pem", tmp_path / "server-key.pem", tmp_path / "roots.pem")
    target = listen(TransportOptions(f"{LOOPBACK}:0", tls=files))
    credentials = grpc.ssl_channel_credentials(
        authority.cert_pem.bytes(), client.private_key_pem.bytes(), client.cert_chain_pems[0].bytes()
    )
    with grpc.secure_channel(target, credentials) as channel:
        names = channel.unary_unary(WHO)(b"", timeout=CALL_TIMEOUT_S).decode().split()
    assert sorted(names) == ["cn:trainer", "dns:models.test", "email:client@models.test", "ip:192.0.2.7"]


def test_a_client_without_a_certificate_has_no_names(listen):
    with grpc.insecure_channel(listen(TransportOptions(f"{LOOPBACK}:0"))) as channel:
        assert channel.unary_unary(WHO)(b"", timeout=CALL_TIMEOUT_S) == b""
