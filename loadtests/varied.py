"""Loads whose requests differ: their generator as a process, and what it has measured."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loadtests import effort, h2load
from loadtests.h2load import TIMEOUT_S, Load, LoadError, Measured, frame, steady_rate
from loadtests.peers import METHOD
from loadtests.summary import quantile

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
    latencies_us = found["latencies_us"]
    p50_us, p99_us = quantile(latencies_us, 0.5), quantile(latencies_us, 0.99)
    rate = steady_rate(found["ends_us"], load.in_flight, report.elapsed_s)
    return Measured(requests, rate, p50_us / 1e3, p99_us / 1e3, spent)
