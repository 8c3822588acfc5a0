"""Capture files: inference requests with their arrival times and what became of each. Read and written by this alone.

Version 1, every number little-endian, times in nanoseconds:

    file    | head | record | record | ...            records stand in the order in which the requests ended
    head    | magic "SLUICAP\\n" | version u32 | start u64, unix time | share of the requests that was captured f64 |
    record  | bytes of the body u64 | CRC-32 of the body u32 | CRC-32 of the 12 bytes before u32 | body |
    body    | arrival u64 | time to the deadline u64 | service time u64 | code u32 | bytes of the model's name u32
            | bytes of the request u64 | the model's name, UTF-8 | ModelInferRequest | ModelInferResponse |

An arrival counts from the start on the monotonic clock, and is when the request's message was complete; its service
time lasts from then until the server gave its answer out. Time to the deadline of 0: there was none. `code` is gRPC's.
A response of no bytes: there was none, or it was not to be kept.

Records are only added, so that a file whose writer was killed lacks the end of its last record at most; reading stops
before that. Anything else that is wrong is a CaptureError, which says where.
"""

from __future__ import annotations

import mmap
import os
import struct
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from sluice_proto.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

Data: TypeAlias = bytes | memoryview

MAGIC: Final = b"SLUICAP\n"
VERSION: Final = 1
FILE_MODE: Final = 0o600
"""Requests are what clients sent: nobody else may read them."""

NS_PER_S: Final = 1_000_000_000

_HEAD: Final = struct.Struct("<8sIQd")
_FRAME: Final = struct.Struct("<QI")
_CHECK: Final = struct.Struct("<I")
_BODY: Final = struct.Struct("<QQQIIQ")
_FRAME_BYTES: Final = _FRAME.size + _CHECK.size

EMPTY_FILE_BYTES: Final = _HEAD.size
"""What a capture without any request has."""


@dataclass(frozen=True, slots=True)
class CaptureHead:
    """What holds for the whole file: `started_unix_ns`, and the share of the requests that was captured, up to 1."""

    started_unix_ns: int
    rate: float


@dataclass(frozen=True, slots=True)
class CapturedRequest:
    """One request and what became of it; the module says what the fields mean.

    Of a file that is read, `request` and `response` are views of it.
    """

    arrival_ns: int
    deadline_ns: int
    service_ns: int
    code: int
    model: str
    request: Data
    response: Data = b""


@dataclass(frozen=True, slots=True)
class Capture:
    """A file that was read: its requests in the order of their arrivals, and what a cut-off record at its end has."""

    head: CaptureHead
    requests: tuple[CapturedRequest, ...]
    truncated_bytes: int

    def offsets_s(self) -> list[float]:
        """When the requests arrived, in seconds after the first, ascending: an arrival process for a load."""
        first_ns = self.requests[0].arrival_ns if self.requests else 0
        return [(request.arrival_ns - first_ns) / NS_PER_S for request in self.requests]


