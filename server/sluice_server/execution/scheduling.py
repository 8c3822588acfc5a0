"""Puts a queue and what runs its batches around a prepared version, and decides what the version is served as.

Everything that a model asks for beyond plain batching (sequences, the response cache, splitting, order, padding, ragged
batches, an objective) is chosen here, as classes and callables, so that requests to other models have no branch for it.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sluice_batching import BatchQueue, QueuePolicy, RunTimes, SequenceQueue, SloTuner
from sluice_server.execution.anticipating import anticipation_of
from sluice_server.execution.buckets import PaddedEncoder, gatherer
from sluice_server.execution.cached import CachedModel, CachingRunner
from sluice_server.execution.instance import BatchRunner
from sluice_server.execution.model import ServedModel
from sluice_server.execution.model_cache import ModelCache
from sluice_server.execution.ordering import ORDERED, OrderedAnswers, preserves_ordering
from sluice_server.execution.queue_policies import queue_bounds, queue_policy, sequence_policy
from sluice_server.execution.ragged import RaggedEncoder, RaggedGatherer, is_ragged
from sluice_server.execution.sequences import SequenceModel, SequenceRunner
from sluice_server.execution.split import SplittingModel, SplittingRunner
from sluice_server.protocol.encode import Encoder

if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice_batching import Anticipation
    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.preparation import PreparedModel
    from sluice_server.execution.request import InferRequest
    from sluice_server.execution.response_cache import ResponseCache
    from sluice_server.observability.statistics import ModelStatistics
    from sluice_server.protocol.interface import ModelInterface
    from sluice_server.settings import ModelSettings
    from sluice_server.status import StatusMapper

NS_PER_S = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Scheduling:
    """How the requests to a version get to its sessions."""

    make_model: Callable[..., ServedModel]
    """What the version is served as: a class, with the arguments that only it has."""
    queue: BatchQueue[InferRequest]
    runner: BatchRunner
    is_tuned: bool
    """Whether the queue is steered by a latency objective."""
    anticipation: Anticipation | None
    """What its only instance waits with, where it does."""


@dataclass(frozen=True, slots=True)
class Scheduler:
    """Makes the scheduling of one prepared version; `cache` is the server's response cache if the version uses it."""

    prepared: PreparedModel
    settings: ModelSettings
    statistics: ModelStatistics
    to_status: StatusMapper
    cache: ResponseCache | None

    def schedule(self) -> Scheduling:
        """Decide all of it."""
        prepared, run_times = self.prepared, _run_times(self.prepared)
        make_model, queue, runner = self._in_order(run_times)
        is_tuned = isinstance(run_times, SloTuner)
        if isinstance(run_times, SloTuner):
            run_times.steer(queue.tune)
        waits = prepared.instances == 1 and prepared.merges and not is_tuned
        anticipation = anticipation_of(prepared.findings.curve, queue.policy) if waits else None
        return Scheduling(make_model, queue, runner, is_tuned, anticipation)

    def _in_order(
        self, run_times: RunTimes
    ) -> tuple[Callable[..., ServedModel], BatchQueue[InferRequest], BatchRunner]:
        """What the version is made as, its queue, and what runs its batches; answers in order where they have one."""
        policy = queue_policy(self.prepared, self.settings)
        if not preserves_ordering(self.prepared.config):
            return self._queue_and_runner(policy, run_times)
        # Answers leave in the order of arrival, so that to overtake in the queue gains nothing.
        policy = replace(policy, deadline_first=False)
        order = OrderedAnswers(policy)
        made_as, queue, runner = self._queue_and_runner(policy, run_times, order.enter)
        runner.keep_order(order)
        make_model = functools.partial(ORDERED[made_as], order=order, on_arrival=self.prepared.sequences is None)
        return make_model, queue, runner

    def _queue_and_runner(
        self,
        policy: QueuePolicy,
        run_times: RunTimes,
        on_taken: Callable[[list[InferRequest]], None] | None = None,
    ) -> tuple[type[ServedModel], BatchQueue[InferRequest], BatchRunner]:
        """The same but for an order; of sequences `on_taken` is told what is taken."""
        prepared, interface = self.prepared, self.prepared.interface
        encoder, seams = _seams(prepared.config, interface)
        seams["run_times"] = run_times
        common = encoder, self.statistics, self.to_status
        if prepared.sequences is not None:
            sequences: SequenceQueue[InferRequest] = SequenceQueue(
                sequence_policy(prepared.config, policy), run_times=run_times, on_taken=on_taken
            )
            return SequenceModel, sequences, SequenceRunner(*common, prepared.sequences, sequences.finish, **seams)
        queue: BatchQueue[InferRequest] = BatchQueue(policy, run_times=run_times)
        if self.cache is not None:
            following: BatchQueue[InferRequest] = BatchQueue(queue_bounds(interface, self.settings))
            model_cache = ModelCache(self.cache, interface, queue, following, self.statistics)
            return CachedModel, queue, CachingRunner(*common, model_cache, **seams)
        if prepared.splits:
            return SplittingModel, queue, SplittingRunner(*common, **seams)
        return ServedModel, queue, BatchRunner(*common, **seams)


def _run_times(prepared: PreparedModel) -> RunTimes:
    """What the runs are recorded in: with an objective, what learns from them."""
    if not prepared.slo_ns:
        return RunTimes(prepared.instances)
    curve, limit = prepared.findings.curve, max(1, prepared.config.max_batch_size)
    tuner = SloTuner(prepared.slo_ns, curve.cap or limit if curve is not None else limit, prepared.instances)
    for at in curve.points if curve is not None else ():
        tuner.learn(at.rows, round(at.rows / at.rows_per_s * NS_PER_S), time.monotonic_ns())
    return tuner


def _seams(config: ModelConfig, interface: ModelInterface) -> tuple[Encoder, dict[str, Any]]:
    """What encodes a model's answers, and the named arguments of its runner: how its batches are made and cut."""
    seams: dict[str, Any] = {"has_batch_dimension": interface.max_batch_rows > 0}
    if interface.buckets is not None:
        padded = PaddedEncoder(interface, interface.buckets)
        return padded, seams | {"gather": gatherer(interface.buckets, interface), "cut": padded.apart}
    if is_ragged(config):
        ragged = RaggedEncoder(interface, config)
        return ragged, seams | {"gather": RaggedGatherer(config), "cut": ragged.apart}
    return Encoder(interface), seams
