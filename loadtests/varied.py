"""Loads whose requests differ: their generator as a process, and what it has measured."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loadtests import effort, h2load
from loadtests.framing import frame
from loadtests.h2load import TIMEOUT_S, Load, LoadError, Measured
from loadtests.peers import METHOD

NAME = "loadtests.varied_load"


def run(
    port: int,
    messages: Sequence[bytes],
    load: Load,
    requests: int,
    answer_bytes: int,
    scratch: Path,
    more: Mapping[str, int] | None = None,
) -> Measured:
    """Send the messages in turn, so many requests in all, and measure; writes to `scratch`.

    LoadError unless all are answered, with `answer_bytes` in all. `more` are the generator's other flags.
    """
    file = scratch / "messages.bin"
    file.write_bytes(b"".join(map(frame, messages)))
    numbers = {"port": port, "connections": load.connections, "streams": load.streams, "requests": requests}
    flags = [f"--{name}={number}" for name, number in {**numbers, **(more or {})}.items()]
    command = [sys.executable, "-m", "loadtests.varied_load", f"/{METHOD}", str(file), *flags]
    done, spent = effort.run(command, TIMEOUT_S)
    if done.returncode:
        raise LoadError(f"the load of requests that differ failed:\n{done.stderr}")
    found = json.loads(done.stdout)
    spent = replace(spent, cpu_s=found["cpu_s"], elapsed_s=found["elapsed_s"])  # without the interpreter's start
    report = h2load.Report(found["elapsed_s"], requests, len(found["ends_us"]), found["answer_bytes"])
    h2load.check(report, requests, answer_bytes)
    return h2load.measured(found["ends_us"], found["latencies_us"], load, report.elapsed_s, spent)
