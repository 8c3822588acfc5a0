"""The open loop under gevent: requests begin at their times whatever is open, up to the limit, and all are recorded."""

from __future__ import annotations

import gevent
import numpy as np
import pytest
from gevent.event import Event

from loadtests.open_loop import OpenLoop
from sluice_client.load.latencies import NOT_SENT


class Clock:
    """A clock that stands still unless a test moves it."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_what_is_due_begins_although_nothing_ends():
    """All three are due at once; the first ends when the last has begun."""
    begun, all_begun = [], Event()

    def send(kind: int, choice: int) -> int:
        begun.append((kind, choice))
        if len(begun) == 3:
            all_begun.set()
        assert all_begun.wait(10)
        return kind

    told = []
    loop = OpenLoop(send, 10, lambda *what: told.append(what), 100.0, Clock())
    loop.run([(0.0, 0, 7), (0.0, 1, 8), (0.0, 0, 9)])

    assert begun == [(0, 7), (1, 8), (0, 9)]
    assert loop.log.most_in_flight == 3
    assert (loop.log.records().codes.tolist(), list(loop.kinds)) == ([0, 1, 0], [0, 1, 0])
    assert sorted(told) == [(0, 0.0, 0), (0, 0.0, 0), (1, 0.0, 1)]


def test_times_are_those_of_the_clock_and_a_late_sender_shows():
    clock = Clock()

    def send(kind: int, choice: int) -> int:
        clock.now_s += 0.5
        return 0

    loop = OpenLoop(send, 10, lambda *what: None, 99.0, clock)
    loop.run([(0.0, 0, 0), (0.0, 0, 0)])
    assert loop.log.records().intended_s.tolist() == [0.0, 0.0]
    assert loop.log.records().sent_s.tolist() == [1.0, 1.5]
    assert loop.log.records().ended_s.tolist() == [1.5, 2.0]


def test_what_is_due_beyond_the_limit_is_given_up_and_recorded():
    last = Event()

    def send(kind: int, choice: int) -> int:
        assert last.wait(10)
        return 0

    def plan():
        yield from [(0.0, 0, 0)] * 5
        last.set()

    told = []
    loop = OpenLoop(send, 2, lambda *what: told.append(what), 100.0, Clock())
    loop.run(plan())
    assert loop.log.records().codes.tolist() == [0, 0, NOT_SENT, NOT_SENT, NOT_SENT]
    assert np.isnan(loop.log.records().sent_s).tolist() == [False, False, True, True, True]
    assert (loop.log.most_in_flight, len(told)) == (2, 2)


def test_an_error_of_the_sender_s_own_ends_the_load():
    def send(kind: int, choice: int) -> int:
        raise LookupError("a bug")

    loop = OpenLoop(send, 2, lambda *what: None, 100.0, Clock())
    hub = gevent.get_hub()
    hub.NOT_ERROR, shown = (*hub.NOT_ERROR, LookupError), hub.NOT_ERROR  # not printed
    try:
        with pytest.raises(LookupError, match="a bug"):
            loop.run([(0.0, 0, 0)])
    finally:
        hub.NOT_ERROR = shown
