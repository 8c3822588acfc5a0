"""Whether the grpcio transport ends each call and stream exactly once when ends and leaving clients cross."""

from __future__ import annotations

import queue
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

import grpc
import pytest

from sluice_server.status import Code, Status
from sluice_server.transport.call import STREAM_AHEAD
from sluice_server.transport.gathering import CALLS_MAX
from sluice_server.transport.grpcio import GrpcioTransport
from sluice_server.transport.grpcio_calls import GrpcioMessage
from sluice_server.transport.options import TransportOptions
from support.fakes import PATIENCE_S, RecordingCall, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sluice_server.transport.call import Call

ASK, TALK = "/test.Questions/Ask", "/test.Questions/Talk"


class Handler:
    """Keeps the calls that come; the test ends them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.calls: list[Call] = []

    def __call__(self, calls: Sequence[Call]) -> None:
        with self._changed:
            self.calls += calls
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[Call]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.calls) >= count, PATIENCE_S)
            return sorted(self.calls, key=lambda call: call.message or b"")


@contextmanager
def serving(handler: Handler) -> Iterator[tuple[GrpcioTransport, grpc.Channel]]:
    transport = GrpcioTransport(handler, {ASK: False, TALK: True}, TransportOptions("127.0.0.1:0"))
    transport.start()
    with grpc.insecure_channel(transport.endpoints[0]) as channel:
        yield transport, channel
    transport.stop(1.0)


def ask(channel: grpc.Channel, message: bytes, timeout_s: float | None = PATIENCE_S) -> grpc.Future:
    return channel.unary_unary(ASK).future(message, timeout=timeout_s)


def test_an_end_that_crosses_a_cancellation_leaves_the_other_ends_of_its_wakeup_alone(no_errors_logged):
    handler = Handler()
    with serving(handler) as (transport, channel):
        futures = [ask(channel, message) for message in (b"0", b"1")]
        leaving, staying = handler.wait_for(2)

        def cross() -> None:
            # What the cancellation of a call's task does first; the task itself hears of it later in this turn.
            leaving.future.cancel()
            leaving.reply([b"too late"])
            staying.reply([b"in ", b"time"])
            transport._flush()

        transport.loop.call_soon_threadsafe(cross)
        assert futures[1].result() == b"in time"
        eventually(lambda: sum(transport.outcomes().values()) == 2, "both calls are counted")
        assert transport.outcomes() == {(ASK, Code.CANCELLED): 1, (ASK, Code.OK): 1}


def test_calls_go_up_together_when_the_loop_has_nothing_else_to_do(no_errors_logged, monkeypatch):
    monkeypatch.setattr("sluice_server.transport.grpcio.HOLD_S", PATIENCE_S)
    lists = queue.SimpleQueue()
    messages = [b"%d" % number for number in range(5)]
    with serving(lists.put) as (transport, channel):
        working = threading.Event()

        def work_until_all_are_here() -> None:
            working.set()
            if len(transport._inbox) < len(messages):
                transport.loop.call_soon(work_until_all_are_here)

        transport.loop.call_soon_threadsafe(work_until_all_are_here)
        assert working.wait(PATIENCE_S)
        futures = [ask(channel, message) for message in messages]
        calls = lists.get(timeout=PATIENCE_S)
        assert sorted(call.message for call in calls) == messages
        for call in calls:
            call.reply([call.message])
        assert [future.result() for future in futures] == messages


def test_a_loop_that_never_runs_out_of_work_holds_calls_for_a_moment_only(no_errors_logged):
    handler = Handler()
    with serving(handler) as (transport, channel):
        answered = threading.Event()

        def work() -> None:
            if not answered.is_set():
                transport.loop.call_soon(work)

        transport.loop.call_soon_threadsafe(work)
        try:
            future = ask(channel, b"0")
            handler.wait_for(1)[0].reply([b"in time"])
            assert future.result() == b"in time"
        finally:
            answered.set()


def test_a_full_list_goes_up_at_once(no_errors_logged):
    handler = Handler()
    with serving(handler) as (transport, channel):
        lengths = []
        accept = transport._accept

        def arrive() -> None:
            for number in range(CALLS_MAX + 1):
                accept(GrpcioMessage(stream, bytes([number])))
                lengths.append(len(handler.calls))

        talk = channel.stream_stream(TALK)(iter([b"hello"]))
        stream = handler.wait_for(2)[-1].stream
        transport.loop.call_soon_threadsafe(arrive)
        eventually(lambda: len(lengths) == CALLS_MAX + 1, "all have arrived")
        assert lengths[-1] - lengths[0] == CALLS_MAX
        talk.cancel()


def test_the_first_end_of_a_call_counts(no_errors_logged):
    handler = Handler()
    with serving(handler) as (transport, channel):
        future = ask(channel, b"0")
        (call,) = handler.wait_for(1)
        call.reply([b"first"])
        call.fail(Status(Code.INTERNAL, "second"))
        assert future.result() == b"first"
        assert transport.outcomes() == {(ASK, Code.OK): 1}


@pytest.mark.parametrize("code", [code for code in Code if code is not Code.OK])
def test_every_code_and_any_message_reaches_the_client(code, no_errors_logged):
    handler = Handler()
    with serving(handler) as (transport, channel):
        future = ask(channel, b"0")
        message = "100 % of\nit, \N{KATAKANA LETTER TU} and NUL \0 too"
        handler.wait_for(1)[0].fail(Status(code, message))
        error = future.exception()
        assert (error.code().value[0], error.details()) == (code, message)
        assert transport.outcomes() == {(ASK, code): 1}


def test_a_client_that_cancels_is_told_of_once_and_counted(no_errors_logged):
    handler = Handler()
    told = threading.Semaphore(0)
    with serving(handler) as (transport, channel):
        future = ask(channel, b"0")
        (call,) = handler.wait_for(1)
        call.on_cancel = told.release
        future.cancel()
        assert told.acquire(timeout=PATIENCE_S)
        call.reply([b"too late"])
        assert transport.outcomes() == {(ASK, Code.CANCELLED): 1}
    assert not told.acquire(blocking=False)


def test_each_deadline_that_passes_is_told_of_and_counted_once(no_errors_logged):
    handler = Handler()
    told = threading.Semaphore(0)
    with serving(handler) as (transport, channel):
        for number in range(1, 4):
            future = ask(channel, b"0", timeout_s=0.15)
            call = handler.wait_for(number)[-1]
            assert 0 < call.deadline_ns - call.received_ns <= 151_000_000  # gRPC counts it in whole milliseconds
            call.on_cancel = told.release
            assert told.acquire(timeout=PATIENCE_S)
            assert future.exception().code() is grpc.StatusCode.DEADLINE_EXCEEDED
        # The client gives up by its own clock: on a busy machine that may be well before the time is up here.
        assert set(transport.outcomes()) <= {(ASK, Code.DEADLINE_EXCEEDED), (ASK, Code.CANCELLED)}
        assert sum(transport.outcomes().values()) == 3


@pytest.mark.parametrize(("left_s", "code"), [
    (0.0, Code.CANCELLED), (9.8, Code.CANCELLED), (9.95, Code.DEADLINE_EXCEEDED), (10.1, Code.DEADLINE_EXCEEDED),
])  # fmt: skip
def test_who_leaves_just_before_the_deadline_has_run_out_of_time(left_s, code):
    call = RecordingCall()
    call.deadline_ns = call.received_ns + 10 * 10**9
    assert call.code_of_leaving(call.received_ns + int(left_s * 1e9)) is code


def test_who_has_no_deadline_has_cancelled():
    call = RecordingCall()
    assert call.code_of_leaving(call.received_ns + 10**15) is Code.CANCELLED


def test_a_call_without_a_deadline_has_none(no_errors_logged):
    handler = Handler()
    with serving(handler) as (_, channel):
        future = ask(channel, b"0", timeout_s=None)
        (call,) = handler.wait_for(1)
        assert call.deadline_ns == 2**63 - 1
        call.reply([])
        assert future.result() == b""


def test_a_large_message_goes_both_ways_and_compressed_ones_are_read(no_errors_logged):
    handler = Handler()
    message = bytes(range(256)) * 2**16
    with serving(handler) as (transport, _):
        for number, compression in enumerate((grpc.Compression.NoCompression, grpc.Compression.Gzip), 1):
            with grpc.insecure_channel(transport.endpoints[0], [("grpc.max_receive_message_length", -1)]) as large:
                method = large.unary_unary(ASK)
                future = method.future(message, timeout=PATIENCE_S, compression=compression)
                call = handler.wait_for(number)[-1]
                assert call.message == message
                call.reply([message])
                assert future.result() == message


def test_calls_ended_from_many_threads_at_once_are_all_answered(no_errors_logged):
    handler = Handler()
    count = 200
    with serving(handler) as (transport, channel):
        futures = [ask(channel, b"%03d" % number) for number in range(count)]
        calls = handler.wait_for(count)
        threads = [
            threading.Thread(target=lambda own: [call.reply([call.message]) for call in own], args=(calls[start::4],))
            for start in range(4)
        ]
        for thread in threads:
            thread.start()
        assert [future.result() for future in futures] == [b"%03d" % number for number in range(count)]
        for thread in threads:
            thread.join()
        assert transport.outcomes() == {(ASK, Code.OK): count}


class Talk:
    """A stream from the client's side: `say` sends, and `hear` waits for the next message."""

    def __init__(self, channel: grpc.Channel, timeout_s: float | None = PATIENCE_S) -> None:
        self._said: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self.call = channel.stream_stream(TALK)(iter(self._said.get, None), timeout=timeout_s)

    def say(self, *messages: bytes | None) -> None:
        for message in messages:
            self._said.put(message)

    def hear(self) -> bytes:
        message: bytes = next(self.call)
        return message

    def end(self) -> tuple[grpc.StatusCode, str]:
        """How the stream ends; nothing more may come before that."""
        with suppress(grpc.RpcError):
            raise AssertionError(next(self.call, None) or "the stream has ended with OK")
        self.say(None)
        return self.call.code(), self.call.details()


