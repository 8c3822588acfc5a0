"""Runs for which nobody waits any more end early; those for which anybody does go on."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from sluice_server.errors import Cancelled
from sluice_server.execution.options import OptionPlan
from sluice_server.execution.run_watch import RunWatch
from sluice_server.execution.session import Session
from sluice_server.observability.statistics import Outcome
from support import models
from support.fakes import EchoSession, RecordingCall, eventually
from support.requests import answer_arrays, infer_request

pytestmark = pytest.mark.usefixtures("no_errors_logged")

ENDLESS = 100_000_000
"""Iterations that take minutes, more than any test waits."""

SHORT = 1_000


def number(value: float, model: str = "slow"):
    return infer_request(model, {"X": np.array([[value]], np.float32)})


def answer_of(call) -> float:
    return answer_arrays(call.result())["Y"].item()


def wait_until_running(server, requests: int) -> None:
    watches = server.model("slow")._watches
    eventually(lambda: requests in [len(watch.batch) for watch in watches], f"{requests} requests run together")


def wait_until_idle(server) -> None:
    watches = server.model("slow")._watches
    eventually(lambda: not any(watch.batch for watch in watches), "the run has ended")


@pytest.fixture
def serve(start_server, repository):
    def start(iterations: int, **how):
        more = 'parameters { key: "batch_proof" value { string_value: "off" } }' + how.pop("more", "")
        models.write_model(repository, "slow", models.slow(iterations), max_batch_size=4, more=more, **how)
        return start_server(repository, http=None, metrics=None)

    return start


def test_the_run_of_a_call_that_is_cancelled_ends_and_the_next_one_runs(serve):
    server = serve(ENDLESS)
    for _ in range(2):
        call = server.begin("ModelInfer", number(1))
        wait_until_running(server, 1)
        call.cancel()
        wait_until_idle(server)
    model = server.model("slow")
    eventually(lambda: model.statistics.snapshot().outcomes[Outcome.CANCELLED] == 2, "both are counted")
    assert model.statistics.snapshot().execution_count == 0


def test_the_run_of_a_call_whose_deadline_passes_ends(serve):
    server = serve(ENDLESS)
    call = server.begin("ModelInfer", number(1), timeout_s=0.3)
    assert call.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
    wait_until_idle(server)


def test_a_batch_runs_until_the_last_of_its_clients_has_left(serve):
    server = serve(ENDLESS)
    first = server.begin("ModelInfer", number(0))
    wait_until_running(server, 1)
    calls = [server.begin("ModelInfer", number(value)) for value in (1, 2)]
    eventually(lambda: len(server.model("slow").queue) == 2, "two wait")
    first.cancel()
    wait_until_running(server, 2)
    (watch,) = [watch for watch in server.model("slow")._watches if watch.batch]
    calls[0].cancel()
    eventually(lambda: watch._left == 1, "one has left")
    assert not watch._stopped
    calls[1].cancel()
    wait_until_idle(server)


def test_after_a_run_was_ended_its_thread_answers_as_ever(serve, repository):
    server = serve(SHORT)
    for watch in (watch for _ in range(3) for watch in server.model("slow")._watches):
        call = RecordingCall()
        watch.batch = [call]
        assert watch.leave(call)
        watch.end()
        assert answer_of(server.begin("ModelInfer", number(7))) == 7


def test_a_session_that_was_stopped_says_so_and_only_it():
    session = Session(models.slow(SHORT), OptionPlan("slow"), ())
    feeds = {"X": np.array([[7]], np.float32)}
    view, other = session.stoppable(), session.stoppable()
    view.stop()
    with pytest.raises(Cancelled, match="nobody waited for it"):
        view.run(["Y"], feeds)
    for usable in (other, session):
        assert usable.run(["Y"], feeds)[0].item() == 7
    view.resume()
    assert view.run(["Y"], feeds)[0].item() == 7


def test_a_session_that_cannot_be_stopped_is_watched_without_effect():
    session = EchoSession()
    watch = RunWatch(session)
    call = RecordingCall()
    assert watch.session is session
    assert not watch.leave(call)
    watch.batch = [call]
    assert watch.leave(call)
    watch.end()
    assert not watch.leave(call)
