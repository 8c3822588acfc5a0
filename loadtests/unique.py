"""Requests that all differ, to models with and without a response cache: what it costs where it is of no use."""

import itertools
from pathlib import Path

from loadtests import varied
from loadtests.framing import PREFIX_BYTES
from loadtests.h2load import Load, Measured
from loadtests.models import BenchModel
from loadtests.peers import UNIQUE, SluiceMeasurement
from loadtests.processes import ServerProcess
from sluice_proto.grpc_service_pb2 import ModelInferRequest

_first_number = itertools.count(1)
"""Each run's requests begin at another number than all before; a run has fewer than `RUN_REQUESTS`."""

RUN_REQUESTS = 1 << 20


class UniqueMeasurement(SluiceMeasurement):
    """Our server under requests that all differ in their first two elements."""

    generator = varied.NAME

    def __init__(self, model: BenchModel, server: ServerProcess, load: Load, scratch: Path) -> None:
        super().__init__(UNIQUE, model, server, load, scratch)
        (data,) = ModelInferRequest.FromString(model.request).raw_input_contents
        self._offset = model.request.index(data)

    def load_with(self, reply: bytes, requests: int) -> Measured:
        """Send so many, all of which are to be answered with as many bytes as this one was."""
        answer_bytes = requests * (PREFIX_BYTES + len(reply))
        more = {"offset": self._offset, "first": next(_first_number) * RUN_REQUESTS}
        port, messages = self._server.port, [self.model.request]
        return varied.run(port, messages, self._load, requests, answer_bytes, self._scratch, more)
