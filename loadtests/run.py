"""`make loadtest`: serves a scenario's models, has Locust send its load, and holds what comes out to its objectives.

Ends with 0 when all objectives are kept, 1 when one is missed or the load was not what was asked for, 2 when there was
no load: a scenario or a flag that is no good, a server that does not start.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from deploy.envoy.bootstrap import Upstream, Variant
from deploy.envoy.sidecar import SidecarError, sidecar
from deploy.processes import ServerFailed, free_port
from loadtests.machine import host
from loadtests.measuring import Run, make_run
from loadtests.outcome import LoadFailed, Outcome, read_outcome
from loadtests.processes import sluice
from loadtests.report import as_json, passed, render_html, render_text
from loadtests.scenario import REST, SHARED_MEMORY, Scenario, read_scenario
from loadtests.server_watch import Series, ServerWatch
from loadtests.slo import judge
from loadtests.toml_table import ScenarioError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ROOT: Final = Path(__file__).resolve().parents[1]
SCENARIOS: Final = Path(__file__).resolve().parent / "scenarios"
RESULTS: Final = ROOT / ".loadtest"
DIRECT, ENVOY = "direct", "envoy"

SLACK_S: Final = 180.0
"""Beyond a scenario's duration: processes start, models are asked for, the last requests meet their deadlines."""

SIDECAR_RATE: Final = 1_000_000
"""Requests a second that Envoy lets through: what a load test is after is not its rate limit."""


ENVIRON: Final = {"GEVENT_BACKEND": "select"}
"""select() waits microseconds where epoll waits whole milliseconds: requests are sent half a millisecond less late."""


@dataclass(frozen=True, slots=True)
class Target:
    """A server to send to: HOST:PORT of gRPC and of REST, and what can be seen of it ("" and None: nothing)."""

    address: str
    http_address: str = ""
    metrics_url: str | None = None
    pid: int | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """One way to a server: HOST:PORT of gRPC and of REST, and the process of Envoy if there is one on it."""

    name: str
    address: str
    http_address: str
    envoy_pid: int | None = None


class LoadTestError(Exception):
    """No load was sent; the text says what to do."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; gives its exit status."""
    options = _parser().parse_args(arguments)
    try:
        scenario = read_scenario(find_scenario(options.scenario))
        check(scenario, options)
        runs = run_all(scenario, options)
    except (ScenarioError, LoadTestError, LoadFailed, ServerFailed, SidecarError, OSError) as error:
        print(f"loadtest: {error}", file=sys.stderr)
        return 2
    verdicts = judge(scenario.objectives, runs[-1].measured)
    facts = host()
    options.results.mkdir(parents=True, exist_ok=True)
    stem = options.results / f"{scenario.name}-{'via-envoy' if options.via == ENVOY else 'direct'}"
    Path(f"{stem}.json").write_text(json.dumps(as_json(scenario, runs, facts), indent=2) + "\n")
    Path(f"{stem}.html").write_text(render_html(scenario, runs, facts))
    print(render_text(scenario, runs, verdicts))
    print(f"\nreport: {stem}.html, result: {stem}.json")
    return 0 if passed(verdicts, runs) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="loadtest", description=__doc__, allow_abbrev=False)
    parser.add_argument("scenario", help="a name in loadtests/scenarios, or a TOML file")
    parser.add_argument("--host", default="", metavar="HOST:PORT", help="a server that runs already (gRPC)")
    parser.add_argument("--http-host", default="", metavar="HOST:PORT", help="the same server's REST")
    parser.add_argument("--metrics-url", metavar="URL", help="the same server's metrics")
    parser.add_argument("--server-pid", type=int, metavar="PID", help="its process, where it is on this machine")
    parser.add_argument("--via", choices=(DIRECT, ENVOY), default=DIRECT, help="also through an Envoy in front of it")
    parser.add_argument("--transport", default="auto", help="of the server that is started")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FOLDER", help=f"({RESULTS.name})")
    return parser


def find_scenario(name: str) -> Path:
    """The file of a scenario, by name or path. LoadTestError lists the names there are."""
    named, path = SCENARIOS / f"{name}.toml", Path(name)
    if named.is_file():
        return named
    if path.suffix == ".toml":
        return path
    names = ", ".join(sorted(file.stem for file in SCENARIOS.glob("*.toml")))
    raise LoadTestError(f"there is no scenario {name!r}; there are {names}, or give a file that ends in .toml")


