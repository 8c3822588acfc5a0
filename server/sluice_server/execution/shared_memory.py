"""Shared memory: the regions that clients of this machine register, and tensors in them.

Those of a GPU's memory are in `cuda_memory.py`; here are those of system memory, and what all have in common.

A region of system memory is a part of a POSIX shared memory object that belongs to a client, who may cut or remove it
at any time. To touch a mapping beyond the end of its file is a SIGBUS, which ends the process; so nothing here is
mapped. Inputs are read by `preadv` into memory of our own, and what is not there any more is a short read; outputs are
written by `pwrite`, after a look at the object's size.

Invariants:

* an object is open as long as its region is registered or a request uses it, and closed with the last of them: a region
  can be unregistered at any time, and what is in flight is not harmed;
* nothing outside of a region is read or written, and no object is made larger: only when its client cuts it in the
  instant between the look and the write does the write restore some of it;
* an object that has no name any more is an error: whoever has its name now has another one, and would read the answers
  of earlier requests there.
"""

from __future__ import annotations

import errno
import itertools
import os
import stat
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, TypeVar

import numpy as np

from sluice_proto import tensors
from sluice_proto.errors import TensorError
from sluice_server.errors import AlreadyExists, Internal, InvalidArgument, NotFound, ResourceExhausted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Buffer

    from sluice_proto.tensors import DType
    from sluice_server.errors import SluiceError

DIRECTORY = Path("/dev/shm")  # noqa: S108 - not a temporary file, but where Linux keeps what shm_open names
"""Where Linux has its shared memory objects. It is opened there, as the C library does, because Python has no
shm_open of its own."""

NAME_BYTES_MAX = 1024
"""Names of regions are kept and listed; an honest one has some tens of characters."""

KEY_BYTES_MAX = 255
"""NAME_MAX of Linux's file systems."""

REGIONS_MAX = 1024
"""Each is an open file, and the usual limit of a process is a few thousand of these."""

REGISTERED_BYTES_MAX = 1 << 40
"""1 TiB over all regions. They cost the server no memory: what a request reads of them is bounded with its queue."""


RegionT = TypeVar("RegionT", bound="Region")


