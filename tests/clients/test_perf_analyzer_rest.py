"""Triton's own load generator over REST: JSON and binary tensors, compressed, raw and in shared memory."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.observability.statistics import Outcome
from support import models
from support.server import LOOPBACK

if TYPE_CHECKING:
    from support.server import RunningServer

BRIEF = ("--measurement-interval", "300", "--stability-percentage", "1000", "--max-trials", "30")
"""Windows as short as give every one some requests on a busy machine, and no matter how much they differ."""

WAYS = {
    "binary": (),
    "two rows each": ("-b", "2"),
    "from a few threads": ("--async", "--max-threads", "2"),
    "JSON in": ("--input-tensor-format", "json"),
    "JSON both ways": ("--input-tensor-format", "json", "--output-tensor-format", "json"),
    "a version by its number": ("-x", "1"),
    "shared memory": ("--shared-memory", "system", "--output-shared-memory-size", "1000"),
}

CONCURRENCY = 4

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture
def server(start_server, repository) -> RunningServer:
    models.write_model(repository, "echo", models.identity(dims=("N", 16)), max_batch_size=8)
    models.write_model(repository, "text", models.identity("BYTES", ("N", 2)), max_batch_size=8)
    return start_server(repository, allow_client_shm=True, metrics=None)


@pytest.fixture
def load(perf_analyzer, server):
    """Run perf_analyzer on a model; gives what it prints when it has ended well."""

    def run(model: str, *arguments: str) -> str:
        url = f"{LOOPBACK}:{server.server.http_port}"
        done = perf_analyzer.run("-i", "http", "-u", url, "-m", model, *BRIEF, *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        report: str = done.stdout
        return report

    return run


def requests_of(report: str) -> float:
    """How many were sent in the windows."""
    (found,) = re.findall(r"^ *Request count: (\d+)", report, re.MULTILINE)
    return float(found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("model", ["echo", "text"])
def test_perf_analyzer_gets_its_load_through(model, way, load, server):
    report = load(model, "--string-length", "5", "--concurrency-range", str(CONCURRENCY), *WAYS[way])
    assert requests_of(report) > 0
    outcomes = dict(server.model(model).statistics.snapshot().outcomes)
    assert outcomes.pop(Outcome.OK) >= requests_of(report)
    assert outcomes.pop(Outcome.CANCELLED, 0) <= CONCURRENCY
    assert not any(outcomes.values()), outcomes
    assert not server.call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()).regions


def test_perf_analyzer_raises_the_concurrency_step_by_step(load):
    report = load("echo", "--concurrency-range", "1:3:2", "--async")
    assert re.findall(r"^Concurrency: (\d+), throughput: ", report, re.MULTILINE) == ["1", "3"]
