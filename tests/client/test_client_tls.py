"""TLS and mutual TLS against a real server, with certificates made for the test."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from fake_server import FakeServer

from sluice_client import RetryPolicy, Tls, Unavailable

ONCE = RetryPolicy(max_attempts=1)

MakeClient = Callable[..., Any]


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def root(authority: trustme.CA) -> bytes:
    return authority.cert_pem.bytes()


def credentials(authority: trustme.CA, host: str, *, mutual: bool = False) -> grpc.ServerCredentials:
    leaf = authority.issue_cert(host)
    pair = (leaf.private_key_pem.bytes(), b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    return grpc.ssl_server_credentials([pair], root(authority) if mutual else None, require_client_auth=mutual)


def test_a_trusted_server_is_talked_to_over_tls(
    make_client: MakeClient, make_server: Callable[..., FakeServer], authority: trustme.CA
) -> None:
    server = make_server(credentials=credentials(authority, "127.0.0.1"))
    tls = Tls(root_certificates=root(authority))
    assert make_client(server.address, tls=tls).server_live()
    assert make_client(f"grpcs://{server.address}", tls=tls).server_live()


def test_a_server_that_is_not_trusted_or_named_otherwise_is_unavailable(
    make_client: MakeClient, make_server: Callable[..., FakeServer], authority: trustme.CA
) -> None:
    server = make_server(credentials=credentials(authority, "models.test"))
    trusted = root(authority)
    with pytest.raises(Unavailable):
        make_client(server.address, tls=Tls(root_certificates=root(trustme.CA())), retry=ONCE).server_live()
    with pytest.raises(Unavailable):
        make_client(server.address, tls=Tls(root_certificates=trusted), retry=ONCE).server_live()
    with pytest.raises(Unavailable):
        make_client(f"grpcs://{server.address}", retry=ONCE).server_live()
    assert make_client(server.address, tls=Tls(root_certificates=trusted, server_name="models.test")).server_live()


def test_mutual_tls_needs_the_clients_certificate(
    make_client: MakeClient, make_server: Callable[..., FakeServer], authority: trustme.CA, tmp_path: Path
) -> None:
    server = make_server(credentials=credentials(authority, "127.0.0.1", mutual=True))
    me = authority.issue_cert("me@models.test")
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    me.private_key_pem.write_to_path(tmp_path / "key.pem")
    me.cert_chain_pems[0].write_to_path(tmp_path / "cert.pem")
    tls = Tls.from_files(
        root_certificates=tmp_path / "ca.pem", certificate_chain=tmp_path / "cert.pem", private_key=tmp_path / "key.pem"
    )
    assert make_client(server.address, tls=tls).server_live()
    with pytest.raises(Unavailable):
        make_client(server.address, tls=Tls(root_certificates=root(authority)), retry=ONCE).server_live()
