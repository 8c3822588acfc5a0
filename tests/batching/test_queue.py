"""Traces of the queue: what is offered, when somebody takes, and the whole of what comes out."""

import weakref

import pytest

from sluice_batching import (
    NO_DEADLINE,
    BatchingError,
    DeadlineExpired,
    Draining,
    Queue,
    QueueFull,
    QueuePolicy,
    Request,
    RequestTooLarge,
)
from sluice_batching.delay_trials import Wait

MS = 1_000_000


class Named(Request):
    """A request that shows its name in a failed assertion."""

    __slots__ = ("__weakref__", "name")

    def __init__(self, name: str, rows: int = 1, *, deadline_ns: int = NO_DEADLINE, size_bytes: int = 10) -> None:
        super().__init__(rows, size_bytes, name[0], deadline_ns)
        self.name = name

    def __repr__(self) -> str:
        return self.name


def offered(queue: Queue[Named], *requests: Named, now_ns: int = 0) -> None:
    for request in requests:
        queue.offer(request, now_ns)


def taken(queue: Queue[Named], now_ns: int = 0) -> list[str]:
    batch, expired = queue.take(now_ns)
    assert not expired
    return [request.name for request in batch]


def batching(max_batch_rows: int = 4, *, delay_ms: int = 0, preferred: tuple[int, ...] = ()) -> Queue[Named]:
    return Queue(
        QueuePolicy(
            max_batch_rows=max_batch_rows,
            batching=True,
            max_delay_ns=delay_ms * MS,
            preferred_batch_rows=preferred,
        )
    )


def test_an_empty_queue_gives_nothing_and_needs_no_wakeup() -> None:
    queue = batching()
    assert queue.take(0) == ([], [])
    assert queue.next_wakeup_ns() is None
    assert queue.next_deadline_ns() is None


def test_requests_of_one_key_merge_up_to_the_largest_batch_in_order_of_arrival() -> None:
    queue = batching(4)
    offered(queue, *(Named(f"a{i}") for i in range(6)))
    assert taken(queue) == ["a0", "a1", "a2", "a3"]
    assert taken(queue) == ["a4", "a5"]
    assert taken(queue) == []


def test_without_batching_every_request_goes_alone_in_order_of_arrival_whatever_its_key() -> None:
    queue: Queue[Named] = Queue(QueuePolicy(max_batch_rows=4))
    offered(queue, Named("a0"), Named("b0", 4), Named("a1"))
    assert [taken(queue) for _ in range(3)] == [["a0"], ["b0"], ["a1"]]


def test_a_request_can_be_cancelled_without_batching() -> None:
    queue: Queue[Named] = Queue(QueuePolicy())
    gone = Named("a0")
    offered(queue, gone, Named("b0"))
    assert queue.cancel(gone)
    assert taken(queue) == ["b0"]


def test_different_keys_never_share_a_batch_and_the_oldest_request_decides_which_goes_first() -> None:
    queue = batching(4)
    offered(queue, Named("a0"), Named("b0"), Named("a1"), Named("c0"), Named("b1"))
    assert [taken(queue) for _ in range(3)] == [["a0", "a1"], ["b0", "b1"], ["c0"]]


def test_a_request_that_would_overflow_the_batch_is_left_and_nothing_overtakes_it() -> None:
    queue = batching(4)
    offered(queue, Named("a0", 3), Named("a1", 2), Named("a2", 1))
    assert taken(queue) == ["a0"]
    assert taken(queue) == ["a1", "a2"]


def test_preferred_sizes_without_delay_choose_where_to_cut_and_the_rest_goes_with_the_next_take() -> None:
    queue = batching(8, preferred=(2, 4))
    offered(queue, *(Named(f"a{i}") for i in range(7)))
    assert [len(taken(queue)) for _ in range(4)] == [4, 2, 1, 0]


def test_what_hits_no_preferred_size_goes_as_it_is_without_delay() -> None:
    queue = batching(8, preferred=(4,))
    offered(queue, Named("a0", 3), Named("a1", 3), Named("a2", 3))
    assert taken(queue) == ["a0", "a1"]


def test_an_incomplete_batch_waits_until_its_oldest_request_is_as_old_as_the_delay() -> None:
    queue = batching(4, delay_ms=5)
    offered(queue, Named("a0"), now_ns=10 * MS)
    offered(queue, Named("a1"), now_ns=14 * MS)
    assert queue.next_wakeup_ns() == 15 * MS
    assert taken(queue, 15 * MS - 1) == []
    assert taken(queue, 15 * MS) == ["a0", "a1"]


