"""A ModelStreamInfer in progress, whose requests a test sends one by one."""

from __future__ import annotations

import queue
from typing import TYPE_CHECKING, Any

import grpc

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.protocol.dispatch import STREAM_INFER
from support.requests import answer_arrays
from support.server import CALL_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from support.server import RunningServer


class Conversation:
    """One stream to a server: `say` sends, `hear` waits for the next answer, `hang_up` half-closes."""

    def __init__(
        self, server: RunningServer, timeout_s: float = CALL_TIMEOUT_S, metadata: Sequence[tuple[str, str]] = ()
    ) -> None:
        self._requests: queue.SimpleQueue[pb.ModelInferRequest | bytes | None] = queue.SimpleQueue()
        stream = server.channel.stream_stream(
            STREAM_INFER,
            request_serializer=lambda request: request if isinstance(request, bytes) else request.SerializeToString(),
            response_deserializer=pb.ModelStreamInferResponse.FromString,
        )
        self.call: Any = stream(iter(self._requests.get, None), timeout=timeout_s, metadata=tuple(metadata))

    def say(self, *requests: pb.ModelInferRequest | bytes) -> None:
        for request in requests:
            self._requests.put(request)

    def hang_up(self) -> None:
        self._requests.put(None)

    def hear(self) -> pb.ModelStreamInferResponse:
        answer: pb.ModelStreamInferResponse = next(self.call)
        return answer

    def hear_value(self) -> Any:
        """The single element of the only output of the next answer, which must not be an error."""
        answer = self.hear()
        assert not answer.error_message, answer.error_message
        (array,) = answer_arrays(answer.infer_response).values()
        return array.item()

    def end(self) -> grpc.StatusCode:
        """How the stream ends, with nothing more to hear."""
        self.hang_up()
        try:
            rest = list(self.call)
        except grpc.RpcError:
            rest = []
        assert not rest, rest
        code: grpc.StatusCode = self.call.code()
        return code
