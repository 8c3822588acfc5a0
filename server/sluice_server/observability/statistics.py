"""Counts what became of every request to one model version; ModelStatistics and /metrics both read it from here.

Instance threads call `record_batch` once per executed batch; any thread may call the other methods. One lock guards
all counters, and it is held for a few additions only. A version that is loaded gets a new object, so its counts start
at zero. Which counter means what is Triton's rule (compatibility: statistics), with one addition: *every* request
ends in exactly one `Outcome`, also those that Triton counts nowhere.

    counted by        outcomes                                                        also in Triton's statistics
    record_batch      ok                                                              success, queue, compute_*
    record_cache_hits ok                                                              success, queue, cache_hit
    record_failure    backend_error, queue_timeout, cancelled, other                  fail
    record_refused    queue_full, invalid, unavailable; any but ok, before the queue  nowhere
"""

import enum
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sluice_proto import grpc_service_pb2
from sluice_server.observability.latencies import Latencies

_NS_PER_MS = 1_000_000


class FailureReason(enum.StrEnum):
    """Why an accepted request failed; the values are the `reason` label of `nv_inference_request_failure`."""

    REJECTED = "REJECTED"
    """Its time was up while it waited in the queue."""
    CANCELED = "CANCELED"
    """The client went away while it waited in the queue."""
    BACKEND = "BACKEND"
    """ONNX Runtime failed to run it."""
    OTHER = "OTHER"
    """Everything else, such as an answer that could not be encoded."""


class Outcome(enum.StrEnum):
    """How a request ended; the values are the `outcome` label of `sluice_requests_total`."""

    OK = "ok"
    BACKEND_ERROR = "backend_error"
    QUEUE_TIMEOUT = "queue_timeout"
    CANCELLED = "cancelled"
    QUEUE_FULL = "queue_full"
    INVALID = "invalid"
    UNAVAILABLE = "unavailable"
    OTHER = "other"


