"""Reads the priorities and queue policies of a model's configuration, in Triton's terms, for its queue."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_batching import LevelPolicy, Priorities
from sluice_proto.model_config_pb2 import ModelQueuePolicy
from sluice_server.protocol.decode import NS_PER_US
from sluice_server.protocol.interface import has_queue_policy

if TYPE_CHECKING:
    from sluice_proto.model_config_pb2 import ModelConfig


def priorities_of(config: ModelConfig) -> Priorities | None:
    """The priorities of a configuration that is valid; None when it has neither levels nor policies.

    They hold for `max_batch_size` 0 too, where nothing is batched.
    """
    if not has_queue_policy(config):
        return None
    scheduler = config.dynamic_batching
    return Priorities(
        levels=scheduler.priority_levels,
        default_level=scheduler.default_priority_level,
        default_policy=_level_policy(scheduler.default_queue_policy),
        policies={level: _level_policy(policy) for level, policy in scheduler.priority_queue_policy.items()},
    )


def _level_policy(policy: ModelQueuePolicy) -> LevelPolicy:
    return LevelPolicy(
        max_requests=policy.max_queue_size,
        timeout_ns=policy.default_timeout_microseconds * NS_PER_US,
        delays=policy.timeout_action == ModelQueuePolicy.DELAY,
        allow_timeout_override=policy.allow_timeout_override,
    )
