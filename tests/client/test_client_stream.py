"""Streams of both clients: on real servers of both transports, and on one that breaks every promise."""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy as np
import pytest
from drivers import WAIT_S, Loop
from fake_server import FakeServer, answer_of

from sluice_client import (
    AsyncClient,
    Client,
    ClientClosed,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    InvalidRequest,
    InvalidResponse,
    NotFound,
    ResourceExhausted,
    Result,
    Unavailable,
    Unknown,
)
from sluice_client.settings import STREAM_CLOSE_S
from sluice_server.observability.statistics import Outcome
from sluice_server.protocol.dispatch import STREAM_INFER
from sluice_server.status import Code
from support import models
from support.fakes import eventually, held

pytestmark = pytest.mark.usefixtures("no_errors_logged")

X = {"X": np.arange(6, dtype=np.float32).reshape(2, 3)}
THREADS = 8

MakeClient = Callable[..., Any]


@pytest.fixture
def serve(start_server, repository):
    """Start a server of two models that say an INT64 back and one that adds sequences up, without HTTP."""
    for name in ("echo", "other"):
        models.write_model(repository, name, models.identity("INT64", ("N", 1)), max_batch_size=16)
    models.write_accumulator(repository)
    return functools.partial(start_server, repository, http=None, metrics=None)


@pytest.fixture
def real(serve):
    return serve()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS) as pool:
        yield pool


def of(value: int, name: str = "X") -> dict[str, Any]:
    return {name: np.array([[value]], np.int64)}


def ask(stream: Any, value: int, model: str = "echo", **how: Any) -> int:
    return int(stream.infer(model, of(value), **how)["Y"].item())


def in_flight(real: Any, model: str = "echo") -> int:
    """How many requests of a held model run or wait."""
    return len(real.model(model).queue) + 1


# --- on servers of ours


def test_many_callers_share_one_stream_and_each_gets_its_own_answers(real, make_client, pool):
    client = make_client(real.target)
    with client.stream() as stream:
        numbers = list(pool.map(lambda n: ask(stream, n, ("echo", "other")[n % 2]), range(400)))
    assert numbers == list(range(400))
    assert real.server.transport.outcomes() == {(STREAM_INFER, Code.OK): 1}
    assert not stream.is_open


def test_requests_in_flight_together_share_a_batch(real, make_client, pool):
    with held(real.model("echo")) as session, make_client(real.target).stream() as stream:
        first = pool.submit(ask, stream, 0)
        session.wait_for_runs(1)
        others = [pool.submit(ask, stream, n) for n in range(1, THREADS)]
        eventually(lambda: in_flight(real) == THREADS, "all wait")
        session.release()
        assert [each.result(WAIT_S) for each in (first, *others)] == list(range(THREADS))
    assert [len(feeds["X"]) for feeds in session.runs] == [1, THREADS - 1]


def test_a_result_is_that_of_a_call(real, make_client):
    client = make_client(real.target)
    with client.stream() as stream:
        result = stream.infer("echo", of(7), outputs=["Y"], version="1", request_id="mine", parameters={"note": "x"})
        unnamed = [stream.infer("echo", of(7)).id for _ in range(2)]
    assert isinstance(result, Result)
    assert (list(result), result.model_name, result.model_version, result.id) == (["Y"], "echo", "1", "mine")
    assert (result.timing.attempts, result.timing.endpoint) == (1, real.target)
    assert 0 < result.timing.total_s < WAIT_S
    assert len(set(unnamed)) == 2


def test_an_error_reaches_the_caller_it_belongs_to_with_its_status_and_the_stream_goes_on(real, make_client, pool):
    with held(real.model("echo")) as session, make_client(real.target).stream() as stream:
        slow = pool.submit(ask, stream, 1)
        session.wait_for_runs(1)
        missing = pool.submit(ask, stream, 2, "nope")
        wrong = pool.submit(stream.infer, "echo", of(3, "NOPE"))
        last = pool.submit(ask, stream, 4, "other")
        session.release()
        assert (slow.result(WAIT_S), last.result(WAIT_S)) == (1, 4)
        with pytest.raises(NotFound, match="'nope' is not found") as caught:
            missing.result(WAIT_S)
        with pytest.raises(InvalidArgument, match="unexpected inference input 'NOPE' for model 'echo'"):
            wrong.result(WAIT_S)
        assert ask(stream, 5) == 5
    assert (caught.value.model, caught.value.endpoint, caught.value.attempts) == ("nope", real.target, 1)


