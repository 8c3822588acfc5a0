"""Instances: threads that pull a batch whenever they are free, run it, and answer each request on its own.

Many share one session. A batch of one request runs on the request's own views of the received bytes; a larger one is
gathered into new arrays, which is the only copy on the way in. When a merged batch fails, it is halved until the
guilty requests are alone, so that a bad value never takes its neighbours down; that makes at most twice as many runs
as there are requests.
"""

from __future__ import annotations

import functools
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

import numpy as np

from sluice_batching import RunTimes
from sluice_server.errors import BackendError, Cancelled, DeadlineExceeded, Internal, SluiceError
from sluice_server.execution import shared_memory
from sluice_server.execution.run_watch import RunWatch
from sluice_server.execution.sending import collected
from sluice_server.execution.step import HandOver
from sluice_server.observability.statistics import FailureReason
from sluice_server.protocol.traced import TracedCall

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from typing_extensions import Buffer

    from sluice_batching import BatchQueue, Taken
    from sluice_server.execution.ordering import OrderedAnswers
    from sluice_server.execution.request import InferRequest
    from sluice_server.observability.statistics import ModelStatistics
    from sluice_server.protocol.interface import ModelInterface
    from sluice_server.status import Status, StatusMapper
    from sluice_server.transport.call import Call

SMALL_BATCH_BYTES = 1 << 20
"""Copying 1 MiB takes some 0.1 ms, which no client notices."""

WOULD_BE_LATE = "Request timeout expired: it was not run, as by the runs before it would have finished too late"
"""For requests whose deadline had not come yet. It begins as for those whose had, which tools look for."""

Answers = deque[tuple["Call", "list[Buffer]"]]
"""Calls with the parts of their answers, to be sent."""


class Runnable(Protocol):
    """What an instance needs of a session."""

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Compute outputs; `BackendError` when the model fails on these inputs."""


class Encode(Protocol):
    """What an instance needs to answer: the parts of the response messages."""

    def __call__(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[Buffer]]:
        """Encode the answers of a batch, in its order; `arrays` have the rows of all of its requests."""


class Gather(Protocol):
    """What an instance needs to run a batch: the model's inputs."""

    def __call__(self, batch: Sequence[InferRequest]) -> dict[str, np.ndarray]:
        """The inputs of a batch, with the rows of all of its requests in order."""


