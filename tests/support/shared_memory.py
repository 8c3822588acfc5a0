"""Shared memory objects of a test, and requests whose tensors are in regions of them."""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sluice_proto import grpc_service_pb2 as pb
from support.requests import parameter

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

DIRECTORY = Path("/dev/shm")


class Object:
    """A shared memory object with a name of its own; its file is removed at the end."""

    def __init__(self, size_bytes: int, directory: Path = DIRECTORY) -> None:
        name = f"sluice-test-{uuid.uuid4().hex}"
        self.key = f"/{name}"
        self.path = directory / name
        self.size_bytes = size_bytes
        with self.path.open("xb") as file:
            file.truncate(size_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.unlink()

    def put(self, data: bytes | np.ndarray, offset: int = 0) -> None:
        """Write at an offset."""
        with self.path.open("r+b") as file:
            file.seek(offset)
            file.write(data if isinstance(data, bytes) else data.tobytes())

    def get(self, offset: int = 0, size_bytes: int | None = None) -> bytes:
        """What is there now."""
        data = self.path.read_bytes()[offset:]
        return data if size_bytes is None else data[:size_bytes]

    def cut(self, size_bytes: int) -> None:
        """Make it smaller, as its owner may at any time."""
        os.truncate(self.path, size_bytes)

    def unlink(self) -> None:
        """Remove its name."""
        self.path.unlink(missing_ok=True)

    def times_open(self) -> int:
        """How often this process has it open, and the server in it."""
        found = 0
        for fd in Path("/proc/self/fd").iterdir():
            try:
                found += str(fd.readlink()).removesuffix(" (deleted)") == str(self.path)
            except FileNotFoundError:  # closed in between, as the one is that the folder was read by
                continue
        return found

    def registration(self, name: str, offset: int = 0) -> pb.SystemSharedMemoryRegisterRequest:
        """What registers it, from an offset on, under this name."""
        size_bytes = self.size_bytes - offset
        return pb.SystemSharedMemoryRegisterRequest(name=name, key=self.key, offset=offset, byte_size=size_bytes)


def put_into_region(tensor: object, region: str, size_bytes: int, offset: int = 0) -> None:
    """Say of an input or a requested output that it is in a region."""
    values = {"region": region, "byte_size": size_bytes, **({"offset": offset} if offset else {})}
    for key, value in values.items():
        tensor.parameters[f"shared_memory_{key}"].CopyFrom(parameter(value))  # type: ignore[attr-defined]
