"""Priorities, queue policies and overload as clients meet them: order, codes, when to come back, and the counts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status

import sluice_client
from sluice_batching.priority_queue import DELAYED_RANK
from sluice_server.execution.instance import WOULD_BE_LATE
from sluice_server.observability.statistics import Outcome
from sluice_server.settings import HttpSettings
from support import models
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request
from support.rest import post_infer
from support.server import LOOPBACK

pytestmark = pytest.mark.usefixtures("no_errors_logged")

MS = 1_000_000

UNMERGED = 'parameters { key: "merge_requests" value { string_value: "false" } }'


@pytest.fixture
def serve(start_server, repository):
    """Start a server whose model `echo` has this scheduler, and runs one request at a time."""

    def start(scheduler: str, *, max_batch_size: int = 0, more: str = "", **changes):
        model = models.identity("INT64", ("N", 1) if max_batch_size else (1,))
        more += f"dynamic_batching {{ {scheduler} }}" if scheduler else ""
        models.write_model(repository, "echo", model, max_batch_size=max_batch_size, batching=False, more=more)
        return start_server(repository, **{"http": None, "metrics": None, **changes})

    return start


def number(value: int, **parameters: int):
    return infer_request("echo", {"X": np.array([value], np.int64)}, parameters=parameters)


def value_of(call) -> int:
    return answer_arrays(call.result())["Y"].item()


def wait_until_queued(server, count: int) -> None:
    eventually(lambda: len(server.model("echo").queue) == count, f"{count} requests wait")


def occupy(server, session):
    """Let the only instance begin a run, which lasts until the session is released."""
    call = server.begin("ModelInfer", number(-1))
    session.wait_for_runs(1)
    return call


def begun(server, *requests) -> list:
    """Calls that wait in the queue in this order."""
    calls = []
    waiting = len(server.model("echo").queue)
    for request in requests:
        calls.append(server.begin("ModelInfer", request))
        wait_until_queued(server, waiting + len(calls))
    return calls


def run_values(session) -> list[int]:
    return [feeds["X"].item() for feeds in session.runs]


def refusal_of(call) -> tuple[grpc.StatusCode, str]:
    error = call.exception()
    return error.code(), error.details()


def test_priority_1_goes_first_and_a_request_without_one_has_the_default(serve):
    server = serve("priority_levels: 3 default_priority_level: 2")
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        requests = [number(30, priority=3), number(20), number(10, priority=1), number(21, priority=9)]
        # The same again, by then with a head that is known.
        calls = begun(server, *requests, *requests)
        session.release()
        assert [value_of(call) for call in (first, *calls)] == [-1, 30, 20, 10, 21, 30, 20, 10, 21]
    assert run_values(session) == [-1, 10, 10, 20, 21, 20, 21, 30, 30]


def test_priorities_share_batches(serve):
    server = serve("priority_levels: 2 default_priority_level: 2", max_batch_size=3)

    def row(value: int, **parameters: int):
        return infer_request("echo", {"X": np.array([[value]], np.int64)}, parameters=parameters)

    with held(server.model("echo")) as session:
        first = server.begin("ModelInfer", row(-1))
        session.wait_for_runs(1)
        calls = begun(server, row(20), row(21), row(22), row(10, priority=1))
        session.release()
        assert [value_of(call) for call in (first, *calls)] == [-1, 20, 21, 22, 10]
    assert [feeds["X"].ravel().tolist() for feeds in session.runs] == [[-1], [10, 20, 21], [22]]


def test_queue_policies_and_priorities_hold_for_batching_models_whose_requests_are_not_merged(serve):
    server = serve(
        """priority_levels: 2 default_priority_level: 2
        priority_queue_policy { key: 2 value { max_queue_size: 2 } }""",
        max_batch_size=4,
        more=UNMERGED,
    )

    def rows(value: int, **parameters: int):
        return infer_request("echo", {"X": np.array([[value], [value]], np.int64)}, parameters=parameters)

    with held(server.model("echo")) as session:
        first = server.begin("ModelInfer", rows(-1))
        session.wait_for_runs(1)
        calls = begun(server, rows(20), rows(21), rows(10, priority=1))
        code, text = refusal_of(server.begin("ModelInfer", rows(22)))
        session.release()
        for call in (first, *calls):
            call.result()
    assert (code, "2 of 2 requests are waiting" in text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    assert [feeds["X"].ravel().tolist() for feeds in session.runs] == [[-1, -1], [10, 10], [20, 20], [21, 21]]


@pytest.mark.parametrize(
    ("triton", "code"), [(False, grpc.StatusCode.RESOURCE_EXHAUSTED), (True, grpc.StatusCode.UNAVAILABLE)]
)
def test_a_level_that_is_full_refuses_with_the_code_that_is_configured(serve, triton, code):
    server = serve("default_queue_policy { max_queue_size: 2 }", triton_status_codes=triton)
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        calls = begun(server, number(1), number(2))
        got, text = refusal_of(server.begin("ModelInfer", number(3)))
        assert got is code
        assert "Exceeds maximum queue size of model 'echo'" in text
        assert "2 of 2 requests are waiting" in text
        session.release()
        assert [value_of(call) for call in (first, *calls)] == [-1, 1, 2]
    snapshot = server.model("echo").statistics.snapshot()
    assert (snapshot.outcomes[Outcome.QUEUE_FULL], snapshot.fail.count) == (1, 0)


@pytest.mark.parametrize(
    ("triton", "code"), [(False, grpc.StatusCode.DEADLINE_EXCEEDED), (True, grpc.StatusCode.UNAVAILABLE)]
)
def test_a_request_that_has_waited_for_the_timeout_is_refused_while_the_instance_is_busy(serve, triton, code):
    server = serve("default_queue_policy { default_timeout_microseconds: 20000 }", triton_status_codes=triton)
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        assert refusal_of(server.begin("ModelInfer", number(1))) == (code, "Request timeout expired")
        session.release()
        assert value_of(first) == -1
    assert run_values(session) == [-1]
    snapshot = server.model("echo").statistics.snapshot()
    assert (snapshot.failures["REJECTED"], snapshot.outcomes[Outcome.QUEUE_TIMEOUT]) == (1, 1)


def test_a_request_whose_timeout_delays_is_served_behind_the_others(serve):
    server = serve("default_queue_policy { default_timeout_microseconds: 20000 timeout_action: DELAY }")
    queue = server.model("echo").queue
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        (old,) = begun(server, number(1))
        waiting = queue._queue._waiting
        eventually(lambda: any(each.rank >= DELAYED_RANK for each in list(waiting.values())), "the old one is delayed")
        (new,) = begun(server, number(2))
        session.release()
        assert [value_of(call) for call in (first, old, new)] == [-1, 1, 2]
    assert run_values(session) == [-1, 2, 1]


def test_a_requests_own_timeout_counts_only_where_the_policy_allows_it(serve):
    server = serve(
        """priority_levels: 2 default_priority_level: 1
        default_queue_policy { default_timeout_microseconds: 60000000 }
        priority_queue_policy { key: 2 value { allow_timeout_override: true } }"""
    )
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        # 20 ms, which level 1 passes over.
        (kept,) = begun(server, number(1, timeout=20_000))
        refused = server.begin("ModelInfer", number(2, timeout=20_000, priority=2))
        assert refusal_of(refused) == (grpc.StatusCode.DEADLINE_EXCEEDED, "Request timeout expired")
        session.release()
        assert [value_of(call) for call in (first, kept)] == [-1, 1]


def test_the_earliest_deadline_goes_first_without_any_configuration(serve):
    server = serve("")
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        calls = begun(server, number(1), number(3, timeout=900_000_000), number(2, timeout=900_000))
        session.release()
        for call in (first, *calls):
            call.result()
    assert run_values(session)[:2] == [-1, 2]


def slow_runs(server, run_ms: int) -> None:
    """Have the model's runs of one row have taken so long of late."""
    runner = server.model("echo")._runner
    for _ in range(16):
        runner._run_times.record(1, run_ms * MS, runner._clock())


