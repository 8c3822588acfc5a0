"""Shared memory in the protocol: its RPCs, and what a request says of regions (compatibility, section 13).

Off unless the server was started with `--allow-client-shm`: then every RPC and every parameter of it is refused. It is
for clients on the server's own machine, as control calls are: a region's contents and what is written to it are theirs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.errors import InvalidArgument, Unimplemented
from sluice_server.execution.cuda_memory import CudaRegion, open_region
from sluice_server.execution.shared_memory import SystemRegion
from sluice_server.security.control import ControlPolicy

if TYPE_CHECKING:
    from collections.abc import Callable

    from google.protobuf.message import Message

    from sluice_server.execution.cuda_driver import CudaDriver
    from sluice_server.execution.shared_memory import RegionTable, Window
    from sluice_server.transport.call import Call

SYSTEM_EXTENSION, CUDA_EXTENSION = "system_shared_memory", "cuda_shared_memory"
"""Their names in ServerMetadata."""

REGION, SIZE, OFFSET = "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"
"""The parameters of an input or a requested output."""

SLOW = frozenset(("CudaSharedMemoryRegister",))
"""RPCs that may take long: the first use of a GPU by a process takes some tenths of a second."""

_OFF = "shared memory is off on this server: start it with --allow-client-shm, or send tensors in the messages"


class SharedMemory:
    """What clients may do with shared memory: its RPCs, and windows for the parameters of requests."""

    def __init__(
        self,
        regions: RegionTable | None = None,
        control: ControlPolicy | None = None,
        cuda: CudaDriver | None = None,
        no_cuda: str = "",
    ) -> None:
        """`regions` is None where shared memory is off; `control` says whose calls are taken.

        `cuda` is what opens a GPU's memory; None where there is no GPU, and `no_cuda` says why.
        """
        self._regions = regions
        self._control = control or ControlPolicy()
        self._cuda = cuda
        self._no_cuda = no_cuda

    @property
    def extensions(self) -> tuple[str, ...]:
        """What ServerMetadata is to tell of it."""
        if self._regions is None:
            return ()
        return (SYSTEM_EXTENSION,) if self._cuda is None else (SYSTEM_EXTENSION, CUDA_EXTENSION)

    def rpcs(self) -> dict[str, tuple[type[Message], Callable[[Any, Call], Message]]]:
        """The requests and the answers of its RPCs, by their names."""
        return {
            "SystemSharedMemoryStatus": (pb.SystemSharedMemoryStatusRequest, self.status),
            "SystemSharedMemoryRegister": (pb.SystemSharedMemoryRegisterRequest, self.register),
            "SystemSharedMemoryUnregister": (pb.SystemSharedMemoryUnregisterRequest, self.unregister),
            "CudaSharedMemoryStatus": (pb.CudaSharedMemoryStatusRequest, self.cuda_status),
            "CudaSharedMemoryRegister": (pb.CudaSharedMemoryRegisterRequest, self.cuda_register),
            "CudaSharedMemoryUnregister": (pb.CudaSharedMemoryUnregisterRequest, self.cuda_unregister),
        }

    def status(self, request: Any, call: Call) -> Message:
        """SystemSharedMemoryStatus."""
        response = pb.SystemSharedMemoryStatusResponse()
        for region in self._open_to(call).select(SystemRegion, request.name):
            response.regions[region.name].CopyFrom(
                pb.SystemSharedMemoryStatusResponse.RegionStatus(
                    name=region.name, key=region.object.key, offset=region.offset, byte_size=region.size_bytes
                )
            )
        return response

    def register(self, request: Any, call: Call) -> Message:
        """SystemSharedMemoryRegister."""
        self._open_to(call).register(request.name, request.key, request.offset, request.byte_size)
        return pb.SystemSharedMemoryRegisterResponse()

    def unregister(self, request: Any, call: Call) -> Message:
        """SystemSharedMemoryUnregister."""
        self._open_to(call).unregister(SystemRegion, request.name)
        return pb.SystemSharedMemoryUnregisterResponse()

    def cuda_status(self, request: Any, call: Call) -> Message:
        """CudaSharedMemoryStatus."""
        response = pb.CudaSharedMemoryStatusResponse()
        for region in self._open_to(call).select(CudaRegion, request.name):
            response.regions[region.name].CopyFrom(
                pb.CudaSharedMemoryStatusResponse.RegionStatus(
                    name=region.name, device_id=region.memory.device, byte_size=region.size_bytes
                )
            )
        return response

    def cuda_register(self, request: Any, call: Call) -> Message:
        """CudaSharedMemoryRegister: memory of a GPU, where there is one."""
        regions, cuda = self._open_to(call), self._cuda
        name, size_bytes = request.name, request.byte_size
        if cuda is None:
            raise InvalidArgument(
                f"failed to register CUDA shared memory region: '{name}', GPUs not supported: this server shares"
                f" system memory only, see SystemSharedMemoryRegister ({self._no_cuda})"
            )
        regions.enter(
            name, size_bytes, lambda: open_region(cuda, name, request.raw_handle, request.device_id, size_bytes)
        )
        return pb.CudaSharedMemoryRegisterResponse()

    def cuda_unregister(self, request: Any, call: Call) -> Message:
        """CudaSharedMemoryUnregister."""
        self._open_to(call).unregister(CudaRegion, request.name)
        return pb.CudaSharedMemoryUnregisterResponse()

    def window(self, tensor: str, parameters: Any, call: Call) -> Window:
        """What an input's or output's parameters name, REGION among them; `tensor` is what messages call it."""
        if self._regions is None:
            raise Unimplemented(f"{tensor} names a shared memory region, and {_OFF}")
        self._control.check(f"shared memory of {tensor}", call.peer)
        name, size_bytes, offset = _read(tensor, parameters)
        return self._regions.find(name).window(offset, size_bytes)

    def _open_to(self, call: Call) -> RegionTable:
        method = call.method.rpartition("/")[2]
        if self._regions is None:
            raise Unimplemented(f"{method}: {_OFF}")
        self._control.check(method, call.peer)
        return self._regions


OFF = SharedMemory()
"""Where there is none."""


def _read(tensor: str, parameters: Any) -> tuple[str, int, int]:
    """The region's name, the size and the offset."""
    region = parameters[REGION]
    if region.WhichOneof("parameter_choice") != "string_param":
        raise InvalidArgument(f"invalid value type for '{REGION}' parameter for {tensor}, expected string_param.")
    if SIZE not in parameters:
        raise InvalidArgument(f"'{SIZE}' must be specified along with '{REGION}' parameter for {tensor}")
    return region.string_param, _whole(tensor, parameters, SIZE), _whole(tensor, parameters, OFFSET)


def _whole(tensor: str, parameters: Any, key: str) -> int:
    if key not in parameters:
        return 0
    value = parameters[key]
    if value.WhichOneof("parameter_choice") != "int64_param":
        raise InvalidArgument(f"invalid value type for '{key}' parameter for {tensor}, expected int64_param.")
    number: int = value.int64_param
    if number < 0:
        raise InvalidArgument(f"invalid value for '{key}' parameter for {tensor}, expected bytes >= 0, got {number}.")
    return number
