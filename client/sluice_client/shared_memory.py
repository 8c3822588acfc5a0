"""System shared memory: tensors that a server on the same machine reads and writes where they are, not in messages.

Client.shared_memory makes a SharedMemory and registers it. What SharedMemory.write gives is an input by reference,
what SharedMemory.room gives is where an output is to go; both are told to the server as the parameters
`shared_memory_region`, `_offset` and `_byte_size` of Triton's protocol. Nothing here does calls.
"""

import mmap
import os
import struct
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from sluice_client.errors import InvalidRequest, InvalidResponse
from sluice_client.results import Array
from sluice_proto import tensors
from sluice_proto.errors import TensorError

DIRECTORY: Final = Path("/dev/shm")  # noqa: S108 - where Linux has the objects that shm_open names
_LENGTH: Final = struct.Struct("<I")


class SharedMemory:
    """A POSIX shared memory object of our own, which one server knows as a region by the same name.

    Its `size_bytes` are taken from the system at once and are zeros. Writing and reading is not locked: a part that a
    request in flight uses is the server's, also when its caller has given it up.
    """

    def __init__(self, size_bytes: int, endpoint: str, directory: Path = DIRECTORY) -> None:
        _check_number("the size of shared memory", size_bytes, least=1)
        self.name = f"sluice-{os.getpid()}-{uuid.uuid4().hex}"
        self.endpoint = endpoint
        self.size_bytes = size_bytes
        self._path = directory / self.name
        try:
            self._mapping = _make(self._path, size_bytes)
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise InvalidRequest(
                f"shared memory of {size_bytes} bytes cannot be made in {directory}: {reason}"
            ) from error
        self._view = memoryview(self._mapping)
        self._is_open = True

    def __repr__(self) -> str:
        state = f"{self.size_bytes} bytes, registered at {self.endpoint}" if self._is_open else "closed"
        return f"<{type(self).__name__} {self.name}; {state}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    @property
    def key(self) -> str:
        """What shm_open knows it by."""
        return f"/{self.name}"

    def write(self, array: Array, offset: int = 0) -> "SharedTensor":
        """Copy an array of any datatype of the protocol (BYTES in wire form) there, and give it as an input.

        InvalidRequest when it is no such array, or does not fit behind `offset` (bytes).
        """
        if not isinstance(array, np.ndarray):
            raise InvalidRequest(f"shared memory takes numpy arrays, got {type(array).__name__}")
        try:
            datatype, raw = tensors.of_array(array).name, tensors.to_buffer(array)
        except TensorError as error:
            raise InvalidRequest(f"an array for shared memory: {error}") from None
        self._check(offset, len(raw))
        self._view[offset : offset + len(raw)] = raw  # type: ignore[assignment] # a buffer, whatever numpy's stubs say
        return SharedTensor(self, offset, len(raw), datatype, array.shape)

    def room(self, size_bytes: int, offset: int = 0) -> "SharedRoom":
        """Room of `size_bytes` from `offset` on for an output. InvalidRequest when it ends behind the memory.

        An output of BYTES takes 4 bytes for each element besides its own.
        """
        self._check(offset, size_bytes)
        return SharedRoom(self, offset, size_bytes)

    def bytes_at(self, offset: int, size_bytes: int) -> memoryview:
        """What is there, as a view that cannot be written through."""
        self.check_open()
        return self._view[offset : offset + size_bytes].toreadonly()

    def check_open(self) -> None:
        """InvalidRequest once it was closed."""
        if not self._is_open:
            raise InvalidRequest(f"the shared memory {self.name!r} was closed; a request cannot use it any more")

    def close(self) -> None:
        """Give the memory back; arrays that are views of it keep it until they are gone. Closing again does nothing."""
        if not self._is_open:
            return
        self._is_open = False
        self._path.unlink(missing_ok=True)
        # Views of it are not told to go: the mapping ends with the last of them.
        del self._view, self._mapping

    def _check(self, offset: int, size_bytes: int) -> None:
        self.check_open()
        _check_number("an offset in shared memory", offset, least=0)
        _check_number("a size in shared memory", size_bytes, least=0)
        if offset + size_bytes > self.size_bytes:
            raise InvalidRequest(
                f"{size_bytes} bytes from offset {offset} on do not fit into shared memory of {self.size_bytes} bytes"
            )


@dataclass(frozen=True, slots=True, eq=False)
class SharedPart:
    """Part of a shared memory: `size_bytes` at `offset`."""

    memory: SharedMemory
    offset: int
    size_bytes: int

    @property
    def end(self) -> int:
        """The first offset behind it."""
        return self.offset + self.size_bytes


@dataclass(frozen=True, slots=True, eq=False)
class SharedTensor(SharedPart):
    """An input in shared memory, of the protocol's `datatype` ("FP32", ...) and a shape."""

    datatype: str
    shape: tuple[int, ...]


class SharedRoom(SharedPart):
    """Where an output is to go: at most `size_bytes`, at `offset`."""

    __slots__ = ()

    def read(self, dtype: tensors.DType, shape: tuple[int, ...]) -> Array:
        """The output that a server says is there; BYTES are copied. Raises InvalidResponse, ProtoError."""
        count = tensors.element_count(shape)
        if count * dtype.itemsize > self.size_bytes:
            raise InvalidResponse(
                f"{dtype.name} {list(shape)} takes {count * dtype.itemsize} bytes, and the room that the output was "
                f"to go to in shared memory has {self.size_bytes}"
            )
        data = self.memory.bytes_at(self.offset, self.size_bytes)
        return tensors.view(dtype, shape, data[: count * dtype.itemsize] if dtype.itemsize else _elements(data, count))


def _elements(data: memoryview, count: int) -> memoryview:
    """The part of the room that `count` elements of BYTES take by their lengths, as far as it reaches."""
    end = 0
    for _ in range(count):
        if end + _LENGTH.size > len(data):
            break
        end += _LENGTH.size + _LENGTH.unpack_from(data, end)[0]
    return data[:end]


def _make(path: Path, size_bytes: int) -> mmap.mmap:
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        # Taken now: where the system has no room left, writing into a mapping would end the process (SIGBUS).
        os.posix_fallocate(fd, 0, size_bytes)
        return mmap.mmap(fd, size_bytes)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(fd)


def _check_number(what: str, value: int, *, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidRequest(f"{what} is a whole number of bytes, at least {least}, got {value!r}")
