"""Instances with sessions that misbehave: every request of every batch ends once, and the thread goes on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sluice_proto.grpc_service_pb2 import ModelInferResponse
from sluice_server.errors import BackendError
from sluice_server.execution.instance import SMALL_BATCH_BYTES
from sluice_server.execution.request import InferRequest
from sluice_server.observability.statistics import FailureReason, Outcome
from sluice_server.status import Code
from support.fakes import EchoSession, HeldSession, RecordingCall, served_model
from support.requests import answer_arrays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_server.execution.model import ServedModel


class FailingSession:
    """Fails a run whose X holds one of the bad values; counts the runs."""

    def __init__(self, bad: set[int], error: Exception) -> None:
        self._bad = bad
        self._error = error
        self.sizes: list[int] = []

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.sizes.append(len(feeds["X"]))
        if self._bad & set(feeds["X"].ravel().tolist()):
            raise self._error
        return [feeds["X"] * 10]


class ShortSession:
    """Gives one row for whatever it gets, as a model that is no batching model does."""

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return [feeds["X"].sum(axis=0, keepdims=True)]


class UnanswerableCall(RecordingCall):
    """A call whose answer cannot be made, as when there is no memory for it."""

    def reply(self, parts) -> None:
        raise MemoryError


def request(call: RecordingCall, value: int, rows: int = 1) -> InferRequest:
    arrays = {"X": np.full((rows, 1), value, np.int64)}
    return InferRequest(call, "", arrays, ("Y",), rows=rows, key="key", deadline_ns=call.deadline_ns)


def run_batch(model: ServedModel, calls: list[RecordingCall]) -> None:
    """Run a request of each call, whose value is its place, in one batch."""
    assert model.submit([request(call, value) for value, call in enumerate(calls)]) == []
    model.start()
    for call in calls:
        call.wait()


def finish(model: ServedModel) -> None:
    model.drain()
    assert model.join(20.0)


def answer_of(call: RecordingCall) -> int:
    status, payload = call.wait()
    assert status.code is Code.OK, status
    return answer_arrays(ModelInferResponse.FromString(payload))["Y"].item()


@pytest.mark.parametrize("bad", [{0}, {7}, {2, 3}, {0, 4, 7}, set(range(8))])
def test_guilty_requests_are_found_by_halving(bad, timer, no_errors_logged):
    session = FailingSession(bad, BackendError(2, "bad value"))
    model = served_model(session, timer)
    calls = [RecordingCall() for _ in range(8)]
    run_batch(model, calls)
    finish(model)
    for value, call in enumerate(calls):
        assert len(call.ends) == 1
        if value in bad:
            assert call.wait()[0].code is Code.INTERNAL
            assert call.wait()[0].message == "onnx runtime error 2: bad value"
        else:
            assert answer_of(call) == 10 * value
    assert session.sizes[0] == 8
    assert len(session.sizes) <= 2 * 8 - 1
    snapshot = model.statistics.snapshot()
    assert (snapshot.success.count, snapshot.failures[FailureReason.BACKEND]) == (8 - len(bad), len(bad))
    assert snapshot.inference_count == 8 - len(bad)


def test_a_bug_in_a_session_ends_its_batch_with_an_incident_and_no_more(timer, caplog):
    model = served_model(FailingSession({3}, ZeroDivisionError("a secret")), timer)
    calls = [RecordingCall() for _ in range(4)]
    run_batch(model, calls)
    (logged,) = [record for record in caplog.records if record.exc_info]
    incident = logged.args[0]
    assert {(call.wait()[0].code, incident in call.wait()[0].message) for call in calls} == {(Code.INTERNAL, True)}
    assert "secret" not in calls[0].wait()[0].message
    later = RecordingCall()
    model.submit([request(later, 1)])
    assert answer_of(later) == 10
    finish(model)
    assert model.statistics.snapshot().outcomes[Outcome.OTHER] == 4


def test_an_answer_that_cannot_be_made_leaves_the_thread_alive_and_nobody_waiting(timer, caplog):
    model = served_model(EchoSession(), timer)
    calls = [RecordingCall(), UnanswerableCall(), RecordingCall()]
    run_batch(model, calls)
    later = RecordingCall()
    model.submit([request(later, 1)])
    assert answer_of(later) == 1
    finish(model)
    assert calls[1].wait()[0].code is Code.INTERNAL
    assert [answer_of(calls[0]), answer_of(calls[2])] == [0, 2]
    assert len([record for record in caplog.records if record.exc_info]) == 1


class NextRunWaits:
    """Answers the first run at once, and every later one when `release` is set."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self._runs = 0

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        self._runs += 1
        if self._runs > 1:
            assert self.release.wait(20.0)
        return [feeds["X"]]


