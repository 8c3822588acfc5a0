"""The open loop under gevent: each request begins at its time, in a greenlet of its own, whatever is still open."""

from __future__ import annotations

import math
import time
from array import array
from typing import TYPE_CHECKING

import gevent
from gevent.pool import Group

from sluice_client.load.latencies import NOT_SENT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    Send = Callable[[int, int], int]
    Report = Callable[[int, float, int], None]


class OpenLoop:
    """Sends what is due, keeps what became of it, and counts what is in flight.

    `send(kind, choice)` sends a request, chosen by a random number, and gives its gRPC status number. What is due while
    `max_in_flight` requests are is not sent, and recorded as NOT_SENT. `report(kind, response_s, code)` is told of each
    request that ended. To be used once.
    """

    def __init__(
        self, send: Send, max_in_flight: int, report: Report, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        self._send = send
        self._max_in_flight = max_in_flight
        self._report = report
        self._clock_s = clock_s
        self._open: Group = Group()
        self.most_in_flight = 0
        self.intended_s, self.sent_s, self.ended_s = array("d"), array("d"), array("d")
        self.codes, self.kinds = array("B"), array("B")

    def run(self, plan: Iterable[tuple[float, int, int]], started_s: float) -> None:
        """Send what is planned, in ascending seconds from `started_s` on the clock, and return when all has ended."""
        for number, (due_s, kind, choice) in enumerate(plan):
            self.intended_s.append(due_s)
            self.sent_s.append(math.nan)
            self.ended_s.append(math.nan)
            self.codes.append(NOT_SENT)
            self.kinds.append(kind)
            # Also when it is late: the other greenlets have to run, or a generator that is behind would stay behind.
            gevent.sleep(max(started_s + due_s - self._clock_s(), 0))
            if len(self._open) < self._max_in_flight:
                self._open.spawn(self._one, number, kind, choice, started_s)
                self.most_in_flight = max(self.most_in_flight, len(self._open))
        self._open.join(raise_error=True)

    def _one(self, number: int, kind: int, choice: int, started_s: float) -> None:
        sent_s = self._clock_s() - started_s
        code = self._send(kind, choice)
        ended_s = self._clock_s() - started_s
        self.sent_s[number] = sent_s
        self.ended_s[number] = ended_s
        self.codes[number] = code
        self._report(kind, ended_s - self.intended_s[number], code)
