"""Whose answer is whose, on a fake clock: traces of one stream, and any order of events against the invariants."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_client import (
    ClientClosed,
    ClientError,
    InvalidRequest,
    InvalidResponse,
    NotFound,
    ResourceExhausted,
    Result,
    RetryPolicy,
    SharedMemory,
    Unavailable,
    Unknown,
    operations,
)
from sluice_client.endpoints import parse_endpoints
from sluice_client.exchange import Exchange, StreamedRequest
from sluice_client.flow import Flows
from sluice_client.retries import Failure
from sluice_client.settings import STREAM_IN_FLIGHT_MAX
from sluice_proto import grpc_service_pb2 as pb

ONE = {"X": np.ones(1, np.float32)}
BROKEN = Failure("UNAVAILABLE", "the connection broke", pushback_ns=2_000_000_000)


def answer(request_id: str, error: str = "", **parameters: str | int) -> bytes:
    message = pb.ModelStreamInferResponse(error_message=error)
    message.infer_response.id = request_id
    for key, value in parameters.items():
        kind = "string_param" if isinstance(value, str) else "int64_param"
        setattr(message.infer_response.parameters[key], kind, value)
    return message.SerializeToString()


@dataclass
class Stream:
    """An exchange without a network: what was sent, what each request came to, how often the call was cancelled."""

    now_ns: int = 0
    sent: list[str | None] = field(default_factory=list)
    outcomes: dict[str, list[Result | ClientError]] = field(default_factory=dict)
    cancels: int = 0
    in_flight_max: int = STREAM_IN_FLIGHT_MAX

    def __post_init__(self) -> None:
        endpoints = parse_endpoints(["a:1", "b:1"], tls=False)
        self.flows = Flows(endpoints, RetryPolicy(), lambda: self.now_ns, lambda: 0.0)
        self.exchange = Exchange(self.flows, None, self._send, self._cancel, self.in_flight_max)

    def begin(self, request_id: str) -> StreamedRequest:
        operation = operations.infer("m", ONE, request_id=request_id)
        told = self.outcomes.setdefault(request_id, [])
        return self.exchange.begin(operation, request_id, told.append)

    def outcome(self, request_id: str) -> Result | ClientError:
        (outcome,) = self.outcomes[request_id]
        return outcome

    def _send(self, request: bytes | None) -> None:
        self.sent.append(None if request is None else pb.ModelInferRequest.FromString(request).id)

    def _cancel(self) -> None:
        self.cancels += 1


def test_answers_go_to_the_requests_that_they_name_in_any_order():
    stream = Stream()
    stream.begin("a")
    stream.now_ns = 3
    stream.begin("b")
    stream.now_ns = 10
    stream.exchange.take(answer("b"))
    stream.now_ns = 15
    stream.exchange.take(answer("a"))
    assert stream.sent == ["a", "b"]
    told = {name: stream.outcome(name) for name in "ab"}
    assert {name: (each.id, each.timing.total_ns, each.timing.endpoint) for name, each in told.items()} == {
        "a": ("a", 15, "a:1"),
        "b": ("b", 7, "a:1"),
    }


def test_an_answer_without_an_id_is_that_of_the_oldest_request():
    stream = Stream()
    for name in "abc":
        stream.begin(name)
    stream.exchange.take(answer("", error="cannot be read"))
    stream.exchange.take(answer("c"))
    stream.exchange.take(answer(""))
    assert isinstance(stream.outcome("a"), Unknown)
    assert isinstance(stream.outcome("b"), Result)
    assert isinstance(stream.outcome("c"), Result)


def test_a_request_that_was_given_up_keeps_its_place_and_is_told_nothing():
    stream = Stream()
    given_up = stream.begin("a")
    stream.begin("b")
    stream.exchange.give_up(given_up)
    stream.exchange.take(answer("", error="of a"))
    stream.exchange.take(answer("", error="of b"))
    assert stream.outcomes["a"] == []
    assert str(stream.outcome("b")) == "UNKNOWN: of b [a:1, model 'm']"


def test_an_error_has_the_status_and_the_push_back_that_the_server_tells():
    stream = Stream()
    for name in "abc":
        stream.begin(name)
    stream.exchange.take(answer("a", error="no such model", grpc_status="NOT_FOUND"))
    stream.exchange.take(answer("b", error="full", grpc_status="RESOURCE_EXHAUSTED", grpc_retry_pushback_ms=250))
    stream.exchange.take(answer("c", error="new", grpc_status="NO_SUCH_CODE"))
    missing, full, strange = (stream.outcome(name) for name in "abc")
    assert (type(missing), missing.message, missing.retry_after_s) == (NotFound, "no such model", None)
    assert (type(full), full.model, full.endpoint, full.retry_after_s) == (ResourceExhausted, "m", "a:1", 0.25)
    assert type(strange) is Unknown


def test_an_answer_that_is_nobody_s_or_no_message_ends_the_stream():
    stream = Stream()
    stream.begin("a")
    with pytest.raises(InvalidResponse, match=r"the request 'b', which is not in flight; .*decoupled"):
        stream.exchange.take(answer("b"))
    with pytest.raises(InvalidResponse, match="not a ModelStreamInferResponse"):
        stream.exchange.take(b"\xff\xff")
    stream.exchange.take(answer("a"))
    with pytest.raises(InvalidResponse, match="the request '', which is not in flight"):
        stream.exchange.take(answer(""))


def test_an_answer_whose_outputs_cannot_be_read_fails_its_request_alone():
    stream = Stream()
    stream.begin("a")
    stream.begin("b")
    message = pb.ModelStreamInferResponse.FromString(answer("a"))
    message.infer_response.outputs.add(name="Y", datatype="FP32", shape=[1])
    stream.exchange.take(message.SerializeToString())
    stream.exchange.take(answer("b"))
    assert isinstance(stream.outcome("a"), InvalidResponse)
    assert isinstance(stream.outcome("b"), Result)


def test_an_output_whose_shared_memory_was_closed_meanwhile_fails_its_request_alone():
    stream = Stream()
    with SharedMemory(4, "a:1") as memory:
        inference = operations.infer("m", ONE, request_id="a", outputs={"Y": memory.room(4)})
        stream.exchange.begin(inference, "a", stream.outcomes.setdefault("a", []).append)
    stream.begin("b")
    message = pb.ModelStreamInferResponse.FromString(answer("a"))
    message.infer_response.outputs.add(name="Y", datatype="FP32", shape=[1])
    stream.exchange.take(message.SerializeToString())
    stream.exchange.take(answer("b"))
    assert "was closed; a request cannot use it any more" in str(stream.outcome("a"))
    assert isinstance(stream.outcome("a"), InvalidRequest)
    assert isinstance(stream.outcome("b"), Result)


def test_a_stream_that_breaks_fails_all_in_flight_and_all_later_ones_each_with_an_error_of_its_own():
    stream = Stream()
    for name in "ab":
        stream.begin(name)
    stream.exchange.end(BROKEN)
    with pytest.raises(Unavailable, match="the connection broke") as later:
        stream.begin("c")
    errors = [stream.outcome("a"), stream.outcome("b"), later.value]
    assert {(type(e), e.message, e.model, e.retry_after_s) for e in errors} == {
        (Unavailable, "the connection broke", "m", 2.0)
    }
    assert len(set(map(id, errors))) == 3
    assert stream.sent == ["a", "b", None]
    assert repr(stream.exchange) == "a:1; ended: UNAVAILABLE: the connection broke [a:1]"
    assert not stream.exchange.is_open


def test_what_a_stream_met_decides_where_the_next_one_goes():
    stream = Stream()
    again = [Exchange(stream.flows, None, stream._send, stream._cancel) for _ in range(2)]
    assert [each.endpoint for each in (stream.exchange, *again)] == [0, 1, 0]
    again[0].end(BROKEN)
    assert stream.flows.healthy() == 1
    after = [Exchange(stream.flows, None, stream._send, stream._cancel).endpoint for _ in range(3)]
    assert after == [0, 0, 0]
    operation = operations.infer("m", ONE, request_id="a")
    pinned = Exchange(stream.flows, 1, stream._send, stream._cancel)
    pinned.begin(operation, "a", lambda _: None)
    pinned.take(answer("a"))
    assert stream.flows.healthy() == 2


def test_closing_sends_no_more_and_lets_the_rest_be_answered():
    stream = Stream()
    stream.begin("a")
    stream.exchange.close()
    stream.exchange.close()
    with pytest.raises(ClientClosed, match="the stream is closed; open a new one"):
        stream.begin("b")
    assert repr(stream.exchange) == "a:1; closed, 1 in flight"
    stream.exchange.take(answer("a"))
    stream.exchange.end(None)
    assert isinstance(stream.outcome("a"), Result)
    assert (stream.sent, stream.cancels) == (["a", None], 0)
    with pytest.raises(ClientClosed):
        stream.begin("c")


@pytest.mark.parametrize("last", ["close", "give up", "answer"])
def test_a_closed_stream_is_left_when_nobody_waits_for_what_is_in_flight(last):
    stream = Stream()
    lost, kept = stream.begin("lost"), stream.begin("kept")
    if last == "close":
        stream.exchange.take(answer("kept"))
        stream.exchange.give_up(lost)
    elif last == "give up":
        stream.exchange.close()
        stream.exchange.give_up(lost)
        stream.exchange.give_up(lost)
    else:
        stream.exchange.close()
        stream.exchange.give_up(lost)
    assert stream.cancels == 0
    if last == "close":
        stream.exchange.close()
    elif last == "give up":
        stream.exchange.give_up(kept)
    else:
        stream.exchange.take(answer("kept"))
    assert stream.cancels == 1


def test_who_waits_when_a_stream_is_left_is_told_that_it_was_closed_here():
    stream = Stream()
    stream.begin("a")
    stream.exchange.close()
    stream.exchange.leave()
    stream.exchange.end(Failure("CANCELLED", "Locally cancelled by application!"))
    assert str(stream.outcome("a")) == "the stream was closed before the answer came"
    assert isinstance(stream.outcome("a"), ClientClosed)
    assert stream.flows.healthy() == 2


@pytest.mark.parametrize("waits", [True, False])
def test_a_server_that_ends_a_stream_well_without_being_asked_breaks_the_protocol(waits):
    stream = Stream()
    if waits:
        stream.begin("a")
    stream.exchange.end(None)
    with pytest.raises(InvalidResponse, match="ended the stream with status OK"):
        stream.begin("b")
    assert not waits or isinstance(stream.outcome("a"), InvalidResponse)


def test_an_id_is_free_again_once_its_request_was_answered():
    stream = Stream()
    stream.begin("a")
    with pytest.raises(InvalidRequest, match="request_id 'a' is that of a request in flight"):
        stream.begin("a")
    stream.exchange.take(answer("a"))
    stream.begin("a")
    assert stream.sent == ["a", "a"]
    ids = [stream.exchange.prepare("m", {}, {})[1] for _ in range(300)]
    assert len(set(ids)) == 300
    assert len(set(map(len, ids))) == 1


def test_a_stream_has_only_so_many_in_flight():
    stream = Stream(in_flight_max=2)
    first = stream.begin("a")
    stream.begin("b")
    stream.exchange.give_up(first)
    with pytest.raises(ResourceExhausted, match="2 requests of this stream have no answer yet"):
        stream.begin("c")
    stream.exchange.take(answer("a"))
    stream.begin("c")
    assert stream.sent == ["a", "b", "c"]


class GivenUp:
    """What became of a request that was given up: nothing is told."""


ACTIONS = st.one_of(
    st.just(("begin", 0)), st.tuples(st.sampled_from(["answer", "error", "nameless", "give up"]), st.integers(0, 9))
)


@given(actions=st.lists(ACTIONS, max_size=60), ending=st.sampled_from([None, BROKEN]))
def test_every_request_is_settled_once_whatever_happens_in_which_order(actions, ending):
    """Against a naive model: a list of what is in flight, and what each request must have come to."""
    stream = Stream()
    in_flight: list[StreamedRequest] = []
    expected: dict[str, type | None] = {}
    for what, which in actions:
        if what == "begin":
            in_flight.append(stream.begin(str(len(expected))))
            expected[in_flight[-1].id] = None
        elif what == "give up" and in_flight:
            request = in_flight[which % len(in_flight)]
            stream.exchange.give_up(request)
            expected[request.id] = GivenUp
        elif in_flight:
            request = in_flight.pop(0 if what == "nameless" else which % len(in_flight))
            fails = what == "error"
            name = "" if what == "nameless" else request.id
            stream.exchange.take(answer(name, error="no" if fails else ""))
            if expected[request.id] is None:
                expected[request.id] = Unknown if fails else Result
    stream.exchange.close()
    stream.exchange.end(ending if in_flight else None)
    for request in in_flight:
        expected[request.id] = expected[request.id] or (Unavailable if ending else InvalidResponse)
    told = {name: [type(each) for each in outcomes] for name, outcomes in stream.outcomes.items()}
    assert told == {name: [] if kind is GivenUp else [kind] for name, kind in expected.items()}
    waited_for = [request for request in in_flight if expected[request.id] is not GivenUp]
    assert stream.cancels == (bool(in_flight) and not waited_for)
    assert stream.sent == [*map(str, range(len(expected))), None]