def test_a_full_queue_says_when_to_come_back(serve, make_client, pool):
    real = serve(models={"queue_rows": 2})
    client = make_client(real.target)
    for value in range(20):
        client.infer("echo", of(value))  # so that the server can say how long its runs take
    with held(real.model("echo")) as session, client.stream() as stream:
        calls = [pool.submit(ask, stream, 0)]
        session.wait_for_runs(1)
        calls += [pool.submit(ask, stream, value) for value in (1, 2)]
        eventually(lambda: in_flight(real) == 3, "two wait")
        refused = pool.submit(ask, stream, 3)
        eventually(
            lambda: real.model("echo").statistics.snapshot().outcomes[Outcome.QUEUE_FULL] == 1, "the last is refused"
        )
        session.release()
        assert [call.result(WAIT_S) for call in calls] == [0, 1, 2]
        with pytest.raises(ResourceExhausted, match="Exceeds maximum queue size") as caught:
            refused.result(WAIT_S)
    assert caught.value.retry_after_s > 0


def test_a_model_that_fails_is_an_internal_error(real, make_client):
    sequence = {"sequence_id": 3, "sequence_start": True}
    with make_client(real.target).stream() as stream, pytest.raises(Internal, match="onnx runtime error"):
        stream.infer("sums", of(-1, "INPUT"), parameters=sequence)


def test_the_steps_of_sequences_go_in_the_order_of_their_callers(real, make_client, pool):
    def run(stream: Any, sequence: int) -> list[int]:
        sums = []
        for turn in range(10):
            flags = {"sequence_id": sequence, "sequence_start": turn == 0, "sequence_end": turn == 9}
            sums.append(int(stream.infer("sums", of(sequence, "INPUT"), parameters=flags)["OUTPUT"].item()))
        return sums

    with make_client(real.target).stream() as stream:
        told = list(pool.map(functools.partial(run, stream), range(1, 5)))
    assert told == [[sequence * turn for turn in range(1, 11)] for sequence in range(1, 5)]


def test_tasks_that_do_not_wait_are_sent_in_the_order_of_their_start(real, loop):
    async def steps() -> list[int]:
        async with AsyncClient(real.target) as client, client.stream() as stream:
            calls = [
                stream.infer("sums", of(turn, "INPUT"), parameters={"sequence_id": 9, "sequence_start": turn == 1})
                for turn in range(1, 21)
            ]
            return [int(result["OUTPUT"].item()) for result in await asyncio.gather(*calls)]

    assert loop.run(steps()) == [sum(range(1, turn + 1)) for turn in range(1, 21)]


def test_the_deadline_of_a_request_ends_its_waiting_and_the_server_still_runs_it(real, make_client, pool):
    with held(real.model("echo")) as session, make_client(real.target).stream() as stream:
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s; the request is still with") as caught:
            ask(stream, 1, deadline_s=0.05)
        kept = pool.submit(ask, stream, 2)
        eventually(lambda: in_flight(real) == 2, "the second waits")
        session.release()
        assert kept.result(WAIT_S) == 2
    assert (caught.value.model, caught.value.endpoint) == ("echo", real.target)
    assert [feeds["X"].ravel().tolist() for feeds in session.runs] == [[1], [2]]


def test_the_client_s_deadline_holds_for_requests_and_not_for_the_stream(real, make_client):
    with held(real.model("echo")), make_client(real.target, deadline_s=0.05).stream() as stream:
        for value in (1, 2):
            with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.05 s"):
                ask(stream, value)
        assert stream.is_open
        begun_s = time.monotonic()
    # Nobody waits for what is held, so closing does not either.
    assert time.monotonic() - begun_s < STREAM_CLOSE_S / 2