class CaptureWriter:
    """Makes a capture file, and adds requests as long as it stays within `max_bytes`. For one thread."""

    def __init__(self, path: Path, head: CaptureHead, max_bytes: int) -> None:
        """OSError when the file is there already or cannot be made; ValueError when not even a head fits."""
        if max_bytes < _HEAD.size:
            raise ValueError(f"a capture file has {_HEAD.size} bytes at least, and may have {max_bytes}")
        self._path = path
        self._max_bytes = max_bytes
        self.size_bytes = 0
        self._file: int | None = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
        self._write((_HEAD.pack(MAGIC, VERSION, head.started_unix_ns, head.rate),))

    def append(self, requests: Iterable[CapturedRequest]) -> int:
        """Add requests in one go, up to the first that does not fit; how many. None is there after an OSError."""
        parts: list[Data] = []
        size_bytes, count = self.size_bytes, 0
        for request in requests:
            record = _record(request)
            size_bytes += sum(map(len, record))
            if size_bytes > self._max_bytes:
                break
            parts += record
            count += 1
        self._write(parts)
        return count

    def close(self) -> None:
        """End the file; once more does nothing."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _write(self, parts: Sequence[Data]) -> None:
        assert self._file is not None, "it is open"
        rest = memoryview(b"".join(parts))
        size_bytes = len(rest)
        try:
            while rest:
                rest = rest[os.write(self._file, rest) :]
        except OSError:
            # Half a record would make every later one unreadable.
            os.ftruncate(self._file, self.size_bytes)
            os.lseek(self._file, self.size_bytes, os.SEEK_SET)
            raise
        self.size_bytes += size_bytes


def _record(request: CapturedRequest) -> tuple[Data, ...]:
    model = request.model.encode()
    times = request.arrival_ns, request.deadline_ns, request.service_ns
    body = (
        _BODY.pack(*times, request.code, len(model), len(request.request)) + model,
        request.request,
        request.response,
    )
    check = 0
    for part in body:
        check = zlib.crc32(part, check)
    frame = _FRAME.pack(sum(map(len, body)), check)
    return (frame, _CHECK.pack(zlib.crc32(frame)), *body)


def read_capture(path: Path) -> Capture:
    """Read a capture file; OSError when that cannot be opened, CaptureError when it is something else or damaged."""
    with path.open("rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size_bytes else b"")
    head = _read_head(path, data)
    requests = []
    offset = _HEAD.size
    while (found := _read_record(path, data, offset)) is not None:
        request, offset = found
        requests.append(request)
    requests.sort(key=lambda request: request.arrival_ns)
    return Capture(head, tuple(requests), len(data) - offset)


def _read_head(path: Path, data: memoryview) -> CaptureHead:
    if bytes(data[: len(MAGIC)]) != MAGIC:
        raise CaptureError(path, 0, "this is no capture file: it does not begin with SLUICAP")
    if len(data) < _HEAD.size:
        raise CaptureError(path, len(data), f"the file ends within its head of {_HEAD.size} bytes")
    _, version, started_unix_ns, rate = _HEAD.unpack_from(data)
    if version != VERSION:
        raise CaptureError(path, len(MAGIC), f"the format's version is {version}, this reads version {VERSION}")
    return CaptureHead(started_unix_ns, rate)


def _read_record(path: Path, data: memoryview, offset: int) -> tuple[CapturedRequest, int] | None:
    """The record at an offset, and where the next one begins; None when the file ends before this one does."""
    start = offset + _FRAME_BYTES
    if start > len(data):
        return None
    frame = data[offset : offset + _FRAME.size]
    if _CHECK.unpack_from(data, offset + _FRAME.size)[0] != zlib.crc32(frame):
        raise CaptureError(path, offset, "the head of a record is damaged")
    body_bytes, check = _FRAME.unpack(frame)
    if start + body_bytes > len(data):
        return None
    body = data[start : start + body_bytes]
    if zlib.crc32(body) != check:
        raise CaptureError(path, start, f"the {body_bytes} bytes of a record are damaged")
    return _read_body(path, start, body), start + body_bytes


def _read_body(path: Path, offset: int, body: memoryview) -> CapturedRequest:
    # Its sums are right, so that only a writer with an error of its own could have written what is refused here.
    if len(body) < _BODY.size:
        raise CaptureError(path, offset, f"a record has {len(body)} bytes, fewer than its numbers take")
    arrival_ns, deadline_ns, service_ns, code, model_bytes, request_bytes = _BODY.unpack_from(body)
    request_start = _BODY.size + model_bytes
    response_start = request_start + request_bytes
    if response_start > len(body):
        raise CaptureError(path, offset, "the model's name and the request are longer than their record")
    try:
        model = str(body[_BODY.size : request_start], "utf-8")
    except UnicodeDecodeError:
        raise CaptureError(path, offset + _BODY.size, "the model's name is not UTF-8") from None
    request, response = body[request_start:response_start], body[response_start:]
    return CapturedRequest(arrival_ns, deadline_ns, service_ns, code, model, request, response)
