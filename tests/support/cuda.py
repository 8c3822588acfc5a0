"""The functions of libcuda.so.1 that are used, on memory of the host: GPUs for machines without one.

As CUDA does, it wants a current context for what needs one, counts how often a handle is open, and has what was written
there for other processes once the stream is synchronized.
"""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from sluice_server.execution.cuda_driver import HANDLE_BYTES

OK, INVALID_VALUE, INVALID_CONTEXT, INVALID_HANDLE, UNKNOWN = 0, 1, 201, 400, 999
NAMES = {
    INVALID_VALUE: b"CUDA_ERROR_INVALID_VALUE",
    INVALID_CONTEXT: b"CUDA_ERROR_INVALID_CONTEXT",
    INVALID_HANDLE: b"CUDA_ERROR_INVALID_HANDLE",
}
"""UNKNOWN has none, as a code that is newer than the driver."""

CONTEXT = 1000
"""The address of the first device's context."""


class Exported:
    """Memory of a client on a device, which is found by its handle."""

    def __init__(self, device: int, size_bytes: int, offset: int, number: int) -> None:
        self.device = device
        self.offset = offset
        self.handle = number.to_bytes(HANDLE_BYTES, "big")
        self.buffer = (ctypes.c_ubyte * size_bytes)()
        self.seen = bytes(size_bytes)
        """What the client sees."""
        self.times_open = 0

    @property
    def base(self) -> int:
        """Where it is here."""
        return ctypes.addressof(self.buffer)

    def put(self, data: bytes, offset: int = 0) -> None:
        """The client writes."""
        start = self.offset + offset
        self.buffer[start : start + len(data)] = data  # type: ignore[assignment]
        self.synchronize()

    def get(self, offset: int = 0, size_bytes: int | None = None) -> bytes:
        """What the client reads."""
        data = self.seen[self.offset + offset :]
        return data if size_bytes is None else data[:size_bytes]

    def synchronize(self) -> None:
        """What was written is there for everybody."""
        self.seen = bytes(self.buffer)


class FakeCuda:
    """The library: `fails` are codes that its functions return in place of doing anything, by their names."""

    def __init__(self, devices: int = 2) -> None:
        self.fails: dict[str, int] = {}
        self._devices = devices
        self._exported: list[Exported] = []
        self._local = threading.local()

    def export(self, size_bytes: int, *, device: int = 0, offset: int = 0) -> Exported:
        """A client's memory of which a handle is given away; `offset` is where its handle points to."""
        exported = Exported(device, size_bytes, offset, len(self._exported) + 1)
        self._exported.append(exported)
        return exported

    @property
    def times_open(self) -> int:
        """Handles that are open."""
        return sum(exported.times_open for exported in self._exported)

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("cu") and name in self.fails:
            return lambda *_arguments: self.fails[name]
        return super().__getattribute__(name)

    @property
    def _contexts(self) -> list[int]:
        """Of this thread."""
        if not hasattr(self._local, "contexts"):
            self._local.contexts = []
        contexts: list[int] = self._local.contexts
        return contexts

    def _at(self, pointer: int, size_bytes: int = 0) -> Exported | None:
        """The open memory of the current device that a range is in."""
        for exported in self._exported:
            inside = exported.base <= pointer and pointer + size_bytes <= exported.base + len(exported.buffer)
            if exported.times_open and inside and self._contexts[-1:] == [CONTEXT + exported.device]:
                return exported
        return None

    def cuInit(self, flags: Any) -> int:
        return OK if flags.value == 0 else INVALID_VALUE

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._devices
        return OK

    def cuDeviceGet(self, device: Any, ordinal: Any) -> int:
        device._obj.value = ordinal.value
        return OK

    def cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> int:
        context._obj.value = CONTEXT + device.value
        return OK

    def cuCtxPushCurrent_v2(self, context: Any) -> int:
        self._contexts.append(context.value)
        return OK

    def cuCtxPopCurrent_v2(self, context: Any) -> int:
        context._obj.value = self._contexts.pop()
        return OK

    def cuIpcOpenMemHandle_v2(self, pointer: Any, handle: Any, flags: Any) -> int:
        if flags.value != 1:
            return INVALID_VALUE
        for exported in self._exported:
            if exported.handle == bytes(handle.reserved) and self._contexts[-1:] == [CONTEXT + exported.device]:
                exported.times_open += 1
                pointer._obj.value = exported.base + exported.offset
                return OK
        return INVALID_HANDLE

    def cuIpcCloseMemHandle(self, pointer: Any) -> int:
        found = self._at(pointer.value)
        if found is None:
            return INVALID_VALUE
        found.times_open -= 1
        return OK

    def cuMemGetAddressRange_v2(self, base: Any, size: Any, pointer: Any) -> int:
        found = self._at(pointer.value)
        if found is None:
            return INVALID_VALUE
        base._obj.value, size._obj.value = found.base, len(found.buffer)
        return OK

    def cuMemcpyDtoH_v2(self, target: Any, source: Any, size: Any) -> int:
        if self._at(source.value, size.value) is None:
            return INVALID_VALUE
        ctypes.memmove(target, source.value, size.value)
        return OK

    def cuMemcpyHtoD_v2(self, target: Any, source: Any, size: Any) -> int:
        if self._at(target.value, size.value) is None:
            return INVALID_VALUE
        ctypes.memmove(target.value, source, size.value)
        return OK

    def cuStreamSynchronize(self, stream: Any) -> int:
        if stream.value is not None or not self._contexts:
            return INVALID_CONTEXT
        for exported in self._exported:
            exported.synchronize()
        return OK

    def cuGetErrorName(self, code: Any, text: Any) -> int:
        text._obj.value = NAMES.get(code.value)
        return OK if code.value in NAMES else INVALID_VALUE

    def cuGetErrorString(self, code: Any, text: Any) -> int:
        text._obj.value = NAMES[code.value].removeprefix(b"CUDA_ERROR_").lower() if code.value in NAMES else None
        return OK if code.value in NAMES else INVALID_VALUE
