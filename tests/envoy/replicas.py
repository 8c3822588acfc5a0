"""Two server processes behind Envoy, a load that does not wait for answers, and what became of its requests."""

from __future__ import annotations

import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
from edges import echo, socket_folder

from deploy.envoy.bootstrap import Upstream, Variant
from deploy.envoy.sidecar import sidecar
from sluice_batching.arrivals import Constant, arrivals, even
from sluice_client.load.open_loop import Sender, run_precisely, send_at
from support import models
from support.fakes import PATIENCE_S, eventually
from support.processes import ServeProcess

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sluice_client.load.latencies import Records

RATE_PER_S = 200
"""Requests a second; each waits up to 20 ms for company, so that a handful is always in flight."""

COMPANY = "dynamic_batching { preferred_batch_size: [ 8 ] max_queue_delay_microseconds: 20000 }"


def write_models(repository: Path) -> None:
    models.write_model(repository, "echo", models.identity(dims=("N", 1)), max_batch_size=8, more=COMPANY)


class Replica:
    """A server process at its own Unix socket, which can be started again."""

    def __init__(self, repository: Path, transport: str, socket: Path) -> None:
        self.socket = str(socket)
        self._flags = (
            f"--transport={transport}",
            f"--model-repository={repository}",
            f"--grpc-address=unix:{socket}",
            "--allow-http=false",
            "--allow-metrics=false",
        )
        self.process = ServeProcess(*self._flags)

    def wait_until_serving(self) -> None:
        self.process.wait_for("server is serving")

    def start_again(self) -> None:
        """After its end."""
        self.process.close()
        self.process = ServeProcess(*self._flags)
        self.wait_until_serving()

    def end(self) -> None:
        """Ask it to end, and wait for that; it must have answered all that it had accepted."""
        self.process.signal(signal.SIGTERM)
        assert self.process.wait() == 0
        assert self.process.records[-1]["all_answered"] is True, self.process.lines


class Pair:
    """Two replicas of the model `echo` and the Envoy in front of them."""

    def __init__(self, stack: ExitStack, repository: Path, transport: str) -> None:
        sockets = stack.enter_context(socket_folder())
        self.replicas = [Replica(repository, transport, sockets / f"{name}.sock") for name in "ab"]
        for replica in self.replicas:
            stack.callback(lambda replica=replica: replica.process.close())
        for replica in self.replicas:
            replica.wait_until_serving()
        upstreams = tuple(Upstream(f"unix:{replica.socket}") for replica in self.replicas)
        self.envoy = stack.enter_context(sidecar(Variant(upstreams, access_log="/dev/null")))
        self.envoy.wait_until_healthy(2)


class Load:
    """A load that goes on in a thread of its own; `records` are there once it is over."""

    def __init__(self, address: str, rate_per_s: float, deadline_s: float = PATIENCE_S) -> None:
        self._stop = threading.Event()
        self._begun = threading.Event()
        self._first_ns = 0
        self._address = address
        self._deadline_s = deadline_s
        self._times_s = takewhile(lambda _: not self._stop.is_set(), arrivals(Constant(rate_per_s), even()))
        self._thread = threading.Thread(target=self._run)
        self.sent = 0
        self.records: Records | None = None

    def _run(self) -> None:
        self.records = run_precisely(self._send()).records

    async def _send(self):
        requests = [echo(value).SerializeToString() for value in range(16)]
        async with Sender(self._address, requests, deadline_s=self._deadline_s, connections=2) as sender:

            async def send(number: int) -> int:
                if number == 0:
                    self._first_ns = time.monotonic_ns()
                self.sent = number + 1
                return await sender(number)

            return await send_at(self._times_s, send)

    def start(self) -> None:
        self._thread.start()
        self.wait_for_more(100)

    def wait_for_more(self, count: int) -> None:
        """Until so many more have been sent."""
        until = self.sent + count
        eventually(lambda: self.sent >= until or not self._thread.is_alive(), f"{count} more requests are sent")

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    @property
    def finished(self) -> Records:
        assert self.records is not None, "the load has failed"
        return self.records

    def failed_apart_from(self, moment_ns: int, give_s: float) -> dict[str, int]:
        """Who failed by code, apart from those in flight at a moment (give or take some seconds)."""
        records = self.finished
        moment_s = (moment_ns - self._first_ns) / 1e9 + records.sent_s[0]
        in_flight = (records.sent_s <= moment_s + give_s) & (records.ended_s >= moment_s - give_s)
        keep = ~in_flight
        return type(records)(*(getattr(records, name)[keep] for name in records.__slots__)).outcomes

    @property
    def failed(self) -> dict[str, int]:
        """How many failed with each code."""
        return {code: count for code, count in self.finished.outcomes.items() if code != "OK"}


@contextmanager
def under_load(address: str, rate_per_s: float = RATE_PER_S) -> Iterator[Load]:
    """A load at this address while the block runs."""
    load = Load(address, rate_per_s)
    load.start()
    try:
        yield load
        # What is done last must show in what comes after it.
        load.wait_for_more(100)
    finally:
        load.stop()


def slow_share(records: Records, above_s: float) -> float:
    """Of the requests, how many took longer than this from when they were due."""
    return float(np.mean(records.response_s > above_s))
