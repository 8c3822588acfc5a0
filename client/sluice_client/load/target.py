"""What a load is sent to, and one load of it, with what the servers counted meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sluice_client.load.counters import Counters, read_counters
from sluice_client.load.open_loop import Run, Sender, run_precisely, send_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_client.client import Client
    from sluice_client.settings import Tls


@dataclass(frozen=True, slots=True)
class Target:
    """A model on servers, and how requests are sent there; `requests` as for Sender.

    `client` asks for statistics. `lag_limit_s` is how late the generator may be, at the 99th percentile.
    """

    client: Client
    model: str
    version: str
    requests: tuple[bytes, ...]
    deadline_s: float
    tls: Tls | None
    connections: int
    max_in_flight: int
    lag_limit_s: float

    def load(self, times_s: Sequence[float]) -> tuple[Run, Counters | None]:
        """Send a request at each of these times; what became of them, and what the servers counted, if they do."""
        before = read_counters(self.client, self.model, self.version)
        run = run_precisely(self._send(times_s))
        after = read_counters(self.client, self.model, self.version)
        counted = None if before is None or after is None else after.since(before)
        return Run(run.records, replace(run.generator, lag_limit_s=self.lag_limit_s)), counted

    def alone_s(self, number: int) -> Sequence[float]:
        """How long each of so many requests takes, sent one after the other, the connections made before."""
        return run_precisely(self._send_alone(number))

    def _sender(self) -> Sender:
        return Sender(
            self.client.endpoints,
            self.requests,
            deadline_s=self.deadline_s,
            tls=self.tls,
            connections=self.connections,
        )

    async def _send(self, times_s: Sequence[float]) -> Run:
        async with self._sender() as sender:
            # Connections are made before the first request is due.
            await sender.connect()
            return await send_at(times_s, sender, max_in_flight=self.max_in_flight)

    async def _send_alone(self, number: int) -> list[float]:
        clock_s = asyncio.get_running_loop().time
        times_s = []
        async with self._sender() as sender:
            await sender.connect()
            for index in range(number):
                started_s = clock_s()
                await sender(index)
                times_s.append(clock_s() - started_s)
        return times_s
