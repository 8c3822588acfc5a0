"""The queue of sequences that threads share: what runs stays one by one, and nobody waits for ever."""

from __future__ import annotations

import threading
from collections import defaultdict

from sluice_batching import NO_DEADLINE, ExpiryTimer, QueuePolicy, Request, SequencePolicy, SequenceQueue, Step
from support.fakes import eventually

MS = 1_000_000
PATIENCE_S = 30.0


def shared(
    *, rows: int = 2, idle_ns: int = 1000 * 1000 * MS, clock_ns: list[int] | None = None
) -> SequenceQueue[Request]:
    policy = SequencePolicy(queue=QueuePolicy(max_batch_rows=rows, batching=True), max_idle_ns=idle_ns, groups=1)
    return SequenceQueue(policy) if clock_ns is None else SequenceQueue(policy, lambda: clock_ns[0])


def request(sequence_id: int, number: int = 0, *, end: bool = False, deadline_ns: int = NO_DEADLINE) -> Request:
    made = Request(1, number, "k", deadline_ns)
    made.step = Step(sequence_id, start=number == 0, end=end)
    return made


def test_many_threads_run_each_sequence_in_order_and_one_request_at_a_time() -> None:
    queue = shared(rows=4)
    ran: defaultdict[int, list[int]] = defaultdict(list)
    under_way: set[int] = set()
    problems: list[str] = []

    def run() -> None:
        while (taken := queue.take()) is not None:
            ids = {each.step.sequence_id for each in taken.batch}
            if ids & under_way or len(ids) < len(taken.batch):
                problems.append(f"{ids} while {under_way}")
            under_way.update(ids)  # type: ignore[arg-type]
            for each in taken.batch:
                ran[int(each.step.sequence_id)].append(each.size_bytes)
            under_way.difference_update(ids)  # type: ignore[arg-type]
            queue.finish(taken.batch)

    takers = [threading.Thread(target=run, daemon=True) for _ in range(3)]
    for taker in takers:
        taker.start()
    for number in range(50):
        for sequence_id in range(1, 9):
            queue.offer(request(sequence_id, number, end=number == 49))
    queue.drain()
    for taker in takers:
        taker.join(PATIENCE_S)
        assert not taker.is_alive()
    assert not problems
    assert dict(ran) == {sequence_id: list(range(50)) for sequence_id in range(1, 9)}
    assert queue.live == 0


def test_a_taker_of_a_draining_queue_waits_for_what_another_runs() -> None:
    queue = shared()
    queue.offer(request(1))
    queue.offer(request(1, 1))
    first = queue.take()
    assert first is not None
    queue.drain()
    got: list[object] = []
    taker = threading.Thread(target=lambda: got.append(queue.take()), daemon=True)
    taker.start()
    queue.finish(first.batch)
    taker.join(PATIENCE_S)
    assert [each.size_bytes for each in got[0].batch] == [1]  # type: ignore[attr-defined]
    queue.finish(got[0].batch)  # type: ignore[attr-defined]
    assert queue.take() is None


def test_a_lone_request_may_be_run_by_the_thread_that_offers_it() -> None:
    queue = shared()
    waits = threading.Thread(target=queue.take, daemon=True)
    waits.start()
    eventually(lambda: queue._idle_takers == 1, "a taker is idle")
    lone = request(1)
    assert queue.offer_and_take(lone) == (None, [lone])
    queue.finish([lone])
    queue.give_back()
    queue.drain()
    waits.join(PATIENCE_S)
    assert not waits.is_alive()


def test_the_timer_ends_idle_sequences_and_their_slots_go_to_those_that_wait() -> None:
    queue = shared(rows=1, idle_ns=20 * MS)
    timer = ExpiryTimer()
    try:
        timer.register(queue, lambda expired: None)
        first, second = request(1), request(2)
        queue.offer(first)
        taken = queue.take()
        assert taken is not None
        queue.finish(taken.batch)
        queue.offer(second)
        taken = queue.take(timeout_ns=int(PATIENCE_S * 1e9))
        assert taken is not None
        assert taken.batch == [second]
        queue.finish(taken.batch)
        eventually(lambda: queue.live == 0, "the second is idle too")
    finally:
        timer.stop()


def test_whoever_frees_a_slot_wakes_a_taker() -> None:
    clock_ns = [0]
    queue = shared(rows=1, idle_ns=10, clock_ns=clock_ns)
    first, second = request(1), request(2)
    queue.offer(first)
    assert queue.take() is not None
    queue.finish([first])
    queue.offer(second)
    assert not queue.cancel(first)
    clock_ns[0] = 10
    assert queue.expire() == []
    taken = queue.take()
    assert taken is not None
    assert taken.batch == [second]


def test_who_wants_to_know_is_told_of_each_batch_in_the_order_in_which_they_are_taken() -> None:
    told: list[list[Request]] = []
    policy = SequencePolicy(queue=QueuePolicy(max_batch_rows=1, batching=True), max_idle_ns=MS, max_candidates=4)
    queue: SequenceQueue[Request] = SequenceQueue(policy, lambda: 0, on_taken=told.append)
    first, second = request(1), request(2)
    queue.offer_many([first, second])
    assert queue.take() is not None
    assert queue.take() is not None
    assert queue.take(timeout_ns=0) is not None, "nothing is left"
    assert told == [[first], [second]]
