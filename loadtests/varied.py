"""Loads whose requests differ: their generator as a process, and what it has measured."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from loadtests import h2load
from loadtests.h2load import TIMEOUT_S, Load, LoadError, Measured, children_cpu_s, frame, steady_rate
from loadtests.peers import METHOD
from loadtests.summary import quantile


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
    before_s = children_cpu_s()
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    generator_cpu_s = children_cpu_s() - before_s
    if done.returncode:
        raise LoadError(f"the load of requests that differ failed:\n{done.stderr}")
    found = json.loads(done.stdout)
    report = h2load.Report(found["elapsed_s"], requests, len(found["ends_us"]), found["answer_bytes"])
    h2load.check(report, requests, answer_bytes)
    latencies_us = found["latencies_us"]
    p50_us, p99_us = quantile(latencies_us, 0.5), quantile(latencies_us, 0.99)
    rate = steady_rate(found["ends_us"], load.in_flight, report.elapsed_s)
    return Measured(requests, rate, p50_us / 1e3, p99_us / 1e3, generator_cpu_s)