def test_the_delay_counts_from_enqueueing_also_for_what_an_earlier_batch_left() -> None:
    queue = batching(2, delay_ms=5)
    offered(queue, Named("a0"), Named("a1"), Named("a2"), now_ns=1 * MS)
    assert taken(queue, 4 * MS) == ["a0", "a1"]
    assert queue.next_wakeup_ns() == 6 * MS
    assert taken(queue, 6 * MS) == ["a2"]


def test_a_full_batch_waits_for_no_delay() -> None:
    queue = batching(2, delay_ms=5)
    offered(queue, Named("a0"), Named("a1"), now_ns=7)
    assert queue.next_wakeup_ns() == 7
    assert taken(queue, 7) == ["a0", "a1"]


def test_a_batch_that_cannot_take_the_next_request_waits_for_no_delay() -> None:
    queue = batching(4, delay_ms=5)
    offered(queue, Named("a0", 3), Named("a1", 2))
    assert taken(queue) == ["a0"]
    assert taken(queue) == []


def test_a_preferred_size_goes_at_once_and_what_is_left_waits_for_the_delay() -> None:
    queue = batching(8, delay_ms=5, preferred=(2, 4))
    offered(queue, *(Named(f"a{i}") for i in range(3)))
    assert taken(queue) == ["a0", "a1"]
    assert taken(queue) == []
    assert taken(queue, 5 * MS) == ["a2"]


def test_a_group_past_the_largest_preferred_size_goes_as_it_is() -> None:
    queue = batching(8, delay_ms=5, preferred=(4,))
    offered(queue, Named("a0", 3), Named("a1", 3))
    assert taken(queue) == ["a0", "a1"]


def test_when_the_delay_is_over_everything_that_fits_goes_not_only_a_preferred_size() -> None:
    queue = batching(8, delay_ms=5, preferred=(2,))
    offered(queue, *(Named(f"a{i}") for i in range(3)))
    assert taken(queue, 5 * MS) == ["a0", "a1", "a2"]


def test_a_group_that_is_not_due_holds_up_no_full_one_and_goes_in_its_own_time() -> None:
    queue = batching(2, delay_ms=5)
    offered(queue, Named("a0"))
    offered(queue, Named("b0"), Named("b1"), Named("c0"), Named("c1"), now_ns=1)
    assert taken(queue, 2) == ["b0", "b1"]
    assert taken(queue, 2) == ["c0", "c1"]
    assert taken(queue, 2) == []
    assert taken(queue, 5 * MS) == ["a0"]


def test_a_full_group_does_not_starve_one_whose_delay_is_over() -> None:
    queue = batching(2, delay_ms=5)
    offered(queue, Named("a0"))
    offered(queue, Named("b0"), Named("b1"), now_ns=1)
    assert taken(queue, 5 * MS) == ["a0"]
    assert taken(queue, 5 * MS) == ["b0", "b1"]


def test_cancelling_makes_a_full_group_incomplete_again() -> None:
    queue = batching(2, delay_ms=5)
    gone = Named("a0")
    offered(queue, gone, Named("a1"))
    assert queue.cancel(gone)
    assert taken(queue) == []
    assert queue.next_wakeup_ns() == 5 * MS


def test_cancelling_can_make_the_rest_add_up_to_a_preferred_size() -> None:
    queue = batching(8, delay_ms=5, preferred=(4,))
    gone = Named("a1", 2)
    offered(queue, Named("a0", 1), gone)
    assert taken(queue) == []
    assert queue.cancel(gone)
    offered(queue, Named("a2", 2))
    assert taken(queue) == []
    offered(queue, Named("a3", 1))
    assert taken(queue) == ["a0", "a2", "a3"]


def test_a_removal_from_the_middle_can_uncover_a_preferred_size() -> None:
    queue = batching(9, delay_ms=5, preferred=(3, 8))
    gone = Named("a1", 3)
    offered(queue, Named("a0", 1), gone, Named("a2", 2), Named("a3", 1))
    assert taken(queue) == []
    assert queue.cancel(gone)
    assert taken(queue) == ["a0", "a2"]