def test_the_deadline_of_a_stream_ends_all_that_is_in_flight(real, make_client, pool):
    with held(real.model("echo")) as session, make_client(real.target).stream(deadline_s=0.5) as stream:
        calls = [pool.submit(ask, stream, n) for n in range(3)]
        for call in calls:
            with pytest.raises(DeadlineExceeded, match=r"(?i)deadline") as caught:
                call.result(WAIT_S)
            assert caught.value.model == "echo"
        with pytest.raises(DeadlineExceeded):
            ask(stream, 4)
        session.release()


def test_a_caller_that_wants_errors_as_the_status_of_the_stream_gets_them_so(real, make_client, pool):
    headers = {"triton_grpc_error": "true"}
    with held(real.model("echo")) as session, make_client(real.target).stream(metadata=headers) as stream:
        first = pool.submit(ask, stream, 0)
        session.wait_for_runs(1)
        missing = pool.submit(ask, stream, 1, "nope")
        session.release()
        assert first.result(WAIT_S) == 0
        with pytest.raises(NotFound, match="'nope' is not found"):
            missing.result(WAIT_S)
        with pytest.raises(NotFound, match="'nope' is not found"):
            ask(stream, 3)
        assert not stream.is_open


def test_a_server_that_stops_answers_what_is_due_and_refuses_the_rest(real, make_client, pool):
    with held(real.model("echo")) as session, make_client(real.target).stream() as stream:
        due = pool.submit(ask, stream, 1)
        session.wait_for_runs(1)
        stopping = threading.Thread(target=real.server.stop)
        stopping.start()
        eventually(lambda: real.server._dispatcher._infer_streams._stopping, "the server takes no more")
        late = pool.submit(ask, stream, 2)
        session.release()
        assert due.result(WAIT_S) == 1
        with pytest.raises(Unavailable, match="shutting down"):
            late.result(WAIT_S)
        stopping.join(WAIT_S)


def test_closing_waits_for_the_answers_in_flight(real, make_client, pool):
    with held(real.model("echo")) as session:
        stream = make_client(real.target).stream()
        calls = [pool.submit(ask, stream, value) for value in range(3)]
        session.wait_for_runs(1)
        eventually(lambda: sum(map(len, [feeds["X"] for feeds in session.runs])) + len(real.model("echo").queue) == 3,
                   "all are with the server")  # fmt: skip
        closing = pool.submit(stream.close)
        eventually(lambda: not stream.is_open, "it takes no more")
        with pytest.raises(ClientClosed, match="the stream is closed; open a new one"):
            ask(stream, 4)
        session.release()
        assert [call.result(WAIT_S) for call in calls] == [0, 1, 2]
        closing.result(WAIT_S)
        stream.close()
    assert real.server.transport.outcomes() == {(STREAM_INFER, Code.OK): 1}


# --- on a server that does what a script says


