"""Whether the helpers that the other server tests stand on do what they say."""

import threading
import time

import numpy as np
import pytest

from support import models
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request


def test_a_request_goes_through_a_server_and_comes_back(start_server, repository, no_errors_logged):
    models.write_model(repository, "echo", models.identity(), max_batch_size=8)
    server = start_server(repository)
    array = np.array([[1, 2, 3, 4]], np.float32)
    answer = server.infer(infer_request("echo", {"X": array}, request_id="7"))
    np.testing.assert_array_equal(answer_arrays(answer)["Y"], array)
    assert (answer.model_name, answer.model_version, answer.id) == ("echo", "1", "7")


def test_a_held_model_answers_nothing_until_it_is_released(start_server, repository, no_errors_logged):
    models.write_model(repository, "echo", models.identity(dims=("N", 1)), max_batch_size=8)
    server = start_server(repository)
    with held(server.model("echo")) as session:
        calls = [server.begin("ModelInfer", infer_request("echo", {"X": np.array([[0]], np.float32)}))]
        session.wait_for_runs(1)
        calls += [
            server.begin("ModelInfer", infer_request("echo", {"X": np.array([[value]], np.float32)}))
            for value in (1, 2, 3)
        ]
        eventually(lambda: len(server.model("echo").queue) == 3, "three requests wait")
        assert not any(call.done() for call in calls)
        session.release()
        assert [answer_arrays(call.result())["Y"].item() for call in calls] == [0, 1, 2, 3]
    assert [feeds["X"].shape for feeds in session.runs] == [(1, 1), (3, 1)]


def test_a_slow_model_keeps_its_instance_busy(start_server, repository, no_errors_logged):
    models.write_model(repository, "slow", models.slow(50_000), max_batch_size=8)
    server = start_server(repository)
    begun = time.monotonic()
    answer = server.infer(infer_request("slow", {"X": np.array([[5]], np.float32)}))
    assert answer_arrays(answer)["Y"].item() == 5
    assert time.monotonic() - begun > 0.005


def test_eventually_fails_with_what_did_not_happen(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("support.fakes.PATIENCE_S", 0.0)
    with pytest.raises(AssertionError, match="did not happen: the event"):
        eventually(threading.Event().is_set, "the event")
