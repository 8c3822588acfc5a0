"""Locust runs a scenario: one user in each worker process sends the worker's share of it in an open loop.

The workers connect, check one answer of each kind of request and report ready; the first has measured lone requests by
then. The master names the second at which all of them start, collects what became of every request, writes it into a
file, and ends. Without --master and --worker one process does both. `make loadtest` (loadtests/run.py) starts all that,
and reads the file. Importing locust replaces what blocks by gevent's, so nothing but Locust's processes imports this.
"""

from __future__ import annotations

import grpc.experimental.gevent

grpc.experimental.gevent.init_gevent()  # before the first channel, or gRPC's calls would block all greenlets

import time  # noqa: E402
from itertools import islice  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import TYPE_CHECKING, Any, Final  # noqa: E402

import gevent  # noqa: E402
import numpy as np  # noqa: E402
from gevent.event import AsyncResult  # noqa: E402
from locust import User, events, task  # noqa: E402
from locust.exception import StopUser  # noqa: E402
from locust.runners import MasterRunner, WorkerRunner  # noqa: E402

from loadtests.open_loop import OpenLoop  # noqa: E402
from loadtests.outcome import Part, write_outcome, write_problem  # noqa: E402
from loadtests.payloads import cut_payloads  # noqa: E402
from loadtests.scenario import Scenario, read_scenario  # noqa: E402
from loadtests.senders import Sender, open_sender  # noqa: E402
from sluice_client import Client  # noqa: E402
from sluice_client.load.latencies import OK, code_name  # noqa: E402

if TYPE_CHECKING:
    from argparse import ArgumentParser

    from locust.env import Environment

READY, START, SENT, PROBLEM = "loadtest_ready", "loadtest_start", "loadtest_sent", "loadtest_problem"

LONE_REQUESTS: Final = 50
LONE_S: Final = 3.0
"""So many are sent one by one before the load, or for so long: their p50 is what a load's latency is a multiple of."""

HEAD_START_S: Final = 0.3
"""From the master's word to the start, so that every worker has heard it."""

BARRIER_TIMEOUT_S: Final = 120.0
"""How long a worker that is ready waits for the others, which have to start and to connect."""


@events.init_command_line_parser.add_listener
def _add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("--scenario", help="the scenario's TOML file")
    parser.add_argument("--http-address", default="", help="HOST:PORT of REST; --host is that of gRPC")
    parser.add_argument("--outcome", help="where what became of the requests is written")


@events.init.add_listener
def _begin(environment: Environment, **_: Any) -> None:
    options: Any = environment.parsed_options
    if not (options.scenario and options.outcome):
        raise SystemExit("give --scenario FILE and --outcome FILE, or let `make loadtest` do so")
    scenario = read_scenario(Path(options.scenario))
    is_alone = not isinstance(environment.runner, MasterRunner | WorkerRunner)
    if is_alone and scenario.generator.workers > 1:
        raise SystemExit(f"{options.scenario} wants {scenario.generator.workers} workers: start --master and --worker")
    if not isinstance(environment.runner, MasterRunner):
        OpenLoopUser.worker = Worker(environment, scenario)
    if not isinstance(environment.runner, WorkerRunner):
        Collector(environment, scenario.generator.workers, Path(options.outcome))


class OpenLoopUser(User):
    """The one user of a worker process."""

    worker: Worker

    @task
    def send_all(self) -> None:
        """Send this worker's share of the scenario."""
        try:
            self.worker.run()
        except Exception as error:
            self.environment.runner.send_message(PROBLEM, {"text": f"{type(error).__name__}: {error}"})
            raise
        raise StopUser


