"""The sweep with Triton's load generator: every way in against a real server, and what it says of errors."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loadtests import perf_sweep, processes
from loadtests.effort import Effort
from loadtests.models import generate
from loadtests.perf_sweep import THREADS, TOOLS, WAYS, Run, SweepFailed, find, read, render, told_errors
from loadtests.table import LIMITED_NOTE

needs_perf_analyzer = pytest.mark.skipif(
    (shutil.which("perf_analyzer") or shutil.which("perf_analyzer", path=TOOLS / "bin")) is None,
    reason="perf_analyzer is not there: `make perf_analyzer` gets it",
)

BRIEF = ("--window-ms", "300", "--concurrency")


@needs_perf_analyzer
def test_every_way_in_is_swept_on_a_server_of_its_own(transport: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = perf_sweep.main([*BRIEF, "1", "3", "--transport", transport])

    out, err = capsys.readouterr()
    assert code == 0, out + err
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
    assert [(way, count) for way, count, *_ in rows] == [(way.title, n) for way in WAYS.values() for n in ("1", "3")]
    for _, _, rate, p50_ms, p99_ms, busy, errors in rows:
        assert float(rate.replace(",", "")) > 0
        assert 0 < float(p50_ms) <= float(p99_ms)
        assert float(busy.rstrip("%†")) > 0
        assert errors == "0"


@needs_perf_analyzer
def test_a_server_that_runs_is_swept_and_every_error_is_told(
    transport: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate("identity", tmp_path / "models")
    with processes.sluice(tmp_path / "models", tmp_path, transport) as server:
        where = ["--url", f"127.0.0.1:{server.port}", "--ways"]
        assert perf_sweep.main([*where, "grpc", *BRIEF, "2", "--", "-b", "4"]) == 0
        assert perf_sweep.main([*where, "grpc", "stream", "shared", *BRIEF, "2", "--", "-b", "65"]) == 1
        assert perf_sweep.main([*where, "rest", *BRIEF, "2"]) == 1
    out, err = capsys.readouterr()
    assert "gRPC, 2 in flight: [request id: 0] inference request batch-size must be <= 64 for 'identity', got 65" in out
    assert "gRPC stream, 2 in flight: [request id: 0] inference request batch-size must be <= 64" in out
    assert "gRPC, shared memory, 2 in flight: Unable to unregister all shared memory regions" in out  # it is off
    assert "where is REST? Give --http-url too" in err


@pytest.mark.parametrize("flags", [["--model", "other"], ["--http-url", "127.0.0.1:8000"]])
def test_what_is_about_a_server_that_runs_needs_its_url(
    flags: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "perf_analyzer"
    program.touch(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert perf_sweep.main(flags) == 1
    assert "give its --url" in capsys.readouterr().err


def test_without_perf_analyzer_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SweepFailed, match="`make perf_analyzer` gets it"):
        find(tmp_path)


def test_no_concurrency_of_zero(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        perf_sweep.main(["--concurrency", "0"])
    assert ended.value.code == 2
    assert "expected 1 or more, got 0" in capsys.readouterr().err


def test_the_report_is_read_in_milliseconds() -> None:
    report = "Concurrency,Inferences/Second,p50 latency,p90 latency,p99 latency\n4,4350.63,672,1312,3401\n"
    assert read(report, "REST", 4) == Run("REST", 4, 4350.63, 0.672, 3.401)


def test_errors_are_those_of_the_threads_or_else_the_last_line() -> None:
    assert told_errors("x\nThread [0] had error: a\nThread [1] had error: b: c\n\n") == ("a", "b: c")
    assert told_errors("starting\nerror: failed to get model metadata\n\n") == ("error: failed to get model metadata",)
    assert told_errors("\n") == ("it said nothing",)


def test_a_run_with_errors_has_no_figures_in_the_table() -> None:
    table = render([Run("gRPC", 1, 1234.5, 0.5, 2.25), Run("REST", 2, errors=("no", "nope"))])
    lines = table.splitlines()
    assert [cell.strip() for cell in lines[2].strip("|").split("|")] == ["gRPC", "1", "1,234", "0.50", "2.25", "", "0"]
    assert [cell.strip() for cell in lines[3].strip("|").split("|")] == ["REST", "2", "", "", "", "", "2"]
    assert lines[4:] == ["REST, 2 in flight: no", "REST, 2 in flight: nope"]


def test_a_run_whose_generator_was_the_limit_is_marked() -> None:
    idle, busy = (Run("gRPC", 1, 1.0, 1.0, 1.0, effort=Effort(cpu_s, 0.1, 1.0, THREADS)) for cpu_s in (1.0, 1.8))
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")][5] for line in render([idle, busy]).splitlines()[2:4]
    ]
    assert cells == ["50%", "90%†"]
    assert LIMITED_NOTE in render([busy])
    assert LIMITED_NOTE not in render([idle])
