"""When arrived calls are held for company: traces of arrivals, and of a loop that is busy or has time."""

import pytest

from sluice_server.transport.gathering import CALLS_MAX, SAMPLE_CALLS, Gathering

MS = 1_000_000


class Traffic:
    """Feeds arrivals, with a clock that goes 1 ms per call and a CPU clock that goes `load` times as fast."""

    def __init__(self) -> None:
        self.gathering = Gathering()
        self.now_ns = self.cpu_ns = 10**12

    def calls(self, number: int, *, company: int, load: float) -> None:
        for _ in range(number):
            self.now_ns += MS
            self.cpu_ns += int(load * MS)
            if self.gathering.arrived(company):
                self.gathering.sampled(self.now_ns, self.cpu_ns)


def test_the_first_call_of_an_idle_server_is_not_held() -> None:
    gathering = Gathering()
    gathering.arrived(1)
    assert not gathering.holds(1)


def test_many_calls_on_a_busy_loop_are_held() -> None:
    traffic = Traffic()
    traffic.calls(200, company=6, load=0.9)
    assert traffic.gathering.holds(1)


def test_nobody_is_held_while_the_loop_has_time_even_when_the_models_are_slow() -> None:
    traffic = Traffic()
    traffic.calls(500, company=50, load=0.3)
    assert not traffic.gathering.holds(1)


@pytest.mark.parametrize("clients", [1, 2])
def test_one_client_or_two_are_never_held_however_busy_the_loop_is(clients: int) -> None:
    traffic = Traffic()
    traffic.calls(5000, company=clients, load=1.0)
    assert not traffic.gathering.holds(1)


def test_calls_go_when_as_many_have_come_as_were_lately_in_the_server() -> None:
    traffic = Traffic()
    traffic.calls(200, company=8, load=0.9)
    assert traffic.gathering.holds(7)
    assert not traffic.gathering.holds(8)


def test_a_full_list_goes_without_waiting() -> None:
    traffic = Traffic()
    traffic.calls(200, company=1000, load=0.9)
    assert traffic.gathering.holds(CALLS_MAX - 1)
    assert not traffic.gathering.holds(CALLS_MAX)


def test_load_is_recognised_within_two_looks_at_the_clocks_after_any_silence() -> None:
    traffic = Traffic()
    traffic.calls(200, company=1, load=0.01)
    traffic.now_ns += 3600 * 1000 * MS
    traffic.calls(2 * SAMPLE_CALLS, company=10, load=0.9)
    assert traffic.gathering.holds(1)


def test_load_is_forgotten_when_the_clients_leave() -> None:
    traffic = Traffic()
    traffic.calls(200, company=30, load=0.9)
    traffic.calls(2 * SAMPLE_CALLS, company=1, load=0.9)
    assert not traffic.gathering.holds(1)


def test_the_peak_of_the_past_is_forgotten_so_that_few_clients_do_not_wait_for_many() -> None:
    traffic = Traffic()
    traffic.calls(200, company=60, load=0.9)
    traffic.calls(300, company=4, load=0.9)
    assert traffic.gathering.holds(3)
    assert not traffic.gathering.holds(4)
