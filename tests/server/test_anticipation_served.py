"""A model whose runs take as long whatever their rows, on a server: clients who come back run together."""

from __future__ import annotations

import json

import numpy as np
import pytest

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.execution.anticipating import AnticipatingInstance
from support import models
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request

RUN_S = 600.0
"""What the curve that is kept says of every run, so that a wait is longer than any test."""


def request(value: float) -> pb.ModelInferRequest:
    return infer_request("m", {"X": np.array([[value]], np.float32)})


def begin(server, *values: float) -> list:
    """Calls under way, of which the last one waits in the queue."""
    calls = []
    for value in values:
        waiting = server.model("m").queue.rows
        calls.append(server.begin("ModelInfer", request(value)))
        eventually(lambda waiting=waiting: server.model("m").queue.rows == waiting + 1, "it waits")
    return calls


def answers(calls) -> list[float]:
    return [answer_arrays(call.result())["Y"].item() for call in calls]


@pytest.fixture
def start_patient(repository, start_server, tmp_path):
    """Starts a server whose model has a curve by which a wait pays, measured long before."""

    def start(more: str = ""):
        models.write_model(repository, "m", models.identity(dims=("N", 1)), max_batch_size=4, more=more)
        kept = {"curve_directory": tmp_path / "cache"}
        start_server(repository, models=kept)
        for file in tmp_path.glob("cache/batch-curves/*"):
            curve = json.loads(file.read_text())
            curve["points"] = [[rows, rows / RUN_S] for rows in (1, 2, 4)]
            file.write_text(json.dumps(curve))
        return start_server(repository, models=kept)

    return start


def run_four_together(server) -> None:
    """One request runs, and then a full batch that came meanwhile."""
    with held(server.model("m")) as session:
        first = server.begin("ModelInfer", request(1))
        session.wait_for_runs(1)
        calls = [first, *begin(server, 2, 3, 4, 5)]
        session.release()
        assert answers(calls) == [1, 2, 3, 4, 5]
    assert server.executions("m") == 2


def test_after_a_full_run_the_first_who_come_back_wait_for_the_last(start_patient):
    server = start_patient()
    run_four_together(server)
    calls = begin(server, 6, 7, 8)
    calls.append(server.begin("ModelInfer", request(9)))
    assert answers(calls) == [6, 7, 8, 9]
    assert server.executions("m") == 3


def test_a_server_that_ends_waits_for_nobody(start_patient):
    server = start_patient()
    run_four_together(server)
    calls = begin(server, 6)
    server.model("m").queue.drain()
    assert answers(calls) == [6]


@pytest.mark.parametrize(
    "more",
    [
        "dynamic_batching { max_queue_delay_microseconds: 100 }",
        'dynamic_batching { preferred_batch_size: 2 } parameters { key: "batch_curve" value { string_value: "on" } }',
        'parameters { key: "batch_curve" value { string_value: "off" } }',
        'parameters { key: "slo_p99_ms" value { string_value: "100" } }',
        "instance_group { count: 2 kind: KIND_CPU }",
    ],
)
def test_nothing_is_waited_for_where_the_configuration_says_when_batches_go(start_patient, more):
    server = start_patient(more)
    assert not [each for each in server.model("m")._instances if isinstance(each, AnticipatingInstance)]
