"""What is measured side by side: our server, the bare grpcio echo, and the bare ONNX Runtime loop.

The first two are servers, loaded by h2load. Before and after each load one real call checks the answer; the lengths of
all answers and, for our server, ModelStatistics must say that every request in between succeeded.
"""

import json
import math
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import grpc

from loadtests import h2load
from loadtests.h2load import Load, LoadError
from loadtests.models import THREADS, BenchModel
from loadtests.ort_loop import LoopResult
from loadtests.processes import ServerProcess
from loadtests.procfs import read_cpu_s
from sluice_client import Client

GRPCIO = "sluice on grpcio"
NATIVE = "sluice on native"
SHARED = "native, shared memory"
REST = "native, REST binary"
UNIQUE = "native, unique inputs"
STREAM = "native, streams"
CACHED = "native, cache"
FEATURES = "native, features on for others"
ECHO = "bare grpcio echo"
LOOP = "bare ONNX Runtime loop"

SERVICE = "inference.GRPCInferenceService"
METHOD = f"{SERVICE}/ModelInfer"

RATE_TRIALS = 3
"""Each finds the rate better than the one before, and together they warm the server up."""

PROBES = 2
"""Requests around each load whose answers are looked at."""

LOOP_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One round of one measurement; a request is one row. What a peer cannot tell is NaN."""

    requests_per_s: float
    cpu_us_per_request: float
    p50_ms: float
    p99_ms: float
    mean_batch_rows: float = math.nan
    generator_cpu_us_per_request: float = math.nan
    generator_busy: float = math.nan
    """The share of its time in which the load generator ran, and"""
    generator_waiting: float = math.nan
    """in which it could have run, and others had the CPU (`loadtests.effort`)."""


class Measurement(ABC):
    """One row of the table."""

    model: BenchModel
    who: str
    in_flight: int
    """Requests in flight; for the loop, the rows of a batch."""
    load: str
    """The same in words."""
    generator: str = ""
    """What makes the load; nothing else does for the loop."""

    @abstractmethod
    def prepare(self, trial_s: float) -> None:
        """Warm up, and find out in trials of about this length what `measure` needs to know."""

    @abstractmethod
    def measure(self, duration_s: float) -> Sample:
        """Measure for about this long; LoadError when anything but the right answer came back."""


class ServerMeasurement(Measurement):
    """A server under the load of h2load, or another generator; what a subclass adds is what it knows of the answers."""

    generator = "h2load"

    def __init__(
        self,
        model: BenchModel,
        server: ServerProcess,
        load: Load,
        scratch: Path,
        generator: "Generator | None" = None,
    ) -> None:
        self.model = model
        self.in_flight = load.in_flight
        self.load = str(load)
        self._generator = generator
        if generator is not None:
            self.generator = generator.name
        self._server = server
        self._load = load
        self._scratch = scratch
        self._rate = 0.0

    def prepare(self, trial_s: float) -> None:
        """Warm up, and find out how many requests it takes to fill a second."""
        self._rate = self._load.in_flight / trial_s
        for _ in range(RATE_TRIALS):
            self._rate = self.measure(trial_s).requests_per_s

    def measure(self, duration_s: float) -> Sample:
        """Send as many requests as fill this time at the rate found before."""
        return self.send(self._rate * duration_s)

    def send(self, requests: float) -> Sample:
        """Send at least this many requests, equally many over each stream."""
        count = math.ceil(requests / self._load.in_flight) * self._load.in_flight
        before = self.counters()
        reply = self._probe()
        cpu_started_s = self._cpu_s()
        done = self.load_with(reply, count)
        cpu_s = self._cpu_s() - cpu_started_s
        self._probe()
        after = self.counters()
        sent = done.requests or counted(before, after) - PROBES
        return Sample(
            requests_per_s=done.requests_per_s,
            cpu_us_per_request=cpu_s / sent * 1e6,
            p50_ms=done.p50_ms,
            p99_ms=done.p99_ms,
            mean_batch_rows=mean_batch(before, after, requests=sent + PROBES),
            generator_cpu_us_per_request=done.effort.cpu_s / sent * 1e6,
            generator_busy=done.effort.busy,
            generator_waiting=done.effort.waiting,
        )

    def _cpu_s(self) -> float:
        return math.nan if self._server.pid is None else read_cpu_s(self._server.pid)

    def _probe(self) -> bytes:
        reply = self.ask()
        self.check_reply(reply)
        return reply

    def ask(self) -> bytes:
        """The answer to one request."""
        return probe(self._server.address, self.model.request)

    def load_with(self, reply: bytes, requests: int) -> h2load.Measured:
        """Send so many requests, all of which are to be answered as this one was."""
        if self._generator is not None:
            return self._generator.run(self._server.address, self.model, self._load, requests / self._rate)
        request = h2load.grpc_request(METHOD, self.model.request, len(reply))
        return h2load.run(self._server.address, request, self._load, requests, self._scratch)

    @abstractmethod
    def check_reply(self, reply: bytes) -> None:
        """Raise LoadError unless this is the right answer."""

    @abstractmethod
    def counters(self) -> "Counters | None":
        """What the server has counted so far; None when it does not count."""


@dataclass(frozen=True, slots=True)
class Counters:
    """The counters of a model in ModelStatistics."""

    succeeded: int
    failed: int
    rows: int
    executions: int


@dataclass(frozen=True, slots=True)
class Generator:
    """What makes the load of unary calls in the place of h2load: HOST:PORT, model, load, for about how many seconds."""

    name: str
    run: Callable[[str, BenchModel, Load, float], h2load.Measured]


def counted(before: Counters | None, after: Counters | None) -> float:
    """How many requests the server says were answered in between, NaN where it does not count."""
    return math.nan if before is None or after is None else after.succeeded - before.succeeded


def mean_batch(before: Counters | None, after: Counters | None, requests: float) -> float:
    """Rows per execution in between, NaN without counters or executions; LoadError unless all requests succeeded."""
    if before is None or after is None:
        return math.nan
    succeeded, failed = after.succeeded - before.succeeded, after.failed - before.failed
    if succeeded != requests or failed:
        raise LoadError(f"of {requests} requests the server counts {succeeded} as succeeded and {failed} as failed")
    executions = after.executions - before.executions
    return (after.rows - before.rows) / executions if executions else math.nan


def probe(address: str, request: bytes) -> bytes:
    """The answer to the very bytes that will be sent, from grpcio as the client."""
    with grpc.insecure_channel(address, [("grpc.max_receive_message_length", -1)]) as channel:
        reply: bytes = channel.unary_unary(f"/{METHOD}")(request, timeout=30)
        return reply


class SluiceMeasurement(ServerMeasurement):
    """Our server, on one of its transports."""

    def __init__(
        self,
        who: str,
        model: BenchModel,
        server: ServerProcess,
        load: Load,
        scratch: Path,
        generator: Generator | None = None,
    ) -> None:
        super().__init__(model, server, load, scratch, generator)
        self.who = who

    def check_reply(self, reply: bytes) -> None:
        """The model's answer, as ONNX Runtime alone gives it."""
        if not self.model.is_answered_by(reply):
            raise LoadError(f"the answer of {self.model.name} is not what ONNX Runtime gives")

    def counters(self) -> Counters:
        """From ModelStatistics."""
        with Client(self._server.address) as client:
            (model,) = client.statistics(self.model.name)
        return Counters(model.success.count, model.fail.count, model.inference_count, model.execution_count)