class Cut(Protocol):
    """What an instance needs to tell the outputs of a batch apart, where they are not just rows."""

    def __call__(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> Sequence[Sequence[np.ndarray]]:
        """Each request's own outputs, in the order of the batch."""


class BatchRunner:
    """Runs batches of one model version and resolves every request of them; used by all its instances at once."""

    def __init__(
        self,
        encode: Encode,
        statistics: ModelStatistics,
        to_status: StatusMapper,
        *,
        has_batch_dimension: bool,
        run_times: RunTimes | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
        gather: Gather | None = None,
        cut: Cut | None = None,
    ) -> None:
        """`run_times` is what the model's queue predicts from: every run is recorded in it. `gather` makes the model's
        inputs where they are not just the rows of the requests one behind the other, and `cut` tells its outputs apart
        where those are not; `encode` then checks their rows itself.
        """
        self._encode = encode
        self._gather: Gather = gather_rows if gather is None else gather
        self._statistics = statistics
        self._to_status = to_status
        self._run_times = run_times or RunTimes()
        self._cut = cut
        self._has_batch_dimension = has_batch_dimension and cut is None
        self._clock = clock
        self._serves_steps = False
        self._order: OrderedAnswers | None = None

    def keep_order(self, order: OrderedAnswers) -> None:
        """Send answers, and the failures of runs, in this order from now on; called once, before anything runs."""
        self._order = order
        order.send_with(self.send)
        self.send = order.send  # type: ignore[method-assign] # only who keeps an order pays for it

    def serve_steps(self, interface: ModelInterface, *, arrays: bool) -> bool:
        """Answer the steps of ensembles too from now on, with `arrays` where it is no use to encode the outputs.

        What a batch of them makes ready goes on as a batch. `interface` is the model's. Gives whether it is arrays:
        not where outputs are not just the rows of the requests one behind the other.
        """
        arrays = arrays and self._cut is None
        if self._serves_steps:
            return arrays
        self._serves_steps = True
        self.send = functools.partial(collected, self.send)  # type: ignore[method-assign] # only a part pays for it
        if arrays:
            self._encode = HandOver(self._encode, interface)
        return arrays

    def run(self, session: Runnable, batch: list[InferRequest], earlier: Answers) -> Answers:
        """Run a batch of requests with equal keys; give the answers that are left to send, the others have their error.

        `earlier`, the answers of the batch before, are sent when this batch is ready to run, or given back.
        """
        started_ns = self._clock()
        names = batch[0].output_names
        try:
            feeds = self._gather(batch)
            gathered_ns = self._clock()
            self.send(earlier)
            outputs = session.run(names, feeds)
            computed_ns = self._clock()
            if self._has_batch_dimension:
                check_outputs(batch, outputs)
            answers = self._encode(batch, outputs)
        except Cancelled as error:
            self._fail(batch, error, FailureReason.CANCELED)
            return earlier
        except SluiceError as error:
            if len(batch) == 1:
                backend = isinstance(error, BackendError)
                self._fail(batch, error, FailureReason.BACKEND if backend else FailureReason.OTHER)
                return earlier
            middle = len(batch) // 2
            return self.run(session, batch[middle:], self.run(session, batch[:middle], earlier))
        except Exception as error:
            self._fail(batch, error, FailureReason.OTHER)
            return earlier
        if self._record(batch, started_ns, gathered_ns, computed_ns):
            self._show(batch, feeds, outputs)
        return self._answered(batch, answers)

    def run_and_send(self, session: Runnable, batch: list[InferRequest]) -> None:
        """Run a batch and answer every request of it, whatever happens."""
        try:
            self.send(self.run(session, batch, deque()))
        except Exception as error:
            # A bug; whoever runs batches has other requests to see to.
            self.give_up(batch, error)

    def send(self, answers: Answers) -> None:
        """Send answers and forget each as it goes; one that cannot be made (no memory, say) ends with an error."""
        while answers:
            call, parts = answers.popleft()
            try:
                call.reply(parts)
            except Exception as error:
                call.fail(self._to_status(error))

    def give_up(self, batch: Sequence[InferRequest], error: Exception) -> None:
        """End whatever of a batch has not ended; what has is counted already, and a second end has no effect."""
        self._end_with(batch, self._to_status(error))

    def expire(self, requests: Sequence[InferRequest]) -> None:
        """Answer requests whose time was up while they waited, or would be before the end of a run."""
        now_ns = self._clock()
        expired = [request for request in requests if request.deadline_ns <= now_ns]
        if expired:
            self._fail(expired, DeadlineExceeded("Request timeout expired"), FailureReason.REJECTED)
        if len(expired) < len(requests):
            late = [request for request in requests if request.deadline_ns > now_ns]
            self._fail(late, DeadlineExceeded(WOULD_BE_LATE), FailureReason.REJECTED)

    def _answered(self, batch: list[InferRequest], answers: list[list[Buffer]]) -> Answers:
        """What is to be sent for a batch that has run."""
        return deque(zip([request.call for request in batch], answers, strict=True))

    def _record(
        self, batch: list[InferRequest], started_ns: int, gathered_ns: int, computed_ns: int, *, other_rows: int = 0
    ) -> bool:
        """Count the batch; whether any request of it is traced. `other_rows` ran with it, and count as no request."""
        ended_ns = self._clock()
        rows = other_rows
        queued_ns = received_ns = 0
        sampled = False
        for request in batch:
            rows += request.rows
            queued_ns += request.enqueued_ns
            received_ns += request.call.received_ns
            sampled |= request.call.sampled
        input_ns, infer_ns, output_ns = gathered_ns - started_ns, computed_ns - gathered_ns, ended_ns - computed_ns
        self._run_times.record(rows, ended_ns - started_ns, ended_ns)
        self._statistics.record_batch(
            rows=rows,
            requests=len(batch),
            total_ns=ended_ns * len(batch) - received_ns,
            queue_ns=started_ns * len(batch) - queued_ns,
            compute_input_ns=input_ns,
            compute_infer_ns=infer_ns,
            compute_output_ns=output_ns,
        )
        if self._statistics.latencies is not None:
            self._statistics.latencies.record(
                [ended_ns - request.call.received_ns for request in batch],
                [started_ns - request.enqueued_ns for request in batch],
                input_ns,
                infer_ns,
                output_ns,
            )
        if not sampled:
            return False
        for request in batch:
            request.call.describe(
                batch_rows=rows,
                enqueued_ns=request.enqueued_ns,
                started_ns=started_ns,
                compute_input_ns=input_ns,
                compute_infer_ns=infer_ns,
                compute_output_ns=output_ns,
            )
        return True

    def _show(self, batch: list[InferRequest], feeds: Mapping[str, np.ndarray], outputs: Sequence[np.ndarray]) -> None:
        """Let the traced requests see their own tensors; where feeds are no rows, those that came in messages."""
        whole = slice(None)
        row = 0
        cut = None if self._cut is None else self._cut(batch, outputs)
        for place, request in enumerate(batch):
            rows = whole if len(batch) == 1 else slice(row, row + request.rows)
            row += request.rows
            if isinstance(request.call, TracedCall):
                shown = {name: array[rows] for name, array in feeds.items()} if cut is None else request.arrays
                own = [array[rows] for array in outputs] if cut is None else cut[place]
                request.call.show("TENSOR_QUEUE_INPUT", shown.items())
                request.call.show("TENSOR_BACKEND_OUTPUT", zip(request.output_names, own, strict=True))

    def _fail(self, requests: Sequence[InferRequest], error: Exception, reason: FailureReason) -> None:
        now_ns = self._clock()
        total_ns = sum(now_ns - request.call.received_ns for request in requests)
        self._statistics.record_failure(reason, requests=len(requests), total_ns=total_ns)
        self._end_with(requests, self._to_status(error), at_once=reason is FailureReason.REJECTED)

    def _end_with(self, requests: Sequence[InferRequest], status: Status, *, at_once: bool = False) -> None:
        """Fail the calls of requests; `at_once`: whatever order is kept, as they have not run."""
        if self._order is not None and not at_once:
            self._order.fail(requests, status)
            return
        for request in requests:
            request.call.fail(status)
        if self._order is not None:
            self._order.leave(requests)


class Instance:
    """One thread of one model version.

    Where the next batch waits already, the answers of the last one are sent when the next is about to run: sending
    wakes the transport, and then both would want the interpreter at once while the model stands idle.
    """

    def __init__(self, name: str, queue: BatchQueue[InferRequest], session: Runnable, runner: BatchRunner) -> None:
        self.watch = RunWatch(session)
        self._queue = queue
        self._session = self.watch.session
        self._runner = runner
        self._answers: Answers = deque()
        self._thread = threading.Thread(target=self._pull, name=name, daemon=True)

    def start(self) -> None:
        """Begin to pull."""
        self._thread.start()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the queue is closed and empty and the last batch is answered; False when time ran out first."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _pull(self) -> None:
        while (taken := self._next()) is not None:
            if taken.expired:
                self._runner.expire(taken.expired)
            if taken.batch:
                self._run(taken.batch)
            # Nothing of the batch may stay alive while this thread waits for the next one.
            del taken

    def _next(self) -> Taken[InferRequest] | None:
        """Wait for the next batch, with no answer unsent."""
        if self._answers:
            taken = self._queue.take(timeout_ns=0)
            if taken is not None and taken.batch and is_small(taken.batch):
                return taken
            self._runner.send(self._answers)
            if taken is None or taken.batch or taken.expired:
                return taken
        return self._queue.take()

    def _run(self, batch: list[InferRequest]) -> None:
        self.watch.batch = batch
        try:
            self._answers = self._runner.run(self._session, batch, self._answers)
        except Exception as error:
            # A bug; the requests behind this batch need the thread all the same.
            self._runner.give_up(batch, error)
        finally:
            self.watch.end()


def is_small(batch: list[InferRequest]) -> bool:
    """Whether gathering the batch takes so little time that answers may wait for it."""
    return sum([request.size_bytes for request in batch]) <= SMALL_BATCH_BYTES


def check_rows(name: str, array: np.ndarray, rows: int) -> None:
    """Refuse an output without one row for each row of the batch: nobody could tell whose they are."""
    if not array.ndim or len(array) != rows:
        raise Internal(
            f"output '{name}' came out with shape {list(array.shape)} for {rows} rows: the model does not keep one"
            " row per input row; set max_batch_size to 0"
        )


def check_outputs(batch: list[InferRequest], outputs: Sequence[np.ndarray]) -> None:
    """As `check_rows`, for all outputs that a batch asks for."""
    rows = 0
    for request in batch:
        rows += request.rows
    for name, array in zip(batch[0].output_names, outputs, strict=True):
        check_rows(name, array, rows)


def gather_rows(batch: Sequence[InferRequest]) -> dict[str, np.ndarray]:
    """The model's inputs for a batch: one request's own views, or the rows of all in the order of the batch."""
    first = batch[0]
    if len(batch) == 1:
        feeds = first.arrays
    else:
        feeds = {name: np.concatenate([request.arrays[name] for request in batch]) for name in first.arrays}
    if first.shared is None:
        return feeds
    # Requests of a batch have the same inputs in shared memory.
    shared = [request.shared for request in batch if request.shared is not None]
    return feeds | {name: shared_memory.gather(name, shared) for name in first.shared.inputs}
