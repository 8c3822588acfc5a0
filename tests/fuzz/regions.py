"""Fuzzed here: what clients do with regions of shared memory, and meanwhile with the objects."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import strategies as st

from fuzz import serving
from fuzz.inference import WORDS, pb_message
from fuzz.serving import MEMORY, REGION, Serving, check_at_rest, check_good, judge, judge_answer
from fuzz.subject import joined, parted
from sluice_proto import grpc_service_pb2 as pb
from sluice_server.execution.shared_memory import NAME_BYTES_MAX, REGISTERED_BYTES_MAX
from sluice_server.protocol.dispatch import INFER
from sluice_server.protocol.rpcs import path_of
from sluice_server.status import Code
from support.any_messages import any_message
from support.requests import infer_request
from support.shared_memory import put_into_region

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SIZES = {"small": 16, "page": 4096}
"""The objects that there are, by their names; what else is cut and made whole again is `small`."""

REGISTER, STATUS, UNREGISTER = (path_of(f"SystemSharedMemory{verb}") for verb in ("Register", "Status", "Unregister"))
STEPS = (REGISTER, STATUS, UNREGISTER, INFER, "cut", "mend", "remove")
"""By the first byte of a message."""


class Regions:
    """Several steps: calls about regions, requests that name some, and what the owner of an object does to it."""

    def __init__(self, server: Serving, memory: Path) -> None:
        self._server = server
        self._memory = memory
        self._known: dict[str, tuple[str, int, int]] = {}
        self._mend()

    def check(self, data: bytes) -> None:
        """After each step exactly those regions are there that a plain table says."""
        for message in parted(data):
            self._step(STEPS[message[0] % len(STEPS)] if message else "mend", message[1:])
        self._end(UNREGISTER, b"")
        self._known.clear()
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
            judges = {REGISTER: self._registered, STATUS: self._told, UNREGISTER: self._unregistered, INFER: self._ran}
            judges[step](message, status, payload)

    def _mend(self) -> None:
        for name, size_bytes in SIZES.items():
            with (self._memory / name).open("ab") as file:
                file.truncate(size_bytes)

    def _end(self, path: str, message: bytes) -> tuple[Any, bytes]:
        (end,) = self._server.end_of(message, path).ends
        return end

    def _registered(self, message: bytes, status: Any, _payload: bytes) -> None:
        if status.code is Code.OK:
            asked = pb.SystemSharedMemoryRegisterRequest.FromString(message)
            assert asked.name not in self._known
            assert 0 < len(asked.name.encode()) <= NAME_BYTES_MAX
            path = self._memory / asked.key.lstrip("/")
            assert path.parent == self._memory
            assert 0 < asked.byte_size <= path.stat().st_size - asked.offset
            self._known[asked.name] = (asked.key, asked.offset, asked.byte_size)
            assert sum(size for _, _, size in self._known.values()) <= REGISTERED_BYTES_MAX
        else:
            refused = (Code.INVALID_ARGUMENT, Code.ALREADY_EXISTS, Code.INTERNAL, Code.RESOURCE_EXHAUSTED)
            assert status.code in refused, status
            assert status.code is not Code.INTERNAL or status.message.startswith("Unable to open shared memory region")
            assert status.message

    def _told(self, message: bytes, status: Any, payload: bytes) -> None:
        try:
            name = pb.SystemSharedMemoryStatusRequest.FromString(message).name
        except DecodeError:
            assert status.code is Code.INVALID_ARGUMENT
            return
        if name and name not in self._known:
            assert status.code is Code.NOT_FOUND
            return
        assert status.code is Code.OK, status
        regions = pb.SystemSharedMemoryStatusResponse.FromString(payload).regions
        told = {key: (region.key, region.offset, region.byte_size) for key, region in regions.items()}
        assert told == ({name: self._known[name]} if name else self._known)

    def _unregistered(self, message: bytes, status: Any, _payload: bytes) -> None:
        if status.code is not Code.OK:
            assert status.code is Code.INVALID_ARGUMENT
            return
        name = pb.SystemSharedMemoryUnregisterRequest.FromString(message).name
        if name:
            self._known.pop(name, None)
        else:
            self._known.clear()

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


def step(kind: str, message: Any = None) -> bytes:
    """A message of an input."""
    return bytes([STEPS.index(kind)]) + (b"" if message is None else pb_message(message))


def registration(name: str, key: str, offset: int, byte_size: int) -> pb.SystemSharedMemoryRegisterRequest:
    return pb.SystemSharedMemoryRegisterRequest(name=name, key=key, offset=offset, byte_size=byte_size)


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
    return [
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
        elif kind in (STATUS, UNREGISTER):
            steps.append(step(kind, pb.SystemSharedMemoryStatusRequest(name=name)))
        else:
            steps.append(step(kind))
    return joined(steps)


@contextmanager
def open_regions(directory: Path) -> Iterator[Regions]:
    with serving.serving(directory) as server:
        server.end_of(b"", UNREGISTER)
        yield Regions(server, directory / MEMORY)
