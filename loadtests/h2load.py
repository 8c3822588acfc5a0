"""Runs h2load, the load generator of nghttp2, with one fixed request, gRPC's or REST's, and reads what it measured.

h2load knows nothing of gRPC: it counts every HTTP 200 as a success, also one whose grpc-status is an error. Such an
answer has no body, so the bytes of the bodies, which h2load counts too, tell the two apart.
"""

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loadtests import effort
from loadtests.effort import Effort
from loadtests.framing import PREFIX_BYTES, frame
from sluice_client.load.latencies import quantile

TIMEOUT_S = 300.0
"""No measurement takes this long: a generator that still runs is stuck."""

_FINISHED = re.compile(r"finished in ([\d.]+)(us|ms|s), ")
_REQUESTS = re.compile(r"requests: (\d+) total, .* (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout")
_TRAFFIC = re.compile(r"traffic: .* \((\d+)\) data")
_UNIT_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


class LoadError(Exception):
    """The load could not be made, or not every request of it succeeded; the text says which."""


@dataclass(frozen=True, slots=True)
class Load:
    """A closed loop: each stream of each connection sends its next request when the last one was answered."""

    connections: int
    streams: int

    def __str__(self) -> str:
        return f"{self.in_flight} ({self.connections} x {self.streams})"

    @property
    def in_flight(self) -> int:
        """Requests that wait for an answer at any time."""
        return self.connections * self.streams


@dataclass(frozen=True, slots=True)
class Request:
    """What is sent over and over, and how many bytes the body of each right answer has."""

    path: str
    body: bytes
    headers: tuple[str, ...]
    answer_bytes: int
    http1: bool = False


def grpc_request(method: str, message: bytes, reply_bytes: int) -> Request:
    """A unary call of a method (`service/name`), whose reply is a message of this length."""
    headers = ("content-type: application/grpc", "te: trailers")
    return Request(method, frame(message), headers, PREFIX_BYTES + reply_bytes)


@dataclass(frozen=True, slots=True)
class Report:
    """What h2load prints at its end."""

    elapsed_s: float
    total: int
    succeeded: int
    data_bytes: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One finished load: all of its requests succeeded."""

    requests: int | None
    """None when the generator does not say how many it sent."""
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    effort: Effort
    """Of the generator."""


def find() -> str:
    """The path of h2load; LoadError says how to install it."""
    path = shutil.which("h2load")
    if path is None:
        raise LoadError("h2load is not installed; on Debian and Ubuntu: apt-get install nghttp2-client")
    return path


def told_version() -> str:
    """What it says of itself; LoadError when it is not there."""
    done = subprocess.run([find(), "--version"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def command(
    program: str, address: str, request: Request, load: Load, requests: int, body: Path, log: Path
) -> list[str]:
    """The command line for this many requests to this HOST:PORT."""
    return [
        program,
        f"--requests={requests}",
        f"--clients={load.connections}",
        f"--max-concurrent-streams={load.streams}",
        "--threads=1",
        f"--data={body}",
        *(f"--header={header}" for header in request.headers),
        *(["--h1"] if request.http1 else []),
        f"--log-file={log}",
        f"http://{address}/{request.path}",
    ]


def parse_report(output: str) -> Report:
    """Read h2load's standard output; LoadError when it has no report in it."""
    finished, requests, traffic = (pattern.search(output) for pattern in (_FINISHED, _REQUESTS, _TRAFFIC))
    if not (finished and requests and traffic):
        raise LoadError(f"h2load printed no report:\n{output}")
    elapsed_s = float(finished[1]) * _UNIT_S[finished[2]]
    return Report(elapsed_s, int(requests[1]), int(requests[2]), int(traffic[1]))


def parse_log(lines: Iterable[str]) -> tuple[list[int], list[int]]:
    """When all requests ended, in ascending order, and how long they took, in microseconds, from --log-file.

    A line is: start in microseconds since the epoch, HTTP status (-1: failed), microseconds until the end.
    """
    ends_us, latencies_us = [], []
    for line in lines:
        start, _, latency = line.split("\t")
        latencies_us.append(int(latency))
        ends_us.append(int(start) + int(latency))
    return sorted(ends_us), latencies_us


def steady_rate(ends_us: Sequence[int], in_flight: int, elapsed_s: float) -> float:
    """Requests/s between the first answers, while connections are still being made, and the last, when streams run out.

    As many at either end as are in flight; over all the time when they are most of the load.
    """
    counted = len(ends_us) - 2 * in_flight
    if counted < in_flight:
        return len(ends_us) / elapsed_s
    return counted / max(1, ends_us[-1 - in_flight] - ends_us[in_flight - 1]) * 1e6


def check(report: Report, requests: int, expected: int) -> None:
    """Raise LoadError unless all requests were answered, with bodies that have so many bytes in all."""
    if report.succeeded != requests or report.total != requests:
        raise LoadError(f"{report.succeeded} of {requests} requests were answered with HTTP 200")
    if report.data_bytes != expected:
        raise LoadError(
            f"the answers have {report.data_bytes} bytes instead of {expected}: some requests failed with a grpc-status"
        )


def run(address: str, request: Request, load: Load, requests: int, scratch: Path) -> Measured:
    """Send the request this often to HOST:PORT and measure; writes to `scratch`.

    LoadError unless each answer has its length.
    """
    body, log = scratch / "body.bin", scratch / "requests.log"
    body.write_bytes(request.body)
    log.unlink(missing_ok=True)  # h2load appends
    done, spent = effort.run(command(find(), address, request, load, requests, body, log), TIMEOUT_S)
    if done.returncode:
        raise LoadError(f"h2load ended with exit code {done.returncode}: {done.stderr or done.stdout}")
    report = parse_report(done.stdout)
    check(report, requests, requests * request.answer_bytes)
    with log.open() as lines:
        ends_us, latencies_us = parse_log(lines)
    return measured(ends_us, latencies_us, load, report.elapsed_s, spent)


def measured(
    ends_us: Sequence[int], latencies_us: Sequence[int], load: Load, elapsed_s: float, spent: Effort
) -> Measured:
    """Of when all requests ended, in ascending order, and how long they took, in microseconds."""
    latencies_ms = np.array(latencies_us) / 1e3
    rate = steady_rate(ends_us, load.in_flight, elapsed_s)
    return Measured(len(ends_us), rate, quantile(latencies_ms, 0.5), quantile(latencies_ms, 0.99), spent)
