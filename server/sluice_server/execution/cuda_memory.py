"""CUDA shared memory: regions of a GPU's memory that clients of this machine register by their IPC handles.

Inputs in them are copied from the device into arrays of the host, and outputs back: models get and give the same arrays
as from any client, wherever they run. What it spares a client are its own copies.

The client's memory stays open here, as CUDA counts that, as long as its region is registered or a request uses it. Only
the client knows when what it has written there is complete; what is written here is complete before its request is
answered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice_server.errors import Internal, InvalidArgument
from sluice_server.execution.cuda_driver import HANDLE_BYTES, CudaError
from sluice_server.execution.shared_memory import Region

if TYPE_CHECKING:
    from sluice_server.execution.cuda_driver import CudaDriver


class DeviceMemory:
    """A client's memory on a GPU, open; closed when nobody refers to it any more."""

    __slots__ = ("_driver", "device", "pointer", "size_bytes")

    def __init__(self, driver: CudaDriver, device: int, handle: bytes) -> None:
        """Open what the handle stands for; `CudaError` when it is of no use on this device."""
        self.pointer = 0
        self._driver = driver
        self.device = device
        self.pointer, self.size_bytes = driver.open(device, handle)

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Close it now: nobody uses it any more."""
        pointer, self.pointer = self.pointer, 0
        if pointer:
            self._driver.close(self.device, pointer)

    def read(self, offset: int, out: memoryview) -> None:
        """Copy to the host."""
        self._driver.read(self.device, self.pointer + offset, out)

    def write(self, offset: int, data: memoryview) -> None:
        """Copy to the device."""
        self._driver.write(self.device, self.pointer + offset, data)


@dataclass(frozen=True, slots=True)
class CudaRegion(Region):
    """The beginning of a client's memory on a GPU."""

    kind = "cuda"

    memory: DeviceMemory

    @property
    def identity(self) -> tuple[int, int]:
        """The device, as no file system is numbered, and the address."""
        return -1 - self.memory.device, self.memory.pointer

    def check(self, end: int) -> None:
        """What is open stays as large as it is."""

    def read(self, offset: int, out: memoryview) -> None:
        """Copy to the host."""
        try:
            if out:
                self.memory.read(offset, out)
        except CudaError as error:
            raise Internal(f"shared memory region '{self.name}' cannot be read: {error}") from error

    def write(self, offset: int, data: memoryview) -> None:
        """Copy to the device."""
        try:
            if data:
                self.memory.write(offset, data)
        except CudaError as error:
            raise Internal(f"shared memory region '{self.name}' cannot be written: {error}") from error


def open_region(driver: CudaDriver, name: str, handle: bytes, device: int, size_bytes: int) -> CudaRegion:
    """The first `size_bytes` of what an IPC handle stands for; `InvalidArgument` when that is less, or nothing."""
    failed = f"failed to register CUDA shared memory region: '{name}': invalid args:"
    if not 0 <= device < driver.devices:
        raise InvalidArgument(f"{failed} there is no device {device}, the GPUs here are 0 to {driver.devices - 1}")
    if len(handle) != HANDLE_BYTES:
        raise InvalidArgument(f"{failed} raw_handle has {len(handle)} bytes, and a CUDA IPC handle has {HANDLE_BYTES}")
    if not size_bytes:
        raise InvalidArgument(f"{failed} byte_size is 0")
    try:
        memory = DeviceMemory(driver, device, handle)
    except CudaError as error:
        raise InvalidArgument(f"{failed} its handle cannot be opened on device {device}: {error}") from error
    if size_bytes > memory.size_bytes:
        memory.close()  # the error, which lives on for a while, refers to it
        raise InvalidArgument(
            f"{failed} {size_bytes} bytes are not a part of its memory, which has {memory.size_bytes} bytes"
        )
    return CudaRegion(name, 0, size_bytes, memory)
