"""Captures without a server: who is chosen, what is written of whom, and every way in which a request is left out."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sluice_proto.capture import CapturedRequest, read_capture
from sluice_proto.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from sluice_server.observability import write_behind
from sluice_server.observability.capture import Capturable, Capture, CaptureOptions, Ended, LeftOut
from sluice_server.protocol.capturable import Preparation
from sluice_server.status import Code
from support.fakes import RecordingCall, eventually
from support.requests import infer_request

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BIG = np.zeros((1, 20_000), np.float32)
"""Of such a request the tensors are cut out before it is parsed."""


def as_sent(ended: Ended) -> Capturable | LeftOut:
    return Capturable("m", ended.request, ended.answer)


def opened(path: Path, prepare=as_sent, *, seed: int = 1, **options) -> Capture:
    capture = Capture(CaptureOptions(path, **options), prepare, seed)
    assert not capture.chooses()
    capture.open()
    return capture


def put(capture: Capture, request: bytes = b"q", answer: bytes = b"a", **call) -> RecordingCall:
    call = RecordingCall(request, **call)
    capture.put(call, request, answer, Code.OK, call.received_ns + 7)
    return call


def left_out(capture: Capture) -> dict[LeftOut, int]:
    return {reason: count for reason, count in capture.usage().left_out.items() if count}


def test_times_count_from_the_start_and_to_the_deadline(tmp_path):
    capture = opened(tmp_path / "c")
    first = put(capture)
    put(capture, deadline_ns=first.received_ns + 1_000_000_000)
    before = RecordingCall(b"q")
    before.received_ns = 0
    capture.put(before, b"q", b"", Code.CANCELLED, 5)
    capture.close()
    early, one, two = read_capture(tmp_path / "c").requests
    assert early == CapturedRequest(0, 0, 5, 1, "m", b"q", b"")
    assert (one.deadline_ns, one.service_ns) == (0, 7)
    assert 0 < two.deadline_ns <= 1_000_000_000
    assert one.arrival_ns <= two.arrival_ns


@pytest.mark.parametrize("rate", [0.01, 0.5, 1.0])
def test_each_request_is_chosen_with_the_same_chance(rate, tmp_path):
    capture = opened(tmp_path / "c", rate=rate)
    chosen = np.array([capture.chooses() for _ in range(20_000)])
    capture.close()
    for part in np.split(chosen, 4):
        # five standard deviations
        assert abs(part.mean() - rate) <= 5 * np.sqrt(rate * (1 - rate) / len(part))


def test_a_full_file_ends_the_capture_once_and_for_all(tmp_path, caplog):
    capture = opened(tmp_path / "c", max_bytes=250)
    for _ in range(5):
        put(capture)
    capture.close()
    assert (tmp_path / "c").stat().st_size == capture.usage().size_bytes <= 250
    usage = capture.usage()
    assert (usage.requests, left_out(capture), usage.stopped) == (3, {LeftOut.FULL: 2}, True)
    assert not capture.chooses()
    assert [line.getMessage() for line in caplog.records if line.levelname == "WARNING"] == [
        "no more requests are captured"
    ]


def test_a_disk_that_fails_ends_the_capture_and_no_request(tmp_path, caplog):
    resource = pytest.importorskip("resource")
    capture = opened(tmp_path / "c")
    put(capture)
    eventually(lambda: capture.usage().requests == 1, "the first one is written")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        put(capture, bytes(1000))
        put(capture)
        capture.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left_out(capture) == {LeftOut.DISK: 2}
    assert len(read_capture(tmp_path / "c").requests) == 1
    assert "no more requests are captured" in [line.getMessage() for line in caplog.records]


def held_up() -> tuple[Callable[[Ended], Capturable | LeftOut], threading.Event, threading.Event]:
    """A way to choose that waits with its first request, an event that says that it does, and one that ends it."""
    waits, goes_on = threading.Event(), threading.Event()

    def slowly(ended: Ended) -> Capturable | LeftOut:
        waits.set()
        goes_on.wait()
        return as_sent(ended)

    return slowly, waits, goes_on


def test_what_the_writer_cannot_follow_is_left_out_and_nobody_waits(tmp_path):
    slowly, waits, goes_on = held_up()
    capture = opened(tmp_path / "c", slowly)
    put(capture)
    waits.wait()
    for _ in range(write_behind.PENDING_MAX + 3):
        put(capture)
    goes_on.set()
    capture.close()
    assert left_out(capture) == {LeftOut.BEHIND: 3}
    assert capture.usage().requests == write_behind.PENDING_MAX + 1


def test_memory_is_bounded_by_bytes_too(tmp_path):
    slowly, waits, goes_on = held_up()
    capture = opened(tmp_path / "c", slowly)
    half = bytes(write_behind.PENDING_BYTES_MAX // 2 + 1)
    put(capture, half)
    waits.wait()
    put(capture, half)
    put(capture)
    goes_on.set()
    capture.close()
    assert left_out(capture) == {LeftOut.BEHIND: 1}
    assert capture.usage().requests == 2


def test_a_file_that_is_there_is_refused_and_one_without_requests_is_taken_away(tmp_path):
    path = tmp_path / "c"
    opened(path).close()
    assert not path.exists()
    path.touch()
    with pytest.raises(OSError, match=r"is there already, and captures replace nothing"):
        Capture(CaptureOptions(path), as_sent)
    with pytest.raises(OSError, match=r"no file can be made in '.*missing'"):
        Capture(CaptureOptions(tmp_path / "missing" / "c"), as_sent)
    Capture(CaptureOptions(tmp_path / "never opened"), as_sent).close()


def ended(request: ModelInferRequest | bytes, answer: ModelInferResponse | None = None) -> Ended:
    data = request if isinstance(request, bytes) else request.SerializeToString()
    return Ended(data, b"" if answer is None else answer.SerializeToString(), Code.OK, 0, 0, 0)


def simple(**how) -> ModelInferRequest:
    return infer_request("m", {"X": np.ones((1, 2), np.float32)}, request_id="alice", **how)


ANSWER = ModelInferResponse(model_name="m", id="alice", raw_output_contents=[b"1234"])


@pytest.mark.parametrize("request_", [simple(), infer_request("m", {"X": BIG})], ids=["small", "large"])
def test_a_request_is_written_as_it_was_sent(request_):
    given = ended(request_, ANSWER)
    assert Preparation(None, every_request=False)(given) == Capturable("m", given.request, given.answer)


def in_shared_memory(of_output: bool) -> ModelInferRequest:
    request = simple(outputs=["Y"])
    tensor = request.outputs[0] if of_output else request.inputs[0]
    tensor.parameters["shared_memory_region"].string_param = "r"
    return request


@pytest.mark.parametrize(("request_", "every_request", "reason"), [
    (b"\xff", True, LeftOut.UNREADABLE),
    (b"\xff" * 60_000, True, LeftOut.UNREADABLE),
    (in_shared_memory(of_output=False), True, LeftOut.SHARED_MEMORY),
    (in_shared_memory(of_output=True), True, LeftOut.SHARED_MEMORY),
    (simple(parameters={"sequence_id": 5}), False, LeftOut.SEQUENCE),
])  # fmt: skip
def test_what_cannot_be_replayed_is_left_out(request_, every_request, reason):
    assert Preparation(None, every_request=every_request)(ended(request_)) is reason


def test_sequences_are_captured_with_every_request():
    given = ended(simple(parameters={"sequence_id": 5}))
    assert Preparation(None, every_request=True)(given) == Capturable("m", given.request, b"")


def without_id(request: ModelInferRequest) -> ModelInferRequest:
    request.id = ""
    request.parameters.clear()
    return request


def test_a_hook_takes_out_of_the_answer_too_what_it_takes_out_of_the_request():
    given = ended(simple(parameters={"user": "alice"}), ANSWER)
    kept = Preparation(without_id, every_request=True)(given)
    assert ModelInferRequest.FromString(kept.request) == infer_request("m", {"X": np.ones((1, 2), np.float32)})
    assert ModelInferResponse.FromString(kept.answer) == ModelInferResponse(
        model_name="m", raw_output_contents=[b"1234"]
    )
    assert b"alice" not in kept.request + kept.answer


def other_tensors(request: ModelInferRequest) -> ModelInferRequest:
    request.raw_input_contents[0] = bytes(8)
    return request


def test_the_answer_to_other_tensors_is_not_kept():
    kept = Preparation(other_tensors, every_request=True)(ended(simple(), ANSWER))
    assert ModelInferRequest.FromString(kept.request).raw_input_contents == [bytes(8)]
    assert kept.answer == b""


def test_a_hook_leaves_requests_out():
    assert Preparation(lambda request: None, every_request=True)(ended(simple())) is LeftOut.REDACTED


def failing(request: ModelInferRequest) -> ModelInferRequest:
    raise KeyError(request.id)


def leaving(request: ModelInferRequest) -> ModelInferRequest:
    raise SystemExit


@pytest.mark.parametrize(("hook", "error"), [
    (failing, "KeyError"), (leaving, "SystemExit"), (lambda request: b"bytes", "TypeError"),
])  # fmt: skip
def test_a_hook_that_fails_leaves_requests_out_and_is_told_once_without_what_it_saw(hook, error, caplog):
    prepare = Preparation(hook, every_request=True)
    assert [prepare(ended(simple())) for _ in range(3)] == [LeftOut.REDACT_FAILED] * 3
    (line,) = caplog.records
    assert (line.getMessage(), line.error) == ("the hook of --capture-redact fails", error)
    assert "alice" not in str(line.__dict__)
