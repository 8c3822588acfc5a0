"""perf_analyzer as the generator of the benchmark: a real load, and what it cannot send."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path

import pytest

from loadtests import bench, perf_generator, perf_sweep, processes
from loadtests.h2load import Load, LoadError
from loadtests.models import generate
from loadtests.peers import GRPCIO, LOOP, NATIVE, SluiceMeasurement
from loadtests.perf_sweep import TOOLS
from loadtests.record import read
from sluice_server.transport.choice import native_problem

needs_both = pytest.mark.skipif(
    (shutil.which("perf_analyzer") or shutil.which("perf_analyzer", path=TOOLS / "bin")) is None
    or shutil.which("h2load") is None,
    reason="perf_analyzer (`make perf_analyzer`) or h2load (nghttp2-client) is not there",
)


@needs_both
def test_a_run_by_perf_analyzer_counts_requests_and_says_what_it_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results.json"
    flags = ["--quick", "--seconds=0.3", "--parts", "identity", "--generator", "perf_analyzer"]
    code = bench.main([*flags, "--json", str(results)])
    assert code == 0, capsys.readouterr().err
    record = read(results)
    rows = {row.who: row for row in record.rows}
    ours = [GRPCIO] if native_problem(version("sluice")) else [GRPCIO, NATIVE]
    assert set(rows) == {*ours, LOOP}
    for who in ours:
        assert rows[who].generator == "perf_analyzer"
        (sample,) = rows[who].samples
        assert sample.requests_per_s > 0
        assert sample.cpu_us_per_request > 0
        assert sample.generator_cpu_us_per_request > 0
        assert sample.generator_busy > 0
    assert "identity on bare grpcio echo: perf_analyzer cannot send this load" in record.skipped
    assert record.machine["generator"] == "perf_analyzer with connections of its own"


@needs_both
def test_an_error_of_the_server_fails_the_load(tmp_path: Path, transport: str) -> None:
    model = generate("identity", tmp_path / "models")
    with processes.sluice(tmp_path / "models", tmp_path, transport) as server:
        measured = SluiceMeasurement("ours", model, server, Load(1, 2), tmp_path, perf_generator.GENERATOR)
        measured.prepare(0.1)
        unknown = generate("digits_mlp", tmp_path / "others")
        with pytest.raises(LoadError, match="perf_analyzer failed on digits_mlp: "):
            perf_generator.generate(server.address, unknown, Load(1, 2), 0.1)


def test_without_perf_analyzer_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(perf_sweep, "TOOLS", tmp_path)
    model = generate("identity", tmp_path / "models")
    with pytest.raises(LoadError, match="`make perf_analyzer` gets it"):
        perf_generator.command("127.0.0.1:1", model, 1, 100)


def test_a_command_has_the_shapes_of_one_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "perf_analyzer"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    command = perf_generator.command("host:8001", generate("images", tmp_path / "models"), 8, 250)
    assert command[:7] == [str(program), "-i", "grpc", "-u", "host:8001", "-m", "images"]
    assert command[-4:] == ["--measurement-interval=250", "--concurrency-range=8", "--shape", "X:3,224,224"]
