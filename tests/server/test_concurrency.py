"""Many callers at once: each gets its own answer, and what becomes of one request does not touch its neighbours."""

from __future__ import annotations

import functools
import socket
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from sluice_server.observability.statistics import Outcome
from sluice_server.protocol.dispatch import INFER
from sluice_server.status import Code
from support import models
from support.fakes import PATIENCE_S, eventually, held
from support.requests import answer_arrays, infer_request

CALLERS = 64

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture
def serve(start_server, repository):
    """Start a server on the repository, without the HTTP listeners, which nobody here asks."""
    return functools.partial(start_server, repository, http=None, metrics=None)


def number(value: int, model: str = "echo", **how):
    return infer_request(model, {"X": np.array([[value]], np.int64)}, **how)


def answer_of(call) -> int:
    return answer_arrays(call.result())["Y"].item()


def add_echo(repository, **how) -> None:
    models.write_model(repository, "echo", models.identity("INT64", ("N", 1)), **{"max_batch_size": 16, **how})


def wait_until_queued(server, count: int, model: str = "echo") -> None:
    eventually(lambda: len(server.model(model).queue) == count, f"{count} requests wait")


def values_run(session) -> list[list[int]]:
    """The values of each run that has begun; in rising order, as requests may overtake each other on the way."""
    return [sorted(feeds["X"].ravel().tolist()) for feeds in session.runs]


def occupy(server, session, model: str = "echo"):
    """Let the only instance begin a run, which lasts until the session is released."""
    call = server.begin("ModelInfer", number(-1, model))
    session.wait_for_runs(1)
    return call


def outcomes_of(server, model: str = "echo") -> dict[Outcome, int]:
    return {name: count for name, count in server.model(model).statistics.snapshot().outcomes.items() if count}


def check_statistics(model) -> None:
    """The rules that the counters of a model keep among themselves."""
    batches, stats = model.batch_stats, model.inference_stats
    assert sum(batch.batch_size * batch.compute_infer.count for batch in batches) == model.inference_count
    assert sum(batch.compute_infer.count for batch in batches) == model.execution_count
    parts = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
    assert {part.count for part in parts} == {stats.success.count}
    assert sum(part.ns for part in parts) <= stats.success.ns


def test_each_of_many_waiting_callers_gets_its_own_answer_in_full_batches(serve, repository):
    add_echo(repository)
    server = serve()
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        calls = [server.begin("ModelInfer", number(value)) for value in range(CALLERS)]
        wait_until_queued(server, CALLERS)
        session.release()
        assert [answer_of(call) for call in calls] == list(range(CALLERS))
        assert answer_of(first) == -1
    statistics = server.call("ModelStatistics", b"\x0a\x04echo").model_stats[0]
    assert {batch.batch_size: batch.compute_infer.count for batch in statistics.batch_stats} == {1: 1, 16: 4}
    assert (statistics.inference_count, statistics.execution_count) == (CALLERS + 1, 5)
    assert statistics.inference_stats.success.count == CALLERS + 1


def test_callers_with_threads_and_connections_of_their_own_get_their_own_answers(serve, repository):
    models.write_model(repository, "slow", models.slow(2_000), max_batch_size=16)
    server = serve()
    rounds = 10
    at_once = threading.Barrier(CALLERS)

    def ask(caller: int) -> list[float]:
        with triton.InferenceServerClient(server.target) as client:
            at_once.wait(PATIENCE_S)
            answers = []
            for turn in range(rounds):
                tensor = triton.InferInput("X", [1, 1], "FP32")
                tensor.set_data_from_numpy(np.array([[caller * rounds + turn]], np.float32))
                answers.append(client.infer("slow", [tensor]).as_numpy("Y").item())
            return answers

    with ThreadPoolExecutor(CALLERS) as pool:
        answers = list(pool.map(ask, range(CALLERS)))
    assert sum(answers, []) == list(range(CALLERS * rounds))  # noqa: RUF017 - a short list
    statistics = server.call("ModelStatistics", b"\x0a\x04slow").model_stats[0]
    assert statistics.inference_count == CALLERS * rounds
    assert max(batch.batch_size for batch in statistics.batch_stats) > 1
    assert statistics.execution_count < CALLERS * rounds


def test_requests_of_several_rows_get_their_own_rows(serve, repository):
    add_echo(repository)
    server = serve()
    with held(server.model("echo")) as session:
        occupy(server, session)
        rows = [np.arange(start, start + size, dtype=np.int64)[:, None] for start, size in ((0, 5), (5, 1), (6, 9))]
        calls = [server.begin("ModelInfer", infer_request("echo", {"X": array})) for array in rows]
        wait_until_queued(server, 3)
        session.release()
        for call, array in zip(calls, rows, strict=True):
            np.testing.assert_array_equal(answer_arrays(call.result())["Y"], array)
        assert [len(run) for run in values_run(session)] == [1, 15]


