"""What a capture may have of an inference request and its answer: the hook for secrets, and what cannot be replayed.

Headers are never captured. Left out are requests with tensors in shared memory, which are not in the message, and those
of sequences where only some requests are captured: a sequence with gaps has other answers.
"""

from __future__ import annotations

import logging
import traceback
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from sluice_proto import wire
from sluice_proto.errors import WireError
from sluice_proto.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from sluice_server.observability.capture import Capturable, Ended, LeftOut
from sluice_server.protocol.shared_memory import REGION

if TYPE_CHECKING:
    from sluice_server.observability.capture import Redact

logger = logging.getLogger(__name__)

SEQUENCE_ID = "sequence_id"


class Preparation:
    """Makes of a request that has ended what is written of it. For one thread: the writer's."""

    def __init__(self, redact: Redact | None, *, every_request: bool) -> None:
        """`redact` gets each request, as a copy, and gives what is to be written, or None to leave it out."""
        self._redact = redact
        self._every_request = every_request
        self._failed = False

    def __call__(self, ended: Ended) -> Capturable | LeftOut:
        """What is written, or why nothing is."""
        try:
            message = _parsed(ended.request, whole=self._redact is not None)
        except (DecodeError, WireError):
            return LeftOut.UNREADABLE
        if any(REGION in tensor.parameters for tensor in message.inputs):
            return LeftOut.SHARED_MEMORY
        if any(REGION in tensor.parameters for tensor in message.outputs):
            return LeftOut.SHARED_MEMORY
        if SEQUENCE_ID in message.parameters and not self._every_request:
            return LeftOut.SEQUENCE
        if self._redact is None:
            return Capturable(message.model_name, ended.request, ended.answer)
        return self._redacted(self._redact, message, ended)

    def _redacted(self, redact: Redact, message: ModelInferRequest, ended: Ended) -> Capturable | LeftOut:
        given = ModelInferRequest.FromString(ended.request)
        try:
            kept = redact(given)
            if kept is None:
                return LeftOut.REDACTED
            if not isinstance(kept, ModelInferRequest):
                raise TypeError(f"it gave back a {type(kept).__name__}, no ModelInferRequest")
            answer = _answer_for(kept, ended.answer) if _asks_the_same(kept, message) else b""
            return Capturable(kept.model_name, kept.SerializeToString(), answer)
        except (Exception, SystemExit) as error:
            self._tell(error)
            return LeftOut.REDACT_FAILED

    def _tell(self, error: BaseException) -> None:
        # Once, and without the error's own text, which may have what was to be kept out.
        if not self._failed:
            self._failed = True
            where = traceback.extract_tb(error.__traceback__)[-1]
            at = f"{where.filename}:{where.lineno}"
            logger.error("the hook of --capture-redact fails", extra={"error": type(error).__name__, "at": at})


def _parsed(data: bytes, *, whole: bool) -> ModelInferRequest:
    """The request; unless it is to be `whole`, without its raw tensors where they are large."""
    if whole or len(data) < wire.SPLIT_BYTES_MIN:
        return ModelInferRequest.FromString(data)
    return ModelInferRequest.FromString(wire.split_raw(data)[0])


def _asks_the_same(one: ModelInferRequest, other: ModelInferRequest) -> bool:
    """Whether the answer to one is that to the other; so it is whatever their ids and parameters are."""
    return (
        (one.model_name, one.model_version) == (other.model_name, other.model_version)
        and one.inputs == other.inputs
        and one.outputs == other.outputs
        and one.raw_input_contents == other.raw_input_contents
    )


def _answer_for(request: ModelInferRequest, answer: bytes) -> bytes:
    """The answer, which repeats the id of its request."""
    if not answer:
        return answer
    response = ModelInferResponse.FromString(answer)
    response.id = request.id
    return response.SerializeToString()
