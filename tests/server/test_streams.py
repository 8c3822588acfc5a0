"""Requests of a stream and their answers in order, without models and sockets: by a naive model, from many threads."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_proto import grpc_service_pb2 as pb
from sluice_proto.wire import SPLIT_BYTES_MIN
from sluice_server.protocol.streams import ERROR_AS_STATUS, STOPPING, InferStreams, asks_for_final_mark, request_id
from sluice_server.status import OK, Code, Status
from support.fakes import RecordingStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice_server.transport.turns import MessageInTurn

FAILURE = Status(Code.NOT_FOUND, "no such model")


def request_bytes(number: int, surplus_bytes: int = 0, **parameters: bool) -> bytes:
    request = pb.ModelInferRequest(model_name="m", id=str(number), raw_input_contents=[bytes(surplus_bytes)])
    for name, value in parameters.items():
        request.parameters[name].bool_param = value
    return request.SerializeToString()


def answer_parts(number: int) -> list[bytes]:
    whole = pb.ModelInferResponse(model_name="m", id=str(number), raw_output_contents=[b"12345678"]).SerializeToString()
    return [whole[:5], whole[5:]]


def taken(streams: InferStreams, message: MessageInTurn) -> MessageInTurn:
    assert streams.take(message)
    return message


def read(message: bytes) -> tuple[str, str]:
    """The id and the error of a message that was sent."""
    answer = pb.ModelStreamInferResponse.FromString(message)
    return answer.infer_response.id, answer.error_message


@dataclass
class Traced:
    """A stream under test, and what must have become of it by a model that keeps nothing but lists."""

    errors_end_it: bool
    streams: InferStreams = field(default_factory=InferStreams)
    requests: list[MessageInTurn] = field(default_factory=list)
    answers: dict[int, str] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    closing: Status | None = None
    left: bool = False

    def __post_init__(self) -> None:
        self.stream = RecordingStream(metadata=(ERROR_AS_STATUS,) if self.errors_end_it else (("other", "true"),))

    def ask(self) -> None:
        number = len(self.requests)
        request = self.stream.message(request_bytes(number))
        taken = self.streams.take(request)
        assert taken == (self.closing is None and self.expected()[1] is None)
        if taken:
            request.on_cancel = lambda: self.cancelled.append(number)
            self.requests.append(request)

    def answer(self, which: int, fails: bool) -> None:
        if not self.requests:
            return
        number = which % len(self.requests)
        if not self.over:
            self.answers.setdefault(number, FAILURE.message if fails else "")
        if fails:
            self.requests[number].fail(FAILURE)
        else:
            self.requests[number].reply(answer_parts(number))

    def half_close(self) -> None:
        if not self.over:
            self.closing = self.closing or OK
            assert not self.streams.take(self.stream.message(None))

    def stop(self) -> None:
        if not self.over:
            self.closing = self.closing or STOPPING
        self.streams.stop()

    def leave(self) -> None:
        if self.stream.on_cancel is not None:
            self.stream.on_cancel()
            self.left = True

    @property
    def over(self) -> bool:
        return self.left or bool(self.stream.ends)

    def expected(self) -> tuple[list[tuple[str, str]], Status | None]:
        """What is sent, and how the stream has ended."""
        sent = []
        for number in range(len(self.requests)):
            if number not in self.answers:
                return sent, None
            if self.answers[number] and self.errors_end_it:
                return sent, FAILURE
            sent.append((str(number), self.answers[number]))
        return sent, self.closing


moves = st.one_of(
    st.just(("ask",)),
    st.tuples(st.just("answer"), st.integers(0, 20), st.booleans()),
    st.sampled_from([("half_close",), ("stop",), ("leave",)]),
)


@given(errors_end_it=st.booleans(), moves=st.lists(moves, max_size=40), asks=st.integers(1, 8))
def test_any_course_of_a_stream_is_in_order_and_ends_once(errors_end_it, moves, asks):
    traced = Traced(errors_end_it)
    for name, *arguments in [("ask",)] * asks + moves:
        if name == "ask" and traced.over:
            continue  # a transport hands up nothing for a stream that is over
        getattr(traced, name)(*arguments)
        sent, end = traced.expected()
        assert [read(message) for message in traced.stream.sent] == sent
        ended = end is not None and not traced.left
        assert traced.stream.ends == ([end] if ended else [])
        unheard = set(range(len(traced.requests))) - set(traced.answers)
        assert set(traced.cancelled) == (unheard if ended or traced.left else set())
        assert len(traced.cancelled) == len(set(traced.cancelled))


def test_answers_from_many_threads_are_sent_in_order_and_once():
    streams, stream = InferStreams(), RecordingStream()
    requests = [stream.message(request_bytes(number)) for number in range(2_000)]
    assert all(streams.take(request) for request in requests)
    streams.take(stream.message(None))
    begin = threading.Barrier(4)

    def answer(start: int) -> None:
        begin.wait()
        for number in range(start, len(requests), 4):
            requests[number].reply(answer_parts(number))

    threads = [threading.Thread(target=answer, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [read(message)[0] for message in stream.sent] == [str(number) for number in range(len(requests))]
    assert stream.ends == [OK]


def test_an_answer_is_wrapped_as_it_is_and_marked_as_the_last_one_when_asked():
    streams, stream = InferStreams(), RecordingStream()
    for number, surplus_bytes in enumerate((0, SPLIT_BYTES_MIN)):
        message = request_bytes(number, surplus_bytes, triton_enable_empty_final_response=True)
        taken(streams, stream.message(message)).reply(answer_parts(number))
    for number, message in enumerate(stream.sent):
        response = pb.ModelStreamInferResponse.FromString(message).infer_response
        assert (response.id, list(response.raw_output_contents)) == (str(number), [b"12345678"])
        assert [(key, value.bool_param) for key, value in response.parameters.items()] == [
            ("triton_final_response", True)
        ]


def test_a_stream_that_nobody_holds_any_more_is_forgotten():
    streams, stream = InferStreams(), RecordingStream()
    taken(streams, stream.message(request_bytes(0))).reply(answer_parts(0))
    assert len(streams) == 1
    streams.take(stream.message(None))
    del stream
    assert len(streams) == 0


@pytest.mark.parametrize("pack", [bytes, memoryview])
@pytest.mark.parametrize("surplus_bytes", [0, SPLIT_BYTES_MIN])
def test_a_mark_is_asked_for_by_the_parameter_alone(pack: Callable[[bytes], bytes], surplus_bytes):
    name = "triton_enable_empty_final_response"
    asked = {
        request_bytes(1, surplus_bytes): False,
        request_bytes(1, surplus_bytes, **{name: True}): True,
        request_bytes(1, surplus_bytes, **{name: False}): False,
        request_bytes(1, surplus_bytes, **{f"not_{name}": True}): False,
        pb.ModelInferRequest(id=name, raw_input_contents=[bytes(surplus_bytes)]).SerializeToString(): False,
    }
    assert {message: asks_for_final_mark(pack(message)) for message in asked} == asked


UNREADABLE = [b"\xff", b"\xff" * SPLIT_BYTES_MIN, b"\xfftriton_enable_empty_final_response"]


@pytest.mark.parametrize("pack", [bytes, memoryview])
@pytest.mark.parametrize("message", UNREADABLE)
def test_what_cannot_be_read_has_no_id_asks_for_nothing_and_still_gets_its_turn(message, pack):
    assert request_id(pack(message)) == ""
    assert not asks_for_final_mark(pack(message))
    streams, stream = InferStreams(), RecordingStream()
    taken(streams, stream.message(pack(message))).fail(FAILURE)
    assert [read(answer) for answer in stream.sent] == [("", FAILURE.message)]


def test_a_stream_that_begins_while_the_server_stops_is_ended_at_once():
    streams, stream = InferStreams(), RecordingStream()
    streams.stop()
    assert not streams.take(stream.message(request_bytes(0)))
    assert (stream.sent, stream.ends) == ([], [STOPPING])


def test_an_error_without_a_text_is_still_an_error_for_the_client():
    streams, stream = InferStreams(), RecordingStream()
    taken(streams, stream.message(request_bytes(3))).fail(Status(Code.INTERNAL))
    assert [read(message) for message in stream.sent] == [("3", "INTERNAL")]


def test_an_error_after_the_deadline_of_the_stream_is_its_end():
    streams, stream = InferStreams(), RecordingStream()
    stream.deadline_ns = 1
    late = Status(Code.DEADLINE_EXCEEDED, "too late")
    message = stream.message(request_bytes(0))
    taken(streams, message).fail(late)
    assert (stream.sent, stream.ends) == ([], [late])
