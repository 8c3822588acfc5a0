"""Sequences as traces: who gets a slot, what goes together and when, and what is left when requests drop out."""

import pytest

from sluice_batching import (
    NO_DEADLINE,
    DeadlineExpired,
    Draining,
    QueueFull,
    QueuePolicy,
    Request,
    RequestTooLarge,
    SequenceNotStarted,
    SequencePolicy,
    Sequencer,
    Step,
)

IDLE_NS = 1000


def sequencer(*, rows: int = 2, groups: int = 1, delay_ns: int = 0, utilization: float = 0.0) -> Sequencer[Request]:
    queue = QueuePolicy(max_batch_rows=rows, batching=True, max_delay_ns=delay_ns, max_queue_rows=100)
    return Sequencer(SequencePolicy(queue=queue, max_idle_ns=IDLE_NS, groups=groups, min_utilization=utilization))


def oldest(
    *, rows: int = 4, candidates: int = 8, delay_ns: int = 0, preferred: tuple[int, ...] = ()
) -> Sequencer[Request]:
    queue = QueuePolicy(max_batch_rows=rows, batching=True, max_delay_ns=delay_ns, preferred_batch_rows=preferred)
    return Sequencer(SequencePolicy(queue=queue, max_idle_ns=IDLE_NS, max_candidates=candidates))


def request(sequence_id: int | str, flags: str = "", *, key: str = "k", deadline_ns: int = NO_DEADLINE) -> Request:
    """A request of one byte; "s" in the flags starts the sequence, "e" ends it."""
    made = Request(1, 1, key, deadline_ns)
    made.step = Step(sequence_id, start="s" in flags, end="e" in flags)
    return made


def offer(core: Sequencer[Request], now_ns: int, *requests: Request) -> None:
    assert [core.try_offer(each, now_ns) for each in requests] == [None] * len(requests)


def test_a_sequence_keeps_its_row_until_it_ends_and_its_requests_run_one_by_one() -> None:
    core = sequencer()
    a, b, a2, b2 = request("a", "s"), request("b", "s"), request("a", "e"), request("b")
    offer(core, 0, a, b, a2, b2)
    assert core.take(0) == ([a, b], [])
    assert (a.step.sequence.row, b.step.sequence.row) == (0, 1)
    assert core.take(0) == ([], []), "its group is busy"
    core.finish([a, b], 1)
    assert core.take(1) == ([a2, b2], [])
    core.finish([a2, b2], 2)
    assert core.live == 1
    c = request("c", "s")
    offer(core, 3, c)
    assert c.step.sequence.row == 0


def test_direct_sequences_spread_over_the_groups_and_each_group_has_one_batch_under_way() -> None:
    core = sequencer(groups=2)
    requests = [request(number, "s") for number in range(1, 5)]
    offer(core, 0, *requests)
    assert core.take(0).batch == [requests[0], requests[2]]
    assert core.take(0).batch == [requests[1], requests[3]]
    assert core.take(0).batch == []


def test_a_sequence_that_is_ready_waits_for_the_batch_of_its_group() -> None:
    core = sequencer()
    a, b = request("a", "s"), request("b", "s")
    offer(core, 0, a)
    assert core.take(0).batch == [a]
    offer(core, 0, b)
    assert core.take(0).batch == []
    assert core.next_wakeup_ns() is None
    core.finish([a], 0)
    assert core.take(0).batch == [b]


def test_more_sequences_than_slots_wait_in_the_backlog_for_one_to_end_or_to_be_idle() -> None:
    core = sequencer(rows=1)
    a, b, c = request("a", "s"), request("b", "se"), request("c", "s")
    offer(core, 0, a, b, c)
    assert "2 of them in the backlog" in repr(core)
    core.take(0)
    core.finish([a], 10)
    assert core.next_wakeup_ns() == core.next_deadline_ns() == 10 + IDLE_NS
    assert core.take(10 + IDLE_NS - 1).batch == []
    assert core.take(10 + IDLE_NS).batch == [b]
    core.finish([b], 2000)
    assert core.take(2000).batch == [c]
    assert isinstance(core.try_offer(request("a"), 2000), SequenceNotStarted)


