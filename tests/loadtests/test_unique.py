"""The load of requests that all differ: that they do, that all are answered, and that a cache is of no use to them."""

from __future__ import annotations

import struct
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from loadtests import processes
from loadtests.framing import frame
from loadtests.h2load import Load, LoadError
from loadtests.models import generate
from loadtests.unique import UniqueMeasurement
from loadtests.varied_load import NUMBERS_PER_FLOAT, numbered
from sluice_client import Client

ROOT = Path(__file__).resolve().parents[2]


def test_no_two_requests_have_the_same_number() -> None:
    near_a_carry = list(islice(numbered(NUMBERS_PER_FLOAT - 50), 100))
    assert len(set(near_a_carry)) == 100
    assert struct.unpack("<ff", near_a_carry[50]) == (0.0, 1.0)


def test_all_requests_are_answered_and_none_is_found_in_the_cache(transport: str, tmp_path: Path) -> None:
    model = generate("digits_cached", tmp_path / "models")
    with processes.sluice(tmp_path / "models", tmp_path, transport, "--cache-config=local,size=1048576") as server:
        unique = UniqueMeasurement(model, server, Load(2, 8), tmp_path)
        first, second = unique.send(160), unique.send(160)
        assert min(first.requests_per_s, second.requests_per_s) > 0
        assert first.p50_ms <= first.p99_ms
        with Client(f"127.0.0.1:{server.port}") as client:
            (counted,) = client.statistics(model.name)
        # Of the four probes, which are equal, one is run.
        assert counted.success.count == 324
        assert counted.inference_count == 321


def test_answers_of_another_length_fail_the_load(tmp_path: Path, transport: str) -> None:
    model = generate("digits_cached", tmp_path / "models")
    with processes.sluice(tmp_path / "models", tmp_path, transport) as server:
        unique = UniqueMeasurement(model, server, Load(1, 4), tmp_path)
        with pytest.raises(LoadError, match="bytes instead of"):
            unique.load_with(b"shorter", 16)


def test_a_message_that_does_not_fit_one_frame_is_refused(tmp_path: Path) -> None:
    large = tmp_path / "large.bin"
    large.write_bytes(frame(bytes(20_000)))
    command = [sys.executable, "-m", "loadtests.varied_load", "/path", str(large)]
    command += ["--port=1", "--connections=1", "--streams=1", "--requests=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert "20005 bytes" in done.stderr
