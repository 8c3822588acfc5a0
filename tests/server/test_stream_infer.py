"""ModelStreamInfer as clients see it: order, errors inside the stream, its ends, and how much it takes ahead."""

from __future__ import annotations

import functools
import threading
import time

import grpc
import numpy as np
import pytest

from sluice_server.observability.statistics import Outcome
from sluice_server.protocol.dispatch import STREAM_INFER
from sluice_server.protocol.streams import STATUS_PARAMETER
from sluice_server.status import Code
from sluice_server.transport.call import STREAM_AHEAD
from sluice_server.transport.options import Compression, TransportOptions
from support import models
from support.conversation import Conversation
from support.fakes import PATIENCE_S, eventually, held
from support.requests import answer_arrays, infer_request
from support.server import LOOPBACK

pytestmark = pytest.mark.usefixtures("no_errors_logged")

SPLIT_ELEMENTS = 16_384
"""As many FP32 make a request whose tensors are cut out before it is parsed."""


@pytest.fixture
def serve(start_server, repository):
    """Start a server of two models, without the HTTP listeners, which nobody here asks."""
    for name in ("echo", "other"):
        models.write_model(repository, name, models.identity("INT64", ("N", 1)), max_batch_size=16)
    return functools.partial(start_server, repository, http=None, metrics=None)


@pytest.fixture
def server(serve):
    return serve()


def number(value: int, model: str = "echo", **how):
    return infer_request(model, {"X": np.array([[value]], np.int64)}, request_id=str(value), **how)


def outcomes_of(server, model: str = "echo") -> dict[Outcome, int]:
    return {name: count for name, count in server.model(model).statistics.snapshot().outcomes.items() if count}


def in_server(server, model: str = "echo") -> int:
    """How many requests of a held model wait or run."""
    return len(server.model(model).queue) + 1


def test_answers_come_in_the_order_of_the_requests_and_slow_ones_hold_no_other_model_up(server):
    with held(server.model("echo")) as session:
        stream = Conversation(server)
        order = ["echo", "other", "other", "echo", "other"]
        stream.say(*(number(value, model) for value, model in enumerate(order)))
        eventually(lambda: outcomes_of(server, "other") == {Outcome.OK: 3}, "the other model has answered")
        session.wait_for_runs(1)
        session.release()
        assert [stream.hear_value() for _ in order] == [0, 1, 2, 3, 4]
    assert stream.end() is grpc.StatusCode.OK


def test_requests_of_one_stream_run_in_one_batch_and_are_counted_like_others(server):
    with held(server.model("echo")) as session:
        stream = Conversation(server)
        stream.say(number(0))
        session.wait_for_runs(1)
        stream.say(*(number(value) for value in range(1, 9)))
        eventually(lambda: len(server.model("echo").queue) == 8, "eight requests wait")
        session.release()
        assert [stream.hear_value() for _ in range(9)] == list(range(9))
    assert stream.end() is grpc.StatusCode.OK
    statistics = server.call("ModelStatistics", b"\x0a\x04echo").model_stats[0]
    assert {batch.batch_size: batch.compute_infer.count for batch in statistics.batch_stats} == {1: 1, 8: 1}
    assert statistics.inference_stats.success.count == 9
    assert outcomes_of(server) == {Outcome.OK: 9}
    assert server.server.transport.outcomes()[STREAM_INFER, Code.OK] == 1


def test_an_error_is_an_answer_in_its_turn_and_the_stream_goes_on(server):
    stream = Conversation(server)
    wrong_name = infer_request("echo", {"NOPE": np.array([[1]], np.int64)}, request_id="b")
    stream.say(number(0), number(1, "nope"), wrong_name, b"\xff\xff", number(2))
    assert stream.hear_value() == 0
    errors = [stream.hear() for _ in range(3)]
    assert [error.infer_response.id for error in errors] == ["1", "b", ""]
    told = [{key: value.string_param for key, value in error.infer_response.parameters.items()} for error in errors]
    assert told == [{STATUS_PARAMETER: code} for code in ("NOT_FOUND", "INVALID_ARGUMENT", "INVALID_ARGUMENT")]
    facts = ["'nope' is not found", "unexpected inference input 'NOPE'", "2 bytes of the request"]
    assert all(fact in error.error_message for fact, error in zip(facts, errors, strict=True))
    assert stream.hear_value() == 2
    assert stream.end() is grpc.StatusCode.OK


