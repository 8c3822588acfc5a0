"""Traces of the order by deadline, and of work that is refused as it would end too late."""

import pytest

from sluice_batching import (
    NO_DEADLINE,
    BatchQueue,
    DeadlineExpired,
    Queue,
    QueuePolicy,
    Request,
    RunTimes,
    TooLate,
)
from sluice_batching.queue import HORIZON_NS

MS = 1_000_000


class Named(Request):
    """A request that shows its name in a failed assertion; the first letter is its key."""

    __slots__ = ("name",)

    def __init__(self, name: str, rows: int = 1, *, deadline_ms: int | None = None) -> None:
        super().__init__(rows, 10, name[0], NO_DEADLINE if deadline_ms is None else deadline_ms * MS)
        self.name = name

    def __repr__(self) -> str:
        return self.name


def queue_of(
    max_batch_rows: int = 2, *, run_ms: int = 0, delay_ms: int = 0, preferred: tuple[int, ...] = (), fifo: bool = False
) -> Queue[Named]:
    """Every run of the past took as long."""
    run_times = RunTimes()
    for rows in range(1, max_batch_rows + 1):
        for _ in range(3 if run_ms else 0):
            run_times.record(rows, run_ms * MS, 0)
    policy = QueuePolicy(
        max_batch_rows=max_batch_rows,
        batching=max_batch_rows > 1,
        max_delay_ns=delay_ms * MS,
        preferred_batch_rows=preferred,
        deadline_first=not fifo,
    )
    return Queue(policy, run_times)


def offered(queue: Queue[Named], *requests: Named, at_ms: int = 0) -> None:
    for request in requests:
        queue.offer(request, at_ms * MS)


def taken(queue: Queue[Named], at_ms: int = 0) -> list[str]:
    batch, expired = queue.take(at_ms * MS)
    assert not expired
    return [request.name for request in batch]


def test_the_earliest_deadline_goes_first_and_equal_ones_in_order_of_arrival() -> None:
    queue = queue_of()
    offered(queue, *(Named(f"a{ms}-{i}", deadline_ms=ms) for i, ms in enumerate((30, 10, 20, 10, 30))))
    assert taken(queue) == ["a10-1", "a10-3"]
    assert taken(queue) == ["a20-2", "a30-0"]
    assert taken(queue) == ["a30-4"]


def test_everything_that_waits_goes_in_one_batch_in_the_same_order() -> None:
    queue = queue_of(4)
    offered(queue, Named("a0", deadline_ms=30), Named("a1", deadline_ms=10), Named("a2", deadline_ms=20))
    assert taken(queue) == ["a1", "a2", "a0"]
    offered(queue, Named("a3", deadline_ms=90), Named("a4"))
    assert not queue._overtaking


def test_requests_without_a_deadline_keep_their_order_and_wait_for_no_more_than_the_horizon() -> None:
    queue = queue_of(1)
    horizon_ms = HORIZON_NS // MS
    offered(queue, Named("none0"), Named("far", deadline_ms=10 * horizon_ms), Named("none1"))
    offered(queue, Named("near", deadline_ms=horizon_ms - 1))
    offered(queue, Named("later", deadline_ms=horizon_ms + 100), at_ms=150)
    assert [taken(queue, 150)[0] for _ in range(5)] == ["near", "none0", "far", "none1", "later"]


def test_the_group_of_the_earliest_deadline_goes_first() -> None:
    queue = queue_of()
    offered(queue, Named("a0", deadline_ms=30), Named("b0", deadline_ms=20), Named("a1", deadline_ms=40))
    offered(queue, Named("c0", deadline_ms=10))
    assert [taken(queue) for _ in range(3)] == [["c0"], ["b0"], ["a0", "a1"]]


def test_a_group_that_is_due_by_its_age_goes_before_a_later_one_and_behind_an_earlier() -> None:
    queue = queue_of(4, delay_ms=10)
    offered(queue, Named("a0"), Named("b0", deadline_ms=500), at_ms=0)
    offered(queue, Named("c0", deadline_ms=400), at_ms=5)
    assert taken(queue, 9) == []
    # c0 is due first by its deadline, but has not waited for its delay.
    assert taken(queue, 10) == ["b0"]
    assert taken(queue, 10) == ["a0"]
    assert taken(queue, 15) == ["c0"]


