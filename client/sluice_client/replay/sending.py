"""Sends captured requests at the times at which they arrived, whatever is still open, and keeps every answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import grpc.aio
import numpy as np

from sluice_client.channels import Channels
from sluice_client.endpoints import parse_endpoints
from sluice_client.load.latencies import NOT_SENT, OK, quantile
from sluice_client.load.open_loop import Run, send_at
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


class _Sender:
    """As `open_loop.Sender`, but for requests that each have a deadline and whose answers count."""

    def __init__(
        self,
        requests: Sequence[CapturedRequest],
        endpoints: str | Sequence[str],
        *,
        deadline_s: float,
        tls: Tls | None,
    ) -> None:
        parsed = parse_endpoints(endpoints, tls=tls is not None)
        self._channels = Channels(grpc.aio, parsed, tls, ())
        self._calls = [self._channels.callable(index, "ModelInfer") for index in range(len(parsed))]
        self._requests = requests
        self._deadline_s = deadline_s
        self.answers = [_UNSENT] * len(requests)

    async def connect(self) -> None:
        """Have the connections made, so that no request waits for one; who cannot be reached shows in the answers."""
        for index in range(len(self._calls)):
            call = self._channels.callable(index, "ServerLive")
            try:
                await call(ServerLiveRequest().SerializeToString(), timeout=self._deadline_s)
            except grpc.aio.AioRpcError:
                continue

    async def __call__(self, number: int) -> int:
        """Send request `number`; its gRPC status number."""
        request = self._requests[number]
        own_s = min(request.deadline_ns / NS_PER_S, MAX_DEADLINE_S)
        timeout_s = own_s or self._deadline_s
        try:
            response: bytes = await self._calls[number % len(self._calls)](bytes(request.request), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            code: int = error.code().value[0]
            self.answers[number] = Answer(code)
            return code
        # Most answers are what was captured, which is in a file already: memory is for the others.
        same = response == bytes(request.response)
        self.answers[number] = Answer(OK, request.response if same else response)
        return OK

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channel in self._channels.close():
            await channel.close()
