"""Instances that run only while the resources are free that their group's `rate_limiter` names.

The claims are read here, the turns are the limiter's. An instance waits for work first and for its turn next, and takes
its batch only then: what comes meanwhile is in it, and what expires meanwhile is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_batching import Claim, Resource, TooFewCopies
from sluice_server.execution.instance import Instance
from sluice_server.repository.errors import ModelLoadError

if TYPE_CHECKING:
    from sluice_batching import BatchQueue, RateLimiter, Taken
    from sluice_proto.model_config_pb2 import ModelRateLimiter
    from sluice_server.execution.instance import BatchRunner, Runnable
    from sluice_server.execution.request import InferRequest


def claim_of(limits: ModelRateLimiter, device: int, limiter: RateLimiter, model: str) -> Claim | None:
    """What an instance on this device (-1: the CPU) claims for each run, None for nothing.

    ModelLoadError when the server was started with fewer copies of a resource than that.
    """
    needs: dict[Resource, int] = {}
    for resource in limits.resources:
        if resource.count:
            needs[Resource(resource.name, None if getattr(resource, "global") else device)] = resource.count
    if not needs:
        return None
    claim = Claim(needs, max(1, limits.priority))
    try:
        limiter.check(claim)
    except TooFewCopies as error:
        raise ModelLoadError(
            f"model '{model}': its rate_limiter needs {error.needed} of resource '{error.resource.name}', and"
            f" --rate-limit-resource gives {error.copies}",
            model=model,
        ) from error
    return claim


class LimitedInstance(Instance):
    """An instance that asks for its turn before each batch."""

    def __init__(
        self,
        name: str,
        queue: BatchQueue[InferRequest],
        session: Runnable,
        runner: BatchRunner,
        limiter: RateLimiter,
        claim: Claim,
    ) -> None:
        super().__init__(name, queue, session, runner)
        self._limiter = limiter
        self._claim = claim

    def start(self) -> None:
        """Begin to pull; from here on the claim counts for what there is of its resources."""
        self._limiter.register(self._claim)
        super().start()

    def _pull(self) -> None:
        try:
            super()._pull()
        finally:
            self._limiter.unregister(self._claim)

    def _next(self) -> Taken[InferRequest] | None:
        """Wait for work, then for the turn, with no answer unsent; a batch has what it needs until it has run."""
        self._runner.send(self._answers)
        while self._queue.wait():
            self._limiter.acquire(self._claim)
            taken = self._queue.take(timeout_ns=0)
            if taken is not None and taken.batch:
                return taken
            self._limiter.release(self._claim)
            if taken is not None and taken.expired:
                return taken
        return None

    def _run(self, batch: list[InferRequest]) -> None:
        try:
            super()._run(batch)
        finally:
            self._limiter.release(self._claim)