def test_only_a_start_begins_a_sequence_and_an_id_of_text_is_another_than_its_number() -> None:
    core = sequencer()
    error = core.try_offer(request("a"), 0)
    assert isinstance(error, SequenceNotStarted)
    assert error.sequence_id == "a"
    offer(core, 0, request(5, "s"))
    assert isinstance(core.try_offer(request("5"), 0), SequenceNotStarted)
    offer(core, 0, request(5, "e"))
    assert isinstance(core.try_offer(request(5), 0), SequenceNotStarted), "its end is on the way"
    offer(core, 0, request(5, "s"))
    assert core.live == 1


def test_a_batch_has_requests_of_one_key() -> None:
    core = oldest()
    requests = [request(number, "s", key="kl"[number % 2]) for number in range(1, 6)]
    offer(core, 0, *requests)
    assert core.take(0).batch == [requests[0], requests[2], requests[4]]
    assert core.take(0).batch == [requests[1], requests[3]]


def test_slots_that_are_used_enough_do_not_wait_for_the_delay() -> None:
    core = sequencer(rows=4, delay_ns=100, utilization=0.5)
    a, b = request("a", "s"), request("b", "s")
    offer(core, 0, a)
    assert core.next_wakeup_ns() == 100
    assert core.take(99).batch == []
    offer(core, 99, b)
    assert core.take(99).batch == [a, b]
    core.finish([a, b], 100)
    late = request("a")
    offer(core, 200, late)
    assert core.take(299).batch == []
    assert core.take(300).batch == [late]


def test_a_delay_without_a_least_utilization_has_no_effect() -> None:
    core = sequencer(delay_ns=100)
    a = request("a", "s")
    offer(core, 0, a)
    assert core.take(0).batch == [a]


def test_oldest_waits_for_a_preferred_size_or_for_the_delay() -> None:
    core = oldest(delay_ns=100, preferred=(2, 4))
    requests = [request(number, "s") for number in range(1, 4)]
    offer(core, 0, requests[0])
    assert core.take(0).batch == []
    offer(core, 50, *requests[1:])
    assert core.take(50).batch == requests[:2]
    assert core.take(149).batch == []
    assert core.take(150).batch == requests[2:]


def test_oldest_has_so_many_candidates_and_any_number_of_batches_under_way() -> None:
    core = oldest(rows=1, candidates=2)
    requests = [request(number, "s") for number in range(1, 4)]
    offer(core, 0, *requests)
    assert [core.take(0).batch for _ in range(3)] == [requests[:1], requests[1:2], []]


def test_a_start_that_is_dropped_begins_with_the_next_request_or_not_at_all() -> None:
    core = sequencer()
    first, second = request("a", "s"), request("a")
    offer(core, 0, first, second)
    assert core.cancel(first)
    assert core.take(0).batch == [second]
    assert second.step.start
    core.finish([second], 0)
    again = request("a", "s")
    offer(core, 0, again)
    assert core.cancel(again)
    assert not core.cancel(again)
    third = request("a")
    offer(core, 0, third)
    assert core.take(0).batch == [third]
    assert third.step.start, "the client has begun anew"
    lone = request("b", "s", deadline_ns=7)
    offer(core, 0, lone)
    assert core.take(7).expired == [lone]
    assert isinstance(core.try_offer(request("b"), 7), SequenceNotStarted)


def test_a_start_that_is_dropped_in_the_backlog_leaves_its_sequence_there() -> None:
    core = sequencer(rows=1)
    a, b, b2 = request("a", "se"), request("b", "s"), request("b")
    offer(core, 0, a, b, b2)
    assert core.cancel(b)
    assert core.take(0).batch == [a]
    core.finish([a], 0)
    assert core.take(0).batch == [b2]
    assert b2.step.start


def test_an_end_that_is_dropped_ends_the_sequence() -> None:
    core = sequencer()
    first, last = request("a", "s"), request("a", "e")
    offer(core, 0, first, last)
    core.take(0)
    assert core.cancel(last)
    core.finish([first], 0)
    assert core.live == 0


