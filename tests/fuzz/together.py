"""Fuzzed here: requests that are run together in other ways than plain batches; what those are says `features.py`.

Whatever else is there with a request, its outcome is the one that it has alone.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from fuzz import serving
from fuzz.inference import EndingStream, judge_stream, pb_message
from fuzz.serving import REGION, Serving, check_at_rest, check_good, judge, judge_answer
from fuzz.subject import MESSAGE_BYTES_MAX, joined, parted
from protocol import any_requests
from sluice_proto import grpc_service_pb2 as pb
from sluice_server.protocol.dispatch import STREAM_INFER
from sluice_server.status import Code
from support.any_messages import any_message
from support.fakes import PATIENCE_S, RecordingCall
from support.requests import infer_request, parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager
    from pathlib import Path

    import numpy as np

    from sluice_server.status import Status

SHARED = b"shared_memory"
"""Requests with this in them are not compared: what they read there, another may have written."""

CHANCES = frozenset((Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED))
"""What depends on who else is there: with one of these, outcomes are not compared."""


@dataclass(frozen=True)
class Feature:
    """The models that are fuzzed together.

    write: puts them into a repository. seeds: requests to begin with. valid: by name, the tensors of good requests.
    outputs: by name, what those may ask for. parameters: of them, by chance. failing: the models that fail by the
    values of valid tensors. crowded: whether queues are so small that requests are refused for the others that wait.
    """

    write: Callable[[Path], None]
    seeds: Callable[[], list[pb.ModelInferRequest]]
    valid: Mapping[str, st.SearchStrategy[dict[str, np.ndarray]]]
    outputs: Mapping[str, tuple[str, ...]]
    parameters: Mapping[str, st.SearchStrategy[Any]] = field(default_factory=dict)
    failing: frozenset[str] = frozenset()
    crowded: bool = False


@dataclass
class Together:
    """A few requests: one after the other, all at once, and in a stream."""

    serving: Serving
    feature: Feature

    def check(self, data: bytes) -> None:
        """Each is answered as it is alone."""
        messages = parted(data)
        compared = SHARED not in data
        alone = []
        for message in messages:
            (end,) = self.serving.end_of(message, lend=True).ends
            self._judge(message, end)
            alone.append(end)
        calls = [RecordingCall(message) for message in messages]
        self.serving.dispatcher(calls)
        for message, call, before in zip(messages, calls, alone, strict=True):
            end = call.wait()
            self._judge(message, end)
            if compared:
                compare(before, end)
        self._stream(messages, alone if compared else [])
        assert all(len(call.ends) == 1 for call in calls)

    def _judge(self, message: bytes, end: tuple[Status, bytes]) -> None:
        status, payload = end
        status.message.encode()  # so that it can be sent
        if status.code is Code.OK:
            judge_answer(message, payload)
        else:
            crowded = (Code.RESOURCE_EXHAUSTED,) if self.feature.crowded else ()
            judge(message, status.code, status.message, self.feature.failing, crowded)

    def _stream(self, messages: list[bytes], alone: list[tuple[Status, bytes]]) -> None:
        stream = EndingStream(STREAM_INFER)
        self.serving.dispatcher([stream.message(message) for message in [*messages, None]])
        assert stream.ended.wait(PATIENCE_S), "the stream was not ended"
        (status,) = stream.ends
        judge_stream(messages, stream, status, errors_end_it=False)
        for (before, payload), sent in zip(alone, stream.sent, strict=False):
            answer = pb.ModelStreamInferResponse.FromString(sent)
            if before.code is Code.OK and not answer.error_message:
                answer.infer_response.parameters.pop("triton_final_response", None)  # of a request that asks for it
                assert answer.infer_response == pb.ModelInferResponse.FromString(payload)

    def look(self) -> None:
        """Good requests are answered, and nothing waits."""
        check_good(self.serving)
        for data in seeds_of(self.feature):
            self.check(data)
        check_at_rest(self.serving.manager.served())


def compare(alone: tuple[Status, bytes], end: tuple[Status, bytes]) -> None:
    """The same code, and the same answer."""
    if not CHANCES & {alone[0].code, end[0].code}:
        assert alone[0].code is end[0].code, (alone, end)
        if alone[1] != end[1]:  # an empty id may be left out
            answers = [pb.ModelInferResponse.FromString(payload) for _, payload in (alone, end)]
            assert answers[0] == answers[1]


def opener(feature: Feature) -> Callable[[Path], AbstractContextManager[Together]]:
    """How a target with these models is opened."""

    @contextmanager
    def opened(directory: Path) -> Iterator[Together]:
        with serving.serving(directory, write=feature.write) as server:
            yield Together(server, feature)

    return opened


# --- inputs


@st.composite
def good(draw: st.DrawFn, feature: Feature) -> pb.ModelInferRequest:
    """A request with nothing wrong, but for values that fail a run."""
    model = draw(st.sampled_from(list(feature.valid)))
    outputs = draw(st.lists(st.sampled_from(feature.outputs[model]), max_size=2, unique=True))
    request_id, typed = draw(st.sampled_from(["", "7"])), draw(st.booleans())
    request = infer_request(model, draw(feature.valid[model]), request_id=request_id, outputs=outputs, typed=typed)
    for key, values in feature.parameters.items():
        if draw(st.booleans()):
            request.parameters[key].CopyFrom(parameter(draw(values)))
    if outputs and draw(st.integers(0, 7)) == 0:
        request.outputs[0].parameters["classification"].int64_param = draw(st.integers(1, 3))
    return request


@st.composite
def built_for(draw: st.DrawFn, feature: Feature) -> bytes:
    """Good requests, spoiled ones, and any."""
    outputs = [name for names in feature.outputs.values() for name in names]
    words = (*feature.valid, *outputs, "X", "INDEX", "IDS", "1", "priority", "timeout", "classification", REGION)
    messages = []
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.integers(0, 7))
        request = draw(any_message(pb.ModelInferRequest, words) if kind == 0 else good(feature))
        if kind in (1, 2, 3):
            any_requests.spoil(draw, request, feature.valid)
        messages.append(pb_message(request)[:MESSAGE_BYTES_MAX])
    return joined(messages)


def seeds_of(feature: Feature) -> list[bytes]:
    """Good requests in threes, and some that fail among them."""
    messages = list(map(pb_message, feature.seeds()))
    return [joined([*messages, *messages][start : start + 3]) for start in range(len(messages))]