def test_a_model_that_does_not_batch_runs_each_request_on_its_own(serve, repository):
    more = [("no_scheduler", {"max_batch_size": 16, "batching": False}), ("no_batches", {"max_batch_size": 0})]
    for name, how in more:
        dims = ("N", 1) if how["max_batch_size"] else (1, 1)
        models.write_model(repository, name, models.identity("INT64", dims), **how)
    server = serve()
    for name, _ in more:
        with held(server.model(name)) as session:
            first = occupy(server, session, name)
            calls = [server.begin("ModelInfer", number(value, name)) for value in range(5)]
            wait_until_queued(server, 5, name)
            session.release()
            assert [answer_of(call) for call in (first, *calls)] == [-1, 0, 1, 2, 3, 4]
            assert [len(run) for run in values_run(session)] == [1] * 6


def test_requests_of_other_shapes_or_outputs_are_not_merged(serve, repository):
    models.write_model(repository, "wide", models.identity("INT64", ("N", "W")), max_batch_size=16)
    models.write_model(repository, "two", models.sum_and_difference(("N", 1)), max_batch_size=16)
    server = serve()
    with held(server.model("wide")) as session:
        first = occupy(server, session, "wide")
        arrays = [np.full((1, width), width, np.int64) for width in (1, 2, 1, 2, 3)]
        calls = [server.begin("ModelInfer", infer_request("wide", {"X": array})) for array in arrays]
        wait_until_queued(server, 5, "wide")
        session.release()
        for call, array in zip(calls, arrays, strict=True):
            np.testing.assert_array_equal(answer_arrays(call.result())["Y"], array)
        assert answer_of(first) == -1
        assert sorted(feeds["X"].shape for feeds in session.runs) == [(1, 1), (1, 3), (2, 1), (2, 2)]
    with held(server.model("two")) as session:
        ones = np.ones((1, 1), np.int32)
        asked = [(), ("OUTPUT1",), ("OUTPUT0", "OUTPUT1"), ("OUTPUT1",)]
        inputs = {"INPUT0": ones * 5, "INPUT1": ones}
        calls = [server.begin("ModelInfer", infer_request("two", inputs))]
        session.wait_for_runs(1)
        calls += [server.begin("ModelInfer", infer_request("two", inputs, outputs=names)) for names in asked]
        wait_until_queued(server, 4, "two")
        session.release()
        got = [{name: array.item() for name, array in answer_arrays(call.result()).items()} for call in calls]
        both = {"OUTPUT0": 6, "OUTPUT1": 4}
        assert got == [both, both, {"OUTPUT1": 4}, both, {"OUTPUT1": 4}]
        assert [len(feeds["INPUT0"]) for feeds in session.runs] == [1, 2, 2]


def test_a_request_cancelled_while_it_waits_never_runs_and_the_others_do(serve, repository):
    add_echo(repository)
    server = serve()
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        calls = [server.begin("ModelInfer", number(value)) for value in range(4)]
        wait_until_queued(server, 4)
        calls[1].cancel()
        wait_until_queued(server, 3)
        session.release()
        assert [answer_of(call) for call in (first, calls[0], calls[2], calls[3])] == [-1, 0, 2, 3]
        assert values_run(session) == [[-1], [0, 2, 3]]
    assert outcomes_of(server) == {Outcome.OK: 4, Outcome.CANCELLED: 1}
    assert server.server.transport.outcomes() == {(INFER, Code.OK): 4, (INFER, Code.CANCELLED): 1}


def test_a_request_cancelled_while_its_batch_runs_leaves_the_others_answered(serve, repository):
    add_echo(repository)
    server = serve()
    with held(server.model("echo")) as session:
        blocker = occupy(server, session)
        calls = [server.begin("ModelInfer", number(value)) for value in range(4)]
        wait_until_queued(server, 4)
        with held(server.model("echo")) as second:
            session.release()
            second.wait_for_runs(1)
            calls[2].cancel()
            eventually(lambda: (INFER, Code.CANCELLED) in server.server.transport.outcomes(), "the client has left")
            second.release()
            assert [answer_of(call) for call in (blocker, calls[0], calls[1], calls[3])] == [-1, 0, 1, 3]
            assert values_run(second) == [[0, 1, 2, 3]]
    # It was computed: for the model it was answered, for the client it was not.
    assert outcomes_of(server) == {Outcome.OK: 5}
    assert server.server.transport.outcomes() == {(INFER, Code.OK): 4, (INFER, Code.CANCELLED): 1}


