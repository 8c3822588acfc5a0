"""Capture files: what is written is read, a cut end costs one record, and damage is told with its place."""

from __future__ import annotations

import os
import stat
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_proto.capture import (
    EMPTY_FILE_BYTES,
    Capture,
    CapturedRequest,
    CaptureHead,
    CaptureWriter,
    read_capture,
)
from sluice_proto.errors import CaptureError

if TYPE_CHECKING:
    from pathlib import Path

HEAD = CaptureHead(1_700_000_000_000_000_000, 0.25)
NUMBERS = st.integers(0, 2**64 - 1)
REQUESTS = st.builds(
    CapturedRequest, NUMBERS, NUMBERS, NUMBERS, st.integers(0, 16), st.text(st.characters(codec="utf-8"), max_size=9),
    st.binary(max_size=99), st.binary(max_size=99),
)  # fmt: skip


def request(arrival_ns: int, **changes: object) -> CapturedRequest:
    return replace(CapturedRequest(arrival_ns, 0, 5, 0, "m", b"question", b"answer"), **changes)


def written(path: Path, *requests: CapturedRequest, max_bytes: int = 1 << 20) -> Path:
    path.unlink(missing_ok=True)
    writer = CaptureWriter(path, HEAD, max_bytes)
    assert writer.append(requests) == len(requests)
    writer.close()
    return path


def plain(capture: Capture) -> list[CapturedRequest]:
    """With bytes in place of the views."""
    return [replace(each, request=bytes(each.request), response=bytes(each.response)) for each in capture.requests]


@given(requests=st.lists(REQUESTS, max_size=5))
def test_what_is_written_is_read_in_the_order_of_arrival(requests, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("capture") / "c", *requests)
    capture = read_capture(path)
    assert capture.head == HEAD
    assert plain(capture) == sorted(requests, key=lambda each: each.arrival_ns)
    assert capture.truncated_bytes == 0


@given(data=st.data())
def test_a_file_cut_anywhere_has_every_whole_record(data, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("capture") / "c", request(1), request(2), request(3))
    size_bytes = path.stat().st_size
    record_bytes = (size_bytes - EMPTY_FILE_BYTES) // 3
    kept = data.draw(st.integers(EMPTY_FILE_BYTES, size_bytes))
    os.truncate(path, kept)
    capture = read_capture(path)
    whole, rest = divmod(kept - EMPTY_FILE_BYTES, record_bytes)
    assert plain(capture) == [request(1), request(2), request(3)][:whole]
    assert capture.truncated_bytes == rest


@given(data=st.data())
def test_a_changed_byte_is_an_error_that_names_its_record(data, tmp_path_factory):
    path = written(tmp_path_factory.mktemp("capture") / "c", request(1), request(2))
    content = bytearray(path.read_bytes())
    record_bytes = (len(content) - EMPTY_FILE_BYTES) // 2
    place = data.draw(st.integers(EMPTY_FILE_BYTES, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content)
    with pytest.raises(CaptureError, match="damaged") as caught:
        read_capture(path)
    record_start = EMPTY_FILE_BYTES + (place - EMPTY_FILE_BYTES) // record_bytes * record_bytes
    in_frame = place - record_start < 16
    assert caught.value.offset == record_start + (0 if in_frame else 16)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("content", "offset", "reason"), [
    (b"", 0, "no capture file"),
    (b"model.onnx", 0, "no capture file"),
    (b"SLUICAP\n\1\0", 10, "within its head of 28 bytes"),
    (b"SLUICAP\n\2\0\0\0" + bytes(16), 8, "version is 2, this reads version 1"),
])  # fmt: skip
def test_what_is_no_capture_file_is_refused(content, offset, reason, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(content)
    with pytest.raises(CaptureError, match=reason) as caught:
        read_capture(path)
    assert caught.value.offset == offset


def test_the_file_is_for_its_owner_alone_and_replaces_nothing(tmp_path):
    path = written(tmp_path / "c")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        CaptureWriter(path, HEAD, 1 << 20)


def test_the_file_never_grows_beyond_its_bound(tmp_path):
    path = written(tmp_path / "c", request(1))
    size_bytes = path.stat().st_size
    path.unlink()
    writer = CaptureWriter(path, HEAD, size_bytes)
    assert writer.append([request(1), request(2)]) == 1
    assert writer.append([request(3)]) == 0
    assert path.stat().st_size == writer.size_bytes == size_bytes
    writer.close()
    writer.close()
    with pytest.raises(ValueError, match="28 bytes at least"):
        CaptureWriter(tmp_path / "d", HEAD, 27)


def test_a_record_that_the_disk_refuses_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "c"
    writer = CaptureWriter(path, HEAD, 1 << 30)
    assert writer.append([request(1)]) == 1
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A file that may not grow is written in part, and then not at all.
    resource.setrlimit(resource.RLIMIT_FSIZE, (writer.size_bytes + 50, hard))
    try:
        with pytest.raises(OSError, match="large"):
            writer.append([request(2), request(2)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert writer.append([request(3)]) == 1
    writer.close()
    assert plain(read_capture(path)) == [request(1), request(3)]


def test_offsets_are_an_arrival_process_from_the_first_request_on(tmp_path):
    path = written(tmp_path / "c", request(2_500_000_000), request(1_000_000_000))
    assert read_capture(path).offsets_s() == [0.0, 1.5]
    assert read_capture(written(path)).offsets_s() == []
