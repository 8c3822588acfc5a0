"""Traces of priority levels and of their policies: who goes first, who waits no longer, and who goes behind."""

from collections.abc import Mapping
from typing import Any

import pytest

from sluice_batching import (
    NO_DEADLINE,
    BatchQueue,
    Draining,
    LevelPolicy,
    Priorities,
    PriorityQueue,
    QueueFull,
    QueuePolicy,
    Request,
    RunTimes,
)

MS = 1_000_000


class Asking(Request):
    """A request that shows its name, and asks for a priority and a timeout."""

    __slots__ = ("name", "priority", "timeout_ns")

    def __init__(self, name: str, priority: int = 0, *, timeout_ms: int = 0, deadline_ms: int | None = None) -> None:
        super().__init__(1, 10, "k", NO_DEADLINE if deadline_ms is None else deadline_ms * MS)
        self.name = name
        self.priority = priority
        self.timeout_ns = timeout_ms * MS

    def __repr__(self) -> str:
        return self.name


def queue_of(
    default: LevelPolicy = LevelPolicy(),  # noqa: B008 # immutable
    policies: Mapping[int, LevelPolicy] | None = None,
    *,
    levels: int = 3,
    max_batch_rows: int = 1,
    run_times: RunTimes | None = None,
    **others: Any,
) -> PriorityQueue[Asking]:
    priorities = Priorities(
        levels=levels, default_level=min(levels, 2), default_policy=default, policies=policies or {}
    )
    policy = QueuePolicy(max_batch_rows=max_batch_rows, batching=max_batch_rows > 1, priorities=priorities, **others)
    return PriorityQueue(policy, run_times)


def offered(queue: PriorityQueue[Asking], *requests: Asking, at_ms: int = 0) -> None:
    for request in requests:
        queue.offer(request, at_ms * MS)


def left(queue: PriorityQueue[Asking], at_ms: int = 0) -> tuple[list[str], list[str]]:
    batch, expired = queue.take(at_ms * MS)
    return [request.name for request in batch], [request.name for request in expired]


def order(queue: PriorityQueue[Asking], at_ms: int = 0) -> list[str]:
    names = []
    while queue:
        batch, expired = left(queue, at_ms)
        assert not expired
        names += batch
    return names


def test_level_1_goes_first_and_each_level_in_order_of_arrival() -> None:
    queue = queue_of()
    offered(queue, *(Asking(f"{level}{i}", level) for i, level in enumerate((3, 1, 2, 3, 1))))
    assert order(queue) == ["11", "14", "22", "30", "33"]


def test_a_priority_that_is_no_level_is_the_default_level() -> None:
    queue = queue_of()
    offered(queue, Asking("third", 3), Asking("none", 0), Asking("unknown", 4), Asking("second", 2))
    assert order(queue) == ["none", "unknown", "second", "third"]


def test_within_a_level_the_earliest_deadline_goes_first_and_never_before_a_higher_level() -> None:
    queue = queue_of()
    offered(queue, Asking("a", 2, deadline_ms=90), Asking("b", 2, deadline_ms=10), Asking("c", 1))
    assert order(queue) == ["c", "b", "a"]


def test_a_batch_is_filled_with_requests_of_the_next_level() -> None:
    queue = queue_of(max_batch_rows=3)
    offered(queue, Asking("2a", 2), Asking("1a", 1), Asking("3a", 3), Asking("1b", 1))
    assert left(queue) == (["1a", "1b", "2a"], [])
    assert left(queue) == (["3a"], [])


def test_a_level_that_is_full_refuses_and_the_others_do_not() -> None:
    queue = queue_of(policies={1: LevelPolicy(max_requests=2)})
    first = Asking("1a", 1)
    offered(queue, first, Asking("1b", 1), Asking("2a", 2))
    with pytest.raises(QueueFull, match=r"the queue is full: 2 of 2 requests are waiting$") as caught:
        queue.offer(Asking("1c", 1), 0)
    assert (caught.value.what, caught.value.limit, caught.value.waiting) == ("requests", 2, 2)
    assert queue.cancel(first)
    offered(queue, Asking("1d", 1))
    assert order(queue) == ["1b", "1d", "2a"]
    assert queue._counts == {}


def test_a_full_level_of_a_draining_queue_says_that_it_drains() -> None:
    queue = queue_of(LevelPolicy(max_requests=1))
    offered(queue, Asking("a"))
    queue.drain()
    with pytest.raises(Draining):
        queue.offer(Asking("b"), 0)


def test_a_request_that_has_waited_for_its_timeout_expires() -> None:
    queue = queue_of(LevelPolicy(timeout_ns=10 * MS))
    offered(queue, Asking("a"), Asking("b", deadline_ms=5))
    assert queue.next_deadline_ns() == 5 * MS
    assert [each.name for each in queue.expire(5 * MS)] == ["b"]
    assert queue.next_deadline_ns() == 10 * MS
    assert left(queue, 10) == ([], ["a"])


