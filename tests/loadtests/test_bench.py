"""The benchmark from end to end, as quick as it gets: that it measures and checks, not what it measures."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loadtests import bench
from loadtests.models import THREADS, generate
from loadtests.ort_loop import measure, open_session
from loadtests.peers import ECHO, LOOP, SLUICE

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load (nghttp2-client) is not installed")
def test_a_quick_run_prints_the_table_and_the_goals_and_writes_json(tmp_path: Path) -> None:
    results = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "loadtests.bench", "--quick", "--json", str(results)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    table, memory, goals, machine = done.stdout.strip().split("\n\n")
    assert [line.split("|")[2].strip() for line in table.splitlines()[2:]] == [SLUICE, ECHO, LOOP]
    assert memory.startswith("resident memory before")
    assert {line.split()[0] for line in goals.splitlines()} <= {"pass", "MISS"}
    assert "onnxruntime" in machine
    content = json.loads(results.read_text())
    ours, echo, loop = (row["samples"][0] for row in content["rows"])
    assert min(sample["requests_per_s"] for sample in (ours, echo, loop)) > 0
    assert min(ours["cpu_us_per_request"], echo["cpu_us_per_request"]) > 0
    assert ours["mean_batch_rows"] >= 1
    assert echo["mean_batch_rows"] is None
    assert content["memory"]["requests"] == bench.QUICK.soak_requests


def test_without_h2load_it_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "")

    assert bench.main(["--quick"]) == 1
    assert "apt-get install nghttp2-client" in capsys.readouterr().err


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
