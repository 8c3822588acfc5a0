"""Trace files: whole JSON after each trace, numbered ones, tensors as text, and disks that fail."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sluice_server.observability import write_behind
from sluice_server.observability.trace_file import TensorRecord, TraceFile, TraceRecord
from support.fakes import PATIENCE_S, eventually

if TYPE_CHECKING:
    from pathlib import Path


def record(number: int, *tensors: TensorRecord) -> TraceRecord:
    return TraceRecord(number, "m", 1, "", [("REQUEST_START", number)], list(tensors))


def ids(path: Path) -> list[int]:
    return sorted({entry["id"] for entry in json.loads(path.read_text())})


def test_the_file_is_whole_after_each_trace(tmp_path):
    path = tmp_path / "trace.json"
    writer = TraceFile(path)
    assert not path.exists()
    for number in (1, 2, 3):
        writer.put(record(number), scope="", log_frequency=0)
        eventually(lambda: path.exists() and path.stat().st_size > 0, "the file is written")
    assert writer.close(PATIENCE_S)
    assert json.loads(path.read_text())[:2] == [
        {"id": 1, "model_name": "m", "model_version": 1},
        {"id": 1, "timestamps": [{"name": "REQUEST_START", "ns": 1}]},
    ]
    assert ids(path) == [1, 2, 3]


def test_each_settings_fill_numbered_files_of_their_own(tmp_path):
    writer = TraceFile(tmp_path / "t")
    for number, scope in enumerate(["", "a", "", "a", "a", ""]):
        writer.put(record(number), scope=scope, log_frequency=2)
    writer.put(record(6), scope="", log_frequency=3)
    assert writer.close(PATIENCE_S)
    assert {path.name: ids(path) for path in tmp_path.iterdir()} == {
        "t.0": [0, 2], "t.1": [1, 3], "t.2": [4], "t.3": [5], "t.4": [6],
    }  # fmt: skip


def test_tensors_of_every_kind_are_text(tmp_path):
    texts = np.empty((2,), object)
    texts[:] = [b"one", b"\xff"]
    tensors = [
        TensorRecord("TENSOR_QUEUE_INPUT", "I", np.array([[1, -2]], np.int8)),
        TensorRecord("TENSOR_QUEUE_INPUT", "T", texts),
        TensorRecord("TENSOR_BACKEND_OUTPUT", "E", np.zeros((0, 3), np.float64)),
        TensorRecord("TENSOR_BACKEND_OUTPUT", "S", np.array(True)),
    ]
    writer = TraceFile(tmp_path / "t")
    writer.put(record(1, *tensors), scope="", log_frequency=0)
    assert writer.close(PATIENCE_S)
    shown = [entry["tensor"] for entry in json.loads((tmp_path / "t").read_text()) if "tensor" in entry]
    assert [(tensor["data"], tensor["shape"], tensor["dtype"]) for tensor in shown] == [
        ("1,-2", "1,2", "INT8"),
        ("one,\N{REPLACEMENT CHARACTER}", "2", "BYTES"),
        ("", "0,3", "FP64"),
        ("True", "", "BOOL"),
    ]


def test_an_older_file_is_replaced(tmp_path):
    path = tmp_path / "t"
    path.write_text("old")
    writer = TraceFile(path)
    writer.put(record(1), scope="", log_frequency=0)
    assert writer.close(PATIENCE_S)
    assert ids(path) == [1]


@pytest.mark.parametrize("name", ["missing/t", "."])
def test_a_path_that_can_be_no_file_is_refused_at_the_start(name, tmp_path):
    with pytest.raises(OSError, match="no trace file can be made"):
        TraceFile(tmp_path / name)


def test_a_disk_that_fails_is_told_once_and_costs_only_the_traces(tmp_path, caplog):
    writer = TraceFile(tmp_path / "t")
    (tmp_path / "t").mkdir()
    for number in range(3):
        writer.put(record(number), scope="", log_frequency=0)
    assert writer.close(PATIENCE_S)
    assert [line.getMessage() for line in caplog.records] == ["traces cannot be written"]


def test_tensors_in_memory_are_bounded_and_what_is_lost_is_told(tmp_path, caplog):
    writer = TraceFile(tmp_path / "t")
    half = np.zeros(write_behind.PENDING_BYTES_MAX // 2 + 1, np.uint8)
    half.flags.writeable = False
    writer._pending.pending_bytes = half.nbytes  # as if one were being written
    writer.put(record(1, TensorRecord("TENSOR_QUEUE_INPUT", "I", half)), scope="", log_frequency=0)
    assert writer.close(PATIENCE_S)
    assert [line.getMessage() for line in caplog.records] == ["traces were lost: the disk could not follow"]
    assert not (tmp_path / "t").exists()