@pytest.mark.parametrize("guilty", [{0}, {3}, {7}, {1, 2, 6}, set(range(8))])
def test_a_value_that_fails_the_run_fails_its_own_request_only(guilty, serve, repository):
    models.write_model(repository, "table", models.gather((0, 10, 20, 30, 40, 50, 60, 70)), max_batch_size=16)
    server = serve()
    with held(server.model("table")) as session:
        first = server.begin("ModelInfer", look_up(0))
        session.wait_for_runs(1)
        calls = [server.begin("ModelInfer", look_up(99 if place in guilty else place)) for place in range(8)]
        wait_until_queued(server, 8, "table")
        session.release()
        assert answer_of(first) == 0
        for place, call in enumerate(calls):
            if place in guilty:
                assert call.code() is grpc.StatusCode.INTERNAL
                assert "onnx runtime error" in call.details()
                assert "99" in call.details()
            else:
                assert answer_of(call) == 10 * place
        assert len(session.runs[1]["INDEX"]) == 8
        assert len(session.runs) - 1 <= 2 * 8
    wanted = {Outcome.OK: 9 - len(guilty), Outcome.BACKEND_ERROR: len(guilty)}
    assert outcomes_of(server, "table") == wanted


def test_a_text_that_is_not_utf8_fails_its_own_request_only(serve, repository):
    models.write_model(repository, "text", models.identity("BYTES", ("N", 1)), max_batch_size=16)
    server = serve()
    with held(server.model("text")) as session:
        texts = [b"first", b"one", b"\xff", b"", b"four"]
        calls = []
        for text in texts:
            calls.append(server.begin("ModelInfer", infer_request("text", {"X": np.array([[text]], object)})))
            session.wait_for_runs(1)
        wait_until_queued(server, 4, "text")
        session.release()
        assert calls[2].code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "UTF-8" in calls[2].details()
        assert "element 0 of input 'X'" in calls[2].details()
        del calls[2], texts[2]
        assert [answer_of(call) for call in calls] == texts
        assert len(session.runs[1]["X"]) == 4


@pytest.mark.parametrize("triton_codes", [False, True])
def test_a_request_whose_timeout_passes_is_told_while_the_instance_is_busy(triton_codes, serve, repository):
    add_echo(repository)
    server = serve(triton_status_codes=triton_codes)
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        expiring = server.begin("ModelInfer", number(1, parameters={"timeout": 20_000}))
        patient = server.begin("ModelInfer", number(2, parameters={"timeout": 3_600_000_000}))
        endless = server.begin("ModelInfer", number(3, parameters={"timeout": 2**63 - 1}))
        wanted = grpc.StatusCode.UNAVAILABLE if triton_codes else grpc.StatusCode.DEADLINE_EXCEEDED
        assert expiring.code() is wanted
        assert expiring.details() == "Request timeout expired"
        assert not first.done()
        wait_until_queued(server, 2)
        session.release()
        assert [answer_of(call) for call in (first, patient, endless)] == [-1, 2, 3]
        assert values_run(session) == [[-1], [2, 3]]
    assert outcomes_of(server) == {Outcome.OK: 3, Outcome.QUEUE_TIMEOUT: 1}


def test_a_request_whose_grpc_deadline_passes_never_runs(serve, repository):
    add_echo(repository)
    server = serve()
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        expiring = server.begin("ModelInfer", number(1), timeout_s=0.25)
        patient = server.begin("ModelInfer", number(2))
        assert expiring.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        wait_until_queued(server, 1)
        session.release()
        assert [answer_of(call) for call in (first, patient)] == [-1, 2]
        assert values_run(session) == [[-1], [2]]
    ends = dict(server.server.transport.outcomes())
    assert ends.pop((INFER, Code.OK)) == 2
    # The client gives up by its own clock, which may be a little before the time is up here.
    assert ends in ({(INFER, Code.DEADLINE_EXCEEDED): 1}, {(INFER, Code.CANCELLED): 1})
    # Whoever noticed first, the timer or the client that left, counted it; the other one did not.
    outcomes = outcomes_of(server)
    assert outcomes.pop(Outcome.OK) == 2
    assert outcomes in ({Outcome.QUEUE_TIMEOUT: 1}, {Outcome.CANCELLED: 1})


