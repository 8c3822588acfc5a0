"""Peers: how they are named, what is said of one that is not there, and that one is measured like our own."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from deploy.processes import free_port
from loadtests import bench, oip, processes
from loadtests.h2load import LoadError
from loadtests.models import generate
from loadtests.oip import Peer, PeerMeasurement
from loadtests.peers import ECHO, GRPCIO, NATIVE
from loadtests.plan import BASE, LONE, Case
from loadtests.record import read

needs_h2load = pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load (nghttp2-client) is not installed")


def test_a_peer_is_a_name_and_an_address() -> None:
    assert oip.parse("triton=10.0.0.1:8001") == Peer("triton", "10.0.0.1", 8001)
    assert oip.parse("a=[::1]:8001") == Peer("a", "[::1]", 8001)
    assert oip.parse("a=b=c:1").address == "b=c:1"


@pytest.mark.parametrize("text", ["triton", "triton=", "=host:1", "triton=host", "triton=host:", "triton=host:0",
                                  "triton=host:65536", "triton=:8001", "triton=host:port"])  # fmt: skip
def test_anything_else_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="expected NAME=HOST:PORT, got"):
        oip.parse(text)
    with pytest.raises(SystemExit) as ended:
        bench.main(["--peer", text])
    assert ended.value.code == 2
    assert "expected NAME=HOST:PORT" in capsys.readouterr().err


@pytest.mark.parametrize("names", [["a", "a"], [NATIVE], [ECHO]])
def test_two_columns_have_no_common_name(names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    flags = [flag for name in names for flag in ("--peer", f"{name}=127.0.0.1:1")]
    with pytest.raises(SystemExit) as ended:
        bench.main(flags)
    assert ended.value.code == 2
    assert "each needs a name of its own" in capsys.readouterr().err


@needs_h2load
def test_a_peer_that_is_not_there_ends_the_run_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    port = free_port()
    results = tmp_path / "results.json"
    assert bench.main(["--quick", "--peer", f"triton=127.0.0.1:{port}", "--json", str(results)]) == 1
    assert f"--peer triton: 127.0.0.1:{port} does not answer ServerLive: UNAVAILABLE" in capsys.readouterr().err
    assert not results.exists()


@pytest.mark.long
@needs_h2load
def test_what_a_peer_serves_is_measured_and_what_it_does_not_is_said(
    transport: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The peer is a server of ours, as any of the protocol; of the two models it has one."""
    generate("identity", tmp_path / "models")
    results = tmp_path / "results.json"
    with processes.sluice(tmp_path / "models", tmp_path, transport) as server:
        flags = ["--quick", "--seconds=0.2", "--parts", "lone", "images", "--json", str(results)]
        code = bench.main([*flags, "--peer", f"triton={server.address}"])
        out, err = capsys.readouterr()
        assert code == 0, err
    record = read(results)
    if not any(row.who == NATIVE for row in record.rows):
        pytest.skip("peers stand beside the native transport, which is not installed")
    (row,) = [row for row in record.rows if row.who == "triton"]
    assert (row.model, row.load) == ("identity", str(LONE))
    assert row.samples[0].requests_per_s > 0
    assert row.samples[0].mean_batch_rows == 1
    assert math.isnan(row.samples[0].cpu_us_per_request)
    texts = {goal.text: goal for goal in record.goals}
    beside = texts["identity 1x16, 1 (1 x 1): requests/s, native over triton"]
    assert (beside.limit, beside.is_met) == (None, None)
    assert record.skipped == (f"images on triton: {server.address} has no model of this name ready",)
    assert f"Not measured: {record.skipped[0]}" in out


def test_a_peer_stands_beside_the_native_rows_alone(tmp_path: Path, transport: str) -> None:
    generate("identity", tmp_path / "models")
    with processes.sluice(tmp_path / "models", tmp_path, transport) as server:
        peer = Peer("triton", server.host, server.port)
        oip.check(peer)
        ours = [Case("identity", NATIVE, BASE), Case("identity", GRPCIO, BASE), Case("digits_mlp", NATIVE, BASE)]
        found, skipped = oip.cases([peer], ours)
        assert found == [Case("identity", "triton", BASE)]
        assert skipped == [f"digits_mlp on triton: {server.address} has no model of this name ready"]


def test_a_wrong_answer_of_a_peer_is_told_with_its_name(tmp_path: Path, transport: str) -> None:
    model = generate("identity", tmp_path / "models")
    other = generate("digits_mlp", tmp_path / "others")
    with processes.sluice(tmp_path / "models", tmp_path, transport) as server:
        peer = PeerMeasurement(Peer("triton", server.host, server.port), model, BASE, tmp_path)
        peer.check_reply(peer.ask())
        peer.model = other
        with pytest.raises(LoadError, match="triton does not answer digits_mlp: NOT_FOUND"):
            peer.ask()
        assert peer.counters() is None
