"""An instance that waits a moment after a run for the clients whom it has just answered, where that pays."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_batching import Anticipation
from sluice_server.execution.instance import Instance

if TYPE_CHECKING:
    from sluice_batching import BatchQueue, QueuePolicy, Taken
    from sluice_server.execution.batch_curve import BatchCurve
    from sluice_server.execution.instance import BatchRunner, Runnable
    from sluice_server.execution.request import InferRequest


def anticipation_of(curve: BatchCurve | None, policy: QueuePolicy) -> Anticipation | None:
    """What a model's only instance learns to wait with; None where it has nothing to wait for.

    Nor where the configuration says itself when batches go, by a delay or by preferred sizes.
    """
    if curve is None or not curve.points or policy.max_delay_ns or policy.preferred_batch_rows:
        return None
    anticipation = Anticipation([(point.rows, point.rows / point.rows_per_s * 1e9) for point in curve.points])
    return anticipation if anticipation.can_pay(policy.most_merged_rows) else None


class AnticipatingInstance(Instance):
    """The only instance of a model whose large batches take clearly less time than two of half the size."""

    def __init__(
        self,
        name: str,
        queue: BatchQueue[InferRequest],
        session: Runnable,
        runner: BatchRunner,
        anticipation: Anticipation,
    ) -> None:
        super().__init__(name, queue, session, runner)
        self._anticipation = anticipation
        self._ran_rows = 0

    def _next(self) -> Taken[InferRequest] | None:
        """As of any instance, after the wait."""
        if not self._answers:
            return super()._next()
        waiting_rows = self._queue.rows
        company = self._anticipation.expect(self._ran_rows, waiting_rows, self._queue.merge_rows)
        if company is None:
            return super()._next()
        self._runner.send(self._answers)
        self._anticipation.note(company, waiting_rows, self._queue.gather(*company))
        return self._queue.take()

    def _run(self, batch: list[InferRequest]) -> None:
        self._ran_rows = sum([request.rows for request in batch])
        super()._run(batch)