def test_a_request_is_expired_from_the_instant_of_its_deadline_and_leaves_once() -> None:
    queue = batching(4)
    late, early, other = Named("a0", deadline_ns=20), Named("a1", deadline_ns=10), Named("a2")
    offered(queue, late, early, other)
    assert queue.next_deadline_ns() == 10
    assert queue.expire(9) == []
    assert queue.expire(10) == [early]
    assert queue.next_deadline_ns() == 20
    assert queue.take(20) == ([other], [late])
    assert queue.take(20) == ([], [])
    assert queue.next_deadline_ns() is None


def test_a_take_hands_out_the_expired_also_when_no_batch_is_due() -> None:
    queue = batching(4, delay_ms=5)
    expired = Named("a0", deadline_ns=2 * MS)
    offered(queue, expired, Named("b0"))
    assert queue.next_wakeup_ns() == 2 * MS
    assert queue.take(3 * MS) == ([], [expired])


def test_a_deadline_after_the_delay_does_not_move_the_wakeup() -> None:
    queue = batching(4, delay_ms=5)
    offered(queue, Named("a0", deadline_ns=9 * MS))
    assert queue.next_wakeup_ns() == 5 * MS


def test_a_deadline_that_has_passed_is_refused_with_both_times() -> None:
    queue = batching()
    with pytest.raises(DeadlineExpired, match=r"passed 2\.000 ms before") as caught:
        queue.offer(Named("a0", deadline_ns=1 * MS), 3 * MS)
    assert (caught.value.deadline_ns, caught.value.now_ns) == (1 * MS, 3 * MS)
    assert len(queue) == 0


def test_a_cancelled_request_never_runs_and_frees_its_room_at_once() -> None:
    queue = batching()
    gone, kept = Named("a0", 3, deadline_ns=50), Named("a1", 1)
    offered(queue, gone, kept)
    assert queue.cancel(gone)
    assert (len(queue), queue.rows, queue.size_bytes) == (1, 1, 10)
    assert not queue.cancel(gone)
    assert queue.take(60) == ([kept], [])
    assert not queue.cancel(kept)


def test_a_request_of_another_queue_is_not_cancelled_here() -> None:
    queue, other = batching(), batching()
    here, there = Named("a0"), Named("a0")
    offered(queue, here)
    offered(other, there)
    assert not queue.cancel(there)
    assert not queue.cancel(Named("a1"))
    assert taken(queue) == ["a0"]


def test_a_request_that_left_may_be_offered_again() -> None:
    queue = batching()
    request = Named("a0")
    offered(queue, request)
    assert taken(queue) == ["a0"]
    queue.offer(request, 7)
    assert request.enqueued_ns == 7
    assert taken(queue, 7) == ["a0"]


def test_a_request_that_waits_cannot_be_offered_again() -> None:
    queue = batching()
    request = Named("a0")
    offered(queue, request)
    with pytest.raises(ValueError, match="waits in this queue already"):
        queue.offer(request, 0)
    assert len(queue) == 1


@pytest.mark.parametrize("rows", [-1, 0, 5])
def test_a_request_that_fits_no_batch_is_a_bug_of_the_caller(rows: int) -> None:
    with pytest.raises(ValueError, match=f"1 to 4 rows, got {rows}"):
        batching(4).offer(Named("a0", rows), 0)


def test_the_bound_on_rows_refuses_what_does_not_fit_and_accepts_again_when_rows_have_left() -> None:
    queue: Queue[Named] = Queue(QueuePolicy(max_batch_rows=4, batching=True, max_queue_rows=6))
    offered(queue, Named("a0", 4))
    error = queue.try_offer(Named("a1", 3), 0)
    assert isinstance(error, QueueFull)
    assert (error.what, error.limit, error.waiting, error.requested) == ("rows", 6, 4, 3)
    assert str(error) == "the queue is full: 4 of 6 rows are waiting, and the request has 3"
    offered(queue, Named("a2", 2))
    assert taken(queue) == ["a0"]
    assert queue.try_offer(Named("a3", 4), 0) is None


def test_the_bound_on_bytes_refuses_what_does_not_fit() -> None:
    queue: Queue[Named] = Queue(QueuePolicy(max_queue_bytes=100))
    offered(queue, Named("a0", size_bytes=60))
    error = queue.try_offer(Named("a1", size_bytes=41), 0)
    assert isinstance(error, QueueFull)
    assert (error.what, error.limit, error.waiting, error.requested) == ("bytes", 100, 60, 41)
    assert queue.try_offer(Named("a2", size_bytes=40), 0) is None