def test_what_would_finish_too_late_is_refused_before_it_runs(serve):
    server = serve("")
    slow_runs(server, 5_000)
    code, text = server.refusal("ModelInfer", number(1, timeout=2_000_000))
    assert code is grpc.StatusCode.DEADLINE_EXCEEDED
    assert "would have finished too late" in text
    assert "a run takes 5000.000 ms" in text
    assert server.model("echo").statistics.snapshot().outcomes[Outcome.QUEUE_TIMEOUT] == 1
    # It is what nobody gives a deadline that is run whatever it takes.
    slow_runs(server, 60_000)
    assert value_of(server.begin("ModelInfer", number(1), timeout_s=None)) == 1


def test_what_comes_too_late_while_it_waits_is_refused_before_it_runs(serve):
    server = serve("")
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        (late,) = begun(server, number(1, timeout=20_000_000))
        slow_runs(server, 25_000)
        session.release()
        assert value_of(first) == -1
        assert refusal_of(late) == (grpc.StatusCode.DEADLINE_EXCEEDED, WOULD_BE_LATE)
    assert run_values(session) == [-1]
    assert server.model("echo").statistics.snapshot().failures["REJECTED"] == 1


def test_a_full_queue_says_when_to_come_back(serve):
    server = serve("", models={"queue_rows": 2})
    slow_runs(server, 700)
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        calls = begun(server, number(1), number(2))
        error = server.begin("ModelInfer", number(3)).exception()
        trailers = dict(error.trailing_metadata())
        session.release()
        assert [value_of(call) for call in (first, *calls)] == [-1, 1, 2]
    # Two rows wait, at 0.7 s each by the runs before.
    assert trailers["grpc-retry-pushback-ms"] == "1400"
    details = Status.FromString(trailers["grpc-status-details-bin"])
    assert (details.code, details.message) == (error.code().value[0], error.details())
    retry = RetryInfo()
    assert details.details[0].Unpack(retry)
    assert retry.retry_delay.ToMilliseconds() == 1400