class Worker:
    """A process that sends: every n-th request of the scenario, where there are n workers."""

    def __init__(self, environment: Environment, scenario: Scenario) -> None:
        self._environment = environment
        self._scenario = scenario
        self._options: Any = environment.parsed_options
        self._start: AsyncResult[float] = AsyncResult()
        environment.runner.register_message(START, lambda msg, **_: self._start.set(msg.data["at_s"]))

    def run(self) -> None:
        """Connect, wait for the others, send, and report."""
        index: int = self._environment.runner.worker_index
        senders = self._senders()
        try:
            for sender in senders:
                sender.check(0)
            lone_s = self._lone(senders) if index == 0 else np.empty(0)
            self._environment.runner.send_message(READY, {"index": index})
            start_at_s = self._start.get(timeout=BARRIER_TIMEOUT_S)
            part = self._load(senders, index, start_at_s, lone_s)
        finally:
            for sender in senders:
                sender.close()
        # Last, as the master ends all processes once it knows.
        self._environment.runner.send_message(SENT, part.as_message())

    def _senders(self) -> list[Sender]:
        senders = []
        with Client(self._options.host) as client:
            for kind in self._scenario.requests:
                client.wait_until_ready(BARRIER_TIMEOUT_S, kind.model)
                model = client.model_metadata(kind.model)
                inputs, outputs = ([tensor.name for tensor in each] for each in (model.inputs, model.outputs))
                payloads = cut_payloads(kind.golden, inputs, outputs, kind.rows)
                limit = self._scenario.generator.max_in_flight
                senders.append(open_sender(kind, payloads, self._options.host, self._options.http_address, limit))
        return senders

    def _lone(self, senders: list[Sender]) -> Any:
        """The times in seconds of requests one by one, as the scenario mixes them."""
        times: list[float] = []
        until_s = time.monotonic() + LONE_S
        for _, kind, choice in islice(self._scenario.plan(), LONE_REQUESTS):
            begun_s = time.monotonic()
            if begun_s > until_s:
                break
            if senders[kind].send(choice % len(senders[kind].payloads)) == OK:
                times.append(time.monotonic() - begun_s)
        return np.array(times)

    def _load(self, senders: list[Sender], index: int, start_at_s: float, lone_s: Any) -> Part:
        def send(kind: int, choice: int) -> int:
            sender = senders[kind]
            return sender.send(choice % len(sender.payloads))

        mine = islice(self._scenario.plan(), index, None, self._scenario.generator.workers)
        started_s = time.monotonic() + start_at_s - time.time()
        loop = OpenLoop(send, self._scenario.generator.max_in_flight, self._report, started_s)
        gevent.sleep(max(started_s - time.monotonic(), 0))
        cpu_s, begun_s = time.process_time(), time.monotonic()
        loop.run(mine)
        return Part.of(loop, index, start_at_s, time.process_time() - cpu_s, time.monotonic() - begun_s, lone_s)

    def _report(self, kind: int, response_s: float, code: int) -> None:
        """For Locust's own statistics and whatever listens to its events."""
        about = self._scenario.requests[kind]
        self._environment.events.request.fire(
            request_type=about.protocol,
            name=about.title,
            response_time=response_s * 1e3,
            response_length=0,
            exception=None if code == OK else RuntimeError(code_name(code)),
            context={},
        )


class Collector:
    """The master's part: the common start, and the file in the end."""

    def __init__(self, environment: Environment, workers: int, outcome: Path) -> None:
        self._environment = environment
        self._workers = workers
        self._outcome = outcome
        self._ready: set[int] = set()
        self._parts: list[Part] = []
        for message, listener in ((READY, self._on_ready), (SENT, self._on_sent), (PROBLEM, self._on_problem)):
            environment.runner.register_message(message, listener)

    def _on_ready(self, msg: Any, **_: Any) -> None:
        self._ready.add(msg.data["index"])
        if len(self._ready) == self._workers:
            self._environment.runner.send_message(START, {"at_s": time.time() + HEAD_START_S})

    def _on_sent(self, msg: Any, **_: Any) -> None:
        self._parts.append(Part.from_message(msg.data))
        if len(self._parts) == self._workers:
            write_outcome(self._outcome, self._parts)
            self._end(0)

    def _on_problem(self, msg: Any, **_: Any) -> None:
        write_problem(self._outcome, msg.data["text"])
        self._end(1)

    def _end(self, exit_code: int) -> None:
        self._environment.process_exit_code = exit_code
        gevent.spawn(self._environment.runner.quit)
