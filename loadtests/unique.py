"""Requests that all differ, with and without a response cache: what a cache costs where it is of no use."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

from loadtests import h2load
from loadtests.h2load import GRPC_PREFIX_BYTES, TIMEOUT_S, Load, LoadError, Measured, children_cpu_s, steady_rate
from loadtests.models import BenchModel
from loadtests.peers import METHOD, SluiceMeasurement
from loadtests.processes import ServerProcess
from loadtests.summary import quantile
from sluice_proto.grpc_service_pb2 import ModelInferRequest

_first_number = itertools.count(1)
"""Each run's requests begin at another number than all before; a run has fewer than `RUN_REQUESTS`."""

RUN_REQUESTS = 1 << 20


class UniqueMeasurement(SluiceMeasurement):
    """Our server under requests that all differ in their first two elements."""

    def __init__(self, who: str, model: BenchModel, server: ServerProcess, load: Load, scratch: Path) -> None:
        super().__init__(who, model, server, load, scratch)
        (data,) = ModelInferRequest.FromString(model.request).raw_input_contents
        self._offset = model.request.index(data)

    def load_with(self, reply: bytes, requests: int) -> Measured:
        """Send so many, all of which are to be answered with as many bytes as this one was."""
        message = self._scratch / "unique.bin"
        message.write_bytes(self.model.request)
        numbers = {
            "port": self._server.port,
            "connections": self._load.connections,
            "streams": self._load.streams,
            "requests": requests,
            "offset": self._offset,
            "first": next(_first_number) * RUN_REQUESTS,
        }
        flags = [f"--{name}={number}" for name, number in numbers.items()]
        command = [sys.executable, "-m", "loadtests.unique_load", f"/{METHOD}", str(message), *flags]
        before_s = children_cpu_s()
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        generator_cpu_s = children_cpu_s() - before_s
        if done.returncode:
            raise LoadError(f"the load of unique requests failed:\n{done.stderr}")
        found = json.loads(done.stdout)
        report = h2load.Report(found["elapsed_s"], requests, len(found["ends_us"]), found["answer_bytes"])
        h2load.check(report, requests, GRPC_PREFIX_BYTES + len(reply))
        latencies_us = found["latencies_us"]
        p50_us, p99_us = quantile(latencies_us, 0.5), quantile(latencies_us, 0.99)
        rate = steady_rate(found["ends_us"], self._load.in_flight, report.elapsed_s)
        return Measured(requests, rate, p50_us / 1e3, p99_us / 1e3, generator_cpu_s)
