"""The queue that threads share: who is woken, who is not, and that every request leaves exactly once."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain

import pytest

from sluice_batching import (
    NO_DEADLINE,
    BatchQueue,
    DeadlineExpired,
    Draining,
    QueueFull,
    QueuePolicy,
    Request,
    RequestTooLarge,
    Taken,
)

MS = 1_000_000
HOUR_NS = 3600 * 1000 * MS
PATIENCE_S = 30.0
"""How long a test waits for what must come: long enough for any machine, and never waited out by a test that passes."""


class ManualClock:
    """A clock that stands still, and counts who reads it.

    A taker reads it with the queue's lock held, right before it waits. Whoever has seen the reading and then gets the
    lock knows that the taker waits.
    """

    def __init__(self) -> None:
        self.now_ns = 0
        self._changed = threading.Condition()
        self._readings: Counter[str] = Counter()

    def __call__(self) -> int:
        with self._changed:
            self._readings[threading.current_thread().name] += 1
            self._changed.notify_all()
            return self.now_ns

    def readings(self, name: str) -> int:
        with self._changed:
            return self._readings[name]

    def wait_for_reading(self, name: str, count: int) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._readings[name] >= count, PATIENCE_S)


class Taker(threading.Thread):
    """A thread that takes once and keeps what it got."""

    def __init__(self, queue: BatchQueue[Request], name: str = "taker", timeout_ns: int | None = None) -> None:
        super().__init__(name=name, daemon=True)
        self._queue = queue
        self._timeout_ns = timeout_ns
        self._result: Taken[Request] | None = None
        self.start()

    def run(self) -> None:
        self._result = self._queue.take(self._timeout_ns)

    def result(self) -> Taken[Request] | None:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self._result


def request(key: str = "a", *, deadline_ns: int = NO_DEADLINE) -> Request:
    return Request(1, 10, key, deadline_ns)


def batch_queue(
    clock: Callable[[], int] = time.monotonic_ns, *, max_batch_rows: int = 4, delay_ns: int = 0
) -> BatchQueue[Request]:
    return BatchQueue(QueuePolicy(max_batch_rows=max_batch_rows, batching=True, max_delay_ns=delay_ns), clock)


def test_what_was_offered_is_taken_with_the_time_of_its_enqueueing() -> None:
    clock = ManualClock()
    clock.now_ns = 7
    queue = batch_queue(clock)
    first, second = request(), request()
    queue.offer(first)
    queue.offer(second)
    assert (len(queue), queue.rows, queue.size_bytes) == (2, 2, 20)
    assert repr(queue) == "<BatchQueue: 0 idle takers, <Queue: 2 requests, 2 rows, 20 bytes, 1 groups>>"
    assert queue.take() == ([first, second], [])
    assert first.enqueued_ns == 7


def test_refusals_are_raised_by_offer_and_returned_one_by_one_by_offer_many() -> None:
    clock = ManualClock()
    clock.now_ns = 5
    queue: BatchQueue[Request] = BatchQueue(QueuePolicy(max_queue_rows=2), clock)
    with pytest.raises(DeadlineExpired):
        queue.offer(request(deadline_ns=5))
    errors = queue.offer_many([request(), request(deadline_ns=4), request(), request()])
    assert [type(error) for error in errors] == [type(None), DeadlineExpired, type(None), QueueFull]
    assert len(queue) == 2
    assert queue.policy.max_queue_rows == 2


def test_requests_that_are_offered_together_wait_all_or_none_and_wake_one_taker() -> None:
    clock = ManualClock()
    queue: BatchQueue[Request] = BatchQueue(QueuePolicy(batching=True, max_batch_rows=4, max_queue_rows=3), clock)
    assert type(queue.offer_together([request(), request(), request(), request()])) is RequestTooLarge
    assert type(queue.offer_together([request(), request(deadline_ns=0)])) is DeadlineExpired
    assert len(queue) == 0
    taker = Taker(queue)
    clock.wait_for_reading("taker", 1)
    parts = [request(), request()]
    assert queue.offer_together(parts) is None
    assert taker.result() == (parts, [])
    reported: list[int] = []
    queue.watch_deadlines(reported.append)
    assert queue.offer_together([request(deadline_ns=9), request(deadline_ns=7)]) is None
    assert queue.offer_together([request(deadline_ns=8)]) is None
    assert type(queue.offer_together([request()])) is QueueFull
    assert reported == [7]
    queue.drain()
    assert type(queue.offer_together([request()])) is Draining


def test_a_waiting_taker_is_woken_by_an_offer() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    taker = Taker(queue)
    clock.wait_for_reading("taker", 1)
    offered = request()
    queue.offer(offered)
    assert taker.result() == ([offered], [])


def test_two_waiting_takers_each_get_a_batch_of_one_list() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    takers = [Taker(queue, "one"), Taker(queue, "two")]
    clock.wait_for_reading("one", 1)
    clock.wait_for_reading("two", 1)
    a, b = request("a"), request("b")
    assert queue.offer_many([a, b]) == [None, None]
    batches = [taken.batch for taker in takers if (taken := taker.result())]
    assert sorted(batches, key=lambda batch: str(batch[0].key)) == [[a], [b]]


def test_a_request_that_is_not_due_wakes_only_the_taker_that_sets_its_alarm() -> None:
    clock = ManualClock()
    queue = batch_queue(clock, max_batch_rows=3, delay_ns=HOUR_NS)
    taker = Taker(queue)
    clock.wait_for_reading("taker", 1)
    first, second, third = request(), request(), request()
    queue.offer(first)
    clock.wait_for_reading("taker", 2)
    queue.offer(second)
    assert repr(queue) == "<BatchQueue: 1 idle takers, <Queue: 2 requests, 2 rows, 20 bytes, 1 groups>>"
    queue.offer(third)
    assert taker.result() == ([first, second, third], [])
    # Once when it came, once to set the alarm, once for the full batch; none for the second request.
    assert clock.readings("taker") == 3


def test_a_delayed_batch_goes_by_itself_when_the_delay_is_over() -> None:
    queue = batch_queue(delay_ns=20 * MS)
    offered = request()
    queue.offer(offered)
    assert queue.take() == ([offered], [])
    assert time.monotonic_ns() - offered.enqueued_ns >= 20 * MS


def test_a_taker_that_waits_for_a_delay_notices_an_earlier_deadline() -> None:
    clock = ManualClock()
    queue = batch_queue(clock, delay_ns=HOUR_NS)
    taker = Taker(queue)
    clock.wait_for_reading("taker", 1)
    queue.offer(request())
    clock.wait_for_reading("taker", 2)
    hasty = request(deadline_ns=1 * MS)
    queue.offer(hasty)
    clock.wait_for_reading("taker", 3)
    clock.now_ns = 1 * MS
    assert taker.result() == ([], [hasty])


def test_the_expired_are_handed_to_the_taker_together_with_the_batch() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    expired, alive = request(deadline_ns=5), request()
    queue.offer_many([expired, alive])
    clock.now_ns = 5
    assert queue.take() == ([alive], [expired])


def test_a_take_with_a_timeout_returns_two_empty_lists_when_it_is_over() -> None:
    queue = batch_queue()
    start_ns = time.monotonic_ns()
    assert queue.take(timeout_ns=5 * MS) == ([], [])
    assert time.monotonic_ns() - start_ns >= 5 * MS
    assert queue.take(timeout_ns=0) == ([], [])


def test_a_taker_that_gives_up_leaves_the_watch_to_the_others() -> None:
    clock = ManualClock()
    queue = batch_queue(clock, max_batch_rows=2, delay_ns=HOUR_NS)
    stays = Taker(queue, "stays")
    clock.wait_for_reading("stays", 1)
    gives_up = Taker(queue, "gives up", timeout_ns=5 * MS)
    clock.wait_for_reading("gives up", 1)
    first, second = request(), request()
    queue.offer(first)
    clock.now_ns = 5 * MS
    assert gives_up.result() == ([], [])
    clock.wait_for_reading("stays", 2)
    queue.offer(second)
    assert stays.result() == ([first, second], [])
    assert clock.readings("stays") == 3


def test_draining_hands_out_the_rest_and_then_tells_every_taker_to_end() -> None:
    clock = ManualClock()
    queue = batch_queue(clock, delay_ns=HOUR_NS)
    last = request()
    queue.offer(last)
    takers = [Taker(queue, "one"), Taker(queue, "two")]
    clock.wait_for_reading("one", 1)
    clock.wait_for_reading("two", 1)
    queue.drain()
    assert queue.draining
    results = [taker.result() for taker in takers]
    assert sorted(results, key=lambda taken: taken is None) == [([last], []), None]
    assert queue.take() is None
    with pytest.raises(Draining):
        queue.offer(request())


def test_a_cancelled_request_does_not_run() -> None:
    queue = batch_queue()
    gone, kept = request(), request()
    queue.offer_many([gone, kept])
    assert queue.cancel(gone)
    assert not queue.cancel(gone)
    assert queue.take() == ([kept], [])


def test_a_callers_bug_in_a_list_does_not_strand_the_requests_before_it() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    taker = Taker(queue)
    clock.wait_for_reading("taker", 1)
    good = request()
    with pytest.raises(ValueError, match="1 to 4 rows"):
        queue.offer_many([good, Request(5, 10, "a")])
    assert taker.result() == ([good], [])


def test_only_deadlines_earlier_than_the_watched_one_are_reported_and_with_no_lock_held() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    reported: list[tuple[int, list[Request]]] = []
    queue.offer(request(deadline_ns=100))
    queue.watch_deadlines(lambda deadline_ns: reported.append((deadline_ns, queue.expire())))
    assert queue.watched_deadline_ns == 100
    queue.offer_many([request(deadline_ns=100), request(), request(deadline_ns=120)])
    assert reported == []
    queue.offer_many([request(deadline_ns=90), request(deadline_ns=80)])
    assert reported == [(80, [])]
    queue.watch_deadlines(None)
    queue.offer(request(deadline_ns=10))
    queue.expire()
    assert reported == [(80, [])]
    assert queue.watched_deadline_ns < 0


def test_expiring_sets_the_watched_deadline_to_the_earliest_that_still_waits() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    queue.watch_deadlines(lambda _: None)
    assert queue.watched_deadline_ns == NO_DEADLINE
    early, late = request(deadline_ns=10), request(deadline_ns=20)
    queue.offer_many([late, early])
    assert queue.watched_deadline_ns == 10
    clock.now_ns = 10
    assert queue.expire() == [early]
    assert queue.watched_deadline_ns == 20
    assert queue.cancel(late)
    assert queue.expire() == []
    assert queue.watched_deadline_ns == NO_DEADLINE


@pytest.mark.parametrize("delay_ns", [0, 1 * MS])
def test_many_threads_offer_take_and_cancel_and_every_request_leaves_exactly_once(delay_ns: int) -> None:
    queue = batch_queue(max_batch_rows=8, delay_ns=delay_ns)
    start = threading.Barrier(7)
    left: list[list[int]] = [[] for _ in range(7)]
    accepted: list[Request] = []

    def take(mine: list[int]) -> None:
        start.wait(PATIENCE_S)
        while (taken := queue.take()) is not None:
            assert len({each.key for each in taken.batch}) <= 1
            assert len(taken.batch) <= 8
            mine.extend(map(id, taken.batch + taken.expired))

    def offer(mine: list[int], name: str) -> None:
        start.wait(PATIENCE_S)
        for i in range(200):
            life_ns = NO_DEADLINE if i % 3 else time.monotonic_ns() + i * 10_000
            group = [request(name), request("b"), request("c", deadline_ns=life_ns)]
            errors = queue.offer_many(group)
            accepted.extend(each for each, error in zip(group, errors, strict=True) if error is None)
            if i % 5 == 0 and queue.cancel(group[1]):
                mine.append(id(group[1]))

    takers = [threading.Thread(target=take, args=(left[i],), daemon=True) for i in range(4)]
    offerers = [threading.Thread(target=offer, args=(left[i], "abc"[i - 4]), daemon=True) for i in range(4, 7)]
    for thread in takers + offerers:
        thread.start()
    for thread in offerers:
        thread.join(PATIENCE_S)
    queue.drain()
    for thread in takers:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
    assert sorted(chain.from_iterable(left)) == sorted(map(id, accepted))


def test_without_an_idle_taker_nothing_is_lent() -> None:
    queue = batch_queue()
    lone = request()
    assert queue.offer_and_take(lone) == (None, [])
    assert queue.take() == ([lone], [])


def test_the_place_of_an_idle_taker_is_lent_until_it_is_given_back() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    taker = Taker(queue)
    clock.wait_for_reading("taker", 1)
    lent, next_one = request(), request()
    assert queue.offer_and_take(lent) == (None, [lent])
    assert queue.offer_and_take(next_one) == (None, [])
    assert len(queue) == 1
    assert clock.readings("taker") == 1
    queue.give_back()
    assert taker.result() == ([next_one], [])


def test_only_one_place_is_lent_for_each_idle_taker_and_the_others_go_on() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    takers = [Taker(queue, "one"), Taker(queue, "two")]
    clock.wait_for_reading("one", 1)
    clock.wait_for_reading("two", 1)
    lent, taken = request(), request()
    assert queue.offer_and_take(lent) == (None, [lent])
    queue.offer(taken)
    queue.drain()
    queue.give_back()
    results = [taker.result() for taker in takers]
    assert sorted(results, key=lambda result: result is None) == [([taken], []), None]


def test_a_taker_that_wakes_by_itself_while_its_place_is_lent_takes_nothing() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    patient = Taker(queue, "patient", timeout_ns=5 * MS)
    clock.wait_for_reading("patient", 1)
    lent, waits = request(), request()
    assert queue.offer_and_take(lent) == (None, [lent])
    queue.offer(waits)
    clock.wait_for_reading("patient", 2)
    clock.now_ns = 5 * MS
    assert patient.result() == ([], [])
    queue.give_back()
    assert queue.take() == ([waits], [])


def test_a_refusal_or_a_delay_lends_nothing() -> None:
    clock = ManualClock()
    clock.now_ns = 5
    queue = batch_queue(clock, delay_ns=HOUR_NS)
    taker = Taker(queue)
    clock.wait_for_reading("taker", 1)
    error, batch = queue.offer_and_take(request(deadline_ns=5))
    assert (type(error), batch) == (DeadlineExpired, [])
    delayed = request()
    assert queue.offer_and_take(delayed) == (None, [])
    queue.drain()
    assert taker.result() == ([delayed], [])


def test_an_earlier_deadline_of_a_request_that_waits_is_reported_by_the_one_who_offers_it() -> None:
    queue = batch_queue(ManualClock())
    reported: list[int] = []
    queue.watch_deadlines(reported.append)
    queue.offer_and_take(request(deadline_ns=100))
    queue.offer_and_take(request(deadline_ns=200))
    assert reported == [100]


def test_a_drained_queue_lets_its_takers_go_once_what_is_lent_is_done() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    taker = Taker(queue)
    clock.wait_for_reading("taker", 1)
    lent = request()
    assert queue.offer_and_take(lent) == (None, [lent])
    queue.drain()
    clock.wait_for_reading("taker", 2)
    assert taker.is_alive()
    queue.give_back()
    assert taker.result() is None


class Waiter(threading.Thread):
    """A thread that waits once for something to be due."""

    def __init__(self, queue: BatchQueue[Request], name: str = "waiter") -> None:
        super().__init__(name=name, daemon=True)
        self._queue = queue
        self._result: bool | None = None
        self.start()

    def run(self) -> None:
        self._result = self._queue.wait()

    def result(self) -> bool | None:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self._result


def test_everybody_who_waits_is_told_of_what_is_due_and_it_stays_there() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    waiters = [Waiter(queue, "one"), Waiter(queue, "two")]
    clock.wait_for_reading("one", 1)
    clock.wait_for_reading("two", 1)
    offered = request()
    queue.offer(offered)
    assert [waiter.result() for waiter in waiters] == [True, True]
    assert queue.wait()
    assert queue.take() == ([offered], [])


def test_waiting_ends_when_the_queue_is_draining_and_empty() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    waiter = Waiter(queue)
    clock.wait_for_reading("waiter", 1)
    queue.drain()
    assert waiter.result() is False


def test_what_is_left_in_a_draining_queue_is_due() -> None:
    queue = batch_queue(delay_ns=HOUR_NS)
    queue.offer(request())
    queue.drain()
    assert queue.wait()
    assert queue.take() is not None
    assert not queue.wait()


def test_a_taker_that_waits_for_a_full_batch_is_woken_when_less_is_full() -> None:
    clock = ManualClock()
    queue = batch_queue(clock, delay_ns=HOUR_NS)
    offered = [request(), request()]
    queue.offer_many(offered)
    taker = Taker(queue)
    clock.wait_for_reading("taker", 1)
    queue.tune(merge_rows=2, queue_rows=100)
    assert queue.merge_rows == 2
    assert taker.result() == (offered, [])


class Gatherer(threading.Thread):
    """A thread that gathers once, and keeps how many rows there were."""

    def __init__(self, queue: BatchQueue[Request], rows: int, within_ns: int) -> None:
        super().__init__(name="gatherer", daemon=True)
        self._queue, self._rows, self._within_ns = queue, rows, within_ns
        self._result = -1
        self.start()

    def run(self) -> None:
        self._result = self._queue.gather(self._rows, self._within_ns)

    def result(self) -> int:
        self.join(PATIENCE_S)
        assert not self.is_alive()
        return self._result


def test_who_gathers_waits_until_enough_is_there_and_nothing_is_lent_meanwhile() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    gatherer = Gatherer(queue, 3, HOUR_NS)
    clock.wait_for_reading("gatherer", 1)
    assert queue.offer_and_take(request()) == (None, [])
    queue.offer(request())
    queue.offer(request())
    assert gatherer.result() == 3
    assert len(queue) == 3


def test_who_gathers_waits_no_longer_than_that() -> None:
    queue = batch_queue()
    queue.offer(request())
    assert queue.gather(2, MS) == 1
    assert queue.gather(1, HOUR_NS) == 1


def test_who_gathers_does_not_wait_until_a_deadline_is_near() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    gatherer = Gatherer(queue, 3, HOUR_NS)
    clock.wait_for_reading("gatherer", 1)
    queue.offer(request(deadline_ns=2 * HOUR_NS))
    clock.wait_for_reading("gatherer", 2)
    clock.now_ns = MS
    queue.offer(request(deadline_ns=MS + 1))
    clock.now_ns = 2 * MS
    assert gatherer.result() == 2


def test_who_gathers_is_sent_on_by_a_queue_that_drains() -> None:
    clock = ManualClock()
    queue = batch_queue(clock)
    gatherer = Gatherer(queue, 3, HOUR_NS)
    clock.wait_for_reading("gatherer", 1)
    queue.drain()
    assert gatherer.result() == 0
