"""Instances: threads that pull a batch whenever they are free, run it, and answer each request on its own.

Many share one session. A batch of one request runs on the request's own views of the received bytes; a larger one is
gathered into new arrays, which is the only copy on the way in. When a merged batch fails, it is halved until the
guilty requests are alone, so that a bad value never takes its neighbours down; that makes at most twice as many runs
as there are requests.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sluice_server.errors import BackendError, DeadlineExceeded, Internal, SluiceError
from sluice_server.observability.statistics import FailureReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice_batching import BatchQueue
    from typing_extensions import Buffer

    from sluice_server.execution.request import InferRequest
    from sluice_server.observability.statistics import ModelStatistics
    from sluice_server.status import StatusMapper

logger = logging.getLogger(__name__)


class Runnable(Protocol):
    """What an instance needs of a session."""

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Compute outputs; `BackendError` when the model fails on these inputs."""


class Encode(Protocol):
    """What an instance needs to answer: the parts of a response message."""

    def __call__(self, request_id: str, names: tuple[str, ...], arrays: Sequence[np.ndarray]) -> list[Buffer]:
        """Encode one answer."""


class BatchRunner:
    """Runs batches of one model version and resolves every request of them; used by all its instances at once."""

    def __init__(
        self,
        encode: Encode,
        statistics: ModelStatistics,
        to_status: StatusMapper,
        *,
        has_batch_dimension: bool,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._encode = encode
        self._statistics = statistics
        self._to_status = to_status
        self._has_batch_dimension = has_batch_dimension
        self._clock = clock

    def run(self, session: Runnable, batch: list[InferRequest]) -> None:
        """Run a batch of requests with equal keys; each of them has its answer or its error when this returns."""
        started_ns = self._clock()
        names = batch[0].output_names
        try:
            feeds = gather(batch)
            gathered_ns = self._clock()
            outputs = session.run(names, feeds)
            computed_ns = self._clock()
            answers = [
                self._encode(request.id, names, arrays) for request, arrays in self._scatter(batch, names, outputs)
            ]
        except SluiceError as error:
            if len(batch) == 1:
                backend = isinstance(error, BackendError)
                self._fail(batch, error, FailureReason.BACKEND if backend else FailureReason.OTHER)
                return
            middle = len(batch) // 2
            self.run(session, batch[:middle])
            self.run(session, batch[middle:])
            return
        except Exception as error:
            self._fail(batch, error, FailureReason.OTHER)
            return
        self._record(batch, started_ns, gathered_ns, computed_ns)
        for request, parts in zip(batch, answers, strict=True):
            request.call.reply(parts)

    def give_up(self, batch: Sequence[InferRequest], error: Exception) -> None:
        """End whatever of a batch has not ended; what has is counted already, and a second end has no effect."""
        status = self._to_status(error)
        for request in batch:
            request.call.fail(status)

    def expire(self, requests: Sequence[InferRequest]) -> None:
        """Answer requests whose time was up while they waited."""
        self._fail(requests, DeadlineExceeded("Request timeout expired"), FailureReason.REJECTED)

    def _scatter(
        self, batch: list[InferRequest], names: tuple[str, ...], outputs: list[np.ndarray]
    ) -> list[tuple[InferRequest, list[np.ndarray]]]:
        """Each request with its own rows of every output, as views."""
        if self._has_batch_dimension:
            rows = sum(request.rows for request in batch)
            for name, array in zip(names, outputs, strict=True):
                if not array.ndim or array.shape[0] != rows:
                    raise Internal(
                        f"output '{name}' came out with shape {list(array.shape)} for {rows} rows: the model does not"
                        " keep one row per input row; set max_batch_size to 0"
                    )
        if len(batch) == 1:
            return [(batch[0], outputs)]
        shares = []
        start = 0
        for request in batch:
            stop = start + request.rows
            shares.append((request, [array[start:stop] for array in outputs]))
            start = stop
        return shares

    def _record(self, batch: list[InferRequest], started_ns: int, gathered_ns: int, computed_ns: int) -> None:
        ended_ns = self._clock()
        rows = queue_ns = total_ns = 0
        for request in batch:
            rows += request.rows
            queue_ns += started_ns - request.enqueued_ns
            total_ns += ended_ns - request.call.received_ns
        self._statistics.record_batch(
            rows=rows,
            requests=len(batch),
            total_ns=total_ns,
            queue_ns=queue_ns,
            compute_input_ns=gathered_ns - started_ns,
            compute_infer_ns=computed_ns - gathered_ns,
            compute_output_ns=ended_ns - computed_ns,
        )
        for request in batch:
            if request.call.sampled:
                request.call.describe(
                    batch_rows=rows,
                    enqueued_ns=request.enqueued_ns,
                    started_ns=started_ns,
                    compute_input_ns=gathered_ns - started_ns,
                    compute_infer_ns=computed_ns - gathered_ns,
                    compute_output_ns=ended_ns - computed_ns,
                )

    def _fail(self, requests: Sequence[InferRequest], error: Exception, reason: FailureReason) -> None:
        now_ns = self._clock()
        total_ns = sum(now_ns - request.call.received_ns for request in requests)
        self._statistics.record_failure(reason, requests=len(requests), total_ns=total_ns)
        status = self._to_status(error)
        for request in requests:
            request.call.fail(status)


class Instance:
    """One thread of one model version."""

    def __init__(self, name: str, queue: BatchQueue[InferRequest], session: Runnable, runner: BatchRunner) -> None:
        self._queue = queue
        self._session = session
        self._runner = runner
        self._thread = threading.Thread(target=self._pull, name=name, daemon=True)

    def start(self) -> None:
        """Begin to pull."""
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the queue is closed and empty and the last batch is answered; False when time ran out first."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _pull(self) -> None:
        while (taken := self._queue.take()) is not None:
            if taken.expired:
                self._runner.expire(taken.expired)
            if taken.batch:
                self._run(taken.batch)
            # Nothing of the batch may stay alive while this thread waits for the next one.
            del taken

    def _run(self, batch: list[InferRequest]) -> None:
        try:
            self._runner.run(self._session, batch)
        except Exception as error:
            # No memory for an answer, or a bug: the requests behind this batch need the thread all the same.
            self._runner.give_up(batch, error)


def gather(batch: list[InferRequest]) -> dict[str, np.ndarray]:
    """The model's inputs for a batch: one request's own views, or the rows of all in the order of the batch."""
    if len(batch) == 1:
        return batch[0].arrays
    return {name: np.concatenate([request.arrays[name] for request in batch]) for name in batch[0].arrays}