_OUTCOME_OF_FAILURE = {
    FailureReason.REJECTED: Outcome.QUEUE_TIMEOUT,
    FailureReason.CANCELED: Outcome.CANCELLED,
    FailureReason.BACKEND: Outcome.BACKEND_ERROR,
    FailureReason.OTHER: Outcome.OTHER,
}


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happened and how long it took in all."""

    count: int
    ns: int


NEVER = Duration(0, 0)
"""Of what has not happened."""


@dataclass(frozen=True, slots=True)
class BatchDurations:
    """All executions of one batch size, with the nanoseconds they took in all."""

    rows: int
    count: int
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int


@dataclass(frozen=True, slots=True)
class CacheCounts:
    """What the response cache did for one model version.

    `hit` counts the requests that were answered without a run of their own, `miss` those that were not found; the times
    are those of looking up and, for a miss, of keeping the answer. `coalesced` of the hits waited for the run of an
    equal request that was in flight; `skipped` of the misses were not looked up, as next to nothing was found.
    """

    hit: Duration
    miss: Duration
    coalesced: int
    skipped: int


@dataclass(frozen=True, slots=True)
class ModelSnapshot:
    """The counters of one model version at one moment; they agree with each other.

    `inference_count` is in rows, `execution_count` in batches, the durations in requests. `batches` is in order of
    rows. `failures` has every reason and `outcomes` every outcome, zeros included. `cache` is None without a response
    cache; hits are in `success` and `queue`, and in nothing of what executions count.
    """

    inference_count: int
    execution_count: int
    last_inference_ms: int
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    batches: tuple[BatchDurations, ...]
    failures: Mapping[FailureReason, int]
    outcomes: Mapping[Outcome, int]
    cache: CacheCounts | None = None


class ModelStatistics:
    """The counters of one model version. `wall_ns` gives nanoseconds since the epoch, for `last_inference`.

    `latencies` are the distributions that a server may have been asked for: who records a batch records it there too.
    `caches` is whether it has a response cache.
    """

    __slots__ = (
        "_batches",
        "_cache_hit_ns",
        "_cache_hits",
        "_cache_miss_ns",
        "_cache_misses",
        "_cache_skipped",
        "_caches",
        "_coalesced",
        "_compute_infer_ns",
        "_compute_input_ns",
        "_compute_output_ns",
        "_executions",
        "_fail_ns",
        "_failures",
        "_last_inference_ns",
        "_lock",
        "_queue_ns",
        "_refused",
        "_requests",
        "_rows",
        "_success_ns",
        "_wall_ns",
        "latencies",
    )

    def __init__(
        self,
        *,
        wall_ns: Callable[[], int] = time.time_ns,
        latencies: Latencies | None = None,
        caches: bool = False,
    ) -> None:
        self.latencies = latencies
        self._wall_ns = wall_ns
        self._caches = caches
        self._cache_hits = self._cache_hit_ns = self._coalesced = 0
        self._cache_misses = self._cache_miss_ns = self._cache_skipped = 0
        self._lock = threading.Lock()
        self._rows = self._executions = self._requests = self._last_inference_ns = 0
        self._success_ns = self._queue_ns = self._fail_ns = 0
        self._compute_input_ns = self._compute_infer_ns = self._compute_output_ns = 0
        # batch rows -> [executions, input ns, infer ns, output ns]; no more entries than max_batch_size
        self._batches: dict[int, list[int]] = {}
        self._failures: dict[FailureReason, int] = dict.fromkeys(FailureReason, 0)
        self._refused: dict[Outcome, int] = {outcome: 0 for outcome in Outcome if outcome is not Outcome.OK}

    def record_batch(
        self,
        *,
        rows: int,
        requests: int,
        total_ns: int,
        queue_ns: int,
        compute_input_ns: int,
        compute_infer_ns: int,
        compute_output_ns: int,
    ) -> None:
        """Count one executed batch, all of whose `requests` were answered.

        `total_ns` (time in the server) and `queue_ns` (enqueue to start of execution) are sums over the requests;
        the compute times are the batch's own, and each of its requests is charged with the whole of them.
        `rows` is the batch size that was executed: 1 for a model without a batch dimension.
        """
        now_ns = self._wall_ns()
        with self._lock:
            self._executions += 1
            self._rows += rows
            self._requests += requests
            self._last_inference_ns = now_ns
            self._success_ns += total_ns
            self._queue_ns += queue_ns
            self._compute_input_ns += compute_input_ns * requests
            self._compute_infer_ns += compute_infer_ns * requests
            self._compute_output_ns += compute_output_ns * requests
            batch = self._batches.get(rows)
            if batch is None:
                batch = self._batches[rows] = [0, 0, 0, 0]
            batch[0] += 1
            batch[1] += compute_input_ns
            batch[2] += compute_infer_ns
            batch[3] += compute_output_ns

    def record_cache_lookups(self, misses: int, *, miss_ns: int, hit_ns: int) -> None:
        """Count requests that were not found, and time that lookups took; hits are counted when they are answered."""
        with self._lock:
            self._cache_misses += misses
            self._cache_miss_ns += miss_ns
            self._cache_hit_ns += hit_ns

    def record_cache_skipped(self, misses: int) -> None:
        """Count requests that were not looked up."""
        with self._lock:
            self._cache_misses += misses
            self._cache_skipped += misses

    def record_cache_hits(self, requests: int, *, total_ns: int, queue_ns: int, coalesced: bool) -> None:
        """Count requests that were answered without a run of their own; the times as in `record_batch`.

        With `coalesced` they waited for the run of another, which is in `queue_ns`.
        """
        with self._lock:
            self._cache_hits += requests
            self._coalesced += requests if coalesced else 0
            self._success_ns += total_ns
            self._queue_ns += queue_ns

    def record_failure(self, reason: FailureReason, *, requests: int = 1, total_ns: int = 0) -> None:
        """Count accepted requests that failed; `total_ns` is the sum of the time that they were in the server."""
        with self._lock:
            self._failures[reason] += requests
            self._fail_ns += total_ns

    def record_refused(self, outcome: Outcome) -> None:
        """Count a request that ended before it was in the queue: any outcome but OK.

        A full queue is QUEUE_FULL, a request that validation refuses INVALID, one whose deadline was over when it
        came QUEUE_TIMEOUT, one that came while the model drains UNAVAILABLE.
        """
        with self._lock:
            self._refused[outcome] += 1

    def snapshot(self) -> ModelSnapshot:
        """Give all counters as they are now, from one moment."""
        with self._lock:
            requests = self._requests
            answered = requests + self._cache_hits
            failures = dict(self._failures)
            return ModelSnapshot(
                inference_count=self._rows,
                execution_count=self._executions,
                last_inference_ms=self._last_inference_ns // _NS_PER_MS,
                success=Duration(answered, self._success_ns),
                fail=Duration(sum(failures.values()), self._fail_ns),
                queue=Duration(answered, self._queue_ns),
                compute_input=Duration(requests, self._compute_input_ns),
                compute_infer=Duration(requests, self._compute_infer_ns),
                compute_output=Duration(requests, self._compute_output_ns),
                batches=tuple(BatchDurations(rows, *entry) for rows, entry in sorted(self._batches.items())),
                failures=MappingProxyType(failures),
                outcomes=MappingProxyType(self._outcomes(answered)),
                cache=self._cache_counts() if self._caches else None,
            )

    def outcomes(self) -> dict[str, int]:
        """Give the number of requests by how they ended, every outcome present."""
        with self._lock:
            answered = self._requests + self._cache_hits
            return {str(outcome): count for outcome, count in self._outcomes(answered).items()}

    def _cache_counts(self) -> CacheCounts:
        return CacheCounts(
            hit=Duration(self._cache_hits, self._cache_hit_ns),
            miss=Duration(self._cache_misses, self._cache_miss_ns),
            coalesced=self._coalesced,
            skipped=self._cache_skipped,
        )

    def _outcomes(self, ok: int) -> dict[Outcome, int]:
        counts: dict[Outcome, int] = {Outcome.OK: ok}
        counts.update(self._refused)
        for reason, count in self._failures.items():
            counts[_OUTCOME_OF_FAILURE[reason]] += count
        return counts


def to_proto(name: str, version: str, snapshot: ModelSnapshot) -> grpc_service_pb2.ModelStatistics:
    """Give the protocol's message for one model version."""
    duration = grpc_service_pb2.StatisticDuration
    hit, miss = (snapshot.cache.hit, snapshot.cache.miss) if snapshot.cache else (NEVER, NEVER)
    return grpc_service_pb2.ModelStatistics(
        name=name,
        version=version,
        last_inference=snapshot.last_inference_ms,
        inference_count=snapshot.inference_count,
        execution_count=snapshot.execution_count,
        inference_stats=grpc_service_pb2.InferStatistics(
            success=duration(count=snapshot.success.count, ns=snapshot.success.ns),
            fail=duration(count=snapshot.fail.count, ns=snapshot.fail.ns),
            queue=duration(count=snapshot.queue.count, ns=snapshot.queue.ns),
            compute_input=duration(count=snapshot.compute_input.count, ns=snapshot.compute_input.ns),
            compute_infer=duration(count=snapshot.compute_infer.count, ns=snapshot.compute_infer.ns),
            compute_output=duration(count=snapshot.compute_output.count, ns=snapshot.compute_output.ns),
            # present and zero without a response cache
            cache_hit=duration(count=hit.count, ns=hit.ns),
            cache_miss=duration(count=miss.count, ns=miss.ns),
        ),
        batch_stats=[
            grpc_service_pb2.InferBatchStatistics(
                batch_size=batch.rows,
                compute_input=duration(count=batch.count, ns=batch.compute_input_ns),
                compute_infer=duration(count=batch.count, ns=batch.compute_infer_ns),
                compute_output=duration(count=batch.count, ns=batch.compute_output_ns),
            )
            for batch in snapshot.batches
        ],
    )