@pytest.mark.parametrize(
    ("policy", "asked_ms", "expires_ms"),
    [
        (LevelPolicy(), 5, None),
        (LevelPolicy(timeout_ns=10 * MS), 5, 10),
        (LevelPolicy(timeout_ns=10 * MS, allow_timeout_override=True), 5, 5),
        (LevelPolicy(timeout_ns=10 * MS, allow_timeout_override=True), 50, 10),
        (LevelPolicy(timeout_ns=10 * MS, allow_timeout_override=True), 0, 10),
        (LevelPolicy(allow_timeout_override=True), 5, 5),
        (LevelPolicy(allow_timeout_override=True), 0, None),
    ],
)
def test_a_requests_own_timeout_counts_where_it_may_and_only_shortens(
    policy: LevelPolicy, asked_ms: int, expires_ms: int | None
) -> None:
    queue = queue_of(policy)
    offered(queue, Asking("a", timeout_ms=asked_ms))
    assert queue.next_deadline_ns() == (None if expires_ms is None else expires_ms * MS)


def test_a_request_whose_timeout_delays_goes_behind_its_level_once_and_is_served() -> None:
    queue = queue_of(LevelPolicy(timeout_ns=10 * MS, delays=True))
    old = Asking("old", 2)
    offered(queue, old, Asking("low", 3))
    offered(queue, Asking("new", 2), at_ms=9)
    assert queue.next_deadline_ns() == 10 * MS
    assert queue.expire(10 * MS) == []
    assert old.enqueued_ns == 0
    offered(queue, Asking("newer", 2), at_ms=11)
    assert order(queue, 11) == ["new", "newer", "old", "low"]


def test_a_delayed_request_still_counts_in_its_level_and_keeps_its_deadline() -> None:
    queue = queue_of(LevelPolicy(timeout_ns=10 * MS, delays=True, max_requests=2))
    offered(queue, Asking("old", deadline_ms=30), Asking("other"))
    assert queue.expire(10 * MS) == []
    with pytest.raises(QueueFull):
        queue.offer(Asking("new"), 10 * MS)
    assert left(queue, 30) == (["other"], ["old"])


def test_a_request_that_is_delayed_when_it_would_end_too_late_leaves() -> None:
    run_times = RunTimes()
    queue = queue_of(LevelPolicy(timeout_ns=10 * MS, delays=True), run_times=run_times)
    offered(queue, Asking("old", deadline_ms=30))
    for _ in range(3):
        run_times.record(1, 25 * MS, 0)
    assert [each.name for each in queue.expire(10 * MS)] == ["old"]
    assert len(queue) == 0
    assert queue._counts == {}


def test_a_request_is_delayed_also_where_the_queue_has_been_tuned_to_hold_less_meanwhile() -> None:
    queue = queue_of(LevelPolicy(timeout_ns=10 * MS, delays=True))
    offered(queue, Asking("old"), Asking("older"), Asking("oldest"))
    queue.tune(1, 1)
    assert queue.expire(10 * MS) == []
    assert order(queue, 10) == ["old", "older", "oldest"]


def test_a_deadline_that_has_come_with_the_delay_expires_in_its_turn() -> None:
    queue = queue_of(LevelPolicy(timeout_ns=10 * MS, delays=True))
    offered(queue, Asking("a", deadline_ms=19), Asking("b", deadline_ms=15))
    assert left(queue, 20) == ([], ["b", "a"])


def test_a_draining_queue_delays_nothing() -> None:
    queue = queue_of(LevelPolicy(timeout_ns=10 * MS, delays=True))
    offered(queue, Asking("old"))
    offered(queue, Asking("new"), at_ms=9)
    queue.drain()
    assert order(queue, 10) == ["old", "new"]


def test_without_levels_the_default_policy_is_that_of_all_requests() -> None:
    queue = queue_of(LevelPolicy(max_requests=1), levels=0)
    offered(queue, Asking("a", 7))
    with pytest.raises(QueueFull):
        queue.offer(Asking("b", 1), 0)


def test_first_come_first_served_is_to_be_had_within_levels() -> None:
    queue = queue_of(deadline_first=False)
    offered(queue, Asking("a", 2, deadline_ms=90), Asking("b", 2, deadline_ms=10), Asking("c", 1))
    assert order(queue) == ["c", "a", "b"]


def test_a_queue_for_threads_has_the_order_that_its_policy_asks_for() -> None:
    queue: BatchQueue[Asking] = BatchQueue(queue_of().policy, clock=lambda: 0)
    queue.offer_many([Asking("low", 3), Asking("high", 1)])
    names = [taken.batch[0].name for taken in (queue.take(0), queue.take(0)) if taken]
    assert names == ["high", "low"]


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"levels": -1}, "levels must not be negative, got -1"),
        ({"levels": 2}, r"default_level must lie in 1\.\.2, got 0"),
        ({"levels": 2, "default_level": 3}, r"default_level must lie in 1\.\.2, got 3"),
        ({"default_level": 1}, "default_level must be 0 without levels, got 1"),
        ({"levels": 2, "default_level": 1, "policies": {3: LevelPolicy()}}, r"levels 1\.\.2, got one of 3"),
    ],
)
def test_levels_that_make_no_sense_are_refused_by_name(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Priorities(**fields)


@pytest.mark.parametrize("field", ["max_requests", "timeout_ns"])
def test_bounds_of_a_level_are_not_negative(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must not be negative, got -1"):
        LevelPolicy(**{field: -1})
