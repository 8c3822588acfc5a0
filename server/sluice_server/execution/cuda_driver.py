"""The little of CUDA's driver API that shared memory needs, by ctypes: no CUDA toolkit is, only the GPU's driver.

The functions and their rules are those of NVIDIA's CUDA Driver API reference, sections 6.5 (initialization), 6.7
(primary contexts), 6.8 (contexts) and 6.13 (memory).
"""

from __future__ import annotations

import ctypes
import logging
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

LIBRARY = "libcuda.so.1"
"""Comes with NVIDIA's driver; where it is not there, there is no GPU to use."""

HANDLE_BYTES = 64
"""CU_IPC_HANDLE_SIZE."""

LAZY_ENABLE_PEER_ACCESS = 1
"""The one flag of cuIpcOpenMemHandle: memory that the driver has on another device is made accessible."""


class CudaError(Exception):
    """A call of the driver failed; the text has its function, the name of the error, and what it means."""


class CudaDriver(Protocol):
    """What regions need of the driver; for any thread. Everything raises `CudaError`, but `close`."""

    devices: int
    """How many GPUs there are, numbered from 0."""

    def open(self, device: int, handle: bytes) -> tuple[int, int]:
        """The address of another process's memory in ours, and how many bytes it has from there on."""

    def close(self, device: int, pointer: int) -> None:
        """Undo one `open`."""

    def read(self, device: int, pointer: int, out: memoryview) -> None:
        """Copy from the device; back when it is done."""

    def write(self, device: int, pointer: int, data: memoryview) -> None:
        """Copy to the device; back when every process sees it there."""


class _IpcHandle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("reserved", ctypes.c_ubyte * HANDLE_BYTES),)


class LibCuda:
    """The driver itself."""

    def __init__(self, library: Any) -> None:
        """`library` has the functions of libcuda.so.1. CudaError when it cannot be used, or no GPU is there."""
        self._library = library
        self._lock = threading.RLock()  # memory may be closed by the collector, in the middle of anything
        self._contexts: dict[int, ctypes.c_void_p] = {}
        """The primary context of each device that was used: what CUDA's runtime, and ONNX Runtime, use as well."""
        self._call("cuInit", ctypes.c_uint(0))
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not count.value:
            raise CudaError("cuDeviceGetCount: there is no GPU")
        self.devices = count.value

    def open(self, device: int, handle: bytes) -> tuple[int, int]:
        """The address of another process's memory in ours, and how many bytes it has from there on."""
        pointer, base, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
        opened = _IpcHandle.from_buffer_copy(handle)
        with self._on(device):
            flags = ctypes.c_uint(LAZY_ENABLE_PEER_ACCESS)
            self._call("cuIpcOpenMemHandle_v2", ctypes.byref(pointer), opened, flags)
            try:
                self._call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
            except CudaError:
                self._call("cuIpcCloseMemHandle", pointer)
                raise
        return pointer.value, base.value + size.value - pointer.value

    def close(self, device: int, pointer: int) -> None:
        """Undo one `open`; that it fails is logged, as whoever lets go of memory has nobody to tell."""
        try:
            with self._on(device):
                self._call("cuIpcCloseMemHandle", ctypes.c_uint64(pointer))
        except CudaError as error:
            logger.warning("CUDA shared memory was not closed", extra={"device": device, "reason": str(error)})

    def read(self, device: int, pointer: int, out: memoryview) -> None:
        """Copy from the device; back when it is done."""
        with self._on(device):
            self._call("cuMemcpyDtoH_v2", _address(out), ctypes.c_uint64(pointer), ctypes.c_size_t(out.nbytes))

    def write(self, device: int, pointer: int, data: memoryview) -> None:
        """Copy to the device; back when every process sees it there."""
        with self._on(device):
            self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(pointer), _address(data), ctypes.c_size_t(data.nbytes))
            # From pageable memory the copy may return before the device has all of it.
            self._call("cuStreamSynchronize", ctypes.c_void_p(None))

    @contextmanager
    def _on(self, device: int) -> Iterator[None]:
        """This thread's calls are about the device, and then about what they were about before."""
        with self._lock:
            context = self._contexts.get(device)
            if context is None:
                context = self._contexts[device] = self._primary_context(device)
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def _primary_context(self, device: int) -> ctypes.c_void_p:
        number, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuDeviceGet", ctypes.byref(number), ctypes.c_int(device))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), number)
        return context

    def _call(self, function: str, *arguments: Any) -> None:
        called = getattr(self._library, function, None)
        if called is None:
            raise CudaError(f"{function} is not in the driver: it is too old")
        code = called(*arguments)
        if code:
            raise CudaError(
                f"{function}: {self._text('cuGetErrorName', code)} ({self._text('cuGetErrorString', code)})"
            )

    def _text(self, function: str, code: int) -> str:
        text = ctypes.c_char_p()
        getattr(self._library, function)(ctypes.c_int(code), ctypes.byref(text))
        return (text.value or b"error %d" % code).decode(errors="replace")


def _address(data: memoryview) -> ctypes.c_void_p:
    """Where bytes are, which may be read-only: ctypes tells that of none."""
    return ctypes.c_void_p(np.frombuffer(data, np.uint8).ctypes.data)


def find_driver() -> tuple[LibCuda | None, str]:
    """The driver of this machine's GPUs, or None and why there is none."""
    try:
        return LibCuda(ctypes.CDLL(LIBRARY)), ""
    except (OSError, CudaError) as error:
        return None, str(error)
