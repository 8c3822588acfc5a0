"""When arrived calls are held for company: traces of arrivals under a virtual clock."""

import pytest
from sluice_server.transport.gathering import CALLS_MAX, HOLD_NS, SMOOTHING, Gathering

MS = 1_000_000


def after(gathering: Gathering, *, arrivals: int, gap_ns: int, company: int, start_ns: int = 10**12) -> int:
    """Let calls arrive evenly; gives the time of the last one."""
    for number in range(arrivals):
        gathering.arrived(start_ns + number * gap_ns, company)
    return start_ns + (arrivals - 1) * gap_ns


def test_the_first_call_of_an_idle_server_is_not_held() -> None:
    gathering = Gathering()
    gathering.arrived(10**12, 1)
    assert not gathering.holds(1)


def test_many_calls_in_fast_traffic_are_held() -> None:
    gathering = Gathering()
    after(gathering, arrivals=200, gap_ns=MS // 5, company=6)
    assert gathering.holds(1)


def test_a_lone_client_is_never_held_however_fast_it_calls() -> None:
    gathering = Gathering()
    after(gathering, arrivals=5000, gap_ns=MS // 10, company=1)
    assert not gathering.holds(1)


def test_two_clients_that_take_turns_are_not_held() -> None:
    gathering = Gathering()
    for number in range(1000):
        gathering.arrived(10**12 + number * MS // 4, 1 + number % 2)
        assert not gathering.holds(1)


def test_slow_traffic_is_not_held_even_when_the_models_are_slow() -> None:
    gathering = Gathering()
    after(gathering, arrivals=500, gap_ns=2 * MS, company=50)
    assert not gathering.holds(1)


def test_a_full_list_goes_without_waiting() -> None:
    gathering = Gathering()
    after(gathering, arrivals=200, gap_ns=MS // 10, company=40)
    assert gathering.holds(CALLS_MAX - 1)
    assert not gathering.holds(CALLS_MAX)


def test_load_is_recognised_soon_after_a_silence_of_any_length() -> None:
    gathering = Gathering()
    last_ns = after(gathering, arrivals=200, gap_ns=MS // 10, company=10)
    after(gathering, arrivals=8 * SMOOTHING, gap_ns=MS // 10, company=10, start_ns=last_ns + 3600 * 1000 * MS)
    assert gathering.holds(1)


@pytest.mark.parametrize("company", [1, 2])
def test_load_is_forgotten_when_the_clients_leave(company: int) -> None:
    gathering = Gathering()
    last_ns = after(gathering, arrivals=200, gap_ns=MS // 10, company=30)
    after(gathering, arrivals=8 * SMOOTHING, gap_ns=HOLD_NS // 4, company=company, start_ns=last_ns + MS)
    assert gathering.holds(1) is False
