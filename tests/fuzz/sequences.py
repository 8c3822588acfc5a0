"""Fuzzed here: requests of sequences in any order, unary and in two streams, next to a plain sum for each sequence."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError
from hypothesis import strategies as st

from fuzz import serving
from fuzz.inference import EndingStream, pb_message
from fuzz.serving import Serving, check_at_rest, check_good, judge, judge_answer
from fuzz.subject import MESSAGE_BYTES_MAX, joined, parted
from protocol import any_requests
from sluice_proto import grpc_service_pb2 as pb
from sluice_server.protocol.dispatch import STREAM_INFER
from sluice_server.status import OK, Code
from support import models
from support.any_messages import any_message
from support.fakes import PATIENCE_S, RecordingCall, eventually
from support.requests import answer_arrays, infer_request

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sluice_server.status import Status

NUMBERED, NAMED, FLEETING = MODELS = ("direct", "oldest", "fleeting")
"""Sequences with numbers in four slots; with names in two; with numbers, and over when they are idle."""

WAYS = ("unary", "first stream", "second stream")
"""How a message is sent, by its first byte."""

NOT_STARTED = "must specify the START flag on the first request of the sequence"
SUM = "OUTPUT"

Ids = tuple[str, int | str]
"""A model and a sequence of it."""

UINT64_MASK = (1 << 64) - 1


class Step(NamedTuple):
    """What a request is in its sequence; the value is None where it is not in the message."""

    ids: Ids
    start: bool
    end: bool
    value: int | None


class Outcome(NamedTuple):
    """What became of a message: an answer, or the text of an error."""

    message: bytes
    answer: pb.ModelInferResponse | None
    text: str


class Sums:
    """The sum of each sequence that is not over, worked out from the requests in their order."""

    def __init__(self) -> None:
        self._sums: dict[Ids, int | None] = {}

    def follow(self, outcome: Outcome) -> None:
        """Hold an outcome against what came before it."""
        step = step_of(outcome.message)
        if outcome.answer is None:
            if step is not None and NOT_STARTED in outcome.text:
                assert not step.start
                assert step.ids[0] == FLEETING or step.ids not in self._sums, outcome
                self._sums.pop(step.ids, None)
            return
        assert step is not None, outcome
        total = added(0 if step.start else self._sums[step.ids], step.value)
        told = answer_arrays(outcome.answer).get(SUM)
        assert told is None or total is None or told.item() == total, (outcome, total)
        if step.end:
            self._sums.pop(step.ids, None)
        else:
            self._sums[step.ids] = total


def added(one: int | None, other: int | None) -> int | None:
    """Their sum as an INT64 has it; None when one of them is not known."""
    return None if one is None or other is None else (one + other + (1 << 63) & UINT64_MASK) - (1 << 63)


def step_of(message: bytes) -> Step | None:
    """A request read in the plainest way; None when it is none of a sequence."""
    try:
        request = pb.ModelInferRequest.FromString(message)
    except DecodeError:
        return None
    parameters = request.parameters
    sequence = parameters["sequence_id"] if "sequence_id" in parameters else pb.InferParameter()
    sequence_id = sequence.string_param or sequence.int64_param & UINT64_MASK
    if request.model_name not in MODELS or not sequence_id:
        return None
    start, end = (key in parameters and parameters[key].bool_param for key in ("sequence_start", "sequence_end"))
    return Step((request.model_name, sequence_id), start, end, _value_of(request))


def _value_of(request: pb.ModelInferRequest) -> int | None:
    if request.raw_input_contents:
        return int.from_bytes(request.raw_input_contents[0][:8], "little", signed=True)
    numbers = [number for tensor in request.inputs for number in tensor.contents.int64_contents]
    return numbers[0] if numbers else None


@dataclass
class Sequences:
    """Messages, each behind a byte that says how it is sent; then the end of every sequence that was named."""

    serving: Serving

    def check(self, data: bytes) -> None:
        """Each has its outcome, and the sums are right but where a run failed, or a request may have come too late."""
        parts = [part for part in parted(data) if part]
        streams = [EndingStream(STREAM_INFER), EndingStream(STREAM_INFER)]
        calls = [self._send(part, streams) for part in parts]
        for message in self._ends(parts):
            self._send(b"\0" + message, streams)
        outcomes = self._outcomes(parts, calls, streams)
        if b"timeout" not in data and not any("onnx runtime error" in outcome.text for outcome in outcomes):
            sums = Sums()
            for outcome in outcomes:
                sums.follow(outcome)

    def _send(self, part: bytes, streams: list[EndingStream]) -> RecordingCall:
        way = part[0] % len(WAYS)
        call = streams[way - 1].message(part[1:]) if way else RecordingCall(part[1:])
        work = self.serving.dispatcher([call], lend=not way)
        if work is not None:
            work()
        return call

    @staticmethod
    def _ends(parts: list[bytes]) -> list[bytes]:
        """A last request for each sequence: what waits for a slot gets one."""
        named = {step.ids: part[1:] for part in parts if (step := step_of(part[1:])) is not None}
        ends = []
        for (model, _), message in named.items():
            request = infer_request(model, {"INPUT": np.zeros((1, 1), np.int64)}, parameters={"sequence_end": True})
            request.parameters["sequence_id"].CopyFrom(
                pb.ModelInferRequest.FromString(message).parameters["sequence_id"]
            )
            ends.append(pb_message(request))
        return ends

    def _outcomes(self, parts: list[bytes], calls: list[RecordingCall], streams: list[EndingStream]) -> list[Outcome]:
        self.serving.dispatcher([stream.message(None) for stream in streams])
        for stream in streams:
            assert stream.ended.wait(PATIENCE_S), "the stream was not ended"
            assert stream.ends == [OK]
        answers = [map(pb.ModelStreamInferResponse.FromString, stream.sent) for stream in streams]
        outcomes = []
        for part, call in zip(parts, calls, strict=True):
            way = part[0] % len(WAYS)
            if way:
                answer = next(answers[way - 1])
                assert "incident" not in answer.error_message, answer
                response = None if answer.error_message else answer.infer_response
                outcomes.append(Outcome(part[1:], response, answer.error_message))
            else:
                outcomes.append(judged(part[1:], *call.wait()))
                assert len(call.ends) == 1
        assert [next(each, None) for each in answers] == [None, None], "more answers than requests"
        return outcomes

    def look(self) -> None:
        """Good requests are answered, nothing waits, and no sequence is left."""
        check_good(self.serving)
        for data in sequence_seeds():
            self.check(data)
        served = {model.interface.name: model for model in self.serving.manager.served()}
        check_at_rest(served.values())
        for name in MODELS:
            model: Any = served[name]
            eventually(lambda model=model: model.queue.live == 0, f"no sequence of {name} is left")


def judged(message: bytes, status: Status, payload: bytes) -> Outcome:
    """The outcome of a call, which is one that it may have."""
    status.message.encode()  # so that it can be sent
    if status.code is Code.OK:
        judge_answer(message, payload)
        return Outcome(message, pb.ModelInferResponse.FromString(payload), "")
    judge(message, status.code, status.message, MODELS)
    return Outcome(message, None, status.message)


def _write_models(repository: Path) -> None:
    models.write_model(repository, "simple", models.sum_and_difference(), max_batch_size=8)
    forever = "max_sequence_idle_microseconds: 3600000000"
    models.write_accumulator(repository, NUMBERED, instances=2, rows=2, more=forever)
    strategy = "oldest { max_candidate_sequences: 2 }"
    models.write_accumulator(repository, NAMED, ids="BYTES", strategy=strategy, more=forever)
    models.write_accumulator(repository, FLEETING, more="max_sequence_idle_microseconds: 1")


@contextmanager
def open_sequences(directory: Path) -> Iterator[Sequences]:
    with serving.serving(directory, write=_write_models) as server:
        yield Sequences(server)


# --- inputs


def request_of(model: str, sequence: int | str, value: int, flags: str = "", **how: Any) -> pb.ModelInferRequest:
    """A request of a sequence; `flags` are of `start` and `end`."""
    parameters: dict[str, Any] = {"sequence_id": sequence}
    parameters |= {f"sequence_{flag}": True for flag in flags.split()}
    return infer_request(model, {"INPUT": np.array([[value]], np.int64)}, parameters=parameters, **how)


def _sent(way: int, request: pb.ModelInferRequest) -> bytes:
    return bytes([way]) + pb_message(request)


def sequence_seeds() -> list[bytes]:
    """Sequences side by side, more of them than slots, begun anew, not begun, without an end, and one that fails."""
    found = []
    for model in MODELS:
        one, *others = (str(number) if model == NAMED else number for number in range(1, 7))
        found += [
            [_sent(way, request_of(model, one, 5, flags)) for way, flags in enumerate(("start", "", "end"))],
            [_sent(0, request_of(model, one, 5, flags)) for flags in ("start", "", "start end", "")],
            [_sent(1, request_of(model, other, 7, "start", outputs=[SUM])) for other in (one, *others)],
            [_sent(2, request_of(model, other, 1, "start end", typed=True)) for other in (one, *others)],
            [_sent(0, request_of(model, one, value, "start" if value == 1 else "")) for value in (1, -1, 2)],
        ]
    return [joined(messages) for messages in found]


IDS: tuple[int | str, ...] = (1, 2, 3, 4, 5, 6, -1, 0, "a", "b", "c", "1", "", "\u00e9", "x" * 129)
WORDS = (
    *MODELS, "INPUT", SUM, "FLAGS", "ID", "START", "INT64", "1", "a", "sequence_id", "sequence_start", "sequence_end",
    "timeout", "priority",
)  # fmt: skip


@st.composite
def built_sequences(draw: st.DrawFn) -> bytes:
    """Requests of one or two models for a few sequences; some of them spoiled, or any."""
    model = draw(st.sampled_from(MODELS))
    few = draw(st.lists(st.sampled_from(IDS[8:] if model == NAMED else IDS[:8]), min_size=1, max_size=6))
    parts = []
    for _ in range(draw(st.integers(1, 8))):
        sequence = draw(st.sampled_from(few))
        value = draw(st.sampled_from([0, 1, 2, 5, 2**62, 2**63 - 1, -1]))
        flags = draw(st.sampled_from(["start", "start", "", "", "end", "start end"]))
        request = request_of(model, sequence, value, flags, typed=draw(st.booleans()))
        kind = draw(st.integers(0, 15))
        if kind == 0:
            request = draw(any_message(pb.ModelInferRequest, WORDS))
        elif kind <= 3:
            any_requests.spoil(draw, request, MODELS)
        parts.append(bytes([draw(st.integers(0, 2))]) + pb_message(request)[: MESSAGE_BYTES_MAX - 1])
    return joined(parts)
