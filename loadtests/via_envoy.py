"""What Envoy adds: the same requests straight to a server and through the sidecar, in turns in one run.

    python -m loadtests.via_envoy [--rounds N] [--requests N]

One server (native transport, identity 1x16), on TCP. The table has medians over the rounds, and per request the CPU of
Envoy; its last line is the sidecar over direct.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from deploy.envoy.bootstrap import Upstream, Variant
from deploy.envoy.sidecar import sidecar
from loadtests import h2load, processes
from loadtests.h2load import Load
from loadtests.models import generate
from loadtests.peers import METHOD, probe
from loadtests.procfs import read_cpu_s

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtests.h2load import Measured, Request

LOADS = (Load(1, 1), Load(2, 16))

WARM_UP = 500
"""Requests before the rounds, of which nothing is kept."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to the server: the HOST:PORT to call, and the process of Envoy if there is one on it."""

    name: str
    address: str
    envoy_pid: int | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print the table, and give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.via_envoy", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="of each load each way (%(default)s)")
    parser.add_argument("--requests", type=int, default=4000, metavar="N", help="in a round (%(default)s)")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        model = generate("identity", scratch / "models")
        with processes.sluice(scratch / "models", scratch, "native") as server:
            variant = Variant((Upstream(server.address),), rate=1_000_000, access_log="/dev/null")
            with sidecar(variant) as envoy:
                ways = (Way("direct", server.address), Way("Envoy", envoy.address, envoy.pid))
                request = h2load.grpc_request(METHOD, model.request, len(probe(server.address, model.request)))
                for load in LOADS:
                    _compare(ways, request, load, options.rounds, options.requests, scratch)
    return 0


def _compare(ways: Sequence[Way], request: Request, load: Load, rounds: int, requests: int, scratch: Path) -> None:
    for way in ways:
        h2load.run(way.address, request, load, WARM_UP, scratch)
    measured: dict[str, list[tuple[Measured, float]]] = {way.name: [] for way in ways}
    for _ in range(rounds):
        for way in ways:
            begun_s = read_cpu_s(way.envoy_pid) if way.envoy_pid else 0.0
            found = h2load.run(way.address, request, load, requests, scratch)
            cpu_s = read_cpu_s(way.envoy_pid) - begun_s if way.envoy_pid else 0.0
            measured[way.name].append((found, cpu_s / requests * 1e6))
    print(f"in flight {load}:")
    for name, samples in measured.items():
        p50_ms, rate = median(one.p50_ms for one, _ in samples), median(one.requests_per_s for one, _ in samples)
        print(
            f"  {name:8} p50 {p50_ms:6.3f} ms  {rate:8,.0f}/s  Envoy's CPU {median(cpu for _, cpu in samples):4.0f} us"
        )
    pairs = list(zip(measured[ways[0].name], measured[ways[1].name], strict=True))
    added_ms = median(via.p50_ms - straight.p50_ms for (straight, _), (via, _) in pairs)
    ratio = median(via.requests_per_s / straight.requests_per_s for (straight, _), (via, _) in pairs)
    print(f"  Envoy adds {added_ms:.3f} ms to p50; requests/s {ratio:.2f} of direct (medians of {len(pairs)} pairs)")


if __name__ == "__main__":
    sys.exit(main())