def test_a_drain_hands_out_what_waits_without_a_delay_and_ends_the_sequences() -> None:
    core = sequencer(rows=1, delay_ns=100, utilization=1.0)
    idle, behind = request("a", "s"), request("b", "s")
    offer(core, 0, idle)
    core.take(100)
    core.finish([idle], 100)
    idle.step.sequence.state = "kept"
    offer(core, 100, behind)
    core.drain()
    assert core.draining
    assert idle.step.sequence.state is None
    assert isinstance(core.try_offer(request("b"), 100), Draining)
    assert core.take(100).batch == [behind]
    core.finish([behind], 100)
    assert core.live == 0
    assert "draining" in repr(core)


def test_what_waits_is_bounded_in_rows_and_bytes() -> None:
    queue = QueuePolicy(max_batch_rows=2, batching=True, max_queue_rows=3, max_queue_bytes=2)
    core: Sequencer[Request] = Sequencer(SequencePolicy(queue=queue, max_idle_ns=IDLE_NS, groups=1))
    assert core.policy is queue
    large = request("a", "s")
    large.size_bytes = 3
    assert isinstance(core.try_offer(large, 0), RequestTooLarge)
    offer(core, 0, request("a", "s"), request("a"))
    error = core.try_offer(request("a"), 0)
    assert isinstance(error, QueueFull)
    assert (error.what, error.limit, error.waiting) == ("bytes", 2, 2)


def test_the_rows_that_wait_are_bounded_and_a_sequence_of_the_backlog_may_vanish() -> None:
    queue = QueuePolicy(max_batch_rows=1, batching=True, max_queue_rows=2)
    core: Sequencer[Request] = Sequencer(SequencePolicy(queue=queue, max_idle_ns=IDLE_NS, groups=1))
    first, second = request("a", "s"), request("b", "s", deadline_ns=50)
    offer(core, 0, first, second)
    error = core.try_offer(request("c", "s"), 0)
    assert isinstance(error, QueueFull)
    assert (error.what, error.limit, error.waiting) == ("rows", 2, 2)
    assert core.cancel(second)
    assert core.live == 1
    assert core.expire(50) == []
    assert core.live == 1


def test_what_a_caller_must_not_do() -> None:
    core = sequencer()
    wide = request("a", "s")
    wide.rows = 2
    with pytest.raises(ValueError, match="must have 1 row, got 2"):
        core.try_offer(wide, 0)
    once = request("a", "s")
    offer(core, 0, once)
    with pytest.raises(ValueError, match="waits here already"):
        core.try_offer(once, 0)
    core.finish([request("x")], 0)
    assert repr(once.step.sequence) == "<LiveSequence 'a' in row 0, 1 waiting>"


def test_deadlines_of_requests_that_have_left_are_forgotten() -> None:
    core = sequencer(rows=1)
    for _ in range(200):
        each = request("a", "s", deadline_ns=10**9)
        offer(core, 0, each)
        assert core.cancel(each)
    assert len(core._deadlines) <= 66
    assert core.next_deadline_ns() is None


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"max_idle_ns": 0}, "max_idle_ns must be at least 1"),
        ({"groups": 0}, "one of groups and max_candidates"),
        ({"max_candidates": 3}, "one of groups and max_candidates"),
        ({"min_utilization": 1.5}, "min_utilization must lie in 0..1"),
    ],
)
def test_a_policy_that_means_nothing_is_refused(changes: dict[str, int], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        SequencePolicy(**{"queue": QueuePolicy(), "max_idle_ns": 1, "groups": 1, **changes})  # type: ignore[arg-type]


def test_a_request_whose_time_is_over_is_refused_and_begins_nothing() -> None:
    core = sequencer()
    refused = core.try_offer(request("a", "s", deadline_ns=5), 5)
    assert isinstance(refused, DeadlineExpired)
    assert (refused.deadline_ns, refused.now_ns, core.live) == (5, 5, 0)


def test_what_waits_is_counted_and_a_deadline_before_the_delay_is_a_reason_to_wake() -> None:
    core = oldest(delay_ns=100)
    offer(core, 0, request("a", "s", deadline_ns=7))
    assert (core.rows, core.size_bytes, len(core)) == (1, 1, 1)
    assert core.next_wakeup_ns() == 7
    assert [len(each) for each in core.take(7)] == [0, 1]
