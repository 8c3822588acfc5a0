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
from replicas import Pair, Replica, slow_share, under_load, write_models

if TYPE_CHECKING:
    from collections.abc import Iterator

CHAOS_S = float(os.environ.get("SLUICE_CHAOS_S", "0"))

NOTICE_S = 0.1
"""Within so long Envoy's process learns that a socket has been closed, also on a machine that is busy."""


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


def test_a_rolling_restart_drains_each_in_turn_and_loses_no_request(pair):
    with under_load(pair.envoy.address) as load:
        for drained, other in turns(pair, least=2):
            drained.end()
            load.wait_for_more(50)
            assert pair.envoy.healthy() == {other.socket}
            drained.start_again()
            pair.envoy.wait_until_healthy(2)
    assert load.failed == {}


def test_one_that_is_killed_loses_only_what_was_in_flight_there(pair):
    for replica, _ in turns(pair):
        with under_load(pair.envoy.address) as load:
            replica.process.signal(signal.SIGKILL)
            killed_ns = time.monotonic_ns()
            replica.process.wait()
            load.wait_for_more(200)
        outcomes = load.failed_apart_from(killed_ns, NOTICE_S)
        assert outcomes.keys() == {"OK"}
        assert sum(load.failed.values()) <= 20
        ejections = "cluster.sluice.outlier_detection.ejections_enforced_consecutive_local_origin_failure"
        assert pair.envoy.stat(ejections) >= 1
        replica.start_again()
        pair.envoy.wait_until_healthy(2)


@contextmanager
def slowed(replica: Replica, runs_s: float = 0.02, stands_s: float = 0.2) -> Iterator[None]:
    """Let it run a tenth of the time only."""
    over = threading.Event()

    def hinder() -> None:
        while not over.wait(runs_s):
            replica.process.signal(signal.SIGSTOP)
            over.wait(stands_s)
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
    for replica, _ in turns(pair):
        with under_load(pair.envoy.address) as load, slowed(replica):
            load.wait_for_more(400)
            assert replica.socket in pair.envoy.healthy()
        assert load.failed == {}
        assert slow_share(load.finished, 0.15) < 0.25


def test_one_that_is_frozen_is_left_out_until_it_answers_again(pair):
    for replica, other in turns(pair):
        with under_load(pair.envoy.address) as load:
            replica.process.signal(signal.SIGSTOP)
            try:
                pair.envoy.wait_until_healthy(1)
                assert pair.envoy.healthy() == {other.socket}
                load.wait_for_more(200)
            finally:
                replica.process.signal(signal.SIGCONT)
            pair.envoy.wait_until_healthy(2)
        assert load.failed == {}
        assert slow_share(load.finished, 1.0) < 0.25
