"""Two replicas behind Envoy under an open-loop load: one killed, drained, slowed, frozen; and both restarted in turn.

In `make test` each happens once; `make chaos` sets SLUICE_CHAOS_S, and it goes on for so many seconds.
"""

from __future__ import annotations

import itertools
import os
import signal
import threading
import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest
from edges import need_envoy
from replicas import Pair, Replica, under_load, write_models

from sluice_client.load.latencies import quantile

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timed

CHAOS_S = float(os.environ.get("SLUICE_CHAOS_S", "0"))

STANDS_S = 0.2
"""How long the slow one stands still at a time."""

EJECTIONS = "cluster.sluice.outlier_detection.ejections_enforced_consecutive_local_origin_failure"


@pytest.fixture(scope="module")
def pair(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Two healthy replicas, which each test leaves healthy."""
    need_envoy()
    repository = tmp_path_factory.mktemp("replicated")
    write_models(repository)
    with ExitStack() as stack:
        yield Pair(stack, repository, transport)


def turns(pair: Pair, least: int = 1) -> Iterator[tuple[Replica, Replica]]:
    """One replica after the other, each with the one that stays, so many times at least, until time is up."""
    until_s = time.monotonic() + CHAOS_S
    for number in itertools.count():
        if number >= least and time.monotonic() > until_s:
            return
        yield pair.replicas[number % 2], pair.replicas[1 - number % 2]


@pytest.mark.long
def test_a_rolling_restart_drains_each_in_turn_and_loses_no_request(pair):
    with under_load(pair.envoy.address) as load:
        for drained, other in turns(pair, least=2):
            drained.end()
            load.wait_for_more(50)
            assert pair.envoy.healthy() == {other.socket}
            drained.start_again()
            pair.envoy.wait_until_healthy(2)
    assert load.failed == {}


@pytest.mark.long
def test_one_that_is_killed_loses_only_what_was_in_flight_there(pair):
    for replica, _ in turns(pair):
        with under_load(pair.envoy.address) as load:
            replica.process.signal(signal.SIGKILL)
            replica.process.wait()
            load.wait_for_more(200)
        replica.start_again()
        pair.envoy.wait_until_healthy(2)
        assert load.failed.keys() <= {"UNAVAILABLE"}
        failures = pair.failures(sum(load.failed.values()))
        assert len(failures) == sum(load.failed.values())
        # UC: the connection on which a request was under way has ended. None failed for want of a connection.
        assert {(record["upstream"], record["flags"]) for record in failures} <= {(replica.socket, "UC")}
        assert pair.envoy.stat(EJECTIONS) >= 1


@contextmanager
def slowed(replica: Replica) -> Iterator[None]:
    """Let it run a tenth of the time only."""
    over = threading.Event()

    def hinder() -> None:
        while not over.wait(STANDS_S / 10):
            replica.process.signal(signal.SIGSTOP)
            over.wait(STANDS_S)
            replica.process.signal(signal.SIGCONT)

    thread = threading.Thread(target=hinder)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        replica.process.signal(signal.SIGCONT)


def test_one_that_is_slow_gets_less_and_harms_nobody_else(pair):
    for replica, other in turns(pair):
        before = pair.envoy.requests()
        with under_load(pair.envoy.address) as load, slowed(replica):
            load.wait_for_more(400)
            after = pair.envoy.requests()
            assert replica.socket in pair.envoy.healthy()
        assert load.failed == {}
        slow, fast = (after[one.socket] - before[one.socket] for one in (replica, other))
        assert slow < fast / 2
        assert quantile(load.finished.service_s, 0.5) < STANDS_S


@pytest.mark.skipif(not CHAOS_S, reason="Envoy takes its time to be sure: make chaos")
def test_one_that_is_frozen_is_left_out_until_it_answers_again(pair):
    for replica, other in turns(pair):
        with under_load(pair.envoy.address) as load:
            replica.process.signal(signal.SIGSTOP)
            try:
                pair.envoy.wait_until_healthy(1)
                assert pair.envoy.healthy() == {other.socket}
                before = pair.envoy.requests()
                load.wait_for_more(200)
                after = pair.envoy.requests()
            finally:
                replica.process.signal(signal.SIGCONT)
            pair.envoy.wait_until_healthy(2)
        assert load.failed == {}
        assert after[replica.socket] == before[replica.socket]
        assert after[other.socket] - before[other.socket] > 150
