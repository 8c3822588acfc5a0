"""The open-loop sender: each request is sent at its time, whatever is still open, and what became of it is recorded.

One event loop sends and receives. A request is a task, whose cost is that of one grpc.aio call (about 0.2 ms of CPU
with prepared bytes), so one process sends a few thousand requests a second at most; `Generator` says when that was the
limit. Times are those of the loop's clock.
"""

from __future__ import annotations

import asyncio
import selectors
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self, TypeVar

import grpc.aio

from sluice_client.channels import Channels
from sluice_client.endpoints import parse_endpoints
from sluice_client.load.latencies import OK, Generator, Log, Records

if TYPE_CHECKING:
    from sluice_client.flow import Metadata
    from sluice_client.settings import Tls

T = TypeVar("T")

MAX_IN_FLIGHT: Final = 10_000
"""About 200 MB of open calls; a server that has so many to answer will not catch up."""

Send = Callable[[int], Coroutine[Any, Any, int]]
"""Sends request number n (from 0) and gives its gRPC status number when it has ended."""


@dataclass(frozen=True, slots=True)
class Run:
    """A load that is over: what became of its requests, and how the generator did."""

    records: Records
    generator: Generator


def run_precisely(coroutine: Coroutine[Any, Any, T]) -> T:
    """As asyncio.run, on a loop whose timers are as precise as the system's.

    The usual selectors round what they wait up to whole milliseconds; select() takes microseconds, and watches few
    sockets here. So nothing has to spin until a request is due.
    """
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selectors.SelectSelector())) as runner:
        return runner.run(coroutine)


async def send_at(
    times_s: Iterable[float],
    send: Send,
    *,
    max_in_flight: int = MAX_IN_FLIGHT,
    cpu_s: Callable[[], float] = time.process_time,
) -> Run:
    """Send one request at each of these times, in ascending seconds from now, and return when all have ended.

    `send(number)` is called at the time of the request, in a task of its own, and returns its gRPC status number; it
    needs a deadline of its own. What is due while `max_in_flight` requests are open is not sent, and recorded as
    NOT_SENT. `cpu_s` reads the CPU seconds that the generator has used. Cancelling this cancels what is open; an
    exception of `send` ends the load, as an ExceptionGroup.
    """
    log = Log(asyncio.get_running_loop().time)
    cpu_started_s = cpu_s()

    async def follow(number: int) -> None:
        log.note_sent(number)
        log.note_ended(number, await send(number))

    async with asyncio.TaskGroup() as tasks:
        for number, due_s in enumerate(times_s):
            # Also when it is late: answers have to be taken, or a generator that is behind would stay behind.
            await asyncio.sleep(max(due_s - log.now_s(), 0))
            if log.begin(due_s, max_in_flight):
                tasks.create_task(follow(number))
    elapsed_s = log.now_s()
    cpu_share = (cpu_s() - cpu_started_s) / elapsed_s if elapsed_s > 0 else 0.0
    return Run(log.records(), log.generator(cpu_share))


class Connections:
    """The client's channels to some endpoints, each as often as asked for: to be used, and closed, on one event loop.

    Raises InvalidRequest when an endpoint cannot be used.
    """

    def __init__(self, endpoints: str | Sequence[str], tls: Tls | None, connections: int = 1) -> None:
        parsed = parse_endpoints(endpoints, tls=tls is not None)
        self._endpoints = len(parsed)
        self._channels = [Channels(grpc.aio, parsed, tls, ()) for _ in range(connections)]

    def _callables(self, method: str) -> list[Any]:
        """A method on each of the channels, endpoint by endpoint."""
        return [channels.callable(index, method) for channels in self._channels for index in range(self._endpoints)]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        for channels in self._channels:
            for channel in channels.close():
                await channel.close()


async def ask(call: Any, message: bytes, timeout_s: float, metadata: Metadata = ()) -> tuple[int, bytes]:
    """The gRPC status number that a call ends with, and its answer, which is empty unless that is OK."""
    try:
        answer: bytes = await call(message, timeout=timeout_s, metadata=metadata)
    except grpc.aio.AioRpcError as error:
        return error.code().value[0], b""
    return OK, answer


class Sender(Connections):
    """Sends prepared ModelInfer requests over the client's channels, in turns: no retry, no look at the answer.

    `endpoints`, `tls`, `metadata`: as Client's. `requests`: serialised ModelInferRequests, sent over and over.
    `deadline_s`: of each request. `connections`: channels to each endpoint.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str],
        requests: Sequence[bytes],
        *,
        deadline_s: float,
        tls: Tls | None = None,
        metadata: Metadata = (),
        connections: int = 1,
    ) -> None:
        super().__init__(endpoints, tls, connections)
        self._calls = self._callables("ModelInfer")
        self._requests = tuple(requests)
        self._deadline_s = deadline_s
        self._metadata = metadata

    async def __call__(self, number: int) -> int:
        """Send request `number`; its gRPC status number."""
        turn, index = divmod(number, len(self._requests))
        # Shifted by one each time around, so that every request goes to every endpoint, whatever their numbers are.
        return await self._outcome(self._calls[(number + turn) % len(self._calls)], self._requests[index])

    async def connect(self) -> None:
        """Send one request over each connection, so that no later one has to wait for it to come up."""
        await asyncio.gather(*(self._outcome(call, self._requests[0]) for call in self._calls))

    async def _outcome(self, call: Any, request: bytes) -> int:
        code, _ = await ask(call, request, self._deadline_s, self._metadata)
        return code
