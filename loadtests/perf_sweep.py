"""Triton's own load generator against our server, each way in, at rising concurrency: `python -m loadtests.perf_sweep`.

perf_analyzer (`make perf_analyzer` gets it) sends to a model over gRPC in unary calls, in streams and with its tensors
in system shared memory, and over REST; one run for each way and concurrency, of three windows. It reads the server's
statistics too, and a run in which these do not grow fails. What follows `--` is passed on: `-- -b 2 --shape X:16`.

Without `--url` a server of our own is started on the identity model of the benchmark. Exit codes: 0 every request was
answered, 1 some were not, or nothing could be measured, 2 wrong command line.
"""

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from deploy.processes import ServerFailed
from loadtests import effort, processes
from loadtests.effort import Effort, is_limit
from loadtests.markdown import markdown
from loadtests.models import generate
from loadtests.table import LIMITED, LIMITED_NOTE
from sluice_server.transport.choice import TransportChoice

TOOLS = Path(__file__).resolve().parents[1] / ".tools"
"""Where `make perf_analyzer` puts the program and its libraries."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way into the server, and what asks perf_analyzer for it."""

    title: str
    arguments: tuple[str, ...]


REST = "rest"
WAYS = {
    "grpc": Way("gRPC", ("-i", "grpc")),
    "stream": Way("gRPC stream", ("-i", "grpc", "--streaming")),
    "shared": Way("gRPC, shared memory", ("-i", "grpc", "--shared-memory", "system")),
    REST: Way("REST", ("-i", "http")),
}

MODEL = "identity"
OUTPUT_BYTES = 1 << 20
"""Room for each output in shared memory, unless `--output-bytes` says otherwise."""

CONCURRENCY = (1, 2, 4, 8, 16, 32)
WINDOW_MS = 1000

STEADY = ("--stability-percentage", "1000", "--max-trials", "10")
"""The first three windows that had requests are taken, however much they differ: the spread of a busy machine is no
error."""

THREADS = 2
FEW_THREADS = ("--async", "--max-threads", str(THREADS))
"""A thread for each request in flight would cost more than the server."""

RUN_TIMEOUT_S = 300.0
"""Ten windows take no longer; a run that does hangs."""

_THREAD_ERROR = re.compile(r"^Thread \[\d+\] had error: (.+)$", re.MULTILINE)

HEAD = ("way in", "in flight", "inferences/s", "p50 ms", "p99 ms", "perf_analyzer busy", "errors")


class SweepFailed(Exception):
    """Nothing can be measured; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A server: where it answers gRPC and REST."""

    grpc: str
    rest: str


@dataclass(frozen=True, slots=True)
class Run:
    """One run: what perf_analyzer measured, or what went wrong in it. It ends at the first error of each thread.

    An inference is one row: a request of `-b 2` is two.
    """

    way: str
    concurrency: int
    inferences_per_s: float = 0.0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    errors: tuple[str, ...] = ()
    effort: Effort | None = None
    """Of perf_analyzer; None when it did not end."""

    @property
    def generator_was_limit(self) -> bool:
        """Whether perf_analyzer itself was what limited the run."""
        return self.effort is not None and is_limit(self.effort.busy, self.effort.waiting)

    def __str__(self) -> str:
        found = f"{len(self.errors)} errors" if self.errors else f"{self.inferences_per_s:,.0f} inferences/s"
        return f"{self.way}, {self.concurrency} in flight: {found}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sweep, print its table and every error; the exit code."""
    args = _parser().parse_args(argv)
    try:
        program = find()
        with _server(args) as endpoint:
            runs = []
            for name in args.ways:
                for concurrency in args.concurrency:
                    runs.append(measure(program, endpoint, name, concurrency, args))
                    print(runs[-1], file=sys.stderr, flush=True)
    except (SweepFailed, ServerFailed) as error:
        print(f"perf_sweep: {error}", file=sys.stderr)
        return 1
    print(render(runs))
    return int(any(run.errors for run in runs))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.perf_sweep", description=__doc__, allow_abbrev=False)
    parser.add_argument(
        "--url", metavar="HOST:PORT", help="of a server's gRPC; it is to allow shared memory, if asked for"
    )
    parser.add_argument("--http-url", metavar="HOST:PORT", help="of its REST")
    parser.add_argument(
        "--transport", choices=[*TransportChoice], default=TransportChoice.AUTO, help="of our own server"
    )
    parser.add_argument("--model", default=MODEL, help=f"({MODEL})")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], metavar="NAME", help=", ".join(WAYS))
    parser.add_argument("--concurrency", nargs="+", type=_count, default=CONCURRENCY, metavar="N",
        help=f"requests in flight ({' '.join(map(str, CONCURRENCY))})")  # fmt: skip
    parser.add_argument("--window-ms", type=_count, default=WINDOW_MS, help=f"a run has three windows ({WINDOW_MS})")
    parser.add_argument("--output-bytes", type=_count, default=OUTPUT_BYTES,
        help=f"room for each output in shared memory ({OUTPUT_BYTES})")  # fmt: skip
    parser.add_argument("more", nargs="*", help="passed on to perf_analyzer, behind --")
    return parser


