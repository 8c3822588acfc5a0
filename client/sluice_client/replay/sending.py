"""Sends captured requests at the times at which they arrived, whatever is still open, and keeps every answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from sluice_client.load.latencies import NOT_SENT, quantile
from sluice_client.load.open_loop import Connections, Run, ask, send_at
from sluice_client.replay.differences import Answer
from sluice_client.settings import MAX_DEADLINE_S
from sluice_proto.capture import NS_PER_S
from sluice_proto.grpc_service_pb2 import ServerLiveRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_client.settings import Tls
    from sluice_proto.capture import Capture, CapturedRequest

_UNSENT: Final = Answer(NOT_SENT)


@dataclass(frozen=True, slots=True)
class Replayed:
    """A replay that is over: the load that it was, and how each request ended, in the order of their arrivals."""

    run: Run
    answers: Sequence[Answer]

    @property
    def gap_error_p99_s(self) -> float:
        """99th percentile of how far the gaps between two requests were from those that were meant, in seconds."""
        records = self.run.records
        sent = records.codes != NOT_SENT
        errors = np.abs(np.diff(records.sent_s[sent]) - np.diff(records.intended_s[sent]))
        return quantile(errors, 0.99)


async def replay(
    capture: Capture, endpoints: str | Sequence[str], *, speed: float, deadline_s: float, tls: Tls | None = None
) -> Replayed:
    """Send every request to these servers, in turns, `speed` times as fast as they came; for `run_precisely`.

    A request has the deadline that it had, or `deadline_s`. Raises InvalidRequest when an endpoint cannot be used.
    """
    async with _Sender(capture.requests, endpoints, deadline_s=deadline_s, tls=tls) as sender:
        await sender.connect()
        run = await send_at([offset_s / speed for offset_s in capture.offsets_s()], sender)
        return Replayed(run, sender.answers)


class _Sender(Connections):
    """As `open_loop.Sender`, but for requests that each have a deadline and whose answers count."""

    def __init__(
        self,
        requests: Sequence[CapturedRequest],
        endpoints: str | Sequence[str],
        *,
        deadline_s: float,
        tls: Tls | None,
    ) -> None:
        super().__init__(endpoints, tls)
        self._calls = self._callables("ModelInfer")
        self._requests = requests
        self._deadline_s = deadline_s
        self.answers = [_UNSENT] * len(requests)

    async def connect(self) -> None:
        """Have the connections made, so that no request waits for one; who cannot be reached shows in the answers."""
        for call in self._callables("ServerLive"):
            await ask(call, ServerLiveRequest().SerializeToString(), self._deadline_s)

    async def __call__(self, number: int) -> int:
        """Send request `number`; its gRPC status number."""
        request = self._requests[number]
        own_s = min(request.deadline_ns / NS_PER_S, MAX_DEADLINE_S)
        timeout_s = own_s or self._deadline_s
        code, response = await ask(self._calls[number % len(self._calls)], bytes(request.request), timeout_s)
        # Most answers are what was captured, which is in a file already: memory is for the others.
        same = response == bytes(request.response)
        self.answers[number] = Answer(code, request.response if same else response)
        return code
