"""The life of a call on a fake clock, as traces: what was attempted where, what was waited, what came out."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_client import (
    NotFound,
    NotReady,
    ResourceExhausted,
    RetryPolicy,
    ServerError,
    Timing,
    Unavailable,
    Unimplemented,
)
from sluice_client.endpoints import parse_endpoints
from sluice_client.errors import BY_CODE
from sluice_client.flow import Attempt, CallOptions, Flow, Flows, Operation, Outcome, Pause
from sluice_client.retries import Failure, Origin, Safety

MS = 1_000_000
REFUSED = Failure("UNAVAILABLE", "no connection", Origin.CONNECT)
BUSY = Failure("UNAVAILABLE", "busy")


@dataclass
class World:
    """A fake clock, a fixed random number, and the outcomes of the attempts to come; each attempt takes `took_ns`."""

    outcomes: Iterator[Outcome]
    took_ns: int = MS
    jitter: float = 1.0
    now_ns: int = 0
    oversleep_ns: int = 0
    trace: list[str] = field(default_factory=list)

    def flows(self, endpoints: int = 1, **policy: Any) -> Flows:
        addresses = parse_endpoints([f"s{index}:1" for index in range(endpoints)], tls=False)
        flows = Flows(addresses, RetryPolicy(**policy), lambda: self.now_ns, lambda: self.jitter)
        # The random start is 0 whatever the jitter is.
        flows._balancer._cursor = 0
        return flows

    def run(self, flow: Flow[Any]) -> Any:
        outcome: Outcome = None
        while True:
            try:
                step = flow.send(outcome)
            except StopIteration as stop:
                return stop.value
            if isinstance(step, Pause):
                self.trace.append(f"wait {step.delay_s * 1e3:g}")
                self.now_ns += round(step.delay_s * 1e9) + self.oversleep_ns
                outcome = None
            else:
                outcome = self.attempt(step)

    def attempt(self, step: Attempt) -> Outcome:
        assert step.timeout_s > 0
        outcome = next(self.outcomes)
        self.trace.append(f"s{step.endpoint} {outcome.code if isinstance(outcome, Failure) else 'OK'}")
        self.now_ns += self.took_ns
        return outcome


def world(*outcomes: Outcome, **options: Any) -> World:
    return World(iter(outcomes), **options)


def call(safety: Safety = Safety.REPEATABLE) -> Operation[Timing]:
    return Operation("ModelInfer", b"request", lambda answer, timing: timing, safety, "digits")


SECOND = CallOptions(1.0)


def test_an_answer_at_the_first_attempt_needs_no_more() -> None:
    w = world(b"answer")
    assert w.run(w.flows().call(call(), SECOND)) == Timing(total_ns=MS, attempts=1, endpoint="s0:1")
    assert w.trace == ["s0 OK"]


def test_unavailable_is_retried_with_growing_pauses_until_it_works() -> None:
    w = world(BUSY, BUSY, b"answer")
    timing = w.run(w.flows().call(call(), SECOND))
    assert w.trace == ["s0 UNAVAILABLE", "wait 50", "s0 UNAVAILABLE", "wait 100", "s0 OK"]
    assert timing == Timing(total_ns=153 * MS, attempts=3, endpoint="s0:1")


def test_the_last_error_is_raised_with_its_facts_when_the_attempts_are_used_up() -> None:
    w = world(*[BUSY] * 9)
    with pytest.raises(Unavailable) as caught:
        w.run(w.flows(max_attempts=3).call(call(), SECOND))
    assert vars(caught.value) == {
        "message": "busy",
        "model": "digits",
        "endpoint": "s0:1",
        "attempts": 3,
        "retry_after_s": None,
    }
    assert w.trace == ["s0 UNAVAILABLE", "wait 50", "s0 UNAVAILABLE", "wait 100", "s0 UNAVAILABLE"]


def test_a_retry_that_would_reach_the_deadline_is_not_waited_for() -> None:
    w = world(BUSY, BUSY)
    with pytest.raises(Unavailable):
        w.run(w.flows().call(call(), CallOptions(0.1)))
    assert w.trace == ["s0 UNAVAILABLE", "wait 50", "s0 UNAVAILABLE"]


def test_a_pause_that_took_too_long_is_followed_by_no_attempt() -> None:
    w = world(BUSY, oversleep_ns=2_000 * MS)
    with pytest.raises(Unavailable):
        w.run(w.flows().call(call(), SECOND))
    assert w.trace == ["s0 UNAVAILABLE", "wait 50"]


def test_a_retry_goes_to_another_endpoint() -> None:
    w = world(BUSY, b"answer", jitter=0.0)
    assert w.run(w.flows(2).call(call(), SECOND)).endpoint == "s1:1"
    assert w.trace == ["s0 UNAVAILABLE", "s1 OK"]


def test_an_endpoint_without_connection_is_left_at_once_without_spending_retries() -> None:
    w = world(REFUSED, REFUSED, b"answer")
    flows = w.flows(3, max_attempts=1)
    assert w.run(flows.call(call(), SECOND)).attempts == 3
    assert w.trace == ["s0 UNAVAILABLE", "s1 UNAVAILABLE", "s2 OK"]
    assert flows.healthy() == 1
    assert repr(flows._budget) == "<Budget 100 of 100>"


def test_later_calls_avoid_the_endpoint_that_is_set_aside() -> None:
    w = world(REFUSED, *[b"answer"] * 4)
    flows = w.flows(2)
    for _ in range(4):
        w.run(flows.call(call(), SECOND))
    assert w.trace == ["s0 UNAVAILABLE", "s1 OK", "s1 OK", "s1 OK", "s1 OK"]


def test_with_every_endpoint_down_the_call_backs_off_between_rounds() -> None:
    w = world(*[REFUSED] * 9)
    with pytest.raises(Unavailable):
        w.run(w.flows(2, max_attempts=3).call(call(), SECOND))
    assert w.trace == ["s0 UNAVAILABLE", "s1 UNAVAILABLE", "wait 50", "s0 UNAVAILABLE", "wait 100", "s1 UNAVAILABLE"]


@pytest.mark.parametrize(
    ("safety", "failure", "attempts"),
    [
        (Safety.NEVER, REFUSED, 1),
        (Safety.NEVER, BUSY, 1),
        (Safety.UNSENT, BUSY, 1),
        (Safety.UNSENT, REFUSED, 2),
        (Safety.REPEATABLE, Failure("RESOURCE_EXHAUSTED", "full"), 1),
        (Safety.REPEATABLE, Failure("RESOURCE_EXHAUSTED", "full", pushback_ns=MS), 2),
        (Safety.REPEATABLE, Failure("UNAVAILABLE", "draining", forbidden=True), 1),
        (Safety.REPEATABLE, Failure("INTERNAL", "broken"), 1),
        (Safety.REPEATABLE, Failure("DEADLINE_EXCEEDED", "late"), 1),
    ],
)
def test_only_what_is_safe_is_repeated(safety: Safety, failure: Failure, attempts: int) -> None:
    w = world(failure, failure)
    with pytest.raises(BY_CODE[failure.code]) as caught:
        w.run(w.flows(max_attempts=2).call(call(safety), SECOND))
    assert caught.value.attempts == attempts


def test_the_wait_that_the_server_asks_for_is_kept_and_reported() -> None:
    full = Failure("RESOURCE_EXHAUSTED", "queue is full", pushback_ns=300 * MS)
    w = world(full, b"answer")
    assert w.run(w.flows().call(call(), SECOND)).attempts == 2
    assert w.trace == ["s0 RESOURCE_EXHAUSTED", "wait 300", "s0 OK"]
    w = world(full)
    with pytest.raises(ResourceExhausted) as caught:
        w.run(w.flows().call(call(), CallOptions(0.2)))
    assert (caught.value.retry_after_s, w.trace) == (0.3, ["s0 RESOURCE_EXHAUSTED"])


def test_an_empty_budget_ends_retries_for_all_calls_until_successes_refill_it() -> None:
    w = world(*[BUSY] * 5, jitter=0.0)
    flows = w.flows(budget_tokens=4, max_attempts=9)
    for _ in range(3):
        with pytest.raises(Unavailable):
            w.run(flows.call(call(), SECOND))
    assert w.trace == ["s0 UNAVAILABLE"] * 4


def test_a_call_that_names_its_endpoint_goes_nowhere_else() -> None:
    w = world(REFUSED, BUSY, b"answer", jitter=0.0)
    assert w.run(w.flows(3).call(call(), CallOptions(1.0, endpoint=2))).endpoint == "s2:1"
    assert w.trace == ["s2 UNAVAILABLE", "s2 UNAVAILABLE", "s2 OK"]


def test_waiting_for_ready_polls_with_growing_pauses_through_every_state_of_a_start() -> None:
    w = world(REFUSED, BUSY, Failure("DEADLINE_EXCEEDED", ""), b"", b"", b"ready")
    ready: Operation[bool] = Operation("ServerReady", b"", lambda answer, _: bool(answer))
    assert w.run(w.flows().wait_until_ready("the server", ready, 9.0, (), None)) is None
    assert [step for step in w.trace if "wait" in step] == [f"wait {pause}" for pause in (20, 40, 80, 160, 320)]


def test_waiting_for_ready_ends_in_time_and_says_what_it_last_met() -> None:
    ready: Operation[bool] = Operation("ServerReady", b"", lambda answer, _: bool(answer))
    w = world(*[BUSY] * 99)
    with pytest.raises(NotReady, match=r"model 'm' was not ready within 2 s; last: UNAVAILABLE: busy") as caught:
        w.run(w.flows().wait_until_ready("model 'm'", ready, 2.0, (), None))
    assert isinstance(caught.value.last, Unavailable)
    assert w.now_ns <= 2_000 * MS
    w = world(*[b""] * 99)
    with pytest.raises(NotReady, match="it answers that it is not ready"):
        w.run(w.flows().wait_until_ready("the server", ready, 0.5, (), None))


@pytest.mark.parametrize("code", ["UNIMPLEMENTED", "NOT_FOUND"])
def test_waiting_for_ready_gives_up_at_once_on_what_waiting_does_not_mend(code: str) -> None:
    w = world(Failure(code, "no"))
    ready: Operation[bool] = Operation("ServerReady", b"", lambda answer, _: bool(answer))
    with pytest.raises((Unimplemented, NotFound)):
        w.run(w.flows().wait_until_ready("the server", ready, 9.0, (), None))
    assert len(w.trace) == 1


FAILURES = st.builds(
    Failure,
    st.sampled_from(["UNAVAILABLE", "RESOURCE_EXHAUSTED", "DEADLINE_EXCEEDED", "INTERNAL"]),
    st.just("x"),
    st.sampled_from(Origin),
    st.none() | st.integers(0, 10**9),
    st.booleans(),
)


@given(
    st.lists(FAILURES | st.just(b"answer"), min_size=1, max_size=12),
    st.integers(1, 4),
    st.integers(1, 5),
    st.floats(0.001, 2.0),
    st.integers(0, 10**9),
    st.floats(0, 1, exclude_max=True),
    st.sampled_from(Safety),
)
def test_whatever_happens_a_call_ends_once_within_its_deadline_and_its_attempts(
    outcomes: list[Outcome],
    endpoints: int,
    max_attempts: int,
    deadline_s: float,
    took_ns: int,
    jitter: float,
    safety: Safety,
) -> None:
    w = World(iter([*outcomes, *[b"answer"] * 20]), took_ns, jitter)
    starts: list[int] = []
    attempt: Callable[[Attempt], Outcome] = w.attempt
    w.attempt = lambda step: (starts.append(w.now_ns), attempt(step))[1]  # type: ignore[method-assign]
    try:
        attempts = w.run(
            w.flows(endpoints, max_attempts=max_attempts).call(call(safety), CallOptions(deadline_s))
        ).attempts
    except ServerError as error:
        attempts = error.attempts
    assert attempts == len(starts)
    assert all(start < deadline_s * 1e9 for start in starts)
    assert len(starts) <= (1 if safety is Safety.NEVER else max_attempts + endpoints)
    assert w.now_ns <= max(starts) + took_ns
