"""The thread that answers requests at their deadline, while no instance takes anything."""

import logging
import queue as stdlib_queue
import statistics
import threading
import time
from collections.abc import Iterator

import pytest

from sluice_batching import BatchQueue, ExpiryTimer, QueuePolicy, Request

MS = 1_000_000
HOUR_NS = 3600 * 1000 * MS
PATIENCE_S = 30.0
"""How long a test waits for what must come."""


class Expired:
    """A callback that keeps what it is called with, for the test's thread to wait for."""

    def __init__(self) -> None:
        self._calls: stdlib_queue.Queue[tuple[list[Request], int]] = stdlib_queue.Queue()

    def __call__(self, requests: list[Request]) -> None:
        self._calls.put((requests, time.monotonic_ns()))

    def next(self) -> tuple[list[Request], int]:
        """The requests of the next call, and when it came."""
        return self._calls.get(timeout=PATIENCE_S)

    def empty(self) -> bool:
        return self._calls.empty()


@pytest.fixture
def timer() -> Iterator[ExpiryTimer]:
    timer = ExpiryTimer()
    yield timer
    timer.stop()


def batch_queue() -> BatchQueue[Request]:
    return BatchQueue(QueuePolicy(max_batch_rows=4, batching=True))


def request(life_ns: int) -> Request:
    return Request(1, 10, "a", time.monotonic_ns() + life_ns)


def test_a_request_is_answered_within_5_ms_of_its_deadline_while_nobody_takes(timer: ExpiryTimer) -> None:
    queue, expired = batch_queue(), Expired()
    timer.register(queue, expired)
    late_ns = []
    for _ in range(15):
        offered = request(3 * MS)
        queue.offer(offered)
        answered, when_ns = expired.next()
        assert answered == [offered]
        late_ns.append(when_ns - offered.deadline_ns)
    assert min(late_ns) >= 0
    # The median, as any single one may meet a machine that is busy with something else.
    assert statistics.median(late_ns) < 5 * MS
    assert len(queue) == 0


def test_each_queue_has_its_own_callback_and_the_earliest_deadline_comes_first(timer: ExpiryTimer) -> None:
    queues, callbacks = [batch_queue(), batch_queue()], [Expired(), Expired()]
    requests = [request(60 * MS), request(20 * MS)]
    for queue, expired, offered in zip(queues, callbacks, requests, strict=True):
        timer.register(queue, expired)
        queue.offer(offered)
    answers = [expired.next() for expired in callbacks]
    assert [answered for answered, _ in answers] == [[requests[0]], [requests[1]]]
    assert answers[1][1] < answers[0][1]


def test_a_later_deadline_does_not_wake_the_timer_and_is_still_answered(timer: ExpiryTimer) -> None:
    queue, other, expired = batch_queue(), batch_queue(), Expired()
    timer.register(queue, expired)
    timer.register(other, expired)
    first, second = request(20 * MS), request(40 * MS)
    queue.offer(first)
    other.offer(second)
    assert [expired.next()[0], expired.next()[0]] == [[first], [second]]


def test_deadlines_that_wait_already_when_a_queue_is_registered_are_answered(timer: ExpiryTimer) -> None:
    queue, expired = batch_queue(), Expired()
    offered = request(10 * MS)
    queue.offer(offered)
    timer.register(queue, expired)
    assert expired.next()[0] == [offered]


def test_a_request_that_was_taken_in_time_is_not_answered(timer: ExpiryTimer) -> None:
    queue, expired = batch_queue(), Expired()
    timer.register(queue, expired)
    taken, waits = request(10 * MS), request(30 * MS)
    queue.offer(taken)
    assert queue.cancel(taken)
    queue.offer(waits)
    assert expired.next()[0] == [waits]


def test_a_callback_may_offer_again_and_that_deadline_is_answered_too(timer: ExpiryTimer) -> None:
    queue, expired = batch_queue(), Expired()
    second_try = request(20 * MS)

    def once_more(requests: list[Request]) -> None:
        if second_try not in requests:
            queue.offer(second_try)
        expired(requests)

    timer.register(queue, once_more)
    first_try = request(5 * MS)
    queue.offer(first_try)
    assert [expired.next()[0], expired.next()[0]] == [[first_try], [second_try]]


def test_a_callback_that_fails_is_logged_and_the_next_deadline_is_answered(
    timer: ExpiryTimer, caplog: pytest.LogCaptureFixture
) -> None:
    broken, whole, expired = batch_queue(), batch_queue(), Expired()

    def fail(requests: list[Request]) -> None:
        raise RuntimeError(f"{len(requests)} requests nobody answers")

    timer.register(broken, fail)
    timer.register(whole, expired)
    with caplog.at_level(logging.ERROR, "sluice_batching"):
        broken.offer(request(1 * MS))
        survivor = request(10 * MS)
        whole.offer(survivor)
        assert expired.next()[0] == [survivor]
    assert "the callback for 1 expired requests" in caplog.text
    assert "1 requests nobody answers" in caplog.text


def test_a_queue_that_is_unregistered_is_left_alone(timer: ExpiryTimer) -> None:
    forgotten, other, unused, expired = batch_queue(), batch_queue(), Expired(), Expired()
    timer.register(forgotten, unused)
    timer.register(other, expired)
    timer.unregister(forgotten)
    timer.unregister(forgotten)
    left_alone = request(5 * MS)
    forgotten.offer(left_alone)
    other.offer(request(20 * MS))
    expired.next()
    assert unused.empty()
    assert forgotten.expire() == [left_alone]


def test_stopping_ends_the_thread_although_deadlines_are_far() -> None:
    threads = threading.active_count()
    timer, queue = ExpiryTimer(), batch_queue()
    timer.register(queue, Expired())
    queue.offer(request(HOUR_NS))
    assert threading.active_count() == threads + 1
    timer.stop()
    timer.stop()
    assert threading.active_count() == threads
