"""Captures a share of the inference requests, with what became of them, in a file for `sluice replay`.

Requests are chosen one by one, each with the same chance, when they come. What is written is made and written on a
thread of its own; what that cannot follow is left out and counted. Capturing ends for good when the next request would
make the file larger than it may be, or when the disk fails. Whatever goes wrong costs records, and never a request.

`Capture.armed` is read without a lock, once per request. The counters are the writer thread's; others only read them.
"""

from __future__ import annotations

import collections
import enum
import logging
import os
import random
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sluice_batching import NO_DEADLINE
from sluice_proto.capture import CapturedRequest, CaptureHead, CaptureWriter
from sluice_server.observability.write_behind import WriteBehind

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sluice_proto.grpc_service_pb2 import ModelInferRequest
    from sluice_server.status import Code
    from sluice_server.transport.call import Call

    Redact = Callable[[ModelInferRequest], ModelInferRequest | None]

logger = logging.getLogger(__name__)

MAX_BYTES_DEFAULT = 1 << 30
"""Of a capture file: 1 GiB, a third of the disk that small pods get; some 500,000 requests of 16 floats."""

FLUSH_S = 5.0
"""How long the end of the process waits for the disk."""


@dataclass(frozen=True, slots=True)
class CaptureOptions:
    """What the `--capture-*` flags say. `rate` is above 0, at most 1; `redact` None: requests are written as sent."""

    file: Path
    rate: float = 1.0
    max_bytes: int = MAX_BYTES_DEFAULT
    redact: Redact | None = None


class LeftOut(enum.StrEnum):
    """Why a request that was chosen is not in the file."""

    BEHIND = "behind"
    FULL = "full"
    DISK = "disk"
    REDACTED = "redacted"
    REDACT_FAILED = "redact_failed"
    SEQUENCE = "sequence"
    SHARED_MEMORY = "shared_memory"
    UNREADABLE = "unreadable"


class Ended(NamedTuple):
    """A chosen request at its end: bytes as they came and went; `answer` is empty unless the code is OK."""

    request: bytes
    answer: bytes
    code: Code
    received_ns: int
    deadline_ns: int
    ended_ns: int


class Capturable(NamedTuple):
    """What the file is to have of a request."""

    model: str
    request: bytes
    answer: bytes


@dataclass(frozen=True, slots=True)
class CaptureUsage:
    """What a capture has done so far; `stopped`: it captures no more."""

    requests: int
    size_bytes: int
    left_out: Mapping[LeftOut, int]
    stopped: bool


class Capture:
    """One capture file in the making. `open`, then `chooses` and `put` from any thread, then `close`."""

    def __init__(
        self, options: CaptureOptions, prepare: Callable[[Ended], Capturable | LeftOut], seed: int | None = None
    ) -> None:
        """`prepare` says what is written of a request; it raises nothing. OSError when no file can be made there."""
        folder = options.file.absolute().parent
        if options.file.exists() or options.file.is_symlink():
            raise FileExistsError(f"'{options.file}' is there already, and captures replace nothing: name another file")
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            raise OSError(f"no file can be made in '{folder}'")
        self._options = options
        self._prepare = prepare
        self._chance = random.Random(seed).random  # noqa: S311 - a sample, no secret
        self._started_ns = 0
        self._requests = 0
        self._left_out: collections.Counter[LeftOut] = collections.Counter()
        self._stopped_by: LeftOut | None = None
        self._file: CaptureWriter | None = None
        self._pending: WriteBehind[Ended] | None = None
        self.armed = False

    def open(self) -> None:
        """Make the file and begin; OSError when that fails."""
        options = self._options
        self._started_ns = time.monotonic_ns()
        self._file = CaptureWriter(options.file, CaptureHead(time.time_ns(), options.rate), options.max_bytes)
        self._pending = WriteBehind("capture", self._write, self._end)
        self.armed = True
        logger.info(
            "capturing requests",
            extra={"file": str(options.file), "share": options.rate, "max_bytes": options.max_bytes},
        )

    def chooses(self) -> bool:
        """Whether the request that has just come is to be captured."""
        return self.armed and self._chance() < self._options.rate

    def put(self, call: Call, request: bytes, answer: bytes, code: Code, ended_ns: int) -> None:
        """Take a chosen request that has ended."""
        if self._pending is not None:
            ended = Ended(request, answer, code, call.received_ns, call.deadline_ns, ended_ns)
            self._pending.put(ended, len(request) + len(answer))

    def usage(self) -> CaptureUsage:
        """What has been done so far."""
        behind = 0 if self._pending is None else self._pending.lost
        size_bytes = 0 if self._file is None else self._file.size_bytes
        left_out = {reason: self._left_out[reason] for reason in LeftOut} | {LeftOut.BEHIND: behind}
        return CaptureUsage(self._requests, size_bytes, left_out, self._stopped_by is not None)

    def close(self) -> None:
        """Write what is left, and end. A file without a request is taken away, as it would refuse the next start."""
        self.armed = False
        if self._pending is None or not self._pending.close(FLUSH_S):
            return
        if not self._requests:
            self._options.file.unlink(missing_ok=True)
        usage = self.usage()
        left_out = {f"left_out_{reason}": count for reason, count in usage.left_out.items() if count}
        logger.info("captured requests", extra={"requests": usage.requests, "bytes": usage.size_bytes, **left_out})

    def _write(self, several: Sequence[Ended]) -> None:
        if self._stopped_by is not None:
            self._left_out[self._stopped_by] += len(several)
            return
        records = []
        for ended in several:
            found = self._prepare(ended)
            if isinstance(found, LeftOut):
                self._left_out[found] += 1
            else:
                records.append(self._record(ended, found))
        assert self._file is not None, "it is made before this thread"
        try:
            written = self._file.append(records)
        except OSError as error:
            self._stop(LeftOut.DISK, str(error), len(records))
            return
        self._requests += written
        if written < len(records):
            self._stop(LeftOut.FULL, "the file is as large as it may be", len(records) - written)

    def _record(self, ended: Ended, found: Capturable) -> CapturedRequest:
        # What came while the server was about to begin counts as come at its start.
        arrival_ns = max(0, ended.received_ns - self._started_ns)
        deadline_ns = 0 if ended.deadline_ns == NO_DEADLINE else max(1, ended.deadline_ns - ended.received_ns)
        service_ns = max(0, ended.ended_ns - ended.received_ns)
        return CapturedRequest(
            arrival_ns, deadline_ns, service_ns, int(ended.code), found.model, found.request, found.answer
        )

    def _stop(self, why: LeftOut, reason: str, left_out: int) -> None:
        self.armed = False
        self._stopped_by = why
        self._left_out[why] += left_out
        logger.warning(
            "no more requests are captured",
            extra={"file": str(self._options.file), "reason": reason, "requests": self._requests},
        )

    def _end(self) -> None:
        assert self._file is not None, "it is made before this thread"
        self._file.close()
