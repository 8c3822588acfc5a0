"""What the counters of a model version say after batches, failures and refusals; the rules are Triton's."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_server.observability.statistics import (
    BatchDurations,
    CacheCounts,
    Duration,
    FailureReason,
    ModelStatistics,
    Outcome,
    to_proto,
)

WALL_NS = 1_700_000_000_123_456_789


def new_statistics() -> ModelStatistics:
    return ModelStatistics(wall_ns=lambda: WALL_NS)


def record(statistics: ModelStatistics, *, rows: int = 1, requests: int = 1) -> None:
    statistics.record_batch(
        rows=rows,
        requests=requests,
        total_ns=1000 * requests,
        queue_ns=100 * requests,
        compute_input_ns=10,
        compute_infer_ns=500,
        compute_output_ns=20,
    )


def test_a_new_version_has_counted_nothing() -> None:
    snapshot = new_statistics().snapshot()
    assert (snapshot.inference_count, snapshot.execution_count, snapshot.last_inference_ms) == (0, 0, 0)
    assert snapshot.success == snapshot.fail == snapshot.queue == Duration(0, 0)
    assert snapshot.batches == ()
    assert snapshot.failures == dict.fromkeys(FailureReason, 0)
    assert snapshot.outcomes == dict.fromkeys(Outcome, 0)


def test_a_batch_adds_its_compute_time_to_each_of_its_requests() -> None:
    statistics = new_statistics()
    record(statistics, rows=6, requests=4)
    snapshot = statistics.snapshot()
    assert (snapshot.inference_count, snapshot.execution_count) == (6, 1)
    assert snapshot.last_inference_ms == 1_700_000_000_123
    assert snapshot.success == Duration(4, 4000)
    assert snapshot.queue == Duration(4, 400)
    assert snapshot.compute_input == Duration(4, 40)
    assert snapshot.compute_infer == Duration(4, 2000)
    assert snapshot.compute_output == Duration(4, 80)


def test_batch_sizes_are_counted_by_execution_in_order_of_rows() -> None:
    statistics = new_statistics()
    for rows in (4, 1, 4):
        record(statistics, rows=rows)
    assert statistics.snapshot().batches == (
        BatchDurations(1, 1, 10, 500, 20),
        BatchDurations(4, 2, 20, 1000, 40),
    )


def test_hits_count_as_answered_and_queued_and_in_nothing_of_what_executions_count() -> None:
    statistics = ModelStatistics(wall_ns=lambda: WALL_NS, caches=True)
    record(statistics, rows=2, requests=2)
    statistics.record_cache_lookups(2, miss_ns=50, hit_ns=30)
    statistics.record_cache_skipped(4)
    statistics.record_cache_hits(3, total_ns=600, queue_ns=0, coalesced=False)
    statistics.record_cache_hits(1, total_ns=400, queue_ns=90, coalesced=True)
    snapshot = statistics.snapshot()
    assert snapshot.success == Duration(6, 3000)
    assert snapshot.queue == Duration(6, 290)
    assert snapshot.compute_infer == Duration(2, 1000)
    assert (snapshot.inference_count, snapshot.execution_count) == (2, 1)
    assert snapshot.cache == CacheCounts(hit=Duration(4, 30), miss=Duration(6, 50), coalesced=1, skipped=4)
    assert snapshot.outcomes[Outcome.OK] == statistics.outcomes()["ok"] == 6
    told = to_proto("m", "1", snapshot).inference_stats
    assert (told.cache_hit.count, told.cache_hit.ns, told.cache_miss.count, told.cache_miss.ns) == (4, 30, 6, 50)


def test_without_a_cache_nothing_is_said_of_one() -> None:
    snapshot = new_statistics().snapshot()
    assert snapshot.cache is None
    assert to_proto("m", "1", snapshot).inference_stats.cache_miss.count == 0


def test_a_failure_counts_its_reason_and_its_time_but_no_inference() -> None:
    statistics = new_statistics()
    statistics.record_failure(FailureReason.BACKEND, requests=3, total_ns=600)
    statistics.record_failure(FailureReason.REJECTED, total_ns=50)
    snapshot = statistics.snapshot()
    assert snapshot.fail == Duration(4, 650)
    assert snapshot.failures == {
        FailureReason.REJECTED: 1,
        FailureReason.CANCELED: 0,
        FailureReason.BACKEND: 3,
        FailureReason.OTHER: 0,
    }
    assert (snapshot.inference_count, snapshot.success, snapshot.last_inference_ms) == (0, Duration(0, 0), 0)


def test_a_refused_request_has_an_outcome_and_is_in_none_of_tritons_counters() -> None:
    statistics = new_statistics()
    refusals = [outcome for outcome in Outcome if outcome is not Outcome.OK]
    for outcome in refusals:
        statistics.record_refused(outcome)
    snapshot = statistics.snapshot()
    assert snapshot.outcomes == {Outcome.OK: 0, **dict.fromkeys(refusals, 1)}
    assert snapshot.fail == Duration(0, 0)
    assert sum(snapshot.failures.values()) == 0


def test_ok_is_no_refusal() -> None:
    with pytest.raises(KeyError):
        new_statistics().record_refused(Outcome.OK)


def test_outcomes_are_keyed_by_the_names_that_the_metrics_show() -> None:
    statistics = new_statistics()
    record(statistics, requests=2)
    statistics.record_failure(FailureReason.CANCELED)
    statistics.record_refused(Outcome.QUEUE_FULL)
    assert statistics.outcomes() == {
        "ok": 2,
        "backend_error": 0,
        "queue_timeout": 0,
        "cancelled": 1,
        "queue_full": 1,
        "invalid": 0,
        "unavailable": 0,
        "other": 0,
    }


def test_a_snapshot_does_not_change_afterwards() -> None:
    statistics = new_statistics()
    record(statistics)
    before = statistics.snapshot()
    record(statistics)
    statistics.record_failure(FailureReason.OTHER)
    assert before.batches == (BatchDurations(1, 1, 10, 500, 20),)
    assert before.outcomes[Outcome.OK] == 1
    assert before.failures[FailureReason.OTHER] == 0


def test_nothing_is_lost_when_threads_count_at_once() -> None:
    statistics = new_statistics()
    start = threading.Barrier(4)

    def count() -> None:
        start.wait()
        for _ in range(500):
            record(statistics, rows=2, requests=2)
            statistics.record_failure(FailureReason.OTHER, total_ns=1)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    snapshot = statistics.snapshot()
    assert (snapshot.execution_count, snapshot.inference_count) == (2000, 4000)
    assert snapshot.fail == Duration(2000, 2000)
    assert snapshot.batches[0].count == 2000


def test_the_protocols_message_carries_every_counter() -> None:
    statistics = new_statistics()
    record(statistics, rows=3, requests=2)
    statistics.record_failure(FailureReason.BACKEND, total_ns=77)
    message = to_proto("digits", "2", statistics.snapshot())
    assert (message.name, message.version) == ("digits", "2")
    assert (message.inference_count, message.execution_count) == (3, 1)
    assert message.last_inference == 1_700_000_000_123
    stats = message.inference_stats
    assert (stats.success.count, stats.success.ns) == (2, 2000)
    assert (stats.fail.count, stats.fail.ns) == (1, 77)
    assert (stats.queue.count, stats.queue.ns) == (2, 200)
    assert (stats.compute_input.count, stats.compute_input.ns) == (2, 20)
    assert (stats.compute_infer.count, stats.compute_infer.ns) == (2, 1000)
    assert (stats.compute_output.count, stats.compute_output.ns) == (2, 40)
    assert stats.HasField("cache_hit")
    assert stats.HasField("cache_miss")
    (batch,) = message.batch_stats
    assert batch.batch_size == 3
    assert (batch.compute_input.count, batch.compute_input.ns) == (1, 10)
    assert (batch.compute_infer.count, batch.compute_infer.ns) == (1, 500)
    assert (batch.compute_output.count, batch.compute_output.ns) == (1, 20)


@given(st.lists(st.tuples(st.integers(1, 64), st.integers(1, 8)), max_size=50))
def test_batch_sizes_add_up_to_the_totals(batches: list[tuple[int, int]]) -> None:
    statistics = new_statistics()
    for rows, requests in batches:
        record(statistics, rows=rows, requests=requests)
    snapshot = statistics.snapshot()
    assert sum(batch.rows * batch.count for batch in snapshot.batches) == snapshot.inference_count
    assert sum(batch.count for batch in snapshot.batches) == snapshot.execution_count
    assert sum(snapshot.outcomes.values()) == snapshot.success.count == sum(requests for _, requests in batches)
