"""Two server processes behind Envoy, a load that does not wait for answers, and what became of its requests."""

from __future__ import annotations

import json
import signal
import threading
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import TYPE_CHECKING, Any

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
        self._log = sockets / "access.log"
        self._failures_read = 0
        self.envoy = stack.enter_context(sidecar(Variant(upstreams, access_log=str(self._log))))
        self.envoy.wait_until_healthy(2)

    def failures(self, count: int) -> list[dict[str, Any]]:
        """The records of Envoy's access log of the next so many calls that were not answered with OK."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            records = map(json.loads, self._log.read_text().splitlines())
            failed = [record for record in records if record["grpc_status"] != "OK"]
            found[:] = failed[self._failures_read :]
            return len(found) >= count

        eventually(look, f"{count} calls that failed are in the access log")
        self._failures_read += len(found)
        return found


class Load:
    """A load that goes on in a thread of its own; `records` are there once it is over."""

    def __init__(self, address: str, rate_per_s: float, deadline_s: float = PATIENCE_S) -> None:
        self._stop = threading.Event()
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
