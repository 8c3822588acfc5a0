"""Fuzzed here: what clients do with regions of shared memory, and meanwhile with the objects."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import strategies as st

from fuzz import serving
from fuzz.inference import WORDS, pb_message
from fuzz.serving import GPU_BYTES, GPU_HANDLE, MEMORY, REGION, Serving, check_at_rest, check_good, judge, judge_answer
from fuzz.subject import joined, parted
from sluice_proto import grpc_service_pb2 as pb
from sluice_server.execution.shared_memory import NAME_BYTES_MAX, REGISTERED_BYTES_MAX
from sluice_server.protocol.dispatch import INFER
from sluice_server.protocol.rpcs import path_of
from sluice_server.status import Code
from support.any_messages import any_message
from support.fakes import eventually
from support.requests import infer_request
from support.shared_memory import put_into_region

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZES = {"small": 16, "page": 4096}
"""The objects that there are, by their names; what else is cut and made whole again is `small`."""

VERBS = ("Register", "Status", "Unregister")
REGISTER, STATUS, UNREGISTER = (path_of(f"SystemSharedMemory{verb}") for verb in VERBS)
GPU_REGISTER, GPU_STATUS, GPU_UNREGISTER = (path_of(f"CudaSharedMemory{verb}") for verb in VERBS)
STEPS = (REGISTER, STATUS, UNREGISTER, INFER, "cut", "mend", "remove", GPU_REGISTER, GPU_STATUS, GPU_UNREGISTER)
"""By the first byte of a message."""


class Regions:
    """Several steps: calls about regions, requests that name some, and what the owner of an object does to it."""

    def __init__(self, server: Serving, memory: Path) -> None:
        self._server = server
        self._memory = memory
        self._known: dict[str, tuple[str | int, int, int]] = {}
        """By name: an object's key, offset and size; or a GPU's number, 0 and a size."""
        self._mend()

    def check(self, data: bytes) -> None:
        """After each step exactly those regions are there that a plain table says."""
        for message in parted(data):
            self._step(STEPS[message[0] % len(STEPS)] if message else "mend", message[1:])
        self._end(UNREGISTER, b"")
        self._end(GPU_UNREGISTER, b"")
        self._known.clear()
        eventually(lambda: not self._server.gpu.times_open, "the memory of the GPU is let go")
        self._mend()

    def _step(self, step: str, message: bytes) -> None:
        if step == "cut":
            with (self._memory / "small").open("wb"):
                pass
        elif step == "remove":
            (self._memory / "small").unlink(missing_ok=True)
        elif step == "mend":
            self._mend()
        else:
            status, payload = self._end(step, message)
            judges = {
                REGISTER: self._registered,
                GPU_REGISTER: self._registered_on_gpu,
                STATUS: self._told,
                GPU_STATUS: self._told_of_gpu,
                UNREGISTER: self._unregistered,
                GPU_UNREGISTER: self._unregistered_on_gpu,
                INFER: self._ran,
            }
            judges[step](message, status, payload)

    def _mend(self) -> None:
        for name, size_bytes in SIZES.items():
            with (self._memory / name).open("ab") as file:
                file.truncate(size_bytes)

    def _end(self, path: str, message: bytes) -> tuple[Any, bytes]:
        (end,) = self._server.end_of(message, path).ends
        return end

    def _registered(self, message: bytes, status: Any, _payload: bytes) -> None:
        if status.code is not Code.OK:
            judge_refusal(status)
            return
        asked = pb.SystemSharedMemoryRegisterRequest.FromString(message)
        path = self._memory / asked.key.lstrip("/")
        assert path.parent == self._memory
        assert 0 < asked.byte_size <= path.stat().st_size - asked.offset
        self._enter(asked.name, (asked.key, asked.offset, asked.byte_size))

    def _registered_on_gpu(self, message: bytes, status: Any, _payload: bytes) -> None:
        if status.code is not Code.OK:
            judge_refusal(status)
            return
        asked = pb.CudaSharedMemoryRegisterRequest.FromString(message)
        assert (asked.raw_handle, asked.device_id) == (GPU_HANDLE, 0)
        assert 0 < asked.byte_size <= GPU_BYTES
        self._enter(asked.name, (asked.device_id, 0, asked.byte_size))

    def _enter(self, name: str, region: tuple[str | int, int, int]) -> None:
        assert name not in self._known
        assert 0 < len(name.encode()) <= NAME_BYTES_MAX
        self._known[name] = region
        assert sum(size for _, _, size in self._known.values()) <= REGISTERED_BYTES_MAX

    def _told(self, message: bytes, status: Any, payload: bytes) -> None:
        regions = self._of_status(message, status, str)
        if regions is not None:
            told = pb.SystemSharedMemoryStatusResponse.FromString(payload).regions
            assert {key: (region.key, region.offset, region.byte_size) for key, region in told.items()} == regions

    def _told_of_gpu(self, message: bytes, status: Any, payload: bytes) -> None:
        regions = self._of_status(message, status, int)
        if regions is not None:
            told = pb.CudaSharedMemoryStatusResponse.FromString(payload).regions
            assert {key: (region.device_id, 0, region.byte_size) for key, region in told.items()} == regions

    def _of_status(self, message: bytes, status: Any, kind: type) -> dict[str, Any] | None:
        """What an answer is to tell; None for a refusal, which is right."""
        try:
            name = pb.SystemSharedMemoryStatusRequest.FromString(message).name  # all of these have one field
        except DecodeError:
            assert status.code is Code.INVALID_ARGUMENT
            return None
        known = {key: region for key, region in self._known.items() if isinstance(region[0], kind)}
        if name and name not in known:
            assert status.code is Code.NOT_FOUND
            return None
        assert status.code is Code.OK, status
        return {name: known[name]} if name else known

    def _unregistered(self, message: bytes, status: Any, _payload: bytes) -> None:
        self._forget(message, status, str)

    def _unregistered_on_gpu(self, message: bytes, status: Any, _payload: bytes) -> None:
        self._forget(message, status, int)

    def _forget(self, message: bytes, status: Any, kind: type) -> None:
        if status.code is not Code.OK:
            assert status.code is Code.INVALID_ARGUMENT
            return
        name = pb.SystemSharedMemoryUnregisterRequest.FromString(message).name
        for each in [name] if name else list(self._known):
            if each in self._known and isinstance(self._known[each][0], kind):
                del self._known[each]

    @staticmethod
    def _ran(message: bytes, status: Any, payload: bytes) -> None:
        if status.code is Code.OK:
            judge_answer(message, payload)
        else:
            judge(message, status.code, status.message)

    def look(self) -> None:
        """Good requests are answered, none is left, and a region can be registered and used."""
        check_good(self._server)
        check_at_rest(self._server.manager.served())
        self.check(joined([step(REGISTER, registration("fine", "/page", 0, 4096)), step(INFER, request("fine"))]))


def judge_refusal(status: Any) -> None:
    """A registration that was refused."""
    refused = (Code.INVALID_ARGUMENT, Code.ALREADY_EXISTS, Code.INTERNAL, Code.RESOURCE_EXHAUSTED)
    assert status.code in refused, status
    assert status.code is not Code.INTERNAL or status.message.startswith("Unable to open shared memory region")
    assert status.message


def step(kind: str, message: Any = None) -> bytes:
    """A message of an input."""
    return bytes([STEPS.index(kind)]) + (b"" if message is None else pb_message(message))


def registration(name: str, key: str, offset: int, byte_size: int) -> pb.SystemSharedMemoryRegisterRequest:
    return pb.SystemSharedMemoryRegisterRequest(name=name, key=key, offset=offset, byte_size=byte_size)


def on_gpu(name: str, handle: bytes, device: int, byte_size: int) -> pb.CudaSharedMemoryRegisterRequest:
    return pb.CudaSharedMemoryRegisterRequest(name=name, raw_handle=handle, device_id=device, byte_size=byte_size)


def request(region: str) -> pb.ModelInferRequest:
    """One with its input and its output in a region."""
    built = infer_request("any", {"X": np.ones((1, 2), np.float32)}, outputs=["Y"])
    del built.raw_input_contents[:]
    put_into_region(built.inputs[0], region, 8)
    put_into_region(built.outputs[0], region, 8, offset=8)
    return built


def region_seeds() -> list[bytes]:
    """Regions that are registered, told of, used, cut, removed and forgotten; and wrong ones."""
    small, page = step(REGISTER, registration("s", "small", 0, 16)), registration("p", "/page", 4000, 96)
    told, forgotten = pb.SystemSharedMemoryStatusRequest(name="s"), pb.SystemSharedMemoryUnregisterRequest(name="s")
    gpu = step(GPU_REGISTER, on_gpu("s", GPU_HANDLE, 0, 16))
    return [
        joined([gpu, step(GPU_STATUS, told), step(INFER, request("s")), step(GPU_UNREGISTER, forgotten), small]),
        joined([gpu, small, gpu, step(STATUS), step(UNREGISTER), step(GPU_STATUS), step(GPU_UNREGISTER), small]),
        joined([step(GPU_REGISTER, on_gpu("a", b"x", 0, 1)), step(GPU_REGISTER, on_gpu("b", GPU_HANDLE, 1, 1))]),
        joined([small, step(STATUS, told), step(INFER, request("s")), step(UNREGISTER, forgotten), step(STATUS)]),
        joined([small, step("cut"), step(INFER, request("s")), step("mend"), step(INFER, request("s"))]),
        joined([small, step("remove"), step(INFER, request("s")), small, step("mend"), step(INFER, request("s"))]),
        joined([small, small, step(REGISTER, page), step(STATUS), step(UNREGISTER), step(INFER, request("p"))]),
        joined([step(REGISTER, registration("n", "/nope", 0, 1)), step(REGISTER, registration("b", "/page", 4090, 7))]),
    ]


KEYS = ("small", "/small", "page", "/page", "//page", "/nope", "..", "/..", "a/b", "")
NAMES = ("s", "p", REGION, "", "x" * (NAME_BYTES_MAX + 1))
NUMBERS = st.sampled_from([0, 1, 8, 15, 16, 17, 4095, 4096, 4097, 2**40, 2**63, 2**64 - 1])


@st.composite
def built_regions(draw: st.DrawFn) -> bytes:
    """A few steps with names and ranges that may be right."""
    steps = []
    for _ in range(draw(st.integers(1, 6))):
        kind = draw(st.sampled_from([REGISTER, REGISTER, *STEPS]))
        name = draw(st.sampled_from(NAMES))
        if kind == REGISTER:
            key, offset, size = draw(st.sampled_from(KEYS)), draw(NUMBERS), draw(NUMBERS)
            steps.append(step(kind, registration(name, key, offset, size)))
        elif kind == INFER:
            steps.append(step(kind, draw(st.just(request(name)) | any_message(pb.ModelInferRequest, WORDS))))
        elif kind == GPU_REGISTER:
            handle = draw(st.sampled_from([GPU_HANDLE, GPU_HANDLE, bytes(64), GPU_HANDLE[1:], b""]))
            device = draw(st.sampled_from([0, 0, 1, 2, -1, 2**63 - 1]))
            size = draw(st.sampled_from([16, GPU_BYTES, GPU_BYTES + 1]) | NUMBERS)
            steps.append(step(kind, on_gpu(name, handle, device, size)))
        elif kind in (STATUS, UNREGISTER, GPU_STATUS, GPU_UNREGISTER):
            steps.append(step(kind, pb.SystemSharedMemoryStatusRequest(name=name)))
        else:
            steps.append(step(kind))
    return joined(steps)


@contextmanager
def open_regions(directory: Path) -> Iterator[Regions]:
    with serving.serving(directory) as server:
        server.end_of(b"", UNREGISTER)
        yield Regions(server, directory / MEMORY)
