"""Triton's own load generator, the C++ program as it is: it gets its load through, and reads our statistics."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.observability.statistics import Outcome
from support import models

if TYPE_CHECKING:
    from support.server import RunningServer

BRIEF = ("--measurement-interval", "300", "--stability-percentage", "1000", "--max-trials", "30")
"""Windows as short as give every one some requests on a busy machine, and no matter how much they differ."""

WINDOWS = 3
"""So many windows in a row are what a report sums up."""

WAYS = {
    "unary": (),
    "unary, two rows each": ("-b", "2"),
    "unary from a few threads": ("--async", "--max-threads", "2"),
    "unary, the inputs zero": ("--input-data", "zero"),
    "unary, compressed": ("--grpc-compression-algorithm", "gzip"),
    "unary, a version by its number": ("-x", "1"),
    "stream": ("--streaming",),
    "stream from a few threads": ("--async", "--streaming", "--max-threads", "2"),
    "stream, two rows each, the inputs zero": ("--async", "--streaming", "-b", "2", "--input-data", "zero"),
}

CONCURRENCY = 4

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture
def server(start_server, repository) -> RunningServer:
    models.write_model(repository, "echo", models.identity(dims=("N", 16)), max_batch_size=8)
    models.write_model(repository, "open", models.identity(dims=("N", "M")), max_batch_size=8)
    models.write_model(repository, "text", models.identity("BYTES", ("N", 2)), max_batch_size=8)
    return start_server(repository, allow_client_shm=True, http=None, metrics=None)


@pytest.fixture
def load(perf_analyzer, server):
    """Run perf_analyzer on a model; gives what it prints when it has ended well."""

    def run(model: str, *arguments: str) -> str:
        done = perf_analyzer.run("-i", "grpc", "-u", server.target, "-m", model, *BRIEF, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        report: str = done.stdout
        return report

    return run


def number(report: str, what: str) -> float:
    """The number behind `what:`; AssertionError when it is not there once."""
    (found,) = re.findall(rf"^ *{what}: ([\d.]+)", report, re.MULTILINE)
    return float(found)


@pytest.mark.parametrize("way", WAYS)
def test_perf_analyzer_gets_its_load_through_and_our_statistics_agree(way, load, server):
    arguments = WAYS[way]
    rows = 2 if "-b" in arguments else 1
    report = load("echo", "--concurrency-range", str(CONCURRENCY), *arguments)
    requests, server_requests = number(report, "Request count"), number(report, "Successful request count")
    assert number(report, "Throughput") > 0
    assert requests > 0
    # Both count in the same windows; at either end of each, all that there may be at once can be between them.
    assert server_requests == pytest.approx(requests, abs=2 * WINDOWS * CONCURRENCY)
    assert number(report, "Inference count") == rows * server_requests
    assert 0 < number(report, "Execution count") <= server_requests
    queue, infer = (re.search(rf"{part} (\d+) usec", report) for part in ("queue", "compute infer"))
    assert int(infer[1]) + int(queue[1]) <= number(report, "Avg request latency")
    check_all_ended_well(server, "echo", at_least=server_requests)


def check_all_ended_well(server: RunningServer, model: str, at_least: float) -> None:
    """What was under way when perf_analyzer ended is cancelled; everything else was answered."""
    outcomes = dict(server.model(model).statistics.snapshot().outcomes)
    assert outcomes.pop(Outcome.OK) >= at_least
    assert outcomes.pop(Outcome.CANCELLED, 0) <= CONCURRENCY
    assert not any(outcomes.values()), outcomes


def test_perf_analyzer_raises_the_concurrency_step_by_step(load):
    report = load("echo", "--concurrency-range", "1:3:2", "--async")
    assert re.findall(r"^Concurrency: (\d+), throughput: ", report, re.MULTILINE) == ["1", "3"]


def test_perf_analyzer_sends_at_a_rate(load):
    report = load("echo", "--request-rate-range", "300")
    assert number(report, "Throughput") > 0


def test_perf_analyzer_is_told_the_shape_of_what_is_open(load):
    report = load("open", "--shape", "X:32", "--concurrency-range", str(CONCURRENCY))
    assert number(report, "Successful request count") > 0


def test_perf_analyzer_sends_text(load):
    report = load("text", "--string-length", "5", "--concurrency-range", str(CONCURRENCY))
    assert number(report, "Successful request count") > 0


@pytest.mark.parametrize("way", [(), ("--async", "--streaming"), ("-b", "2")], ids=" ".join)
@pytest.mark.parametrize("model", ["echo", "text"])
def test_perf_analyzer_shares_memory(model, way, load, server):
    shared = ("--shared-memory", "system", "--output-shared-memory-size", "1000", "--string-length", "5")
    report = load(model, *shared, "--concurrency-range", str(CONCURRENCY), *way)
    assert number(report, "Successful request count") > 0
    assert not server.call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()).regions


@pytest.mark.parametrize("arguments", [(), ("--async", "--streaming")])
def test_perf_analyzer_says_why_a_request_is_refused(arguments, perf_analyzer, server):
    done = perf_analyzer.run("-i", "grpc", "-u", server.target, "-m", "echo", *BRIEF, "-b", "9", *arguments)
    assert done.returncode != 0
    assert "batch-size must be <= 8 for 'echo', got 9" in done.stdout + done.stderr


def test_perf_analyzer_says_that_a_model_is_not_there(perf_analyzer, server):
    done = perf_analyzer.run("-i", "grpc", "-u", server.target, "-m", "nope", *BRIEF)
    assert done.returncode != 0
    assert "'nope' is not found" in done.stdout + done.stderr