def test_a_request_over_a_bound_on_its_own_is_told_that_trying_again_is_useless() -> None:
    queue: Queue[Named] = Queue(QueuePolicy(max_batch_rows=8, max_queue_rows=4, max_queue_bytes=100))
    by_rows = queue.try_offer(Named("a0", 5), 0)
    by_bytes = queue.try_offer(Named("a1", size_bytes=101), 0)
    assert isinstance(by_rows, RequestTooLarge)
    assert (by_rows.what, by_rows.limit, by_rows.requested) == ("rows", 4, 5)
    assert isinstance(by_bytes, RequestTooLarge)
    assert str(by_bytes) == "the request has 101 bytes, and the queue holds at most 100"


def test_a_draining_queue_refuses_and_hands_out_the_rest_without_delay() -> None:
    queue = batching(2, delay_ms=5)
    offered(queue, *(Named(f"a{i}") for i in range(3)))
    assert not queue.draining
    queue.drain()
    assert queue.draining
    with pytest.raises(Draining):
        queue.offer(Named("a3"), 0)
    assert queue.next_wakeup_ns() == 0
    assert [taken(queue) for _ in range(3)] == [["a0", "a1"], ["a2"], []]


def test_every_refusal_is_a_batching_error() -> None:
    assert all(issubclass(kind, BatchingError) for kind in (QueueFull, RequestTooLarge, DeadlineExpired, Draining))


def test_the_queue_shows_its_state() -> None:
    queue = batching()
    offered(queue, Named("a0", 2), Named("b0"))
    assert repr(queue) == "<Queue: 2 requests, 3 rows, 20 bytes, 2 groups>"
    queue.drain()
    assert repr(queue) == "<Queue: 2 requests, 3 rows, 20 bytes, 2 groups, draining>"
    assert queue.policy.max_batch_rows == 4


def test_many_requests_with_far_deadlines_leave_the_heap_small() -> None:
    queue: Queue[Request] = Queue(QueuePolicy(max_batch_rows=50, batching=True))
    requests = [Request(1, 1, None, NO_DEADLINE - 1) for _ in range(200)]
    for now_ns in range(1000):
        for request in requests:
            queue.try_offer(request, now_ns)
        while queue:
            queue.take(now_ns)
        assert len(queue._deadlines) <= 64


@pytest.mark.parametrize("way_out", ["cancel", "expire"])
def test_the_heap_is_bounded_by_what_waits_while_requests_leave_one_by_one(way_out: str) -> None:
    queue = batching(1)
    stays = Named("a0", deadline_ns=10**12)
    offered(queue, stays)
    for i in range(1, 2000):
        far, near = Named("b", deadline_ns=10**12), Named("b", deadline_ns=i + 1)
        offered(queue, far, near, now_ns=i)
        assert queue.cancel(far)
        assert queue.cancel(near) if way_out == "cancel" else queue.expire(i + 1) == [near]
        assert len(queue._deadlines) <= 2 * len(queue) + 64
    assert queue.next_deadline_ns() == 10**12


def test_nothing_keeps_a_request_alive_that_has_left() -> None:
    queue = batching(4, delay_ms=5)
    alive: weakref.WeakSet[Named] = weakref.WeakSet()
    for i in range(100):
        cancelled, run = Named("a0", deadline_ns=10**12), Named(f"{i}0", deadline_ns=10**12)
        alive.update([cancelled, run])
        offered(queue, cancelled, run, now_ns=i)
        assert queue.cancel(cancelled)
        assert queue.take(i + 5 * MS) == ([run], [])
    del cancelled, run
    assert len(alive) == 0
    assert repr(queue) == "<Queue: 0 requests, 0 rows, 0 bytes, 0 groups>"


# --- Merging less, and tuning


def rows_of(queue: Queue[Named], now_ns: int = 0) -> list[int]:
    """The rows of the batches that are due, one after the other."""
    sizes = []
    while batch := queue.take(now_ns).batch:
        sizes.append(sum(request.rows for request in batch))
    return sizes


def test_a_queue_is_tuned_while_it_holds_requests() -> None:
    queue = batching(8, delay_ms=1)
    for _ in range(4):
        queue.offer(Named("a"), 0)
    queue.tune(merge_rows=2, queue_rows=4)
    assert rows_of(queue) == [2, 2]
    assert queue.merge_rows == 2
    queue.tune(merge_rows=99, queue_rows=99)
    assert queue.merge_rows == 8
    for _ in range(8):
        queue.offer(Named("a"), 0)
    assert rows_of(queue) == [8]