def test_a_request_that_overtakes_changes_which_preferred_size_the_first_ones_add_up_to() -> None:
    queue = queue_of(8, delay_ms=10, preferred=(3, 6))
    offered(queue, Named("a0", 3))
    assert queue.next_wakeup_ns() == 0
    offered(queue, Named("a1", 2, deadline_ms=100))
    assert queue.next_wakeup_ns() == 10 * MS
    assert taken(queue, 10) == ["a1", "a0"]


def test_first_come_first_served_is_still_to_be_had() -> None:
    queue = queue_of(1, fifo=True)
    offered(queue, Named("a0", deadline_ms=30), Named("a1", deadline_ms=10), Named("a2"))
    assert [taken(queue) for _ in range(3)] == [["a0"], ["a1"], ["a2"]]


def test_one_that_overtakes_can_be_cancelled_and_expire() -> None:
    queue = queue_of(1)
    cancelled = Named("a1", deadline_ms=10)
    offered(queue, Named("a0", deadline_ms=30), cancelled, Named("a2", deadline_ms=20))
    assert queue.cancel(cancelled)
    batch, expired = queue.take(20 * MS)
    assert ([each.name for each in batch], [each.name for each in expired]) == (["a0"], ["a2"])


def test_what_would_end_too_late_is_refused_when_it_is_offered() -> None:
    queue = queue_of(run_ms=100)
    with pytest.raises(TooLate, match=r"too late: 99\.000 ms are left, and a run takes 100\.000 ms"):
        queue.offer(Named("a0", deadline_ms=99), 0)
    with pytest.raises(DeadlineExpired):
        queue.offer(Named("a0", deadline_ms=5), 5 * MS)
    offered(queue, Named("a1", deadline_ms=100))
    assert taken(queue) == ["a1"]


def test_what_has_come_too_late_while_it_waited_leaves_as_expired_work_does() -> None:
    queue = queue_of(1, run_ms=100)
    offered(queue, Named("a0", deadline_ms=150), Named("a1", deadline_ms=160), Named("a2", deadline_ms=200))
    batch, expired = queue.take(100 * MS)
    assert ([each.name for each in batch], [each.name for each in expired]) == (["a2"], ["a0", "a1"])
    assert not queue


def test_only_work_that_is_too_late_leaves_an_empty_queue() -> None:
    queue = queue_of(1, run_ms=100)
    offered(queue, Named("a0", 1, deadline_ms=150))
    batch, expired = queue.take(100 * MS)
    assert (batch, [each.name for each in expired]) == ([], ["a0"])
    assert queue.take(100 * MS) == ([], [])


def test_without_batching_what_is_late_makes_room_for_one_request_only() -> None:
    run_times = RunTimes()
    for _ in range(3):
        run_times.record(4, 100 * MS, 0)
    queue: Queue[Named] = Queue(QueuePolicy(max_batch_rows=4), run_times)
    offered(queue, Named("a0", 4, deadline_ms=150), Named("b0", 1, deadline_ms=900), Named("c0", 1))
    batch, expired = queue.take(100 * MS)
    assert ([each.name for each in batch], [each.name for each in expired]) == (["b0"], ["a0"])


def test_a_refusal_by_prediction_ends_when_nothing_was_measured_for_long() -> None:
    queue = queue_of(1, run_ms=100)
    later_ms = 1_000 + 8 * 100 + 1
    offered(queue, Named("a0", deadline_ms=later_ms + 1), at_ms=later_ms)
    assert taken(queue, later_ms) == ["a0"]


class Slower(RunTimes):
    """Run times that grow with each question."""

    __slots__ = ("asked",)

    def predict_ns(self, rows: int, now_ns: int) -> int:
        self.asked = getattr(self, "asked", -1) + 1
        return self.asked * 100 * MS


def test_a_lone_request_that_comes_too_late_between_offer_and_take_is_refused_and_no_place_is_lent() -> None:
    run_times = Slower()
    run_times.record(1, 100 * MS, 0)
    queue: BatchQueue[Named] = BatchQueue(QueuePolicy(), clock=lambda: 0, run_times=run_times)
    queue._idle_takers = 1
    error, batch = queue.offer_and_take(Named("a0", deadline_ms=50))
    assert isinstance(error, TooLate)
    assert batch == []
    assert len(queue) == queue._lent == 0


def test_the_wait_is_predicted_from_the_rows_that_wait() -> None:
    run_times = RunTimes()
    queue: BatchQueue[Named] = BatchQueue(QueuePolicy(max_batch_rows=4, batching=True), run_times=run_times)
    queue.offer(Named("a0", 3))
    assert queue.predicted_wait_ns is None
    run_times.record(1, 10 * MS, 0)
    assert queue.predicted_wait_ns == 30 * MS