def silent(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
    """Hear everything, and say nothing until the client leaves."""
    left = threading.Event()
    context.add_callback(left.set)
    for _ in requests:
        pass
    left.wait(WAIT_S)
    return iter(())


def say_back(stream: Any, value: float = 5.0, **how: Any) -> float:
    return float(stream.infer("identity", {"X": np.array([value], np.float32)}, **how)["X"].item())


def test_a_stream_that_breaks_fails_everything_in_flight_and_sends_nothing_again(make_client, server, pool):
    heard: list[str] = []

    def break_at_the_third(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            heard.append(request.id)
            if len(heard) == 3:
                context.set_trailing_metadata([("grpc-retry-pushback-ms", "1")])
                context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        yield b""

    server.talk = break_at_the_third
    client = make_client(server.address)
    stream = client.stream()
    calls = [pool.submit(say_back, stream) for _ in range(3)]
    for call in calls:
        with pytest.raises(Unavailable, match="gone") as caught:
            call.result(WAIT_S)
        assert (caught.value.model, caught.value.attempts, caught.value.retry_after_s) == ("identity", 1, 0.001)
    with pytest.raises(Unavailable, match="gone"):
        say_back(stream)
    stream.close()
    assert (len(heard), server.count("ModelStreamInfer")) == (3, 1)
    assert "ended: UNAVAILABLE: gone" in repr(stream)


def test_answers_without_ids_are_given_out_in_order(make_client, server, pool):
    everything = threading.Event()

    def nameless(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        waiting = [next(requests) for _ in range(4)]
        everything.set()
        for number, request in enumerate(waiting):
            yield answer_of(request, request_id="", error="the second" if number == 1 else "")

    server.talk = nameless
    with make_client(server.address).stream() as stream:
        calls = []
        for value in range(4):
            calls.append(pool.submit(say_back, stream, value))
            eventually(lambda: f"{len(calls)} in flight" in repr(stream) or everything.is_set(), "it was sent")
        assert [calls[index].result(WAIT_S) for index in (0, 2, 3)] == [0, 2, 3]
        with pytest.raises(Unknown, match="UNKNOWN: the second"):
            calls[1].result(WAIT_S)


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (lambda request: answer_of(request, request_id="x"), "answered for the request 'x', which is not in flight"),
        (lambda request: b"\xff\xff", "not a ModelStreamInferResponse"),
    ],
)
def test_an_answer_that_belongs_to_nobody_ends_the_stream(make_client, server, answer, problem):
    def talk(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        for request in requests:
            yield answer(request)

    server.talk = talk
    with make_client(server.address).stream() as stream:
        with pytest.raises(InvalidResponse, match=problem):
            say_back(stream)
        assert server.cancelled.wait(WAIT_S)
        with pytest.raises(InvalidResponse, match=problem):
            say_back(stream)


def test_a_server_that_ends_the_stream_early_breaks_the_protocol(make_client, server):
    def talk(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        yield answer_of(next(requests))
        next(requests)

    server.talk = talk
    with make_client(server.address).stream() as stream:
        assert say_back(stream) == 5.0
        with pytest.raises(InvalidResponse, match="ended the stream with status OK and without all of its answers"):
            say_back(stream)


def test_closing_waits_no_longer_than_it_is_told(make_client, server, pool):
    server.talk = silent
    stream = make_client(server.address).stream()
    call = pool.submit(say_back, stream)
    eventually(lambda: "1 in flight" in repr(stream), "it was sent")
    stream.close(0.05)
    with pytest.raises(ClientClosed, match="the stream was closed before the answer came"):
        call.result(WAIT_S)
    assert server.cancelled.wait(WAIT_S)


def test_an_exception_in_the_block_of_a_stream_cancels_it(make_client, server, pool):
    server.talk = silent
    stream = make_client(server.address).stream()
    call = pool.submit(say_back, stream)
    eventually(lambda: "1 in flight" in repr(stream), "it was sent")
    with pytest.raises(ZeroDivisionError), stream:
        raise ZeroDivisionError
    with pytest.raises(ClientClosed):
        call.result(WAIT_S)


def test_closing_the_client_ends_its_streams(make_client, server, pool):
    server.talk = silent
    client = make_client(server.address)
    stream = client.stream()
    call = pool.submit(say_back, stream)
    eventually(lambda: "1 in flight" in repr(stream), "it was sent")
    client.close()
    with pytest.raises(ClientClosed):
        call.result(WAIT_S)
    with pytest.raises(ClientClosed):
        client.stream()
    eventually(lambda: not stream.is_open, "it has ended")
    with pytest.raises(ClientClosed):
        say_back(stream)


def test_a_stream_to_nobody_is_unavailable_and_the_next_goes_elsewhere(make_client, server, dead_address):
    server.talk = lambda requests, context: map(answer_of, requests)
    client = make_client([dead_address, server.address], random=lambda: 0.0)
    with client.stream() as stream, pytest.raises(Unavailable, match="failed to connect") as caught:
        say_back(stream)
    assert caught.value.endpoint == dead_address
    for _ in range(2):
        with client.stream() as stream:
            assert say_back(stream) == 5.0
    with client.stream(endpoint=dead_address) as stream, pytest.raises(Unavailable):
        say_back(stream)


def test_a_stream_carries_metadata_and_its_deadline(make_client, server):
    server.talk = lambda requests, context: map(answer_of, requests)
    client = make_client(server.address, metadata={"authorization": "Bearer t"})
    for arguments in ({"metadata": {"x-trace": "1"}}, {"deadline_s": 20.0}):
        with client.stream(**arguments) as stream:
            say_back(stream)
    first, second = server.seen
    assert (first.metadata["authorization"], first.metadata["x-trace"]) == ("Bearer t", "1")
    assert not 0 < first.time_remaining_s < 1e6
    assert 10 < second.time_remaining_s < 21


@pytest.mark.parametrize(
    ("open_with", "ask_with", "problem"),
    [
        ({"deadline_s": 0}, {}, "a deadline must be above 0"),
        ({"endpoint": "elsewhere:1"}, {}, "is not one of this client's endpoints"),
        ({"metadata": {"Bad": "x"}}, {}, "metadata key 'Bad'"),
        ({}, {"deadline_s": "soon"}, "a deadline is a number of seconds"),
        ({}, {"request_id": 3}, "request_id must be a str, got int"),
        ({}, {"priority": -1}, "priority must be a whole number"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(make_client, server, open_with, ask_with, problem):
    server.talk = lambda requests, context: map(answer_of, requests)
    client = make_client(server.address)
    with pytest.raises(InvalidRequest, match=problem), client.stream(**open_with) as stream:
        say_back(stream, **ask_with)


def test_two_requests_in_flight_may_not_have_one_id(make_client, server, pool):
    server.talk = silent
    stream = make_client(server.address).stream()
    pool.submit(say_back, stream, request_id="mine")
    eventually(lambda: "1 in flight" in repr(stream), "it was sent")
    with pytest.raises(InvalidRequest, match="request_id 'mine' is that of a request in flight"):
        say_back(stream, request_id="mine")
    stream.close(0.0)


def test_a_task_that_is_cancelled_waits_no_longer_and_its_neighbour_does(loop: Loop, server: FakeServer) -> None:
    heard, release = threading.Event(), threading.Event()

    def answer_the_second_first(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        first, second = next(requests), next(requests)
        heard.set()
        release.wait(WAIT_S)
        yield answer_of(second)
        yield answer_of(first)

    async def scenario() -> float:
        async with AsyncClient(server.address) as client, client.stream() as stream:
            lost, kept = (asyncio.create_task(stream.infer("identity", X)) for _ in range(2))
            await asyncio.to_thread(heard.wait, WAIT_S)
            lost.cancel()
            with pytest.raises(asyncio.CancelledError):
                await lost
            release.set()
            return float((await kept)["X"][1, 2])

    server.talk = answer_the_second_first
    assert loop.run(scenario()) == 5.0


def test_an_interrupt_from_the_keyboard_gives_the_request_up(server: FakeServer) -> None:
    heard = threading.Event()

    def hear(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in requests:
            heard.set()
        yield b""

    def interrupt() -> None:
        assert heard.wait(WAIT_S)
        os.kill(os.getpid(), signal.SIGINT)

    server.talk = hear
    thread = threading.Thread(target=interrupt)
    with Client(server.address) as client:
        thread.start()
        with pytest.raises(KeyboardInterrupt), client.stream() as stream:
            say_back(stream)
        thread.join()
        assert server.cancelled.wait(WAIT_S)
        assert client.server_live()


def test_a_loop_that_ends_ends_its_streams(server: FakeServer) -> None:
    heard = threading.Event()

    def hear(requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[bytes]:
        for _ in requests:
            heard.set()
        yield b""

    async def leave_it_open() -> asyncio.Task[Result]:
        client = AsyncClient(server.address)
        call = asyncio.create_task(client.stream().infer("identity", X))
        await asyncio.to_thread(heard.wait, WAIT_S)
        return call

    server.talk = hear

    assert asyncio.run(leave_it_open()).cancelled()
