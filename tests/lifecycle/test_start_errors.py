"""A server that cannot start says why in one line, and ends with a status that is not zero."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trustme
from cryptography.hazmat.primitives import serialization

from sluice_server.cli import serve
from sluice_server.lifecycle import StartError, check_runtime
from support import models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FLAGS = ("--grpc-port=0", "--http-port=0", "--metrics-port=0", "--grpc-address=127.0.0.1", "--http-address=127.0.0.1")

pytestmark = pytest.mark.usefixtures("own_process")


@pytest.fixture
def failing(transport, repository, capfd) -> Callable[..., tuple[int, list[str]]]:
    """Run `sluice serve` with more flags until it fails: the status, and what it said beside its log."""
    models.write_model(repository, "good", models.identity(), max_batch_size=8)

    def run(*flags: str) -> tuple[int, list[str]]:
        given = [f"--model-repository={repository}", f"--transport={transport}", *FLAGS, *flags]
        code = serve([*given, "--log-format=json"])
        output = capfd.readouterr()
        assert output.out == ""
        lines = output.err.splitlines()
        assert not [line for line in lines if "Traceback" in line]
        own = [line for line in lines if line.startswith("sluice serve: ")]
        assert all(json.loads(line) for line in lines if line not in own)
        return code, own

    return run


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.mark.parametrize(
    ("flag", "what"), [("--grpc-port", "gRPC"), ("--http-port", "HTTP"), ("--metrics-port", "HTTP")]
)
def test_a_port_in_use(flag, what, failing, taken):
    said = f"sluice serve: cannot listen on 127.0.0.1:{taken} for {what}: Address already in use"
    assert failing(f"{flag}={taken}") == (1, [said])


def test_a_broken_model(failing, repository):
    directory = models.write_model(repository, "bad", models.identity(), max_batch_size=8)
    (directory / "1" / "model.onnx").write_bytes(b"no model")
    code, (said,) = failing()
    assert code == 1
    assert "bad failed to load" in said
    assert "--exit-on-error=false" in said


def test_the_reason_of_a_broken_model_is_in_the_log(failing, repository, tmp_path):
    directory = models.write_model(repository, "bad", models.identity(), max_batch_size=8)
    (directory / "1" / "model.onnx").write_bytes(b"no model")
    log = tmp_path / "log"
    failing(f"--log-file={log}")
    (record,) = [record for record in map(json.loads, log.read_text().splitlines()) if record["level"] == "ERROR"]
    assert (record["message"], record["model"]) == ("model failed to load", "bad")
    assert "onnx runtime error" in record["reason"]
    assert "exception" not in record


def test_a_model_to_load_that_is_not_there(failing):
    code, (said,) = failing("--model-control-mode=explicit", "--load-model=nope")
    assert (code, "nope failed to load" in said) == (1, True)


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--model-repository=/no/such/place"], ["/no/such/place", "No such file or directory"]),
        (["--log-file=/no/such/place/log"], ["/no/such/place/log"]),
        (["--grpc-address=203.0.113.1"], ["203.0.113.1:0", "Cannot assign requested address"]),
        (["--grpc-address=unix:/no/such/place/socket"], ["/no/such/place/socket", "No such file or directory"]),
    ],
)
def test_a_place_that_is_not_there(flags, facts, failing):
    code, (said,) = failing(*flags)
    assert code == 1
    assert not [fact for fact in facts if fact not in said], said


def test_the_same_repository_twice(failing, repository):
    code, (said,) = failing(f"--model-repository={repository}/../{repository.name}")
    assert (code, "given twice" in said) == (1, True)


class TlsFiles:
    """A certificate, its key and its authority in files."""

    def __init__(self, directory: Path) -> None:
        authority = trustme.CA()
        leaf = authority.issue_cert("localhost", "127.0.0.1")
        self.key, self.certificate, self.roots = (directory / name for name in ("key.pem", "cert.pem", "ca.pem"))
        leaf.private_key_pem.write_to_path(self.key)
        leaf.cert_chain_pems[0].write_to_path(self.certificate)
        authority.cert_pem.write_to_path(self.roots)

    def flags(self) -> list[str]:
        files = {"server-cert": self.certificate, "server-key": self.key, "root-cert": self.roots}
        return ["--grpc-use-ssl-mutual=true", *(f"--grpc-{name}={path}" for name, path in files.items())]


@pytest.mark.parametrize("spoil", [Path.unlink, lambda path: path.write_text("junk")], ids=["missing", "junk"])
@pytest.mark.parametrize("spoiled", ["key", "certificate", "roots"])
def test_a_tls_file_that_is_none(spoiled, spoil, failing, tmp_path):
    files = TlsFiles(tmp_path)
    path: Path = getattr(files, spoiled)
    spoil(path)
    code, (said,) = failing(*files.flags())
    assert (code, str(path) in said) == (1, True)


def test_a_key_that_is_not_the_certificates(failing, tmp_path):
    files = TlsFiles(tmp_path)
    trustme.CA().issue_cert("localhost").private_key_pem.write_to_path(files.key)
    code, (said,) = failing(*files.flags())
    assert (code, str(files.key) in said) == (1, True)


def test_an_encrypted_key_is_not_asked_for_at_the_terminal(failing, tmp_path):
    files = TlsFiles(tmp_path)
    key = serialization.load_pem_private_key(files.key.read_bytes(), None)
    encryption = serialization.BestAvailableEncryption(b"secret")
    files.key.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption))
    code, (said,) = failing(*files.flags())
    assert (code, str(files.key) in said) == (1, True)


def test_a_trace_exporter_that_is_none(failing, monkeypatch):
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "nope")
    code, (said,) = failing()
    assert (code, "OTEL_TRACES_EXPORTER" in said) == (1, True)


@pytest.mark.parametrize(
    "flags",
    [["--host-policy=a,b=c"], ["--grpc-port=abc"], ["--no-such-flag"], ["--repository-poll-secs=0"], ["stray"]],
)
def test_a_wrong_command_line_is_another_status(flags, failing):
    code, (said,) = failing(*flags)
    assert code == 2
    assert flags[0].partition("=")[0] in said


def test_two_distributions_of_onnx_runtime_are_said_before_anything_starts(tmp_path, monkeypatch):
    for name in ("onnxruntime", "onnxruntime_gpu"):
        directory = tmp_path / f"{name}-1.0.dist-info"
        directory.mkdir()
        (directory / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (directory / "RECORD").write_text("onnxruntime/__init__.py,,\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(StartError, match="onnxruntime and onnxruntime-gpu are both installed"):
        check_runtime()