def test_an_error_that_comes_first_waits_for_its_turn(server):
    with held(server.model("echo")) as session:
        stream = Conversation(server)
        stream.say(number(0), number(1, "nope"))
        session.wait_for_runs(1)
        session.release()
        assert stream.hear_value() == 0
        assert "'nope'" in stream.hear().error_message


def test_a_full_queue_is_an_error_in_the_stream(serve):
    server = serve(models={"queue_rows": 16})
    with held(server.model("echo")) as session:
        stream = Conversation(server)
        stream.say(number(0))
        session.wait_for_runs(1)
        stream.say(*(number(value) for value in range(1, 19)))
        eventually(lambda: outcomes_of(server) == {Outcome.QUEUE_FULL: 2}, "two are refused")
        session.release()
        assert [stream.hear_value() for _ in range(17)] == list(range(17))
        for value in (17, 18):
            answer = stream.hear()
            assert answer.infer_response.id == str(value)
            assert "Exceeds maximum queue size" in answer.error_message
    assert stream.end() is grpc.StatusCode.OK


def test_a_client_that_has_sent_its_last_request_still_gets_all_answers(server):
    with held(server.model("echo")) as session:
        stream = Conversation(server)
        stream.say(number(0), number(1))
        stream.hang_up()
        session.wait_for_runs(1)
        session.release()
        assert [stream.hear_value(), stream.hear_value()] == [0, 1]
        assert stream.end() is grpc.StatusCode.OK


def test_a_stream_without_a_request_ends_well(server):
    assert Conversation(server).end() is grpc.StatusCode.OK


def test_what_a_client_that_cancels_had_in_the_queue_is_not_run(server):
    with held(server.model("echo")) as session:
        stream, neighbour = Conversation(server), Conversation(server)
        stream.say(number(0))
        session.wait_for_runs(1)
        neighbour.say(number(100))
        stream.say(*(number(value) for value in range(1, 6)))
        eventually(lambda: len(server.model("echo").queue) == 6, "six requests wait")
        stream.call.cancel()
        eventually(lambda: len(server.model("echo").queue) == 1, "only the neighbour's request waits")
        session.release()
        assert neighbour.hear_value() == 100
    # The five, and the one that was running if its run could still be ended.
    assert outcomes_of(server)[Outcome.CANCELLED] in {5, 6}
    assert neighbour.end() is grpc.StatusCode.OK
    assert server.server.transport.outcomes() == {(STREAM_INFER, Code.OK): 1, (STREAM_INFER, Code.CANCELLED): 1}
    assert [feeds["X"].ravel().tolist() for feeds in session.runs] == [[0], [100]]


def test_an_idle_stream_that_is_cancelled_is_counted_so_and_leaves_nothing(server):
    for _ in range(20):
        stream = Conversation(server)
        stream.say(number(7))
        assert stream.hear_value() == 7
        stream.call.cancel()
    eventually(
        lambda: server.server.transport.outcomes() == {(STREAM_INFER, Code.CANCELLED): 20}, "all streams are counted"
    )
    eventually(lambda: len(server.server._dispatcher._infer_streams) == 0, "no stream is remembered")


def test_the_deadline_of_a_stream_is_that_of_each_of_its_requests(server):
    with held(server.model("echo")) as session:
        blocking = server.begin("ModelInfer", number(0))
        session.wait_for_runs(1)
        stream = Conversation(server, timeout_s=0.5)
        stream.say(number(1), number(2))
        eventually(lambda: len(server.model("echo").queue) == 2, "two requests wait")
        assert stream.end() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: len(server.model("echo").queue) == 0, "nothing waits any more")
        session.release()
        assert blocking.result().id == "0"
    ends = outcomes_of(server)
    assert ends.pop(Outcome.OK) == 1
    assert sum(ends.values()) == 2
    assert set(ends) <= {Outcome.QUEUE_TIMEOUT, Outcome.CANCELLED}
    assert [len(feeds["X"]) for feeds in session.runs] == [1]