def test_a_timeout_counts_only_in_the_queue(serve, repository):
    add_echo(repository)
    server = serve()
    with held(server.model("echo")) as session:
        running = server.begin("ModelInfer", number(1, parameters={"timeout": 400_000}))
        session.wait_for_runs(1)
        waiting = server.begin("ModelInfer", number(2, parameters={"timeout": 500_000}))
        assert waiting.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        session.release()
        assert answer_of(running) == 1


@pytest.mark.parametrize("triton_codes", [False, True])
@pytest.mark.parametrize("bound", ["rows", "bytes"])
def test_a_full_queue_refuses_at_once_and_serves_what_it_took(bound, triton_codes, serve, repository):
    add_echo(repository)
    size_bytes = number(0).ByteSize()
    limits = {"queue_rows": 4} if bound == "rows" else {"queue_bytes": 4 * size_bytes + 3}
    server = serve(models=limits, triton_status_codes=triton_codes)
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        calls = [server.begin("ModelInfer", number(value)) for value in range(4)]
        wait_until_queued(server, 4)
        wanted = grpc.StatusCode.UNAVAILABLE if triton_codes else grpc.StatusCode.RESOURCE_EXHAUSTED
        for _ in range(3):
            code, message = server.refusal("ModelInfer", number(9))
            assert code is wanted
            assert "Exceeds maximum queue size" in message
            assert "'echo'" in message
            assert bound in message
        session.release()
        assert [answer_of(call) for call in (first, *calls)] == [-1, 0, 1, 2, 3]
    assert outcomes_of(server) == {Outcome.OK: 5, Outcome.QUEUE_FULL: 3}
    statistics = server.model("echo").statistics.snapshot()
    assert statistics.fail.count == 0
    assert answer_of(server.begin("ModelInfer", number(7))) == 7


def test_a_request_above_the_bound_of_the_queue_is_told_that_it_never_fits(serve, repository):
    add_echo(repository)
    server = serve(models={"queue_rows": 2})
    code, message = server.refusal("ModelInfer", infer_request("echo", {"X": np.zeros((3, 1), np.int64)}))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "never" in message
    assert "3 rows" in message
    assert answer_of(server.begin("ModelInfer", number(7))) == 7


def test_a_client_that_vanishes_takes_its_waiting_requests_along_and_no_others(serve, repository):
    add_echo(repository)
    server = serve()
    with held(server.model("echo")) as session:
        first = occupy(server, session)
        with grpc.insecure_channel(server.target) as vanishing:
            method = vanishing.unary_unary("/inference.GRPCInferenceService/ModelInfer")
            lost = [method.future(number(100 + value).SerializeToString()) for value in range(10)]
            staying = [server.begin("ModelInfer", number(value)) for value in range(3)]
            wait_until_queued(server, 13)
        wait_until_queued(server, 3)
        session.release()
        assert sorted(answer_of(call) for call in (first, *staying)) == [-1, 0, 1, 2]
        assert values_run(session) == [[-1], [0, 1, 2]]
    assert all(call.code() is grpc.StatusCode.CANCELLED for call in lost)
    assert outcomes_of(server) == {Outcome.OK: 4, Outcome.CANCELLED: 10}


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@pytest.mark.parametrize(
    "garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", PREFACE[:9], PREFACE, PREFACE + b"\xff" * 99, bytes(10_000)]
)
def test_a_peer_that_speaks_something_else_harms_nobody(garbage, serve, repository):
    add_echo(repository)
    server = serve()
    host, _, port = server.target.rpartition(":")
    for _ in range(5):
        with socket.create_connection((host, int(port)), PATIENCE_S) as peer:
            peer.sendall(garbage)
    assert answer_of(server.begin("ModelInfer", number(7))) == 7


def look_up(index: int, **how):
    return infer_request("table", {"INDEX": np.array([[index]], np.int64)}, **how)


MIX = {
    "good": lambda: look_up(2),
    "bad value": lambda: look_up(99),
    "expiring": lambda: look_up(1, parameters={"timeout": 300_000}),
    "leaving": lambda: look_up(0),
    "invalid": lambda: infer_request("table", {"NOPE": np.zeros((1, 1), np.int64)}),
    "no message": lambda: b"\xff",
    "unknown": lambda: infer_request("nope", {}),
}
EACH = 20
"""Requests of each kind."""


def send_mix(server) -> dict[str, list]:
    """The calls of each kind, sent in no order."""
    order = [kind for kind in MIX for _ in range(EACH)]
    np.random.default_rng(5).shuffle(order)
    calls = {kind: [] for kind in MIX}
    for kind in order:
        calls[kind].append(server.begin("ModelInfer", MIX[kind]()))
    return calls


