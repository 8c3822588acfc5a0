"""The open loop under gevent: each request begins at its time, in a greenlet of its own, whatever is in flight."""

from __future__ import annotations

import time
from array import array
from typing import TYPE_CHECKING

import gevent
from gevent.pool import Group

from sluice_client.load.latencies import Log

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Send = Callable[[int, int], int]
    Report = Callable[[int, float, int], None]


class OpenLoop:
    """Sends what is due, and keeps what became of it in `log`, and of which kind each request was in `kinds`.

    `send(kind, choice)` sends a request, chosen by a random number, and gives its gRPC status number. What is due while
    `max_in_flight` requests are is not sent, and recorded as NOT_SENT. `report(kind, response_s, code)` is told of each
    request that ended. To be used once, for a load that starts at `started_s` on the clock.
    """

    def __init__(
        self,
        send: Send,
        max_in_flight: int,
        report: Report,
        started_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._send = send
        self._max_in_flight = max_in_flight
        self._report = report
        self.log = Log(clock_s, started_s)
        self.kinds = array("B")

    def run(self, plan: Iterable[tuple[float, int, int]]) -> None:
        """Send what is planned, in ascending seconds from the start, and return when all has ended."""
        in_flight: Group = Group()
        for number, (due_s, kind, choice) in enumerate(plan):
            # Also when it is late: the other greenlets have to run, or a generator that is behind would stay behind.
            gevent.sleep(max(due_s - self.log.now_s(), 0))
            self.kinds.append(kind)
            if self.log.begin(due_s, self._max_in_flight):
                in_flight.spawn(self._one, number, kind, choice)
        in_flight.join(raise_error=True)

    def _one(self, number: int, kind: int, choice: int) -> None:
        self.log.note_sent(number)
        code = self._send(kind, choice)
        self._report(kind, self.log.note_ended(number, code), code)
