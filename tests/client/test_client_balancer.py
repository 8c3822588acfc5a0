"""Endpoint picking on a fake clock: round robin, set-aside with backoff, one probe, recovery."""

from hypothesis import given
from hypothesis import strategies as st

from sluice_client.balancer import FIRST_ASIDE_NS, MAX_ASIDE_NS, Balancer


def balancer(size: int) -> Balancer:
    return Balancer(size, lambda: 0.0)


def test_healthy_endpoints_take_turns() -> None:
    three = balancer(3)
    assert [three.pick(0) for _ in range(7)] == [0, 1, 2, 0, 1, 2, 0]


def test_clients_start_at_random_endpoints() -> None:
    assert [Balancer(4, lambda r=r: r).pick(0) for r in (0.0, 0.26, 0.5, 0.999)] == [0, 1, 2, 3]


def test_an_endpoint_that_failed_is_passed_over_until_its_time_is_up_and_then_probed_once() -> None:
    two = balancer(2)
    two.failed(0, now_ns=1000, attempt_started_ns=500)
    assert [two.pick(1000) for _ in range(3)] == [1, 1, 1]
    later = 1000 + FIRST_ASIDE_NS
    assert [two.pick(later) for _ in range(3)] == [0, 1, 1]
    two.answered(0)
    assert sorted(two.pick(later) for _ in range(2)) == [0, 1]
    assert repr(two) == "<Balancer failures=[0, 0]>"


def test_the_set_aside_doubles_up_to_a_bound() -> None:
    two = balancer(2)
    now_ns, waits = 0, []
    for _ in range(9):
        two.failed(0, now_ns, now_ns)
        step = FIRST_ASIDE_NS // 2
        wait = next(wait for wait in range(step, MAX_ASIDE_NS + step, step) if two.has_other(now_ns + wait, tried={1}))
        waits.append(wait)
        now_ns += wait
    assert waits == [min(FIRST_ASIDE_NS * 2**n, MAX_ASIDE_NS) for n in range(9)]


def test_failures_of_calls_that_were_on_their_way_count_once() -> None:
    two = balancer(2)
    for _ in range(64):
        two.failed(0, now_ns=1000, attempt_started_ns=999)
    assert repr(two) == "<Balancer failures=[1, 0]>"


def test_with_all_set_aside_the_one_that_returns_first_is_picked_and_untried_ones_before_it() -> None:
    two = balancer(2)
    two.failed(1, 0, 0)
    two.failed(0, 1, 1)
    assert two.pick(2) == 1
    assert two.pick(2, tried={1}) == 0
    assert not two.has_other(2, tried=())


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from(["pick", "fail", "answer"]), st.integers(0, 4), st.integers(0, MAX_ASIDE_NS))),
)
def test_a_pick_is_always_an_endpoint_and_a_healthy_one_whenever_there_is_one(
    size: int, steps: list[tuple[str, int, int]]
) -> None:
    subject, now_ns = balancer(size), 0
    for kind, index, passed_ns in steps:
        now_ns += passed_ns
        index %= size
        if kind == "fail":
            subject.failed(index, now_ns, now_ns)
            assert not subject.is_healthy(index)
        elif kind == "answer":
            subject.answered(index)
            assert subject.is_healthy(index)
        else:
            usable = subject.has_other(now_ns, tried=())
            picked = subject.pick(now_ns)
            assert 0 <= picked < size
            assert usable or not subject.is_healthy(picked)
