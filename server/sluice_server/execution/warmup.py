"""Warm-up: requests that `model_warmup` describes, run on each instance before a version is ready.

Each sample becomes the bytes of a ModelInferRequest, so that it is checked, run, encoded and counted as a client's
would be: Triton counts warm-up runs as ordinary inferences. One that fails fails the load.
"""

from __future__ import annotations

import logging
import math
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice_batching import NO_DEADLINE
from sluice_proto import tensors
from sluice_proto.grpc_service_pb2 import ModelInferRequest
from sluice_server.errors import SluiceError
from sluice_server.protocol.decode import ParsedRequest, decode
from sluice_server.repository.errors import ModelLoadError
from sluice_server.status import OK
from sluice_server.transport.call import Call

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from typing_extensions import Buffer

    from sluice_proto.model_config_pb2 import ModelConfig, ModelWarmup
    from sluice_proto.tensors import DType
    from sluice_server.execution.instance import BatchRunner, Runnable
    from sluice_server.protocol.interface import ModelInterface
    from sluice_server.status import Status
    from sluice_server.transport.call import Metadata

logger = logging.getLogger(__name__)

DIRECTORY = "warmup"
"""Where the files of `input_data_file` are, in the model's directory."""

SAMPLE_BYTES_MAX = 1 << 30
"""Of all inputs of a sample: what protobuf can still parse as one message, with room."""

TEXT_HEAD_BYTES = 4
"""Of an element of BYTES on the wire: its length. So many zeros are an empty element."""

RANDOM_INTEGERS = 128
"""Random integers are below this, which all types have and most tables of embeddings too; floats are below 1."""

SEED = 0
"""The same data at each load: a load that fails fails again."""


class WarmupCall(Call):
    """A call without a client, which keeps its end."""

    __slots__ = ("status",)

    metadata: Metadata = ()
    peer = "warm-up"
    peer_names: tuple[str, ...] = ()

    def __init__(self, message: bytes) -> None:
        self.method = "warm-up"
        self.message = message
        self.received_ns = time.monotonic_ns()
        self.deadline_ns = NO_DEADLINE
        self.on_cancel = None
        self.status: Status | None = None

    def reply(self, parts: Sequence[Buffer]) -> None:
        """The answer is of no interest."""
        del parts
        self.status = self.status or OK

    def fail(self, status: Status) -> None:
        """Keep why."""
        self.status = self.status or status


def warm_up(
    config: ModelConfig,
    directory: Path,
    interface: ModelInterface,
    runner: BatchRunner,
    sessions: Iterable[tuple[Runnable, int]],
) -> None:
    """Run every sample of a checked configuration as often as it says, for each instance of each session.

    `directory` is the model's. Raises ModelLoadError, with the sample's name, for the first that cannot be made or run.
    """
    began_s = time.monotonic()
    samples = [(sample, _message(sample, directory, interface)) for sample in config.model_warmup]
    runs = 0
    for session, instances in sessions:
        for sample, message in samples:
            for _ in range(instances * max(1, sample.count)):
                _run(sample, message, interface, runner, session)
                runs += 1
    if runs:
        seconds = round(time.monotonic() - began_s, 3)
        extra = {"model": config.name, "version": interface.version, "runs": runs, "seconds": seconds}
        logger.info("model is warmed up", extra=extra)


def _run(
    sample: ModelWarmup, message: bytes, interface: ModelInterface, runner: BatchRunner, session: Runnable
) -> None:
    call = WarmupCall(message)
    try:
        request = decode(ParsedRequest(message), interface, call)
    except SluiceError as error:
        raise _failure(sample, interface, str(error)) from error
    request.fingerprint = None
    request.enqueued_ns = call.received_ns
    runner.run_and_send(session, [request])
    if call.status is not OK:
        raise _failure(sample, interface, call.status.message if call.status is not None else "it has no end")


def _message(sample: ModelWarmup, directory: Path, interface: ModelInterface) -> bytes:
    """The request of a sample: each input's row as often as its batch size says."""
    request = ModelInferRequest(model_name=interface.name, id=sample.name)
    if interface.sequenced:  # a sequence of its own, which begins with it
        request.parameters["sequence_id"].int64_param = 1
        if interface.id_datatype == "BYTES":
            request.parameters["sequence_id"].string_param = sample.name
        for flag in ("sequence_start", "sequence_end"):
            request.parameters[flag].bool_param = True
    left_bytes = SAMPLE_BYTES_MAX // sample.batch_size
    for name, item in sorted(sample.inputs.items()):
        dtype = tensors.BY_CONFIG_TYPE[item.data_type]
        shape = [sample.batch_size, *item.dims] if interface.max_batch_rows else item.dims
        request.inputs.add(name=name, datatype=dtype.name, shape=shape)
        try:
            row = _row(item, dtype, directory, left_bytes)
        except OSError as error:
            raise _failure(
                sample, interface, f"'{DIRECTORY}/{item.input_data_file}' of input '{name}': {error.strerror}"
            ) from error
        if row is None:
            raise _failure(sample, interface, f"its inputs take more than {SAMPLE_BYTES_MAX} bytes")
        left_bytes -= len(row)
        request.raw_input_contents.append(row * sample.batch_size)
    return request.SerializeToString()


def _row(item: ModelWarmup.Input, dtype: DType, directory: Path, most_bytes: int) -> bytes | None:
    """One row of an input; None when it takes more bytes than it may."""
    kind = item.WhichOneof("input_data_type")
    if kind == "input_data_file":
        with (directory / DIRECTORY / item.input_data_file).open("rb") as file:
            data = file.read(most_bytes + 1)
            return data if len(data) <= most_bytes else None
    elements = math.prod(item.dims)
    if elements * (dtype.itemsize or TEXT_HEAD_BYTES) > most_bytes:
        return None
    if not dtype.itemsize:
        return bytes(elements * TEXT_HEAD_BYTES)  # empty elements, for random text too, as in Triton
    if kind == "zero_data":
        return bytes(elements * dtype.itemsize)
    random = np.random.default_rng(SEED)
    values: Any = random.random(elements) if dtype.name in _FLOATS else random.integers(0, RANDOM_INTEGERS, elements)
    if dtype.name == "BOOL":
        values %= 2
    return bytes(tensors.to_buffer(values.astype(dtype.numpy)))


_FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})


def _failure(sample: ModelWarmup, interface: ModelInterface, why: str) -> ModelLoadError:
    return ModelLoadError(f"model_warmup '{sample.name}' of model '{interface.name}': {why}", model=interface.name)
