"""The benchmark from end to end, as quick as it gets: that it measures and checks, not what it measures."""

import math
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import grpc
import pytest

from loadtests import bench, processes
from loadtests.h2load import LoadError
from loadtests.models import THREADS, generate
from loadtests.ort_loop import measure, open_session
from loadtests.peers import ECHO, GRPCIO, LOOP, NATIVE, SluiceMeasurement, probe
from loadtests.plan import APART, BASE, CROWD, IMAGES, Plan
from loadtests.record import read
from loadtests.rest import RestMeasurement
from loadtests.shared_memory import SharedMeasurement, registered
from loadtests.streams import StreamMeasurement
from sluice_server.open_files import raise_limit
from sluice_server.transport.choice import native_problem

ROOT = Path(__file__).resolve().parents[2]


needs_h2load = pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load (nghttp2-client) is not installed")


def run_bench(*flags: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "loadtests.bench", "--quick", "--seconds=0.2", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.long
@needs_h2load
def test_a_run_prints_the_tables_and_writes_json(tmp_path: Path) -> None:
    """On all transports that there are, as the benchmark has them side by side."""
    results = tmp_path / "results.json"
    done = run_bench("--parts", "identity", "lone", "--json", str(results))

    assert done.returncode == 0, done.stderr
    table, goals, *_, machine = done.stdout.strip().split("\n\n")
    ours = [GRPCIO] if native_problem(version("sluice")) else [GRPCIO, NATIVE]
    assert {line.split("|")[2].strip() for line in table.splitlines()[2:]} == {*ours, ECHO, LOOP}
    assert {line.split("|")[2].strip() for line in goals.splitlines()[2:]} <= {"met", "MISSED"}
    assert "onnxruntime" in machine
    record = read(results)
    assert record.flags == ("--quick", "--seconds=0.2", "--parts", "identity", "lone", "--json", str(results))
    assert record.versions["numpy"] == version("numpy")
    samples = {(row.who, row.load): row.samples[0] for row in record.rows}
    assert min(sample.requests_per_s for sample in samples.values()) > 0
    assert math.isnan(samples[ECHO, "32 (2 x 16)"].mean_batch_rows)
    for who in ours:
        sample = samples[who, "32 (2 x 16)"]
        assert sample.cpu_us_per_request > 0
        assert sample.mean_batch_rows >= 1
        assert 0 < sample.generator_busy < 2
        assert samples[who, "1 (1 x 1)"].mean_batch_rows == 1


@needs_h2load
def test_memory_is_measured_before_and_after(transport: str, tmp_path: Path) -> None:
    who = {"grpcio": GRPCIO, "native": NATIVE}[transport]
    plan = Plan(soak_warmup_requests=64, soak_requests=((GRPCIO, 96), (NATIVE, 96)))
    (memory,) = bench.measure_memory([who], plan, tmp_path)

    assert (memory.who, memory.requests) == (who, 96)
    assert 0.5 < memory.ratio < 2


@needs_h2load
def test_a_thousand_connections_and_600_kb_images_come_through(transport: str, tmp_path: Path) -> None:
    repository = tmp_path / "models"
    models = {name: generate(name, repository) for name in ("identity", "images")}
    raise_limit()
    with processes.sluice(repository, tmp_path, transport) as server:
        crowd = SluiceMeasurement("ours", models["identity"], server, CROWD, tmp_path)
        assert crowd.send(2 * CROWD.in_flight).requests_per_s > 0
        images = SluiceMeasurement("ours", models["images"], server, IMAGES, tmp_path)
        assert images.send(2 * IMAGES.in_flight).requests_per_s > 0


@needs_h2load
def test_tensors_in_shared_memory_come_through_and_are_looked_at(transport: str, tmp_path: Path) -> None:
    model = generate("images", tmp_path / "models")
    with processes.sluice(tmp_path / "models", tmp_path, transport, "--allow-client-shm") as server:
        with registered(model, server) as shared:
            images = SharedMeasurement(model, server, IMAGES, tmp_path, shared)
            assert images.send(2 * IMAGES.in_flight).requests_per_s > 0
            reply = probe(server.address, images.model.request)
            images.check_reply(reply)
            with pytest.raises(LoadError, match="not what ONNX Runtime gives"):
                images.check_reply(reply)
        with pytest.raises(grpc.RpcError, match="Unable to find shared memory region"):
            probe(server.address, images.model.request)


@needs_h2load
def test_rest_comes_through_and_its_tensors_are_looked_at(transport: str, tmp_path: Path) -> None:
    model = generate("identity", tmp_path / "models")
    with processes.sluice(tmp_path / "models", tmp_path, transport) as server:
        rest = RestMeasurement(model, server, APART, tmp_path)
        assert rest.send(2 * APART.in_flight).requests_per_s > 0
        reply = rest.ask()
        rest.check_reply(reply)
        with pytest.raises(LoadError, match="not what ONNX Runtime gives"):
            rest.check_reply(reply[:-64] + bytes(64))


@needs_h2load
def test_streams_come_through_and_their_answers_are_looked_at(transport: str, tmp_path: Path) -> None:
    model = generate("identity", tmp_path / "models")
    with processes.sluice(tmp_path / "models", tmp_path, transport) as server:
        streams = StreamMeasurement(model, server, BASE, tmp_path)
        before = streams.counters()
        found = streams.send(4 * BASE.in_flight)
        assert found.requests_per_s > 0
        assert math.isnan(found.p50_ms)
        assert streams.counters().succeeded - before.succeeded == 4 * BASE.in_flight + 2  # the probes
        reply = streams.ask()
        streams.check_reply(reply)
        with pytest.raises(LoadError, match="not what ONNX Runtime gives"):
            streams.check_reply(reply[:-64] + bytes(64))
        nothing = StreamMeasurement(replace(model, request=b""), server, BASE, tmp_path)
        with pytest.raises(LoadError, match=r"answered with an error: .*is not found"):
            nothing.check_reply(nothing.ask())


def test_without_h2load_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")

    assert bench.main(["--quick"]) == 1
    assert "apt-get install nghttp2-client" in capsys.readouterr().err


def test_the_models_are_written_for_a_peer_to_serve(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--write-models", str(tmp_path / "models")]) == 0
    names = capsys.readouterr().out.strip().partition(": ")[2].split(", ")
    assert {"identity", "digits_mlp", "large_mlp", "pipeline"} <= set(names)
    assert sorted(names) == sorted(folder.name for folder in (tmp_path / "models").iterdir())


def test_the_bare_loop_counts_rows(tmp_path: Path) -> None:
    model = generate("identity", tmp_path)

    result = measure(open_session(model.file, THREADS), batch_rows=8, duration_s=0.02)

    assert result.batch_rows == 8
    assert result.rows_per_s > 8 / 0.02
    assert 0 < result.run_p50_ms <= result.run_p99_ms


def test_the_large_model_fills_batches_of_64_rows_of_1024_and_weighs_100_mb(tmp_path: Path) -> None:
    model = generate("large_mlp", tmp_path)

    assert model.max_batch_rows == 64
    assert model.answer.shape == (1, 1000)
    assert 95e6 < model.file.stat().st_size < 110e6