def test_the_timeout_of_a_request_fails_it_alone(server):
    with held(server.model("echo")) as session:
        stream = Conversation(server)
        stream.say(number(0))
        session.wait_for_runs(1)
        stream.say(number(1, parameters={"timeout": 1_000}), number(2))
        eventually(lambda: outcomes_of(server) == {Outcome.QUEUE_TIMEOUT: 1}, "the hurried request has expired")
        session.release()
        assert stream.hear_value() == 0
        assert "Request timeout expired" in stream.hear().error_message
        assert stream.hear_value() == 2
    assert stream.end() is grpc.StatusCode.OK


@pytest.mark.parametrize("elements", [1, SPLIT_ELEMENTS])
def test_the_last_answer_is_marked_when_the_request_asks(elements, start_server, repository):
    models.write_model(repository, "wide", models.identity(dims=("N", "W")), max_batch_size=4)
    server = start_server(repository, http=None, metrics=None)
    stream = Conversation(server)
    array = np.ones((1, elements), np.float32)
    for asked in (True, False):
        stream.say(infer_request("wide", {"X": array}, parameters={"triton_enable_empty_final_response": asked}))
        response = stream.hear().infer_response
        np.testing.assert_array_equal(answer_arrays(response)["Y"], array)
        marks = {key: value.bool_param for key, value in response.parameters.items()}
        assert marks == ({"triton_final_response": True} if asked else {})
    assert stream.end() is grpc.StatusCode.OK


@pytest.mark.parametrize("level", [Compression.NONE, Compression.HIGH])
def test_answers_of_any_size_come_whole_and_in_order_compressed_or_not(level, start_server, repository):
    models.write_model(repository, "wide", models.identity(dims=("N", "W")), max_batch_size=4)
    grpc_options = TransportOptions(f"{LOOPBACK}:0", compression=level)
    server = start_server(repository, http=None, metrics=None, grpc=grpc_options)
    stream = Conversation(server)
    widths = [1, 2, SPLIT_ELEMENTS, 3, 10 * SPLIT_ELEMENTS, 100, 1]
    arrays = [np.full((1, width), number, np.float32) for number, width in enumerate(widths)]
    stream.say(*(infer_request("wide", {"X": array}) for array in arrays))
    for array in arrays:
        np.testing.assert_array_equal(answer_arrays(stream.hear().infer_response)["Y"], array)
    assert stream.end() is grpc.StatusCode.OK


def test_an_answer_that_is_too_large_ends_the_stream_behind_those_before_it(start_server, repository):
    models.write_model(repository, "wide", models.identity(dims=("N", "W")), max_batch_size=4)
    request = infer_request("wide", {"X": np.ones((1, 300), np.float32)})
    limit = len(request.SerializeToString()) + 1
    server = start_server(
        repository, http=None, metrics=None, grpc=TransportOptions(f"{LOOPBACK}:0", max_message_bytes=limit)
    )
    stream = Conversation(server)
    # What an answer has and its request has not, its version and the message around it, is more than that.
    stream.say(infer_request("wide", {"X": np.ones((1, 30), np.float32)}), request)
    assert answer_arrays(stream.hear().infer_response)["Y"].size == 30
    assert stream.end() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_client_that_asks_for_it_gets_the_first_error_as_the_status_of_its_stream(server):
    with held(server.model("echo")) as session:
        stream = Conversation(server, metadata=[("triton_grpc_error", "true")])
        stream.say(number(0), number(1, "nope"))
        session.wait_for_runs(1)
        stream.say(number(2), number(3))
        eventually(lambda: len(server.model("echo").queue) == 2, "two requests wait behind the error")
        session.release()
        assert stream.hear_value() == 0
        assert stream.end() is grpc.StatusCode.NOT_FOUND
    assert "'nope' is not found" in stream.call.details()
    assert server.server.transport.outcomes() == {(STREAM_INFER, Code.NOT_FOUND): 1}