def test_a_tuned_queue_refuses_what_is_too_much_now_and_lets_in_what_finds_it_empty() -> None:
    queue: Queue[Named] = Queue(QueuePolicy(max_batch_rows=8, batching=True, max_queue_rows=6, max_queue_bytes=100))
    queue.tune(merge_rows=8, queue_rows=2)
    assert queue.try_offer(Named("a", rows=4), 0) is None
    refused = queue.try_offer(Named("a", rows=1), 0)
    assert isinstance(refused, QueueFull)
    assert (refused.what, refused.limit, refused.waiting, refused.requested) == ("rows", 2, 4, 1)
    assert rows_of(queue) == [4]
    assert isinstance(queue.try_offer(Named("a", rows=7), 0), RequestTooLarge)
    assert isinstance(queue.try_offer(Named("a", rows=4, size_bytes=101), 0), RequestTooLarge)
    queue.tune(merge_rows=8, queue_rows=99)
    assert queue.try_offer(Named("a", rows=6), 0) is None
    assert isinstance(queue.try_offer(Named("a", rows=1), 0), QueueFull)


def test_requests_are_merged_up_to_merge_rows_and_a_larger_one_goes_alone() -> None:
    queue: Queue[Named] = Queue(QueuePolicy(max_batch_rows=8, merge_rows=2, batching=True))
    offered(queue, Named("a0"), Named("a1"), Named("a2"), Named("a3", rows=8), Named("a4"))
    assert [taken(queue) for _ in range(4)] == [["a0", "a1"], ["a2"], ["a3"], ["a4"]]


def test_what_is_merged_is_full_at_merge_rows_and_waits_no_longer() -> None:
    queue: Queue[Named] = Queue(QueuePolicy(max_batch_rows=8, merge_rows=2, batching=True, max_delay_ns=5 * MS))
    offered(queue, Named("a0"))
    assert taken(queue) == []
    offered(queue, Named("a1"))
    assert taken(queue) == ["a0", "a1"]
    offered(queue, Named("a2", rows=5))
    assert taken(queue) == ["a2"]


def test_a_queue_is_told_to_wait_for_some_rows_and_not_to_while_it_holds_requests() -> None:
    queue = batching(8)
    queue.tune(8, 99, Wait(3, 5 * MS))
    offered(queue, Named("a0"), Named("a1"))
    assert taken(queue) == []
    assert queue.next_wakeup_ns() == 5 * MS
    offered(queue, Named("a2"))
    assert taken(queue) == ["a0", "a1", "a2"]
    offered(queue, Named("a3"), now_ns=MS)
    assert taken(queue, 2 * MS) == []
    assert taken(queue, 6 * MS) == ["a3"]
    offered(queue, Named("a4"), now_ns=7 * MS)
    queue.tune(8, 99)
    assert taken(queue, 7 * MS) == ["a4"]
    # What came at once is still merged: so many rows are enough, and not the most.
    queue.tune(8, 99, Wait(3, 5 * MS))
    offered(queue, *(Named(f"b{number}") for number in range(5)), now_ns=8 * MS)
    assert len(taken(queue, 8 * MS)) == 5


def test_a_tuned_wait_is_none_for_a_policy_with_a_delay_of_its_own_or_without_batches() -> None:
    queue = batching(8, delay_ms=1)
    queue.tune(8, 99, Wait(1, 50 * MS))
    offered(queue, Named("a0"))
    assert taken(queue) == []
    assert taken(queue, MS) == ["a0"]
    alone: Queue[Named] = Queue(QueuePolicy(max_batch_rows=8))
    alone.tune(8, 99, Wait(3, 5 * MS))
    offered(alone, Named("a0"))
    assert taken(alone) == ["a0"]


def test_a_request_with_little_time_left_does_not_wait_for_a_tuned_delay() -> None:
    queue = batching(8)
    queue.tune(8, 99, Wait(4, 5 * MS))
    offered(queue, Named("a0"), Named("a1", deadline_ns=11 * MS))
    assert taken(queue) == []
    offered(queue, Named("a2", deadline_ns=10 * MS))
    assert taken(queue) == ["a2", "a1", "a0"]


def test_a_draining_queue_is_not_told_to_wait() -> None:
    queue = batching(8)
    offered(queue, Named("a0"))
    queue.drain()
    queue.tune(8, 99, Wait(4, 5 * MS))
    assert taken(queue) == ["a0"]
