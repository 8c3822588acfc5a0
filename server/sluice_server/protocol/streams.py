"""ModelStreamInfer: many requests in flight on one stream, answered in the order in which they came.

Each message of a stream becomes a `StreamedRequest`, a call like any other to the rest of the server: it is decoded,
queued and run at once, next to all others. Its answer waits until every earlier one of its stream has been sent.

Invariants of an `InferStream`:

* an answer is sent as soon as it and all earlier ones are there, by the thread that brought the last of them;
* a request that fails is answered in its turn with `error_message`, its id and its status (response parameters, which
  Triton's clients do not look at), and the stream goes on; but the failure is the status that ends the stream when the
  client sent the header `triton_grpc_error: true`, and when the deadline of the stream is over;
* after the client's last message, or when the server stops, no request is taken any more, what is due is sent, and
  then the stream ends;
* when a stream ends before its requests do, those that still wait in a queue are cancelled.

`InferStream._lock` guards the order: whoever holds it is the only one to send.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from sluice_proto import wire
from sluice_proto.errors import WireError
from sluice_proto.grpc_service_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from sluice_server.retry_after import PUSHBACK
from sluice_server.status import OK, Code, Status
from sluice_server.transport.call import Call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from sluice_server.transport.call import Metadata, Stream

ERROR_AS_STATUS = ("triton_grpc_error", "true")
"""The header of a client that wants a failure as the status of its stream."""

STOPPING = Status(Code.UNAVAILABLE, "the server is shutting down and takes no more requests from this stream")

STATUS_PARAMETER, PUSHBACK_PARAMETER = "grpc_status", "grpc_retry_pushback_ms"
"""Response parameters of a failure inside a stream, ours: its code's name, and the push-back where it has one."""

PREFIXES_MAX = 256
"""Sizes of answers whose prefix is remembered: most streams have one or two, and writing it takes a microsecond."""

OVER: Final = object()
"""What is left as the state of a stream that has ended."""

_RESPONSE_FIELD = ModelStreamInferResponse.DESCRIPTOR.fields_by_name["infer_response"].number
_FINAL_ASKED = "triton_enable_empty_final_response"
_FINAL_ASKED_KEY = _FINAL_ASKED.encode()


def _final_mark() -> bytes:
    response = ModelInferResponse()
    response.parameters["triton_final_response"].bool_param = True
    return response.SerializeToString()


_FINAL_MARK = _final_mark()
"""The response parameter, as bytes behind any response: protobuf merges what is concatenated."""


class StreamedRequest(Call):
    """One request of a stream, as the rest of the server sees it: a call of its own."""

    __slots__ = ("_message", "_owner", "answer", "ends_stream")

    def __init__(self, owner: InferStream, message: Call) -> None:
        self.method = message.method
        self.message = message.message
        self.received_ns = message.received_ns
        self.deadline_ns = message.deadline_ns
        self.on_cancel = None
        self.answer: Sequence[Buffer] | None = None
        self.ends_stream: Status | None = None
        self._owner = owner
        self._message = message  # a transport may count what is in memory by the calls that are alive

    @property
    def metadata(self) -> Metadata:
        """The stream's headers."""
        return self._owner.stream.metadata

    @property
    def peer(self) -> str:
        """The client's address."""
        return self._owner.stream.peer

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The names in the client's certificate."""
        return self._owner.stream.peer_names

    def reply(self, parts: Sequence[Buffer]) -> None:
        """Answer in turn; `parts` are those of a ModelInferResponse."""
        if asks_for_final_mark(self.message):
            parts = [*parts, _FINAL_MARK]
        size_bytes = sum(map(len, parts))  # type: ignore[arg-type] # every part is bytes, or a view of bytes
        self._owner.settle(self, [_response_prefix(size_bytes), *parts])

    def fail(self, status: Status) -> None:
        """Answer in turn with an error."""
        response = ModelStreamInferResponse(error_message=status.message or status.code.name)
        response.infer_response.id = request_id(self.message)
        told = response.infer_response.parameters
        told[STATUS_PARAMETER].string_param = status.code.name
        for key, value in status.trailers:
            if key == PUSHBACK:
                told[PUSHBACK_PARAMETER].int64_param = int(value)
        ends_stream = self._owner.errors_end_it or time.monotonic_ns() >= self.deadline_ns
        self._owner.settle(self, [response.SerializeToString()], status if ends_stream else None)


