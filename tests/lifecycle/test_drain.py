"""How a served version ends: what waits is still answered, and deadlines are kept while it is waited for in vain."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from support import models
from support.fakes import PATIENCE_S, eventually, held
from support.requests import answer_arrays, infer_request


@pytest.fixture
def server(start_server, repository, no_errors_logged):
    models.write_model(repository, "echo", models.identity(dims=("N", 1)), max_batch_size=8)
    return start_server(repository, http=None, metrics=None)


def request(value: float):
    return infer_request("echo", {"X": np.array([[value]], np.float32)})


def test_a_wait_that_runs_out_of_time_leaves_deadlines_to_the_timer(server):
    model = server.model("echo")
    with held(model) as session:
        running = server.begin("ModelInfer", request(0))
        session.wait_for_runs(1)
        # The client's own clock must not end the call: what is tested is the server's.
        message = request(1)
        message.parameters["timeout"].int64_param = 500_000
        hurried = server.begin("ModelInfer", message)
        patient = server.begin("ModelInfer", request(2))
        eventually(lambda: len(model.queue) == 2, "two requests wait")
        model.drain()
        assert not model.join(0.01)
        assert hurried.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not running.done()
        session.release()
        assert [answer_arrays(call.result())["Y"].item() for call in (running, patient)] == [0, 2]
    assert model.join(PATIENCE_S)
    assert not server.server._timer._watches


def test_what_comes_while_the_only_version_drains_is_refused_and_not_lost(server):
    model = server.model("echo")
    model.drain()
    code, text = server.refusal("ModelInfer", request(1))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "'echo' is not ready" in text
