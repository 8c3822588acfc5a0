"""ModelStreamInfer: many requests in flight on one stream, answered in the order in which they came.

Each message of a stream is a call like any other to the rest of the server: it is decoded, queued and run at once, next
to all others. The transport keeps its answer until every earlier one of its stream has been sent (`Stream.enter`); what
an answer looks like on a stream is said here:

* a request that fails is answered in its turn with `error_message`, its id and its status (response parameters, which
  Triton's clients do not look at), and the stream goes on; but the failure is the status that ends the stream when the
  client sent the header `triton_grpc_error: true`, and when the deadline of the stream is over;
* after the client's last message, or when the server stops, no request is taken any more, what is due is sent, and
  then the stream ends.
"""

from __future__ import annotations

import threading
import time
import weakref
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from google.protobuf.message import DecodeError

from sluice_proto import wire
from sluice_proto.errors import WireError
from sluice_proto.grpc_service_pb2 import ModelInferRequest, ModelInferResponse, ModelStreamInferResponse
from sluice_server.retry_after import PUSHBACK
from sluice_server.status import Code, Status

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from sluice_server.transport.call import Call, Stream

ERROR_AS_STATUS = ("triton_grpc_error", "true")
"""The header of a client that wants a failure as the status of its stream."""

STOPPING = Status(Code.UNAVAILABLE, "the server is shutting down and takes no more requests from this stream")

STATUS_PARAMETER, PUSHBACK_PARAMETER = "grpc_status", "grpc_retry_pushback_ms"
"""Response parameters of a failure inside a stream, ours: its code's name, and the push-back where it has one."""

BEGUN: Final = object()
"""The state of a stream whose first message has come."""

PREFIXES_MAX = 256
"""Sizes of answers whose prefix is remembered: most streams have one or two, and writing it takes a microsecond."""

_RESPONSE_FIELD = ModelStreamInferResponse.DESCRIPTOR.fields_by_name["infer_response"].number
_FINAL_ASKED = "triton_enable_empty_final_response"
_FINAL_ASKED_KEY = _FINAL_ASKED.encode()


def _final_mark() -> bytes:
    response = ModelInferResponse()
    response.parameters["triton_final_response"].bool_param = True
    return response.SerializeToString()


_FINAL_MARK = _final_mark()
"""The response parameter, as bytes behind any response: protobuf merges what is concatenated."""


class InferStreams:
    """Every ModelStreamInfer that is in progress. `take` is for the transport's intake thread, `stop` for any."""

    def __init__(self) -> None:
        self._open: weakref.WeakSet[Stream] = weakref.WeakSet()
        self._entering = threading.Lock()
        self._stopping = False

    def __len__(self) -> int:
        return len(self._open)

    def take(self, message: Call) -> bool:
        """Whether a message of a stream is a request that is to be answered: one that now has its turn."""
        stream = message.stream
        assert stream is not None, "the method is known to stream"
        if stream.state is None:
            self._begin(stream)
        request = message.message
        if request is None:
            stream.close()
            return False
        return stream.enter(message, _FINAL_MARK if asks_for_final_mark(request) else None)

    def stop(self) -> None:
        """End every stream behind the answers that are due on it, and each new one at once."""
        with self._entering:
            self._stopping = True
            streams = list(self._open)
        for stream in streams:
            stream.close(STOPPING)

    def _begin(self, stream: Stream) -> None:
        stream.state = BEGUN
        ends_at_errors = ERROR_AS_STATUS in stream.metadata
        stream.answer_in_turn(before=response_prefix, on_failure=None if ends_at_errors else error_message)
        with self._entering:
            self._open.add(stream)
            stopping = self._stopping
        if stopping:
            stream.close(STOPPING)


@lru_cache(PREFIXES_MAX)
def response_prefix(size_bytes: int) -> bytes:
    """What precedes a response of this size in a stream's message, whose field `infer_response` it is."""
    return wire.length_delimited(_RESPONSE_FIELD, size_bytes)


def error_message(request: Call, status: Status) -> Sequence[Buffer] | None:
    """What tells of a failure in the stream; None when the time of the whole stream is up."""
    if time.monotonic_ns() >= request.deadline_ns:
        return None
    response = ModelStreamInferResponse(error_message=status.message or status.code.name)
    response.infer_response.id = request_id(request.message)
    told = response.infer_response.parameters
    told[STATUS_PARAMETER].string_param = status.code.name
    for key, value in status.trailers:
        if key == PUSHBACK:
            told[PUSHBACK_PARAMETER].int64_param = int(value)
    return (response.SerializeToString(),)


def asks_for_final_mark(message: bytes | memoryview) -> bool:
    """Whether a request says that its last answer is to be marked; False of what cannot be read.

    Costs a search for the key, unless it is there.
    """
    try:
        head = _head(message)
        if head.find(_FINAL_ASKED_KEY) < 0:  # `in` looks for a number first, which costs more than the search
            return False
        parameters = ModelInferRequest.FromString(head).parameters
    except (DecodeError, WireError):
        return False
    return _FINAL_ASKED in parameters and parameters[_FINAL_ASKED].bool_param


def request_id(message: bytes | memoryview) -> str:
    """The id in a request; empty when the request cannot be read."""
    try:
        return ModelInferRequest.FromString(_head(message)).id
    except (DecodeError, WireError):
        return ""


def _head(message: bytes | memoryview) -> bytes:
    """A request without its tensors, when they are large."""
    if len(message) >= wire.SPLIT_BYTES_MIN:
        return wire.split_raw(message)[0]
    return message if isinstance(message, bytes) else bytes(message)