class SharedObject:
    """An open shared memory object; closed when nobody refers to it any more."""

    __slots__ = ("fd", "identity", "key")

    def __init__(self, key: str, directory: Path) -> None:
        """Open it as shm_open does: `InvalidArgument` for a key that is no name, `Internal` for one of no use."""
        self.fd = -1
        self.key = key
        name = key.lstrip("/")
        if not name or "/" in name or "\0" in name or name in (".", "..") or len(os.fsencode(name)) > KEY_BYTES_MAX:
            raise InvalidArgument(
                f"Unable to open shared memory region: {_shown(key)} is no name of a shared memory object, which is a"
                f" slash and then up to {KEY_BYTES_MAX} bytes without another slash"
            )
        try:
            self.fd = os.open(directory / name, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            found = os.fstat(self.fd)
        except OSError as error:
            raise Internal(f"Unable to open shared memory region: '{key}': {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise Internal(f"Unable to open shared memory region: '{key}': it is no shared memory object")
        self.identity = (found.st_dev, found.st_ino)

    def __del__(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)

    def stat(self) -> os.stat_result:
        """Its size and links as they are now."""
        return os.fstat(self.fd)


@dataclass(frozen=True, slots=True)
class Region(ABC):
    """A registered part of a client's memory, of whichever kind: `size_bytes` from `offset` on."""

    kind: ClassVar[str]
    """What messages call its kind."""

    name: str
    offset: int
    size_bytes: int

    @property
    @abstractmethod
    def identity(self) -> tuple[int, int]:
        """Equal for regions of the same memory, whose offsets can be compared."""

    @abstractmethod
    def check(self, end: int) -> None:
        """Raise unless the memory is still there up to this byte, counted as `offset` is."""

    @abstractmethod
    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out`, bytes, with what is at `offset` now."""

    @abstractmethod
    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes there."""

    def window(self, offset: int, size_bytes: int) -> Window:
        """A part of the region that is there now; `InvalidArgument` or `NotFound` when it is not."""
        if offset >= self.size_bytes:
            raise InvalidArgument(
                f"Invalid offset for shared memory region: '{self.name}' has {self.size_bytes} bytes, and offset"
                f" {offset} is not among them"
            )
        if offset + size_bytes > self.size_bytes:
            raise InvalidArgument(
                f"Invalid offset + byte size for shared memory region: '{self.name}' has {self.size_bytes} bytes, and"
                f" {size_bytes} from offset {offset} on are more"
            )
        window = Window(self, self.offset + offset, size_bytes)
        window.check(size_bytes)
        return window


@dataclass(frozen=True, slots=True)
class SystemRegion(Region):
    """A part of a shared memory object."""

    kind = "system"

    object: SharedObject

    @property
    def identity(self) -> tuple[int, int]:
        """The object's file system and number there."""
        return self.object.identity

    def check(self, end: int) -> None:
        """Raise unless the object still has its name, and so many bytes."""
        found = self.object.stat()
        if not found.st_nlink:
            raise NotFound(
                f"Unable to find shared memory region: '{self.name}' has vanished, as its object"
                f" '{self.object.key}' was removed; register it again"
            )
        if found.st_size < end:
            raise self._is_cut(found.st_size)

    def read(self, offset: int, out: memoryview) -> None:
        """Fill `out`; what is not there any more is an error."""
        try:
            while out:
                count = os.preadv(self.object.fd, [out], offset)
                if not count:
                    raise self._is_cut(offset)
                out, offset = out[count:], offset + count
        except OSError as error:
            raise self._failed("read", error) from error

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes there."""
        try:
            while data:
                count = os.pwrite(self.object.fd, data, offset)
                data, offset = data[count:], offset + count
        except OSError as error:
            raise self._failed("written", error) from error

    def _is_cut(self, size_bytes: int) -> InvalidArgument:
        return InvalidArgument(
            f"Invalid offset + byte size for shared memory region: '{self.name}' was registered with"
            f" {self.size_bytes} bytes from offset {self.offset} on, but its object"
            f" '{self.object.key}' was cut and ends at byte {size_bytes} now"
        )

    def _failed(self, verb: str, error: OSError) -> Internal:
        reason = error.strerror or errno.errorcode.get(error.errno or 0, "I/O error")
        return Internal(f"shared memory region '{self.name}' cannot be {verb}: {reason}")


class Window(NamedTuple):
    """Where one tensor of a request is, or is to go: `size_bytes` of a region's memory, from `offset` of that on."""

    region: Region
    offset: int
    size_bytes: int

    def check(self, size_bytes: int) -> None:
        """Raise unless the window's first `size_bytes` are still there."""
        self.region.check(self.offset + size_bytes)

    def read_into(self, out: np.ndarray) -> None:
        """Fill a C-contiguous array of as many bytes."""
        self.check(self.size_bytes)
        self.region.read(self.offset, memoryview(out.reshape(-1).view(np.uint8)))  # type: ignore[arg-type] # a buffer, whatever numpy's stubs say

    def write(self, data: Buffer) -> None:
        """Put data, which is no larger than the window, at its start."""
        view = memoryview(data)
        self.check(len(view))
        self.region.write(self.offset, view)


class SharedTensor(NamedTuple):
    """An input in shared memory, of a valid shape; of a fixed-size type its window has the bytes that this takes."""

    window: Window
    dtype: DType
    shape: tuple[int, ...]
    refuse: Callable[[TensorError], SluiceError]
    """Makes the client's error of BYTES that are not as many elements as the shape says."""

    def read(self) -> np.ndarray:
        """The tensor as it is now, in an array of its own."""
        if self.dtype.itemsize:
            out = np.empty(self.shape, self.dtype.numpy)
            self.window.read_into(out)
            return out
        data = np.empty(self.window.size_bytes, np.uint8)
        self.window.read_into(data)
        try:
            return tensors.view(self.dtype, self.shape, data)
        except TensorError as error:
            raise self.refuse(error) from error


class SharedTensors(NamedTuple):
    """What a request has in shared memory: inputs to read, and where to write outputs, both by their names."""

    inputs: Mapping[str, SharedTensor]
    outputs: Mapping[str, Window]

    @property
    def kind(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """What requests must have in common to be in one batch."""
        return tuple(self.inputs), tuple(self.outputs)

    @property
    def input_bytes(self) -> int:
        """What reading the inputs takes."""
        return sum(tensor.window.size_bytes for tensor in self.inputs.values())


def gather(name: str, requests: Sequence[SharedTensors]) -> np.ndarray:
    """One input of a batch, with the rows of all its requests in order."""
    parts = [request.inputs[name] for request in requests]
    first = parts[0]
    if len(parts) == 1:
        return first.read()
    if not first.dtype.itemsize:
        return np.concatenate([part.read() for part in parts])
    rows = sum(part.shape[0] for part in parts)
    out = np.empty((rows, *first.shape[1:]), first.dtype.numpy)
    start = 0
    for part in parts:
        stop = start + part.shape[0]
        part.window.read_into(out[start:stop])
        start = stop
    return out


def write_outputs(windows: Mapping[str, Window], raws: Mapping[str, Buffer]) -> None:
    """Write one request's outputs, all of them or, when one does not fit or two overlap, none."""
    taken: list[tuple[tuple[int, int], int, int, str]] = []
    for name, window in windows.items():
        needed = len(memoryview(raws[name]))
        if needed > window.size_bytes:
            raise Internal(
                f"shared memory size specified with the request for output '{name}' ({window.size_bytes} bytes) should"
                f" be at least {needed} bytes to hold the results"
            )
        window.check(needed)
        if needed:
            taken.append((window.region.identity, window.offset, window.offset + needed, name))
    taken.sort()
    for before, after in itertools.pairwise(taken):
        if before[0] == after[0] and after[1] < before[2]:
            raise InvalidArgument(
                f"outputs '{before[3]}' and '{after[3]}' overlap in shared memory: the first takes"
                f" {before[2] - before[1]} bytes, and the second begins {after[1] - before[1]} bytes behind its start"
            )
    for name, window in windows.items():
        window.write(raws[name])


class RegionTable:
    """The registered regions by name; for any thread."""

    def __init__(
        self,
        directory: Path = DIRECTORY,
        *,
        regions_max: int = REGIONS_MAX,
        registered_bytes_max: int = REGISTERED_BYTES_MAX,
    ) -> None:
        self._directory = directory
        self._regions_max = regions_max
        self._registered_bytes_max = registered_bytes_max
        self._regions: dict[str, Region] = {}
        self._lock = threading.Lock()

    def register(self, name: str, key: str, offset: int, size_bytes: int) -> None:
        """Enter a part of the object that `key` names.

        AlreadyExists for a known name, InvalidArgument for a bad name, key or range, Internal when the object cannot
        be opened, ResourceExhausted beyond the bounds.
        """

        def open_object() -> Region:
            opened = SharedObject(key, self._directory)
            end = opened.stat().st_size
            if not size_bytes or offset + size_bytes > end:
                raise InvalidArgument(
                    f"failed to register shared memory region '{name}': invalid args: {size_bytes} bytes from offset"
                    f" {offset} on are not a part of '{key}', which has {end} bytes"
                )
            return SystemRegion(name, offset, size_bytes, opened)

        self.enter(name, size_bytes, open_object)

    def enter(self, name: str, size_bytes: int, open_region: Callable[[], Region]) -> None:
        """Enter a region of any kind, which is opened once nothing else is against it. Names are of all kinds."""
        if not name or len(name.encode()) > NAME_BYTES_MAX:
            raise InvalidArgument(
                f"failed to register shared memory region {_shown(name)}: a name has 1 to {NAME_BYTES_MAX} bytes"
            )
        with self._lock:
            if name in self._regions:
                raise AlreadyExists(f"shared memory region '{name}' already in manager")
            self._check_bounds(name, size_bytes)
            self._regions[name] = open_region()

    def _check_bounds(self, name: str, size_bytes: int) -> None:
        if len(self._regions) >= self._regions_max:
            raise ResourceExhausted(
                f"failed to register shared memory region '{name}': {self._regions_max} are registered, and no more are"
                " taken; unregister some"
            )
        registered = sum(region.size_bytes for region in self._regions.values())
        if registered + size_bytes > self._registered_bytes_max:
            raise ResourceExhausted(
                f"failed to register shared memory region '{name}': with it {registered + size_bytes} bytes would be"
                f" registered, and {self._registered_bytes_max} may be; unregister some"
            )

    def find(self, name: str) -> Region:
        """The region that a request names, or `NotFound`."""
        region = self._regions.get(name)
        if region is None:
            raise NotFound(f"Unable to find shared memory region: '{name}'")
        return region

    def select(self, kind: type[RegionT], name: str = "") -> list[RegionT]:
        """The region of this kind and name, all regions of the kind without one; `NotFound` for an unknown name."""
        with self._lock:
            found = [region for region in self._regions.values() if isinstance(region, kind)]
        if not name:
            return found
        named = [region for region in found if region.name == name]
        if not named:
            raise NotFound(f"Unable to find {kind.kind} shared memory region: '{name}'")
        return named

    def unregister(self, kind: type[Region], name: str = "") -> None:
        """Forget the region of this kind and name, all of the kind without one; an unknown name is no error."""
        with self._lock:
            names = [name] if name else list(self._regions)
            for each in names:
                if isinstance(self._regions.get(each), kind):
                    del self._regions[each]


def _shown(text: str) -> str:
    """Text of a client in a message, however long."""
    return repr(text) if len(text) <= KEY_BYTES_MAX else f"{text[:KEY_BYTES_MAX]!r}..."
