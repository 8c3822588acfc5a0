"""Runs of children: started, followed, ended when they hang; what they found is saved."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from fuzz.progress import Progress

TESTS = Path(__file__).resolve().parents[1]

ENGINES = ("bytes", "structure")

HANG_S = 60.0
"""An input takes less than 10 ms; on a machine that is busy with other things, a thousand times that is a hang."""

START_S = 300.0
"""Packages are instrumented and models loaded before the first input."""

LOOK_S = 0.2

LOG_LINES_MAX = 60
"""Of a child's log, when it has found something."""


@dataclass(frozen=True)
class Result:
    """What became of a run. `problem` is empty when all inputs were good; else `saved` has the one that was not."""

    inputs: int
    seconds: float = 0.0
    rss_before: int = 0
    rss_after: int = 0
    problem: str = ""
    saved: Path | None = None


def run(
    module: str, target: str, engine: str, inputs: int, seed: int, findings: Path, hang_s: float = HANG_S
) -> Result:
    """Run a child to its end."""
    with tempfile.TemporaryDirectory(prefix="sluice-fuzz-") as scratch:
        directory = Path(scratch)
        progress = Progress.create(directory / "progress")
        arguments = [module, target, engine, str(inputs), str(seed), str(directory)]
        environ = {**os.environ, "PYTHONPATH": str(TESTS)}
        with (directory / "log").open("wb") as log:
            command = [sys.executable, "-m", "fuzz.child", *arguments]
            child = subprocess.Popen(command, stdout=log, stderr=log, env=environ)
            try:
                hung = _follow(child, progress, hang_s)
            finally:
                child.kill()
                child.wait()
        report = directory / "report.json"
        if child.returncode == 0 and report.exists():
            return Result(**json.loads(report.read_text()))
        text = (directory / "log").read_text(errors="replace")
        problem = f"it hangs, for {hang_s:.0f} s" if hung else f"exit code {child.returncode}"
        lines = "\n".join(text.splitlines()[-LOG_LINES_MAX:])
        return Result(progress.count, problem=f"{problem}\n{lines}", saved=_save(progress.data, target, findings))


def _follow(child: subprocess.Popen[bytes], progress: Progress, hang_s: float) -> bool:
    """Wait for a child's end; True when one input took too long, and the child was made to tell where it is."""
    count, since = progress.count, time.monotonic()
    while True:
        try:
            child.wait(LOOK_S)
        except subprocess.TimeoutExpired:
            pass
        else:
            return False
        now = time.monotonic()
        if progress.count != count:
            count, since = progress.count, now
        elif now - since > (hang_s if count else START_S):
            child.send_signal(signal.SIGABRT)
            child.wait()
            return True


def _save(data: bytes, target: str, findings: Path) -> Path:
    findings.mkdir(parents=True, exist_ok=True)
    path = findings / f"{target}-{hashlib.sha256(data).hexdigest()[:12]}"
    path.write_bytes(data)
    return path
