"""Programs that are not ours: from the PATH, or where `make` puts them, and what they are run with."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / ".tools"

RUN_TIMEOUT_S = 120.0
"""A run that takes so long hangs; the longest takes seconds."""


@dataclass(frozen=True)
class Tool:
    """A program that can be run."""

    program: str

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run it to its end, whatever that is; it finds the libraries that came with it."""
        libraries = f"{TOOLS / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
        environ = {**os.environ, "LD_LIBRARY_PATH": libraries}
        command = [self.program, *arguments]
        return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=RUN_TIMEOUT_S)


def tool(name: str, version: str) -> Tool:
    """The tool of this name; skipped where it is not there, or does not start with the flag that tells its version."""
    program = shutil.which(name) or shutil.which(name, path=TOOLS / "bin")
    if program is None:
        pytest.skip(f"{name} is not there: `make {name}` gets it")
    found = Tool(program)
    started = found.run(version)
    if started.returncode:
        pytest.skip(f"{program} does not start: {started.stderr.strip()}")
    return found


@pytest.fixture(scope="session")
def perf_analyzer() -> Tool:
    return tool("perf_analyzer", "--version")


@pytest.fixture(scope="session")
def grpcurl() -> Tool:
    return tool("grpcurl", "-version")
