"""Whether requests share batches by a configuration: with `dynamic_batching`, unless its `parameters` say otherwise.

Triton's queue policies and priorities are part of `dynamic_batching`, and so come with merging. `merge_requests` as
`false` in `parameters` is for models whose requests are batches already, or that want each run for itself: all of
`dynamic_batching` that is about the queue holds, and every request is its own execution.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_server.execution.parameters import BadOption, parameter_values, read_switch

if TYPE_CHECKING:
    from sluice_proto.model_config_pb2 import ModelConfig

MERGE = "merge_requests"
"""The key in `parameters`."""


def merges(config: ModelConfig) -> bool:
    """Whether requests share batches if a complete configuration has its way; BadOption where it contradicts itself."""
    can_merge = config.max_batch_size > 1 and config.HasField("dynamic_batching")
    value = parameter_values(config).get(MERGE)
    if value is None:
        return can_merge
    if read_switch(config.name, MERGE, value):
        if not can_merge:
            expected = "false, as max_batch_size is 0 or 1, or dynamic_batching is missing"
            raise BadOption(config.name, MERGE, value, expected)
        return True
    _check_unmerged(config, value)
    return False


def _check_unmerged(config: ModelConfig, value: str) -> None:
    """Refuse what would have no effect without merging."""
    scheduler = config.dynamic_batching
    if scheduler.max_queue_delay_microseconds:
        raise BadOption(config.name, MERGE, value, "true, as max_queue_delay_microseconds waits for requests")
    if set(scheduler.preferred_batch_size) - {config.max_batch_size}:
        raise BadOption(config.name, MERGE, value, "true, as preferred_batch_size is of merged requests")
    if any(tensor.allow_ragged_batch for tensor in config.input) or config.batch_input or config.batch_output:
        raise BadOption(config.name, MERGE, value, "true, as ragged batches are of merged requests")
    if config.HasField("sequence_batching"):
        raise BadOption(config.name, MERGE, value, "no value, as sequences are not batched by it")