def test_what_waits_behind_an_error_that_ends_the_stream_is_not_run(server):
    with held(server.model("echo")) as session:
        blocking = Conversation(server)
        blocking.say(number(0))
        session.wait_for_runs(1)
        stream = Conversation(server, metadata=[("triton_grpc_error", "true")])
        stream.say(number(1, "nope"), number(2))
        assert stream.end() is grpc.StatusCode.NOT_FOUND
        eventually(lambda: len(server.model("echo").queue) == 0, "nothing waits")
        session.release()
        assert blocking.hear_value() == 0
    assert [feeds["X"].ravel().tolist() for feeds in session.runs] == [[0]]


def test_a_stream_is_read_ahead_only_so_far(server):
    count = STREAM_AHEAD + 200
    with held(server.model("echo")) as session:
        stream = Conversation(server)
        stream.say(number(0))
        session.wait_for_runs(1)
        stream.say(*(number(value) for value in range(1, count)))
        eventually(lambda: in_server(server) == STREAM_AHEAD, "as many are taken as may be")
        for _ in range(20):
            server.call("ServerLive", b"")
        assert in_server(server) == STREAM_AHEAD
        session.release()
        assert [stream.hear_value() for _ in range(count)] == list(range(count))
    assert stream.end() is grpc.StatusCode.OK


def test_a_client_that_never_reads_its_answers_is_not_read_for_ever(server):
    """Its answers do not fit into the windows of the connection, so that they cannot be written either."""
    rows = np.zeros((16, 1), np.int64)
    request = infer_request("echo", {"X": rows}, request_id="x" * 4096).SerializeToString()
    sent = []

    def requests():
        while not enough.is_set():
            sent.append(1)
            yield request

    enough = threading.Event()
    call = server.stream("ModelStreamInfer", requests())
    eventually(lambda: outcomes_of(server).get(Outcome.OK, 0) >= STREAM_AHEAD, "as many are taken as may be")
    before = -1
    while before != (before := outcomes_of(server)[Outcome.OK]):
        for _ in range(50):
            server.call("ServerLive", b"")
    assert len(sent) < 10 * STREAM_AHEAD
    enough.set()
    call.cancel()
    eventually(lambda: len(server.server._dispatcher._infer_streams) == 0, "the stream is forgotten")


def test_streams_end_with_the_server_behind_the_answers_that_are_due(server):
    idle = Conversation(server)
    idle.say(number(0))
    assert idle.hear_value() == 0
    with held(server.model("echo")) as session:
        busy = Conversation(server)
        busy.say(number(1))
        session.wait_for_runs(1)
        busy.say(number(2))
        eventually(lambda: len(server.model("echo").queue) == 1, "the second request waits")
        begun = time.monotonic()
        stopping = threading.Thread(target=server.server.stop)
        stopping.start()
        with pytest.raises(grpc.RpcError) as caught:
            idle.hear()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "shutting down" in caught.value.details()
        session.release()
        assert [busy.hear_value(), busy.hear_value()] == [1, 2]
        assert busy.end() is grpc.StatusCode.UNAVAILABLE
        stopping.join(PATIENCE_S)
    assert time.monotonic() - begun < server.server._settings.exit_timeout_s


def test_many_streams_at_once_each_get_their_own_answers_in_order(server):
    errors = []

    def talk(caller: int) -> None:
        try:
            stream = Conversation(server)
            mine = range(caller * 100, caller * 100 + 50)
            stream.say(*(number(value, ("echo", "other")[value % 2]) for value in mine))
            assert [stream.hear_value() for _ in mine] == list(mine)
            assert stream.end() is grpc.StatusCode.OK
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=talk, args=(caller,)) for caller in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert server.server.transport.outcomes() == {(STREAM_INFER, Code.OK): 8}