def test_the_messages_of_a_stream_are_calls_of_one_stream_and_none_is_the_last(no_errors_logged):
    handler = Handler()
    with serving(handler) as (transport, channel):
        talk = Talk(channel)
        talk.say(b"1", b"2", None)
        handler.wait_for(3)
        assert [call.message for call in handler.calls] == [b"1", b"2", None]
        (stream,) = {call.stream for call in handler.calls}
        assert (stream.method, stream.state) == (TALK, None)
        assert {call.deadline_ns for call in handler.calls} == {stream.deadline_ns}
        assert stream.peer.startswith("ipv4:127.0.0.1:")
        stream.send([b"in ", b"parts"])
        handler.calls[0].reply([b"as a reply"])
        stream.finish()
        stream.send([b"too late"])
        stream.finish(Status(Code.INTERNAL, "too late"))
        assert list(talk.call) == [b"in parts", b"as a reply"]
        assert talk.call.code() is grpc.StatusCode.OK
        eventually(lambda: not transport._open, "nothing is open")
        assert transport.outcomes() == {(TALK, Code.OK): 1}


def test_a_stream_can_be_ended_by_the_server_at_any_time_behind_what_was_sent(no_errors_logged):
    handler = Handler()
    with serving(handler) as (transport, channel):
        talk = Talk(channel)
        talk.say(b"1")
        (call,) = handler.wait_for(1)
        call.stream.send([b"last words"])
        call.fail(Status(Code.NOT_FOUND, "100 % of\nit"))
        assert talk.hear() == b"last words"
        assert talk.end() == (grpc.StatusCode.NOT_FOUND, "100 % of\nit")
        assert transport.outcomes() == {(TALK, Code.NOT_FOUND): 1}


