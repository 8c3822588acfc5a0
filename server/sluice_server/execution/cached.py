"""A served model version with a response cache: what `model.py` and `instance.py` do, with the cache around it.

Made in place of those by the loader, so that a model without a cache does nothing for it.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import TYPE_CHECKING, Any

from sluice_batching import Draining
from sluice_server.errors import Unavailable
from sluice_server.execution.instance import BatchRunner
from sluice_server.execution.model import ServedModel
from sluice_server.execution.model_cache import read_shared
from sluice_server.observability.statistics import FailureReason, Outcome
from sluice_server.protocol.encode import answer_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from typing_extensions import Buffer

    from sluice_batching import BatchingError, BatchQueue, RunTimes
    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.instance import Answers, Cut, Gather, Instance
    from sluice_server.execution.model_cache import ModelCache
    from sluice_server.execution.request import InferRequest
    from sluice_server.execution.response_cache import Payload
    from sluice_server.observability.statistics import ModelStatistics
    from sluice_server.protocol.encode import Encoder
    from sluice_server.protocol.interface import ModelInterface
    from sluice_server.status import StatusMapper


class CachingRunner(BatchRunner):
    """Runs batches of leaders, and ends their followers with them."""

    def __init__(
        self,
        encoder: Encoder,
        statistics: ModelStatistics,
        to_status: StatusMapper,
        cache: ModelCache,
        *,
        has_batch_dimension: bool,
        run_times: RunTimes | None = None,
        gather: Gather | None = None,
        cut: Cut | None = None,
    ) -> None:
        encode = functools.partial(_encode, encoder)
        super().__init__(
            encode,
            statistics,
            to_status,
            has_batch_dimension=has_batch_dimension,
            run_times=run_times,
            gather=gather,
            cut=cut,
        )
        self.cache = cache
        self.on_promoted: Callable[[list[InferRequest]], None] = _nobody
        """Queues requests that lead in place of those that have expired; set by their model."""

    def answer(self, hits: Sequence[tuple[InferRequest, Payload]], *, coalesced: bool) -> Answers:
        """The answers to requests that were not run, from those of others; those that cannot be made are failed."""
        answers: Answers = deque()
        now_ns = self._clock()
        total_ns = queue_ns = 0
        for request, payload in hits:
            try:
                answers.append((request.call, answer_of(request, payload)))
            except Exception as error:  # its shared memory, or a bug
                super()._fail((request,), error, FailureReason.OTHER)
                continue
            total_ns += now_ns - request.call.received_ns
            if coalesced:
                queue_ns += now_ns - request.enqueued_ns
        self._statistics.record_cache_hits(len(answers), total_ns=total_ns, queue_ns=queue_ns, coalesced=coalesced)
        return answers

    def refuse(self, requests: Sequence[InferRequest], error: Exception) -> None:
        """Fail requests that cannot even be looked up."""
        super()._fail(requests, error, FailureReason.OTHER)

    def expire_followers(self, requests: Sequence[InferRequest]) -> None:
        """Answer followers whose time was up before their leader's end."""
        self.expire(requests)
        self.count_abandoned(self.cache.leave_expired(requests))

    def count_abandoned(self, requests: Sequence[InferRequest]) -> None:
        """Count requests whose clients have left, and that will not be run."""
        if requests:
            now_ns = self._clock()
            total_ns = sum(now_ns - request.call.received_ns for request in requests)
            self._statistics.record_failure(FailureReason.CANCELED, requests=len(requests), total_ns=total_ns)

    def give_up(self, batch: Sequence[InferRequest], error: Exception) -> None:
        """End whatever of a batch, and of those who follow it, has not ended."""
        super().give_up([*batch, *self.cache.fail(batch)], error)

    def _answered(self, batch: list[InferRequest], answers: list[list[Buffer]]) -> Answers:
        followers = self.cache.complete(batch, answers)
        sent = super()._answered(batch, answers)
        if followers:
            sent += self.answer(followers, coalesced=True)
        return sent

    def _fail(self, requests: Sequence[InferRequest], error: Exception, reason: FailureReason) -> None:
        # What was not run, or was but could not be delivered, says nothing about those who follow.
        own = [each for each in requests if reason is FailureReason.REJECTED or hasattr(each, "payload")]
        promoted = self.cache.pass_on(own)
        super()._fail([*requests, *self.cache.fail(requests)], error, reason)
        if promoted:
            self.on_promoted(promoted)


def _encode(encoder: Encoder, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[Buffer]]:
    """As the encoder does; what others are to get is put aside where a request has outputs in shared memory."""
    shared = batch[0].shared
    if shared is None or not shared.outputs:
        return encoder(batch, arrays)
    for request, payload in zip(batch, encoder.payloads(batch, arrays), strict=True):
        request.payload = payload
    return [answer_of(request, request.payload) for request in batch]