def check(scenario: Scenario, options: argparse.Namespace) -> None:
    """Refuse what would only show after the load. LoadTestError says what."""
    if not options.host:
        for flag in ("http_host", "metrics_url", "server_pid"):
            if getattr(options, flag):
                raise LoadTestError(f"--{flag.replace('_', '-')} goes with --host; without, a server is started here")
    protocols = {kind.protocol for kind in scenario.requests}
    if options.host and REST in protocols and not options.http_host:
        raise LoadTestError(f"{scenario.name} has REST requests: give --http-host too")
    if options.host and options.server_pid is None:
        unseen = [each.kind.key for each in scenario.objectives if each.kind.needs_process]
        if unseen:
            keys = ", ".join(unseen)
            raise LoadTestError(f"{scenario.name} has objectives on the server's process ({keys}): give --server-pid")
    if options.via == ENVOY and SHARED_MEMORY in protocols:
        raise LoadTestError(f"{scenario.name} has requests in shared memory, which the sidecar lets nobody use")


def run_all(scenario: Scenario, options: argparse.Namespace) -> list[Run]:
    """The load on each way to the server, the one that is held to the objectives last."""
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sluice-loadtest-")))
        target = stack.enter_context(_target(scenario, options, scratch))
        runs = [run_once(Way(DIRECT, target.address, target.http_address), scenario, target, scratch)]
        if options.via == ENVOY:
            variant = Variant(
                (Upstream(target.address, target.http_address),),
                rate=SIDECAR_RATE,
                access_log=str(scratch / "access.log"),
            )
            envoy = stack.enter_context(sidecar(variant))
            envoy.wait_until_healthy(1)
            way = Way(f"via {ENVOY}", envoy.address, envoy.address, envoy.pid)
            runs.append(run_once(way, scenario, target, scratch))
    return runs


@contextmanager
def _target(scenario: Scenario, options: argparse.Namespace, scratch: Path) -> Iterator[Target]:
    """The server that the flags name, or one that is started and ended."""
    if options.host:
        yield Target(options.host, options.http_host, options.metrics_url, options.server_pid)
        return
    port = free_port()
    flags = (f"--metrics-port={port}", "--metrics-address=127.0.0.1", *scenario.server.flags)
    with sluice(scenario.server.repository, scratch, options.transport, *flags) as server:
        yield Target(server.address, server.http_address, f"http://127.0.0.1:{port}/metrics", server.pid)


def run_once(way: Way, scenario: Scenario, target: Target, scratch: Path) -> Run:
    """The load on one way; the server, and Envoy, are looked at meanwhile. LoadFailed when it fails."""
    requests = len(scenario.times_s)
    print(f"{scenario.name}, {way.name}: {requests:,} requests in {scenario.duration_s:g} s", file=sys.stderr)
    with ServerWatch(target.pid, target.metrics_url, way.envoy_pid) as watch:
        outcome = send(scenario, way.address, way.http_address, scratch)
    return make_run(way.name, scenario, outcome, Series.of(watch.samples, outcome.started_at_s))


def send(scenario: Scenario, address: str, http_address: str, scratch: Path) -> Outcome:
    """Have Locust send the load, in one process or as a master with workers. LoadFailed with its log when it fails."""
    path, log = scratch / "outcome.npz", scratch / "locust.log"
    path.unlink(missing_ok=True)
    workers = scenario.generator.workers
    common = ["-f", str(ROOT / "loadtests" / "locustfile.py"), "--scenario", str(scenario.file), "--host", address]
    common += ["--http-address", http_address, "--outcome", str(path)]
    headless = ["--headless", "--only-summary", "--users", str(workers), "--spawn-rate", str(workers)]
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))

        def start(*flags: str) -> subprocess.Popen[bytes]:
            process = subprocess.Popen(
                [sys.executable, "-m", "locust", *common, *flags],
                cwd=ROOT, env=os.environ | ENVIRON, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            )  # fmt: skip
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        if workers == 1:
            locust = start(*headless)
        else:
            port = str(free_port())
            locust = start(*headless, "--master", f"--master-bind-port={port}", f"--expect-workers={workers}")
            for _ in range(workers):
                start("--worker", f"--master-port={port}")
        _wait(locust, scenario.duration_s + SLACK_S, log)
    if not path.exists():
        raise LoadFailed(f"Locust ended without an outcome:\n{log.read_text()}")
    return read_outcome(path)


def _wait(process: subprocess.Popen[bytes], timeout_s: float, log: Path) -> None:
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        raise LoadFailed(f"the load did not end within {timeout_s:g} s; Locust's log:\n{log.read_text()}") from None


if __name__ == "__main__":
    sys.exit(main())