def test_a_full_queue_says_nothing_of_what_it_does_not_know(serve):
    server = serve("", models={"queue_rows": 1})
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        (call,) = begun(server, number(1))
        error = server.begin("ModelInfer", number(3)).exception()
        session.release()
        assert [value_of(each) for each in (first, call)] == [-1, 1]
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "grpc-retry-pushback-ms" not in dict(error.trailing_metadata())


def test_rest_clients_are_told_in_whole_seconds(serve):
    server = serve("", models={"queue_rows": 2}, http=HttpSettings(LOOPBACK, 0))
    slow_runs(server, 700)
    body = {"inputs": [{"name": "X", "shape": [1], "datatype": "INT64", "data": [3]}]}
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        calls = begun(server, number(1), number(2))
        refused = post_infer(server, "echo", body)
        session.release()
        for call in (first, *calls):
            call.result()
    assert (refused.status, refused.headers["retry-after"]) == (429, "2")
    assert post_infer(server, "echo", body).status == 200


def test_our_client_comes_back_when_it_was_told_to(serve):
    server = serve("", models={"queue_rows": 1})
    slow_runs(server, 30)
    statistics = server.model("echo").statistics
    policy = sluice_client.RetryPolicy(max_attempts=1000, budget_tokens=10_000)
    patient = sluice_client.Client(server.target, deadline_s=30, retry=policy)
    with held(server.model("echo")) as session, patient, ThreadPoolExecutor() as pool:
        first = occupy(server, session)
        (call,) = begun(server, number(1))
        answer = pool.submit(patient.infer, "echo", {"X": np.array([7], np.int64)})
        eventually(lambda: statistics.snapshot().outcomes[Outcome.QUEUE_FULL] >= 2, "it has come back once")
        session.release()
        assert answer.result()["Y"].item() == 7
        assert [value_of(each) for each in (first, call)] == [-1, 1]
