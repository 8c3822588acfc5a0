"""The dispatcher of a server that captures: it has some inference requests captured, however they came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice_server.protocol.dispatch import Dispatcher
from sluice_server.protocol.watched import WatchedCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from sluice_server.execution.request import InferRequest
    from sluice_server.execution.served import Served
    from sluice_server.observability.capture import Capture
    from sluice_server.status import Code
    from sluice_server.transport.call import Call


class CapturedCall(WatchedCall):
    """The call of a request that was chosen: it is captured when it ends."""

    __slots__ = ("_capture",)

    def __init__(self, call: Call, capture: Capture) -> None:
        super().__init__(call)
        self._capture: Capture | None = capture

    def _end(self, code: Code, ended_ns: int, answer: Sequence[Buffer]) -> None:
        capture, self._capture = self._capture, None
        if capture is not None:
            # Copies: a part may be a view of the memory of a whole batch, which would stay as long as it waits.
            capture.put(self, bytes(self.message), b"".join(answer), code, ended_ns)


class CapturingDispatcher(Dispatcher):
    """As Dispatcher; unary requests, those of streams and those of REST are captured as `capture` chooses."""

    def __init__(self, capture: Capture, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._capture = capture

    def _decode_into(self, queued: dict[Served, list[InferRequest]], call: Call, *, passed_on: bool = False) -> None:
        if not passed_on and self._capture.chooses():
            call = CapturedCall(call, self._capture)
        super()._decode_into(queued, call, passed_on=passed_on)