class CachedModel(ServedModel):
    """A served version whose requests are looked up before they are queued."""

    def __init__(
        self,
        config: ModelConfig,
        interface: ModelInterface,
        queue: BatchQueue[InferRequest],
        instances: Sequence[Instance],
        runner: CachingRunner,
        *others: Any,
        **named: Any,
    ) -> None:
        """The arguments are those of `ServedModel`."""
        super().__init__(config, interface, queue, instances, runner, *others, **named)
        self._caching_runner = runner
        self._cache = runner.cache
        runner.on_promoted = self._resume

    def start(self) -> None:
        """Let the instances pull, and have expired requests answered, those that follow others too."""
        self._timer.register(self._cache.following, self._caching_runner.expire_followers)
        super().start()

    def submit(self, requests: Sequence[InferRequest]) -> list[InferRequest]:
        """Answer what is known, and queue the rest; gives those that came too late, as the version is unloaded."""
        leaders, late = self._admit(requests)
        return late + self._offer(leaders) if leaders else late

    def submit_one(self, request: InferRequest) -> tuple[list[InferRequest], Callable[[], None] | None]:
        """As `submit` for one request, or give its batch to be run by the caller in place of an idle instance."""
        leaders, late = self._admit((request,))
        session = self._common_session
        if not leaders:
            return late, None
        if session is None:
            return self._offer(leaders), None
        error, batch = self.queue.offer_and_take(request)
        if batch:
            return [], functools.partial(self._run_in_place, session, batch)
        return self._settle(leaders, [error]) if error is not None else [], None

    def cancel(self, request: InferRequest) -> bool:
        """Let a request go whose client has left: its work is dropped when nobody else waits for it."""
        ended = self._cache.leave(request)
        self._caching_runner.count_abandoned(ended)
        return request in ended

    def answers_in_arrays(self) -> bool:
        """No: the cache keeps bytes."""
        self._runner.serve_steps(self.interface, arrays=False)
        return False

    def drain(self) -> None:
        """Refuse new requests; what is queued, or follows something queued, is still answered."""
        super().drain()
        self._cache.following.drain()
        self._cache.close()

    def join(self, timeout_s: float | None) -> bool:
        """Wait until everything that was accepted is answered, as the base does."""
        if not super().join(timeout_s):
            return False
        self._timer.unregister(self._cache.following)
        return True

    def _admit(self, requests: Sequence[InferRequest]) -> tuple[Sequence[InferRequest], list[InferRequest]]:
        """Look up requests and answer what is known: who is to be queued, and who came too late."""
        for request in requests:
            request.model = self
            request.fingerprint = None
            request.call.on_cancel = request.cancel
        if self._cache.skips(requests):
            return requests, []
        requests = self._readable(requests)
        if not requests:
            return (), []
        try:
            leaders, hits, refused = self._cache.admit(requests)
        except Exception as error:
            # A bug, or no memory; no request may be left without an end by it.
            self._caching_runner.refuse(requests, error)
            return (), []
        if hits:
            self._runner.send(self._caching_runner.answer(hits, coalesced=False))
        late = self._settle([request for request, _ in refused], [error for _, error in refused]) if refused else []
        return leaders, late

    def _readable(self, requests: Sequence[InferRequest]) -> Sequence[InferRequest]:
        """The requests with their inputs read out of shared memory; those whose cannot be read are failed."""
        if not [request for request in requests if request.shared is not None]:
            return requests
        readable = []
        for request in requests:
            try:
                if request.shared is not None:
                    read_shared(request)
            except Exception as error:
                self._caching_runner.refuse((request,), error)
            else:
                readable.append(request)
        return readable

    def _offer(self, leaders: Sequence[InferRequest]) -> list[InferRequest]:
        errors = self.queue.offer_many(leaders)
        return self._settle(leaders, errors) if any(errors) else []

    def _settle(self, requests: Sequence[InferRequest], errors: Sequence[BatchingError | None]) -> list[InferRequest]:
        """Refuse what a queue has refused; who follows that is offered in its place. Gives those that came too late."""
        late: list[InferRequest] = []
        refused = [pair for pair in zip(requests, errors, strict=True) if pair[1] is not None]
        while refused:
            request, error = refused.pop()
            assert error is not None, "of those the list is made"
            if isinstance(error, Draining):
                late += [request, *self._cache.fail((request,))]
                continue
            self._refuse(request, error)
            for promoted in self._cache.pass_on((request,)):
                error = self.queue.offer_many((promoted,))[0]
                if error is not None:
                    refused.append((promoted, error))
        return late

    def _resume(self, promoted: list[InferRequest]) -> None:
        """Queue requests that lead in place of others; there is nobody to find a successor for those that are late."""
        name = self.interface.name
        for request in self._offer(promoted):
            self.statistics.record_refused(Outcome.UNAVAILABLE)
            refusal = Unavailable(f"model '{name}' is not ready: it is being replaced or unloaded; try again")
            self._turn_away(request, refusal)


def _nobody(promoted: list[InferRequest]) -> None:
    raise AssertionError(f"no model has this runner, and {len(promoted)} requests are to be queued")