class InferStream:
    """One stream in progress: what is due on it, in order."""

    __slots__ = ("_due", "_ends_with", "_is_over", "_lock", "_open_streams", "errors_end_it", "stream")

    def __init__(self, stream: Stream, open_streams: set[InferStream]) -> None:
        """`open_streams` has every stream that has not ended; this one enters itself, and leaves it when it ends."""
        self.stream = stream
        self._due: deque[StreamedRequest] = deque()
        self._ends_with: Status | None = None
        self.errors_end_it = ERROR_AS_STATUS in stream.metadata
        self._is_over = False
        self._lock = threading.Lock()
        self._open_streams = open_streams
        open_streams.add(self)
        stream.state = self
        stream.on_cancel = self.abandon

    def __repr__(self) -> str:
        return f"<InferStream {len(self._due)} due, {'open' if self._ends_with is None else self._ends_with.code.name}>"

    def take(self, message: Call) -> StreamedRequest | None:
        """The request that a message is, in its place in the order; None when no more are taken."""
        if self._ends_with is not None:
            return None
        request = StreamedRequest(self, message)
        self._due.append(request)
        return request

    def settle(self, request: StreamedRequest, answer: Sequence[Buffer], ends_stream: Status | None = None) -> None:
        """Note a request's answer and send what is due by now; from any thread. A second answer has no effect.

        With `ends_stream` the stream ends with that in place of the answer.
        """
        request.on_cancel = None
        with self._lock:
            if self._is_over or request.answer is not None:
                return
            request.answer, request.ends_stream = answer, ends_stream
            unheard = self._send_due()
        if unheard is not None:
            self._end(unheard)

    def close(self, status: Status = OK) -> None:
        """Take no more requests, and end with this status when all that is due has been sent; from any thread."""
        with self._lock:
            if self._ends_with is not None:
                return
            self._ends_with = status
            unheard = self._send_due()
        if unheard is not None:
            self._end(unheard)

    def abandon(self) -> None:
        """Cancel what still waits: the client has left."""
        with self._lock:
            if self._is_over:
                return
            self._ends_with = OK
            unheard = self._leave()
        _cancel(unheard)

    def _send_due(self) -> list[StreamedRequest] | None:
        """Send the answers that are there up to the first that is not. When that ends the stream, who is left of it."""
        due, send = self._due, self.stream.send
        while due and (answer := due[0].answer) is not None:
            ends_with = due.popleft().ends_stream
            if ends_with is not None:
                self._ends_with = ends_with
                return self._leave()
            send(answer)
        return None if due or self._ends_with is None else self._leave()

    def _leave(self) -> list[StreamedRequest]:
        """Be over; gives the requests that nobody will hear of."""
        self._is_over = True
        unheard = list(self._due)
        self._due.clear()
        self._open_streams.discard(self)
        # Both lead here and back: without them memory is freed at once, and not by the collector.
        self.stream.state = OVER
        self.stream.on_cancel = None
        return unheard

    def _end(self, unheard: list[StreamedRequest]) -> None:
        _cancel(unheard)
        self.stream.finish(self._ends_with or OK)


def _cancel(unheard: list[StreamedRequest]) -> None:
    for request in unheard:
        on_cancel, request.on_cancel = request.on_cancel, None
        if on_cancel is not None:
            on_cancel()


class InferStreams:
    """Every ModelStreamInfer that is in progress. `take` is for the transport's intake thread, `stop` for any."""

    def __init__(self) -> None:
        self._open: set[InferStream] = set()
        self._stopping = False

    def __len__(self) -> int:
        return len(self._open)

    def take(self, message: Call) -> StreamedRequest | None:
        """The request that a message of a stream is; None for what needs no answer."""
        stream = message.stream
        assert stream is not None, "the method is known to stream"
        state = stream.state
        if state is OVER:
            return None
        if state is None:
            state = InferStream(stream, self._open)
            if self._stopping:  # looked at after the stream was entered: `stop` sees it, or this does
                state.close(STOPPING)
        if message.message is None:
            state.close()
            return None
        request: StreamedRequest | None = state.take(message)
        return request

    def stop(self) -> None:
        """End every stream behind the answers that are due on it, and each new one at once."""
        self._stopping = True
        for stream in list(self._open):
            stream.close(STOPPING)


@lru_cache(PREFIXES_MAX)
def _response_prefix(size_bytes: int) -> bytes:
    """What precedes a response of this size in that of a stream."""
    return wire.length_delimited(_RESPONSE_FIELD, size_bytes)


def asks_for_final_mark(message: bytes | memoryview) -> bool:
    """Whether a request says that its last answer is to be marked. Costs a search for the key, unless it is there."""
    head = message if type(message) is bytes and len(message) < wire.SPLIT_BYTES_MIN else _head(message)
    # `in` looks for a number first, which costs more than the search.
    return head.find(_FINAL_ASKED_KEY) >= 0 and _final_asked(head)


def request_id(message: bytes | memoryview) -> str:
    """The id in a request; empty when the request cannot be read."""
    try:
        return ModelInferRequest.FromString(_head(message)).id
    except (DecodeError, WireError):
        return ""


def _final_asked(head: bytes) -> bool:
    parameters = ModelInferRequest.FromString(head).parameters
    return _FINAL_ASKED in parameters and parameters[_FINAL_ASKED].bool_param


def _head(message: bytes | memoryview) -> bytes:
    """A request without its tensors, when they are large."""
    if len(message) >= wire.SPLIT_BYTES_MIN:
        return wire.split_raw(message)[0]
    return message if isinstance(message, bytes) else bytes(message)
