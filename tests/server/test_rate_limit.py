"""The rate limiter through a real server: models that share a resource do not run at the same time, and others do."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from sluice_batching import Resource
from sluice_proto import grpc_service_pb2 as pb
from sluice_server.repository.manager import ControlMode
from support import models
from support.fakes import eventually, held
from support.requests import infer_request

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from support.server import RunningServer


def add(repository: Path, name: str, *resources: str, count: int = 1, more: str = "") -> None:
    limits = " ".join(f"resources {{ {resource} }}" for resource in resources)
    models.write_configured(
        repository,
        name,
        models.identity(),
        "max_batch_size: 8 dynamic_batching { } input { name: 'X' data_type: TYPE_FP32 dims: 4 }"
        " output { name: 'Y' data_type: TYPE_FP32 dims: 4 }",
    )
    config = repository / name / "config.pbtxt"
    group = f"instance_group {{ count: {count} kind: KIND_CPU rate_limiter {{ {limits} {more} }} }}"
    config.write_text(config.read_text().replace("instance_group { count: 1 kind: KIND_CPU }", group))


@pytest.fixture
def serve(start_server, repository):
    def serve(copies: Mapping[Resource, int] | None, **more: object) -> RunningServer:
        return start_server(repository, http=None, metrics=None, models={"rate_limit": copies, **more})

    return serve


def begin(server: RunningServer, model: str, value: float = 1.0) -> grpc.Future:
    return server.begin("ModelInfer", infer_request(model, {"X": np.full((1, 4), value, np.float32)}))


def test_models_that_need_the_same_resource_take_turns_and_others_run(serve, repository):
    for name, resource in (("a", "R1"), ("b", "R1"), ("c", "R2")):
        add(repository, name, f"name: '{resource}' count: 1")
    add(repository, "free")
    server = serve({})
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(held(server.model(name))) for name in ("a", "b")}
        first = begin(server, "a")
        sessions["a"].wait_for_runs(1)
        waiting = [begin(server, "b", value) for value in (1.0, 2.0)]
        eventually(lambda: len(server.model("b").queue) == 2, "both wait")
        assert [begin(server, name).result().model_name for name in ("c", "free")] == ["c", "free"]
        assert len(sessions["b"].runs) == 0
        sessions["a"].release()
        first.result()
        sessions["b"].wait_for_runs(1)
        sessions["b"].release()
        for call in waiting:
            call.result()
        # What came while it waited for its turn is in its batch.
        assert [feeds["X"].shape for feeds in sessions["b"].runs] == [(2, 4)]


def test_without_the_flag_the_claims_count_for_nothing(serve, repository):
    for name in ("a", "b"):
        add(repository, name, "name: 'R1' count: 1")
    server = serve(None)
    with held(server.model("a")) as session:
        first = begin(server, "a")
        session.wait_for_runs(1)
        assert begin(server, "b").result().model_name == "b"
        session.release()
        first.result()


def test_copies_that_were_given_let_as_many_run(serve, repository):
    for name in ("a", "b", "c"):
        add(repository, name, "name: 'R1' count: 2 global: true", more="priority: 2")
    server = serve({Resource("R1"): 5})
    with ExitStack() as stack:
        sessions = {name: stack.enter_context(held(server.model(name))) for name in ("a", "b", "c")}
        calls = []
        for name in ("a", "b"):
            calls.append(begin(server, name))
            sessions[name].wait_for_runs(1)
        calls.append(begin(server, "c"))
        eventually(lambda: len(server.model("c").queue) == 1, "it waits")
        sessions["a"].release()
        sessions["c"].wait_for_runs(1)
        for session in sessions.values():
            session.release()
        for call in calls:
            call.result()


def test_a_request_whose_time_is_up_while_its_instance_waits_for_its_turn_is_told_so(serve, repository):
    for name in ("a", "b"):
        add(repository, name, "name: 'R1' count: 1")
    server = serve({})
    with held(server.model("a")) as session:
        first = begin(server, "a")
        session.wait_for_runs(1)
        request = infer_request("b", {"X": np.ones((1, 4), np.float32)}, parameters={"timeout": 20_000})
        assert server.refusal("ModelInfer", request)[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        session.release()
        first.result()
    assert begin(server, "b").result().model_name == "b"


def test_a_claim_that_can_never_be_granted_fails_the_load(serve, repository):
    add(repository, "a", "name: 'R1' count: 4")
    server = serve({Resource("R1"): 3}, control_mode=ControlMode.EXPLICIT)
    code, text = server.refusal("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="a"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "model 'a': its rate_limiter needs 4 of resource 'R1', and --rate-limit-resource gives 3" in text


def test_an_unloaded_model_gives_back_what_its_pool_had_of_it(serve, repository):
    add(repository, "small", "name: 'R1' count: 1")
    add(repository, "large", "name: 'R1' count: 3", count=2)
    server = serve({}, control_mode=ControlMode.EXPLICIT, load_models=("small", "large"))
    pools = server.model("small")._instances[0]._limiter._pools
    assert pools.copies(Resource("R1", -1)) == 3
    server.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="large"))
    eventually(lambda: pools.copies(Resource("R1", -1)) == 1, "its instances have ended")
    assert begin(server, "small").result().model_name == "small"
