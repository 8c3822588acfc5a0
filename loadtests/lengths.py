"""Requests of many lengths, with and without shape buckets: what it is worth that they share batches."""

from itertools import cycle, islice
from pathlib import Path

from loadtests import varied
from loadtests.framing import PREFIX_BYTES
from loadtests.h2load import Load, LoadError, Measured
from loadtests.models import BenchModel
from loadtests.peers import NATIVE, SluiceMeasurement, probe
from loadtests.processes import ServerProcess


class LengthsMeasurement(SluiceMeasurement):
    """Our server under the variants of a model's request, in turn."""

    generator = varied.NAME

    def __init__(self, model: BenchModel, server: ServerProcess, load: Load, scratch: Path) -> None:
        super().__init__(NATIVE, model, server, load, scratch)
        self._answer_bytes: list[int] = []

    def prepare(self, trial_s: float) -> None:
        """Check the answer to every variant, before the server is warmed up as others are."""
        for variant in self.model.variants:
            reply = probe(self._server.address, variant.request)
            if not self.model.is_answered_by(reply, variant.answer):
                raise LoadError(f"the answer of {self.model.name} is not what ONNX Runtime gives to that request alone")
            self._answer_bytes.append(PREFIX_BYTES + len(reply))
        super().prepare(trial_s)

    def load_with(self, reply: bytes, requests: int) -> Measured:
        """Send so many; all are answered with as many bytes as each variant was at first."""
        del reply
        answer_bytes = sum(islice(cycle(self._answer_bytes), requests))
        messages = [variant.request for variant in self.model.variants]
        return varied.run(self._server.port, messages, self._load, requests, answer_bytes, self._scratch)
