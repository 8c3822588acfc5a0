"""One served model version: its interface, its queue, the instances that pull from it, and its counters."""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING

from sluice_batching import Draining
from sluice_server.execution.refusals import refusal_of
from sluice_server.execution.run_watch import RunWatch
from sluice_server.execution.served import Served, Waiting
from sluice_server.observability.statistics import FailureReason

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice_batching import BatchingError, BatchQueue, ExpiryTimer
    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.errors import SluiceError
    from sluice_server.execution.batch_curve import BatchCurve
    from sluice_server.execution.instance import BatchRunner, Instance, Runnable
    from sluice_server.execution.request import InferRequest
    from sluice_server.observability.statistics import ModelStatistics
    from sluice_server.protocol.interface import ModelInterface
    from sluice_server.status import StatusMapper


class ServedModel(Served):
    """A loaded version of a model, ready to take requests from any thread. Made by the loader, started once."""

    def __init__(
        self,
        config: ModelConfig,
        interface: ModelInterface,
        queue: BatchQueue[InferRequest],
        instances: Sequence[Instance],
        runner: BatchRunner,
        statistics: ModelStatistics,
        to_status: StatusMapper,
        timer: ExpiryTimer,
        *,
        properties: dict[str, str],
        common_session: Runnable | None = None,
        notice: str = "",
        curve: BatchCurve | None = None,
        is_tuned: bool = False,
    ) -> None:
        """`common_session` is the one that all instances share; None when they are on several devices. `notice` is
        what RepositoryIndex says of the version while it is ready, `curve` the rates of its batch sizes, `is_tuned`
        whether its queue is tuned to an objective.
        """
        self.config = config
        self.interface = interface
        self.queue = queue
        self.statistics = statistics
        self.properties = properties
        self.notice = notice
        self.is_tuned = is_tuned
        self.batch_rates = () if curve is None else tuple((at.rows, at.rows_per_s) for at in curve.points)
        self._instances = instances
        self._runner = runner
        self._to_status = to_status
        self._timer = timer
        self._common_session = common_session
        # Of everybody who runs batches of this version; and those of them that nobody uses now, for lone requests.
        self._watches = [instance.watch for instance in instances]
        self._spare_watches: list[RunWatch] = []

    def __repr__(self) -> str:
        return f"<ServedModel {self.interface.name}/{self.interface.version} {self.queue!r}>"

    def start(self) -> None:
        """Let the instances pull, and have expired requests answered while all of them are busy."""
        self._timer.register(self.queue, self._runner.expire)
        for instance in self._instances:
            instance.start()

    def submit(self, requests: Sequence[InferRequest]) -> list[InferRequest]:
        """Queue requests; each is answered later, or here when it is refused.

        Returns those that came too late because this version is being unloaded: the caller finds the version that
        took its place.
        """
        for request in requests:
            request.model = self
            request.call.on_cancel = request.cancel
        errors = self.queue.offer_many(requests)
        late: list[InferRequest] = []
        if not any(errors):
            return late
        for request, error in zip(requests, errors, strict=True):
            if error is None:
                continue
            if isinstance(error, Draining):
                late.append(request)
            else:
                self._refuse(request, error)
        return late

    def submit_one(self, request: InferRequest) -> tuple[list[InferRequest], Callable[[], None] | None]:
        """Queue one request as `submit` does, or give its batch to be run by the caller, in place of an idle instance.

        Returns what came too late, and what the caller is to do, soon; it never raises. A lone request that its
        thread runs itself is answered sooner: waking an instance takes longer than a small model.
        """
        session = self._common_session
        if session is None:
            return self.submit((request,)), None
        request.model = self
        request.call.on_cancel = request.cancel
        error, batch = self.queue.offer_and_take(request)
        if batch:
            return [], functools.partial(self._run_in_place, session, batch)
        if isinstance(error, Draining):
            return [request], None
        if error is not None:
            self._refuse(request, error)
        return [], None

    def _run_in_place(self, session: Runnable, batch: list[InferRequest]) -> None:
        try:
            watch = self._spare_watches.pop()
        except IndexError:
            watch = RunWatch(session)
            self._watches.append(watch)
        watch.batch = batch
        try:
            self._runner.run_and_send(watch.session, batch)
        finally:
            watch.end()
            self._spare_watches.append(watch)
            self.queue.give_back()

    def cancel(self, request: InferRequest) -> bool:
        """Take a request out of the queue; False when it runs or has ended.

        A run ends early when this was the last request that waited for it.
        """
        if not self.queue.cancel(request):
            for watch in self._watches:
                if watch.leave(request):
                    break
            return False
        total_ns = time.monotonic_ns() - request.call.received_ns
        self.statistics.record_failure(FailureReason.CANCELED, total_ns=total_ns)
        return True

    def answers_in_arrays(self) -> bool:
        """Answer the steps of ensembles from now on; whether with arrays."""
        return self._runner.serve_steps(self.interface, arrays=True)

    @property
    def merge_rows(self) -> int:
        """Up to how many rows requests are merged now, where that was measured or is tuned; else 0."""
        return self.queue.merge_rows if self.batch_rates or self.is_tuned else 0

    def waiting(self) -> Waiting:
        """What waits in the queue."""
        return Waiting(len(self.queue), self.queue.rows, self.queue.size_bytes)

    def drain(self) -> None:
        """Refuse new requests; what is queued is still run."""
        self.queue.drain()

    def join(self, timeout_s: float | None) -> bool:
        """Wait until everything that was accepted is answered; False when time ran out first. Needs `drain`.

        Until then the timer keeps the deadlines of what still waits, also after a wait that ran out of time.
        """
        until = None if timeout_s is None else time.monotonic() + timeout_s
        for instance in self._instances:
            if not instance.join(None if until is None else max(0.0, until - time.monotonic())):
                return False
        self._timer.unregister(self.queue)
        return True

    def _refuse(self, request: InferRequest, error: BatchingError) -> None:
        what = f"model '{self.interface.name}'"
        outcome, refusal = refusal_of(error, what, self.queue.predicted_wait_ns)
        self.statistics.record_refused(outcome)
        self._turn_away(request, refusal)

    def _turn_away(self, request: InferRequest, error: SluiceError) -> None:
        """Answer a request that is not accepted."""
        request.call.fail(self._to_status(error))