@pytest.mark.parametrize("size_bytes", [0, SMALL_BATCH_BYTES + 1])
def test_answers_are_out_while_the_next_batch_runs(size_bytes, timer, no_errors_logged):
    session = NextRunWaits()
    model = served_model(session, timer, max_batch_rows=2)
    first, second = RecordingCall(), RecordingCall(bytes(size_bytes))
    model.submit([request(first, 5, rows=2), request(second, 7)])
    model.start()
    assert first.wait()[0].code is Code.OK
    assert not second.ends
    session.release.set()
    assert second.wait()[0].code is Code.OK
    finish(model)


def test_a_batch_that_cannot_be_gathered_keeps_no_answer_of_the_one_before(timer, caplog):
    model = served_model(EchoSession(), timer, max_batch_rows=2)
    good, bad, later = (RecordingCall() for _ in range(3))
    broken = request(bad, 1)
    broken.arrays = {"X": np.zeros((1, 2), np.int64)}
    requests = [request(good, 5, rows=2), broken, request(later, 6)]
    model.submit(requests)
    model.start()
    assert (good.wait()[0].code, bad.wait()[0].code) == (Code.OK, Code.INTERNAL)
    finish(model)
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_a_model_that_does_not_keep_its_rows_is_told_what_to_do(timer, no_errors_logged):
    model = served_model(ShortSession(), timer)
    one, two = RecordingCall(), RecordingCall()
    model.submit([request(one, 5), request(two, 7, rows=2)])
    model.start()
    status, _ = two.wait()
    assert status.code is Code.INTERNAL
    assert "output 'Y'" in status.message
    assert "[1, 1] for 2 rows" in status.message
    assert "max_batch_size" in status.message
    # On its own the other one is right: halving found that too.
    assert answer_of(one) == 5
    finish(model)


def test_work_whose_deadline_was_over_when_it_came_is_refused(timer, no_errors_logged):
    model = served_model(EchoSession(), timer)
    late, good = RecordingCall(deadline_ns=1), RecordingCall()
    assert model.submit([request(late, 1), request(good, 2)]) == []
    model.start()
    assert answer_of(good) == 2
    assert late.wait()[0].code is Code.DEADLINE_EXCEEDED
    assert "Request timeout expired" in late.wait()[0].message
    finish(model)
    assert model.statistics.snapshot().outcomes[Outcome.QUEUE_TIMEOUT] == 1


def test_a_client_that_leaves_after_its_batch_began_is_not_counted_as_cancelled(timer, no_errors_logged):
    session = HeldSession(EchoSession())
    model = served_model(session, timer)
    call = RecordingCall()
    model.submit([request(call, 1)])
    model.start()
    session.wait_for_runs(1)
    assert call.on_cancel is not None
    call.on_cancel()
    session.release()
    assert answer_of(call) == 1
    finish(model)
    outcomes = model.statistics.snapshot().outcomes
    assert (outcomes[Outcome.OK], outcomes[Outcome.CANCELLED]) == (1, 0)


def test_instances_run_at_the_same_time(timer, no_errors_logged):
    session = HeldSession(EchoSession())
    model = served_model(session, timer, instances=3, max_batch_rows=0)
    calls = [RecordingCall() for _ in range(3)]
    model.submit([request(call, value) for value, call in enumerate(calls)])
    model.start()
    session.wait_for_runs(3)
    session.release()
    assert [answer_of(call) for call in calls] == [0, 1, 2]
    finish(model)


def test_a_draining_model_gives_back_what_came_too_late_and_finishes_the_rest(timer, no_errors_logged):
    session = HeldSession(EchoSession())
    model = served_model(session, timer)
    early, late = RecordingCall(), RecordingCall()
    model.submit([request(early, 1)])
    model.start()
    model.drain()
    too_late = request(late, 2)
    assert model.submit([too_late]) == [too_late]
    assert late.ends == []
    assert model.join(0.0) is False
    session.release()
    assert model.join(20.0)
    assert answer_of(early) == 1
