"""What a model's queue is asked for: its bounds, how it merges and delays, its priorities, its sequences."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sluice_batching import QueuePolicy, SequencePolicy
from sluice_server.execution.placement import placements
from sluice_server.execution.priorities import priorities_of
from sluice_server.protocol.decode import NS_PER_US

if TYPE_CHECKING:
    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.preparation import PreparedModel
    from sluice_server.protocol.interface import ModelInterface
    from sluice_server.settings import ModelSettings


def queue_bounds(interface: ModelInterface, settings: ModelSettings) -> QueuePolicy:
    """How many may wait: in a queue of a model, and for something else than a run, where it merges nothing."""
    return QueuePolicy(
        max_batch_rows=max(1, interface.max_batch_rows),
        max_queue_rows=settings.queue_rows,
        max_queue_bytes=settings.queue_bytes,
    )


def queue_policy(prepared: PreparedModel, settings: ModelSettings) -> QueuePolicy:
    """How the requests to a version wait and are merged."""
    config, batching, curve = prepared.config, prepared.merges, prepared.findings.curve
    scheduler = config.dynamic_batching
    # The largest size alone is where a batch is cut anyway, so that preferring it says nothing.
    preferred = set(scheduler.preferred_batch_size) - {0}
    if preferred == {config.max_batch_size}:
        preferred = set()
    return replace(
        queue_bounds(prepared.interface, settings),
        merge_rows=curve.cap if curve is not None else 0,
        batching=batching,
        max_delay_ns=scheduler.max_queue_delay_microseconds * NS_PER_US if batching else 0,
        preferred_batch_rows=tuple(sorted(preferred)) if batching else (),
        priorities=priorities_of(config),
    )


def sequence_policy(config: ModelConfig, policy: QueuePolicy) -> SequencePolicy:
    """How the sequences of a model are batched; `policy` has the bounds of its queue.

    There are as many groups of slots as instances were asked for, also when fewer run because there are fewer CPUs.
    """
    batching = config.sequence_batching
    strategy = batching.oldest if batching.HasField("oldest") else batching.direct
    queue = replace(
        policy,
        batching=True,
        max_delay_ns=strategy.max_queue_delay_microseconds * NS_PER_US,
        preferred_batch_rows=tuple(sorted(set(batching.oldest.preferred_batch_size))),
    )
    max_idle_ns = batching.max_sequence_idle_microseconds * NS_PER_US
    if batching.HasField("oldest"):
        return SequencePolicy(
            queue=queue, max_idle_ns=max_idle_ns, max_candidates=batching.oldest.max_candidate_sequences
        )
    return SequencePolicy(
        queue=queue,
        max_idle_ns=max_idle_ns,
        groups=sum(group.count for members in placements(config).values() for group in members),
        min_utilization=batching.direct.minimum_slot_utilization,
    )
