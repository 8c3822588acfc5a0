"""TLS files of the native transport: every form of a key, what is refused in which words, and change while it runs."""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING

import grpc
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from sluice_server.transport import ListenError
from sluice_server.transport.options import TlsFiles
from support.answering import ECHO
from support.fakes import PATIENCE_S, eventually

if TYPE_CHECKING:
    from pathlib import Path

    from conftest import Serve, Served

AUTHORITY = trustme.CA()

PKCS8, TRADITIONAL = PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL
ECDSA, RSA = trustme.KeyType.ECDSA, trustme.KeyType.RSA


def write_pair(
    directory: Path,
    *,
    kind: trustme.KeyType = ECDSA,
    form: PrivateFormat = PKCS8,
    encryption: KeySerializationEncryption | None = None,
) -> TlsFiles:
    """A certificate for the loopback with its key, in files that are written anew each time."""
    issued = AUTHORITY.issue_cert("127.0.0.1", key_type=kind)
    key = load_pem_private_key(issued.private_key_pem.bytes(), None)
    files = TlsFiles(directory / "cert.pem", directory / "key.pem")
    files.key.write_bytes(key.private_bytes(Encoding.PEM, form, encryption or NoEncryption()))
    files.certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    return files


def ask(served: Served) -> grpc.Channel:
    """A channel that has been answered over TLS."""
    credentials = grpc.ssl_channel_credentials(AUTHORITY.cert_pem.bytes())
    channel = grpc.secure_channel(served.target, credentials, [("grpc.use_local_subchannel_pool", 1)])
    assert channel.unary_unary(ECHO)(b"over TLS", timeout=PATIENCE_S) == b"over TLS"
    return channel


@pytest.mark.parametrize(
    ("kind", "form"),
    [(ECDSA, PKCS8), (ECDSA, TRADITIONAL), (RSA, PKCS8), (RSA, TRADITIONAL)],
    ids=["EC in PKCS#8", "EC in SEC1", "RSA in PKCS#8", "RSA in PKCS#1"],
)
def test_a_key_may_have_every_form_that_openssl_writes(serve: Serve, tmp_path: Path, kind, form):
    ask(serve(tls=write_pair(tmp_path, kind=kind, form=form))).close()


@pytest.mark.parametrize("form", [PKCS8, TRADITIONAL], ids=["PKCS#8", "SEC1"])
def test_an_encrypted_key_is_refused_as_nobody_can_be_asked_for_its_password(serve: Serve, tmp_path: Path, form):
    files = write_pair(tmp_path, form=form, encryption=BestAvailableEncryption(b"secret"))
    with pytest.raises(ListenError, match=f"{files.key}: the key is encrypted"):
        serve(tls=files)


@pytest.mark.parametrize("missing", ["certificate", "key"])
def test_a_file_that_is_missing_is_named(serve: Serve, tmp_path: Path, missing: str):
    files = write_pair(tmp_path)
    path: Path = getattr(files, missing)
    path.unlink()
    with pytest.raises(ListenError, match=f"{path}: No such file or directory"):
        serve(tls=files)


def test_a_key_of_another_certificate_is_named_with_it(serve: Serve, tmp_path: Path):
    files = write_pair(tmp_path)
    certificate = files.certificate.read_bytes()
    write_pair(tmp_path)
    files.certificate.write_bytes(certificate)
    with pytest.raises(ListenError, match=f"{files.key}: the key does not fit the certificate in {files.certificate}"):
        serve(tls=files)


def test_a_changed_pair_is_used_for_new_connections_and_a_broken_one_is_told_of(serve: Serve, tmp_path: Path, caplog):
    served = serve(tls=write_pair(tmp_path))
    first = ask(served)
    (tmp_path / "key.pem").write_bytes(b"not yet")

    def told() -> bool:
        ask(served).close()  # the old pair is in use meanwhile
        return "there is no PEM private key in it" in caplog.text

    eventually(told, "the log tells of the broken file")
    write_pair(tmp_path)
    newest = (tmp_path / "cert.pem").read_bytes()
    eventually(lambda: served_certificate(served) in newest, "the new pair is in use")
    assert first.unary_unary(ECHO)(b"still", timeout=PATIENCE_S) == b"still"
    first.close()


def served_certificate(served: Served) -> bytes:
    """The certificate that a new connection is shown, in PEM."""
    host, _, port = served.target.rpartition(":")
    return ssl.get_server_certificate((host, int(port)), timeout=PATIENCE_S).encode()