class EchoMeasurement(ServerMeasurement):
    """The bare echo of the same request."""

    who = ECHO

    def check_reply(self, reply: bytes) -> None:
        """The request."""
        if reply != self.model.request:
            raise LoadError("the echo server did not answer with the request")

    def counters(self) -> None:
        """An echo does not count."""


class LoopMeasurement(Measurement):
    """ONNX Runtime's bare loop with the batch size that suits it best."""

    who = LOOP

    def __init__(self, model: BenchModel) -> None:
        self.model = model
        self.in_flight = 0
        self.load = ""

    def prepare(self, trial_s: float) -> None:
        """Find the power of two, up to the model's largest batch, that gives the most rows per second."""
        sizes = [1 << power for power in range(self.model.max_batch_rows.bit_length())]
        # Every size gets two chances: a disturbance must not decide what the best one is.
        best = max(self._run(sizes * 2, trial_s), key=lambda result: result.rows_per_s)
        self.in_flight = best.batch_rows
        self.load = f"batches of {best.batch_rows}"

    def measure(self, duration_s: float) -> Sample:
        """Run the loop in a new process; the latency is that of one batch."""
        (result,) = self._run([self.in_flight], duration_s)
        return Sample(result.rows_per_s, result.cpu_us_per_row, result.run_p50_ms, result.run_p99_ms, result.batch_rows)

    def _run(self, batch_rows: list[int], duration_s: float) -> list[LoopResult]:
        command = [sys.executable, "-m", "loadtests.ort_loop", str(self.model.file), f"--threads={THREADS}"]
        command += [f"--seconds={duration_s}", "--batch-rows", *map(str, batch_rows)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LOOP_TIMEOUT_S, check=False)
        if done.returncode:
            raise LoadError(f"the loop over ONNX Runtime failed:\n{done.stderr}")
        return [LoopResult(**item) for item in json.loads(done.stdout)]
