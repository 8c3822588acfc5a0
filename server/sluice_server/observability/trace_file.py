"""Triton's JSON trace files, written by a thread of their own.

A file is one JSON array, whole after each trace: the closing bracket is overwritten by what follows. Of each trace
there are

    {"id": 1, "model_name": "digits", "model_version": 2, "request_id": "if the client gave one",
     "parameters": {"x-team": "headers that were forwarded, if any; Triton's files do not have them"}}
    {"id": 1, "timestamps": [{"name": "REQUEST_START", "ns": 4711}, ...]}
    {"id": 1, "activity": "TENSOR_QUEUE_INPUT", "tensor": {"name": "X", "data": "1,2", "shape": "1,2", "dtype": "FP32"}}

with times on the monotonic clock. Without a log frequency all traces go to FILE; with a frequency of N, every N traces
that the same settings chose go to the next of FILE.0, FILE.1, ...
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sluice_proto.tensors import of_array
from sluice_server.observability.write_behind import WriteBehind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from typing import BinaryIO

    import numpy as np

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor at one point of a request's way; `array` is a copy that nobody changes."""

    activity: str
    name: str
    array: np.ndarray


@dataclass(slots=True)
class TraceRecord:
    """What is known of one traced request at its end; `timestamps` are (name, monotonic nanoseconds)."""

    id: int
    model: str
    version: int
    request_id: str
    timestamps: list[tuple[str, int]]
    tensors: list[TensorRecord] = field(default_factory=list)
    parameters: Mapping[str, str] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """What the tensors and parameters hold in memory."""
        texts = sum(len(name) + len(value) for name, value in self.parameters.items())
        return texts + sum(tensor.array.nbytes for tensor in self.tensors)

    def encode(self) -> bytes:
        """The members of the file's array, without its brackets."""
        head: dict[str, Any] = {"id": self.id, "model_name": self.model, "model_version": self.version}
        if self.request_id:
            head["request_id"] = self.request_id
        if self.parameters:
            head["parameters"] = dict(self.parameters)
        entries = [head]
        if self.timestamps:
            entries.append({"id": self.id, "timestamps": [{"name": name, "ns": ns} for name, ns in self.timestamps]})
        entries += [{"id": self.id, "activity": tensor.activity, "tensor": _tensor(tensor)} for tensor in self.tensors]
        return ",".join(json.dumps(entry) for entry in entries).encode()


def _tensor(tensor: TensorRecord) -> dict[str, str]:
    values = (value.decode(errors="replace") if isinstance(value, bytes) else str(value) for value in tensor.array.flat)
    return {
        "name": tensor.name,
        "data": ",".join(values),
        "shape": ",".join(map(str, tensor.array.shape)),
        "dtype": of_array(tensor.array).name,
    }


class _Document:
    """One file: a JSON array that grows."""

    def __init__(self, path: Path) -> None:
        self.traces = 0
        self._file: BinaryIO = path.open("wb")

    def append(self, entries: bytes) -> None:
        if self.traces:
            self._file.seek(-1, os.SEEK_END)
        self._file.write((b"," if self.traces else b"[") + entries + b"]")
        self._file.flush()
        self.traces += 1

    def close(self) -> None:
        self._file.close()


NOTHING_OPEN: tuple[int, _Document | None] = (0, None)


class TraceFile:
    """Takes traces from any thread and writes them in order. `close` ends it."""

    def __init__(self, path: Path) -> None:
        """OSError when the path's folder is not there or cannot be written to."""
        folder = path.absolute().parent
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK) or path.is_dir():
            raise OSError(f"no trace file can be made at '{path}'")
        self._path = path
        self._whole: _Document | None = None
        self._numbered: dict[str, tuple[int, _Document]] = {}
        self._next_number = 0
        self._failing = False
        self._pending = WriteBehind("trace-file", self._write_records, self._end)

    def put(self, record: TraceRecord, *, scope: str, log_frequency: int) -> None:
        """Have a trace written; with a frequency, to the file that is being filled by the settings of `scope`."""
        self._pending.put((record, scope, log_frequency), record.size_bytes)

    def close(self, timeout_s: float) -> bool:
        """Write what is left and end; False when that took longer."""
        ended = self._pending.close(timeout_s)
        if self._pending.lost:
            logger.warning("traces were lost: the disk could not follow", extra={"traces": self._pending.lost})
        return ended

    def _write_records(self, items: Sequence[tuple[TraceRecord, str, int]]) -> None:
        for item in items:
            self._write_record(*item)

    def _write_record(self, record: TraceRecord, scope: str, log_frequency: int) -> None:
        try:
            self._write(record.encode(), scope, log_frequency)
            self._failing = False
        except OSError as error:
            if not self._failing:  # told once, and again after it went well in between
                logger.error("traces cannot be written", extra={"file": str(self._path), "reason": str(error)})
            self._failing = True

    def _end(self) -> None:
        for document in (self._whole, *(document for _, document in self._numbered.values())):
            if document is not None:
                document.close()

    def _write(self, entries: bytes, scope: str, log_frequency: int) -> None:
        if not log_frequency:
            if self._whole is None:
                self._whole = _Document(self._path)
            self._whole.append(entries)
            return
        document = self._document(scope, log_frequency)
        document.append(entries)
        if document.traces >= log_frequency:
            del self._numbered[scope]
            document.close()

    def _document(self, scope: str, log_frequency: int) -> _Document:
        """The numbered file that these settings are filling; another frequency begins another one."""
        frequency, document = self._numbered.get(scope, NOTHING_OPEN)
        if document is not None and frequency == log_frequency:
            return document
        if document is not None:
            document.close()
        path = self._path.with_name(f"{self._path.name}.{self._next_number}")
        self._next_number += 1
        document = _Document(path)
        self._numbered[scope] = log_frequency, document
        return document