def codes_of(calls) -> set[grpc.StatusCode]:
    return {call.code() for call in calls}


def test_every_call_of_a_chaotic_mix_ends_once_and_is_counted_once(serve, repository):
    models.write_model(repository, "table", models.gather(), max_batch_size=4)
    server = serve(models={"queue_rows": 200})
    with held(server.model("table")) as session:
        first = server.begin("ModelInfer", look_up(3))
        session.wait_for_runs(1)
        mix = send_mix(server)
        assert codes_of(mix["expiring"]) == {grpc.StatusCode.DEADLINE_EXCEEDED}
        wait_until_queued(server, 3 * EACH, "table")
        for call in mix["leaving"]:
            call.cancel()
        wait_until_queued(server, 2 * EACH, "table")
        fillers = [server.begin("ModelInfer", look_up(1)) for _ in range(200 - 2 * EACH)]
        wait_until_queued(server, 200, "table")
        refused = [server.begin("ModelInfer", look_up(1)) for _ in range(EACH)]
        assert codes_of(refused) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        session.release()
        assert answer_of(first) == 30
        assert {answer_of(call) for call in mix["good"]} == {20}
        assert {answer_of(call) for call in fillers} == {10}
        assert codes_of(mix["bad value"]) == {grpc.StatusCode.INTERNAL}
        assert codes_of(mix["invalid"] + mix["no message"]) == {grpc.StatusCode.INVALID_ARGUMENT}
        assert codes_of(mix["unknown"]) == {grpc.StatusCode.NOT_FOUND}
    answered = 1 + EACH + len(fillers)
    ends = [Code.INTERNAL, Code.DEADLINE_EXCEEDED, Code.CANCELLED, Code.NOT_FOUND, Code.RESOURCE_EXHAUSTED]
    by_code = {Code.OK: answered, Code.INVALID_ARGUMENT: 2 * EACH, **dict.fromkeys(ends, EACH)}
    assert server.server.transport.outcomes() == {(INFER, code): count for code, count in by_code.items()}
    # A message that cannot be read and a model that is not there are no model's requests.
    others = ["BACKEND_ERROR", "QUEUE_TIMEOUT", "CANCELLED", "INVALID", "QUEUE_FULL"]
    assert outcomes_of(server, "table") == {Outcome.OK: answered, **{Outcome[name]: EACH for name in others}}
    assert len(server.model("table").queue) == 0


def test_a_storm_of_clients_that_come_and_go_leaves_a_server_that_answers(serve, repository):
    models.write_model(repository, "slow", models.slow(500), max_batch_size=8)
    server = serve(models={"queue_rows": 32})
    random = np.random.default_rng(11)

    def one(choice: int, value: float):
        request = infer_request("slow", {"X": np.array([[value]], np.float32)})
        if choice == 0:
            return server.begin("ModelInfer", request, timeout_s=float(random.uniform(0.0, 0.01)))
        if choice == 1:
            request.parameters["timeout"].int64_param = int(random.integers(0, 2_000))
        if choice == 2:
            request.raw_input_contents[0] += b"?"
        return server.begin("ModelInfer", request)

    calls = []
    for turn in range(1000):
        choice = int(random.integers(0, 6))
        calls.append((choice, turn, one(choice, turn)))
        if choice == 3:
            calls[int(random.integers(0, len(calls)))][2].cancel()
    for choice, turn, call in calls:
        if call.cancelled() or call.exception() is not None:
            continue
        assert choice != 2
        assert answer_of(call) == turn
    honest = {
        grpc.StatusCode.OK, grpc.StatusCode.CANCELLED, grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.INVALID_ARGUMENT,
    }  # fmt: skip
    assert {call.code() for _, _, call in calls} <= honest
    assert answer_of(server.begin("ModelInfer", infer_request("slow", {"X": np.array([[5]], np.float32)}))) == 5
    model, transport = server.model("slow"), server.server.transport
    eventually(lambda: len(model.queue) == 0, "the queue is empty")

    def counted() -> tuple[int, int, int]:
        ends = transport.outcomes()
        gone = ends.get((INFER, Code.CANCELLED), 0) + ends.get((INFER, Code.DEADLINE_EXCEEDED), 0)
        return sum(ends.values()), sum(model.statistics.outcomes().values()), gone

    check_statistics(server.call("ModelStatistics", b"\x0a\x04slow").model_stats[0])
    # A client may be gone before its request is looked at, so that no model hears of it.
    eventually(lambda: 0 <= counted()[0] - counted()[1] <= counted()[2], "both sets of counters agree")
