"""When arrived calls are held for company: traces of arrivals, and of a loop that is busy or has time."""

import pytest

from sluice_server.transport.gathering import CALLS_MAX, SAMPLE_CALLS, Gathering

BUSY = 0.35
"""Pauses per call of a loop that is the limit, as measured."""

AT_EASE = 3.4
"""And with a lone client."""


class Traffic:
    """Feeds arrivals, while the loop's thread pauses so many times per call."""

    def __init__(self) -> None:
        self.gathering = Gathering()
        self.pauses = 10**6

    def calls(self, number: int, *, company: int, pauses: float) -> None:
        for _ in range(number):
            self.pauses += pauses
            if self.gathering.arrived(company):
                self.gathering.sampled(int(self.pauses))


def test_the_first_call_of_an_idle_server_is_not_held() -> None:
    gathering = Gathering()
    gathering.arrived(1)
    assert not gathering.holds(1)


def test_many_calls_on_a_busy_loop_are_held() -> None:
    traffic = Traffic()
    traffic.calls(200, company=6, pauses=BUSY)
    assert traffic.gathering.holds(1)


def test_nobody_is_held_while_the_loop_has_time_even_when_the_models_are_slow() -> None:
    traffic = Traffic()
    traffic.calls(500, company=50, pauses=1.1)
    assert not traffic.gathering.holds(1)


@pytest.mark.parametrize("clients", [1, 2])
def test_one_client_or_two_are_never_held_however_busy_the_loop_is(clients: int) -> None:
    traffic = Traffic()
    traffic.calls(5000, company=clients, pauses=0.0)
    assert not traffic.gathering.holds(1)


def test_calls_go_when_as_many_have_come_as_were_lately_in_the_server() -> None:
    traffic = Traffic()
    traffic.calls(200, company=8, pauses=BUSY)
    assert traffic.gathering.holds(7)
    assert not traffic.gathering.holds(8)


def test_a_full_list_goes_without_waiting() -> None:
    traffic = Traffic()
    traffic.calls(200, company=1000, pauses=BUSY)
    assert traffic.gathering.holds(CALLS_MAX - 1)
    assert not traffic.gathering.holds(CALLS_MAX)


def test_load_is_recognised_within_two_looks_at_the_thread() -> None:
    traffic = Traffic()
    traffic.calls(200, company=1, pauses=AT_EASE)
    traffic.calls(2 * SAMPLE_CALLS, company=10, pauses=BUSY)
    assert traffic.gathering.holds(1)


def test_load_is_forgotten_when_the_clients_leave() -> None:
    traffic = Traffic()
    traffic.calls(200, company=30, pauses=BUSY)
    traffic.calls(2 * SAMPLE_CALLS, company=1, pauses=BUSY)
    assert not traffic.gathering.holds(1)


def test_the_peak_of_the_past_is_forgotten_so_that_few_clients_do_not_wait_for_many() -> None:
    traffic = Traffic()
    traffic.calls(200, company=60, pauses=BUSY)
    traffic.calls(300, company=4, pauses=BUSY)
    assert traffic.gathering.holds(3)
    assert not traffic.gathering.holds(4)