def test_a_stream_whose_client_cancels_is_told_of_once(no_errors_logged):
    handler = Handler()
    told = threading.Semaphore(0)
    with serving(handler) as (transport, channel):
        talk = Talk(channel)
        talk.say(b"1")
        (call,) = handler.wait_for(1)
        call.stream.on_cancel = told.release
        talk.call.cancel()
        assert told.acquire(timeout=PATIENCE_S)
        call.stream.send([b"too late"])
        call.stream.finish()
        assert transport.outcomes() == {(TALK, Code.CANCELLED): 1}
        assert [each.message for each in handler.calls] == [b"1"]
        talk.say(None)
    assert not told.acquire(blocking=False)


def test_a_stream_has_a_deadline_and_ends_with_it(no_errors_logged):
    handler = Handler()
    told = threading.Semaphore(0)
    with serving(handler) as (transport, channel):
        talk = Talk(channel, timeout_s=0.15)
        talk.say(b"1")
        (call,) = handler.wait_for(1)
        assert 0 < call.deadline_ns - call.received_ns <= 151_000_000
        call.stream.on_cancel = told.release
        assert told.acquire(timeout=PATIENCE_S)
        assert talk.end()[0] is grpc.StatusCode.DEADLINE_EXCEEDED
        assert set(transport.outcomes()) <= {(TALK, Code.DEADLINE_EXCEEDED), (TALK, Code.CANCELLED)}


def test_messages_stay_unread_while_too_many_are_unanswered(no_errors_logged):
    handler = Handler()
    count = STREAM_AHEAD + 100
    with serving(handler) as (_, channel):
        talk = Talk(channel)
        talk.say(*(b"%04d" % number for number in range(count)))
        first = handler.wait_for(STREAM_AHEAD)[0]
        other = ask(channel, b"other")
        handler.wait_for(STREAM_AHEAD + 1)
        other.cancel()
        assert sum(call.stream is not None for call in handler.calls) == STREAM_AHEAD
        for number in range(count):
            first.stream.send([b"%04d" % number])
        assert [talk.hear() for _ in range(count)] == [b"%04d" % number for number in range(count)]
        handler.wait_for(count + 1)
        first.stream.finish()
        talk.say(None)
        assert list(talk.call) == []


def test_a_stream_that_is_open_at_the_end_of_the_grace_gets_a_status(no_errors_logged):
    handler = Handler()
    with serving(handler) as (transport, channel):
        talk = Talk(channel)
        talk.say(b"1")
        handler.wait_for(1)
        transport.stop(0.1)
        code, details = talk.end()
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "has shut down" in details
        assert transport.outcomes() == {(TALK, Code.UNAVAILABLE): 1}
