"""`make sidecar` as a user meets it: two servers behind Envoy, one that ends comes back, and all end together."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from edges import need_envoy

from sluice_client import Client
from support import models
from support.fakes import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
END_S = 60.0


@pytest.fixture(autouse=True)
def _envoy() -> None:
    need_envoy()


@contextmanager
def running(repository: Path, *flags: str) -> Iterator[subprocess.Popen[str]]:
    ports = [f"--{name}=127.0.0.1:0" for name in ("listen", "readiness", "admin")]
    command = [sys.executable, "-m", "deploy.envoy.replicas", f"--model-repository={repository}", *ports, *flags]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(END_S)


def is_there(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_two_servers_are_served_kept_and_ended(repository):
    models.write_model(repository, "echo", models.identity(dims=("N", 1)), max_batch_size=8)
    with running(repository) as process:
        assert process.stdout is not None
        said = ""
        while "drains one replica" not in said:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            said += line
        pids = [int(found) for found in re.findall(r"pid (\d+)", said)]
        (place,) = re.findall(r"--endpoint (\S+)", said)
        assert len(pids) == 3
        with Client(place, deadline_s=PATIENCE_S) as client:
            assert client.infer("echo", {"X": np.array([[4]], np.float32)})["Y"].item() == 4
            subprocess.run(["kill", str(pids[0])], check=True)
            assert f"(pid {pids[0]}) has ended with 0 and is started again" in process.stdout.readline()
            assert client.infer("echo", {"X": np.array([[5]], np.float32)})["Y"].item() == 5
        process.send_signal(signal.SIGINT)
        assert process.wait(END_S) == 0
        assert process.stdout.read().startswith("ending: ")
    eventually(lambda: not any(map(is_there, pids)), "everything has ended")


def test_servers_that_do_not_start_are_told_of(repository):
    (repository / "broken" / "1").mkdir(parents=True)
    (repository / "broken" / "1" / "model.onnx").write_bytes(b"nothing")
    with running(repository, "--replicas=1") as process:
        _, errors = process.communicate(timeout=END_S)
    assert process.returncode == 1
    assert errors.endswith("replica 1 does not start; what it says is above\n")
    assert "broken" in errors
