"""A request with its tensors in system shared memory: what is measured next to the same request in a message."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import grpc

from loadtests.h2load import Load
from loadtests.models import BenchModel
from loadtests.peers import SERVICE, SHARED, SluiceMeasurement
from loadtests.processes import ServerProcess
from sluice_proto.grpc_service_pb2 import (
    ModelInferRequest,
    ModelInferResponse,
    SystemSharedMemoryRegisterRequest,
    SystemSharedMemoryUnregisterRequest,
)

DIRECTORY = Path("/dev/shm")  # noqa: S108 - where Linux has its shared memory objects
"""The benchmark writes its objects as files, as their clients' libraries do."""


class Shared:
    """An object with the input of a model's request, and room for its output behind that."""

    def __init__(self, model: BenchModel) -> None:
        message = ModelInferRequest.FromString(model.request)
        (tensor,), (data,) = message.inputs, message.raw_input_contents
        del message.raw_input_contents[:]
        self.name = f"sluice-bench-{uuid4().hex}"
        self._path = DIRECTORY / self.name
        self._output_at = len(data)
        self._output_bytes = model.answer.nbytes
        self._path.write_bytes(data + bytes(self._output_bytes))
        self.size_bytes = self._output_at + self._output_bytes
        output = message.outputs.add(name="Y")
        for item, offset, size_bytes in ((tensor, 0, len(data)), (output, self._output_at, self._output_bytes)):
            item.parameters["shared_memory_region"].string_param = self.name
            item.parameters["shared_memory_offset"].int64_param = offset
            item.parameters["shared_memory_byte_size"].int64_param = size_bytes
        self.request: bytes = message.SerializeToString()

    def take_output(self) -> bytes:
        """The output, which is zeros from then on until a request is answered."""
        with self._path.open("r+b") as file:
            file.seek(self._output_at)
            output = file.read()
            file.seek(self._output_at)
            file.write(bytes(self._output_bytes))
        return output

    def remove(self) -> None:
        """Remove the object."""
        self._path.unlink()


class SharedMeasurement(SluiceMeasurement):
    """Our server with the tensors of the request in shared memory."""

    def __init__(self, model: BenchModel, server: ServerProcess, load: Load, scratch: Path, shared: Shared) -> None:
        super().__init__(SHARED, replace(model, request=shared.request), server, load, scratch)
        self._shared = shared

    def check_reply(self, reply: bytes) -> None:
        """The model's answer, whose tensor is in shared memory."""
        message = ModelInferResponse.FromString(reply)
        message.raw_output_contents[0] = self._shared.take_output()
        super().check_reply(message.SerializeToString())


@contextmanager
def registered(model: BenchModel, server: ServerProcess) -> Iterator[Shared]:
    """The request of a model in an object that the server knows."""
    shared = Shared(model)
    register = SystemSharedMemoryRegisterRequest(name=shared.name, key=f"/{shared.name}", byte_size=shared.size_bytes)
    try:
        with grpc.insecure_channel(server.address) as channel:
            channel.unary_unary(f"/{SERVICE}/SystemSharedMemoryRegister")(register.SerializeToString())
            yield shared
            forget = SystemSharedMemoryUnregisterRequest(name=shared.name)
            channel.unary_unary(f"/{SERVICE}/SystemSharedMemoryUnregister")(forget.SerializeToString())
    finally:
        shared.remove()