def _count(text: str) -> int:
    count = int(text)
    if count < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {count}")
    return count


def find(tools: Path | None = None) -> str:
    """The path of perf_analyzer; SweepFailed says how to get it."""
    program = shutil.which("perf_analyzer") or shutil.which("perf_analyzer", path=(tools or TOOLS) / "bin")
    if program is None:
        raise SweepFailed("perf_analyzer is not there: `make perf_analyzer` gets it")
    return program


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[Endpoint]:
    """The server that was named, or one of our own."""
    if args.url:
        if REST in args.ways and not args.http_url:
            raise SweepFailed("where is REST? Give --http-url too, or --ways without rest")
        yield Endpoint(args.url, args.http_url or "")
        return
    if args.http_url or args.model != MODEL:
        raise SweepFailed("--http-url and --model are about a server that runs: give its --url")
    with tempfile.TemporaryDirectory(prefix="sluice-sweep-") as scratch:
        repository = Path(scratch) / "models"
        generate(MODEL, repository)
        with processes.sluice(repository, Path(scratch), args.transport, "--allow-client-shm") as server:
            yield Endpoint(server.address, server.http_address)


def measure(program: str, endpoint: Endpoint, name: str, concurrency: int, args: argparse.Namespace) -> Run:
    """One run of one of `WAYS`."""
    way = WAYS[name]
    arguments = [*way.arguments, "-u", endpoint.rest if name == REST else endpoint.grpc, "-m", args.model]
    arguments += [*STEADY, *FEW_THREADS, "--measurement-interval", str(args.window_ms)]
    arguments += ["--concurrency-range", str(concurrency)]
    if "--shared-memory" in arguments:
        arguments += ["--output-shared-memory-size", str(args.output_bytes)]
    return analyze([program, *arguments, *args.more], way.title, concurrency)


def analyze(command: Sequence[str], way: str, concurrency: int) -> Run:
    """One run of perf_analyzer by its command line, without the flag for its report."""
    with tempfile.TemporaryDirectory(prefix="sluice-sweep-") as scratch:
        table = Path(scratch) / "report.csv"
        libraries = f"{TOOLS / 'lib'}:{os.environ.get('LD_LIBRARY_PATH', '')}".rstrip(":")
        environment = {**os.environ, "LD_LIBRARY_PATH": libraries}
        try:
            done, spent = effort.run([*command, "-f", str(table)], RUN_TIMEOUT_S, THREADS, environment)
        except subprocess.TimeoutExpired:
            return Run(way, concurrency, errors=(f"no end after {RUN_TIMEOUT_S:g} s",))
        if done.returncode or not table.exists():
            return Run(way, concurrency, errors=told_errors(done.stdout + done.stderr))
        return replace(read(table.read_text(), way, concurrency), effort=spent)


def told_errors(output: str) -> tuple[str, ...]:
    """What the threads of a run that failed say; without a word of theirs, the last line of its output."""
    lines = [line for line in output.splitlines() if line.strip()]
    return tuple(_THREAD_ERROR.findall(output)) or (lines[-1].strip() if lines else "it said nothing",)


def read(table: str, way: str, concurrency: int) -> Run:
    """The one line of perf_analyzer's report as comma-separated values; latencies are in microseconds there."""
    (line,) = csv.DictReader(table.splitlines())
    rate, p50_us, p99_us = (float(line[name]) for name in ("Inferences/Second", "p50 latency", "p99 latency"))
    return Run(way, concurrency, rate, p50_us / 1e3, p99_us / 1e3)


def render(runs: Sequence[Run]) -> str:
    """The table, and below it each error with its run."""
    errors = [f"{run.way}, {run.concurrency} in flight: {text}" for run in runs for text in run.errors]
    notes = [LIMITED_NOTE] if any(run.generator_was_limit for run in runs) else []
    return "\n".join([markdown([HEAD, *map(_cells, runs)], words=1), *notes, *errors])


def _cells(run: Run) -> tuple[str, ...]:
    busy = "" if run.effort is None else f"{run.effort.busy:.0%}{LIMITED * run.generator_was_limit}"
    measured = (f"{run.inferences_per_s:,.0f}", f"{run.p50_ms:.2f}", f"{run.p99_ms:.2f}", busy)
    return (run.way, str(run.concurrency), *([""] * len(measured) if run.errors else measured), str(len(run.errors)))


if __name__ == "__main__":
    sys.exit(main())
