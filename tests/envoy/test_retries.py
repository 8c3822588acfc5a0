"""What Envoy sends again, and where: only what no replica has run, only at another one, never a step of a sequence."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from edges import call_with, echo, trailers

from sluice_proto import grpc_service_pb2 as pb
from support import models
from support.conversation import Conversation
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from support.server import RunningServer

OK, UNAVAILABLE = grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE

RETRIES = "cluster.sluice.upstream_rq_retry"
OVER_BUDGET = "cluster.sluice.upstream_rq_retry_overflow"


@pytest.fixture
def half_gone(start_replica, start_edge):
    """Two replicas behind Envoy, of which one says UNAVAILABLE to every inference."""
    one, other = start_replica(), start_replica()
    edge = start_edge(one, other)
    one.model("echo").drain()
    return edge


def test_what_one_replica_cannot_take_another_one_answers(half_gone):
    calls = [call_with(half_gone, "ModelInfer", echo(value)) for value in range(30)]
    answers = [pb.ModelInferResponse.FromString(call.result()) for call in calls]
    assert [answer_arrays(answer)["Y"].item() for answer in answers] == list(range(30))
    assert half_gone.envoy.stat(RETRIES) > 0


def test_a_step_of_a_sequence_is_not_sent_again_and_its_sequence_stays_where_it_is(half_gone):
    def code(sequence: int) -> grpc.StatusCode:
        return call_with(half_gone, "ModelInfer", echo(1), ("sequence-id", str(sequence))).code()

    first = [code(sequence) for sequence in range(32)]
    assert set(first) == {OK, UNAVAILABLE}
    assert [code(sequence) for sequence in range(32)] == first
    assert {record["attempts"] for record in half_gone.logged(cluster="sluice_sequences")} == {1}


@pytest.mark.parametrize(("size_bytes", "codes"), [(3 << 20, {OK}), (5 << 20, {OK, UNAVAILABLE})])
def test_requests_up_to_four_mebibytes_are_kept_to_be_sent_again(size_bytes, codes, half_gone):
    request = echo(1, parameters={"ignored": "x" * size_bytes})
    assert {call_with(half_gone, "ModelInfer", request).code() for _ in range(16)} == codes


def test_a_stream_is_not_sent_again(half_gone):
    codes = set()
    for _ in range(32):
        stream = Conversation(half_gone.through, metadata=[("triton_grpc_error", "true")])
        stream.say(echo(1))
        stream.hang_up()
        with suppress(grpc.RpcError):
            list(stream.call)
        codes.add(stream.call.code())
    assert codes == {OK, UNAVAILABLE}
    assert half_gone.envoy.stat(RETRIES) == 0


def write_sums(repository: Path) -> None:
    models.write_accumulator(
        repository, strategy="oldest { max_candidate_sequences: 64 }", more="max_sequence_idle_microseconds: 3600000000"
    )


def test_sequences_keep_their_state_behind_two_replicas(start_replica, start_edge):
    replicas = [start_replica(write_sums) for _ in range(2)]
    edge = start_edge(*replicas)

    def say(sequence: int, value: int, **parameters: bool) -> int:
        request = infer_request(
            "sums",
            {"INPUT": np.array([[value]], np.int64)},
            parameters={"sequence_id": sequence, **parameters},
        )
        call = call_with(edge, "ModelInfer", request, ("sequence-id", str(sequence)))
        return answer_arrays(pb.ModelInferResponse.FromString(call.result()))["OUTPUT"].item()

    sequences = range(1, 33)
    assert [say(sequence, sequence, sequence_start=True) for sequence in sequences] == list(sequences)
    live = [replica.model("sums").queue.live for replica in replicas]
    assert sum(live) == 32
    assert all(live)
    assert [say(sequence, 100) for sequence in sequences] == [sequence + 100 for sequence in sequences]
    assert [say(sequence, 1000, sequence_end=True) for sequence in sequences] == [
        sequence + 1100 for sequence in sequences
    ]


@contextmanager
def full(server: RunningServer) -> Iterator[None]:
    """Its queue of one request is full, just after it has run one."""
    server.infer(echo(0))
    model = server.model("echo")
    with held(model) as session:
        calls = [server.begin("ModelInfer", echo(1))]
        session.wait_for_runs(1)
        calls.append(server.begin("ModelInfer", echo(2)))
        eventually(lambda: len(model.queue) == 1, "its queue is full")
        yield
        session.release()
        for call in calls:
            call.result()


def test_a_full_queue_of_the_only_replica_is_the_answer_with_its_push_back(start_replica, start_edge):
    server = start_replica(models={"queue_rows": 1})
    edge = start_edge(server)

    def refusal_with_push_back() -> bool:
        with full(server):
            call = call_with(edge, "ModelInfer", echo(3))
            assert call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        # Only a server that has run something within a second knows when to come back.
        said = trailers(call)
        return int(said.get("grpc-retry-pushback-ms", 0)) > 0 and "grpc-status-details-bin" in said

    eventually(refusal_with_push_back, "the refusal says when to come back")
    assert {record["attempts"] for record in edge.logged(cluster="sluice")} == {1}


def test_a_full_queue_is_its_replica_s_alone_and_another_one_may_have_room(start_replica, start_edge):
    servers = [start_replica(models={"queue_rows": 1}) for _ in range(2)]
    edge = start_edge(*servers)
    with full(servers[0]):
        codes = [call_with(edge, "ModelInfer", echo(value)).code() for value in range(20)]
    assert set(codes) == {OK}
    assert edge.envoy.stat(RETRIES) > 0


def test_what_ran_and_failed_is_not_sent_again(start_replica, start_edge):
    def write(repository: Path) -> None:
        models.write_model(repository, "picky", models.gather(), max_batch_size=8)

    edge = start_edge(start_replica(write), start_replica(write))
    for index, code in ((77, grpc.StatusCode.INTERNAL), (1.5, grpc.StatusCode.INVALID_ARGUMENT)):
        request = infer_request("picky", {"INDEX": np.array([[index]], np.int64 if index == 77 else np.float32)})
        assert call_with(edge, "ModelInfer", request).code() is code
    assert edge.envoy.stat(RETRIES) == 0
    assert len(edge.envoy.healthy()) == 2


def test_what_clients_cause_ejects_no_replica(start_replica, start_edge):
    def write(repository: Path) -> None:
        models.write_model(repository, "picky", models.gather(), max_batch_size=8)

    edge = start_edge(start_replica(write), start_replica(write))
    bad = infer_request("picky", {"INDEX": np.array([[77]], np.int64)})
    assert {call_with(edge, "ModelInfer", bad).code() for _ in range(30)} == {grpc.StatusCode.INTERNAL}
    assert len(edge.envoy.healthy()) == 2
    assert edge.envoy.stat("cluster.sluice.outlier_detection.ejections_active") == 0


def test_retries_have_a_budget(start_replica, start_edge):
    one, other = start_replica(), start_replica()
    edge = start_edge(one, other)
    one.model("echo").drain()
    with ExitStack() as stack:
        session = stack.enter_context(held(other.model("echo")))
        calls = [call_with(edge, "ModelInfer", echo(value)) for value in range(600)]
        eventually(lambda: edge.envoy.stat(OVER_BUDGET) > 0, "a retry is not made, as too many are in flight")
        retried = edge.envoy.stat(RETRIES)
        session.release()
        codes = [call.code() for call in calls]
    assert set(codes) == {OK, UNAVAILABLE}
    assert retried < len(calls) / 2
