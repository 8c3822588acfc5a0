"""Which fields of ModelConfig this server implements; every other one is refused by name as soon as it has an effect.

A field is in exactly one of the two tables, by its path of field names. A path in `REFUSED` covers all that is below
it; a path in `IMPLEMENTED` says nothing about the fields below it, which stand there themselves. A refused field that
is set to its default has no effect and is let through, so that configurations which spell out every default still load.
"""

from collections.abc import Iterator
from typing import Final

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.repository.errors import ConfigError

IMPLEMENTED: Final = frozenset(
    {
        "name",
        "platform",
        "backend",
        "max_batch_size",
        "default_model_filename",
        "version_policy",
        "version_policy.latest",
        "version_policy.latest.num_versions",
        "version_policy.all",
        "version_policy.specific",
        "version_policy.specific.versions",
        "input",
        "input.name",
        "input.data_type",
        "input.format",
        "input.dims",
        "input.reshape",
        "input.reshape.shape",
        "input.optional",
        "input.allow_ragged_batch",
        "output",
        "output.name",
        "output.data_type",
        "output.dims",
        "output.label_filename",
        "output.reshape",
        "output.reshape.shape",
        "batch_input",
        "batch_input.kind",
        "batch_input.target_name",
        "batch_input.data_type",
        "batch_input.source_input",
        "batch_output",
        "batch_output.target_name",
        "batch_output.kind",
        "batch_output.source_input",
        "instance_group",
        "instance_group.name",
        "instance_group.count",
        "instance_group.gpus",
        "instance_group.kind",
        "instance_group.rate_limiter",
        "instance_group.rate_limiter.resources",
        "instance_group.rate_limiter.resources.name",
        "instance_group.rate_limiter.resources.global",
        "instance_group.rate_limiter.resources.count",
        "instance_group.rate_limiter.priority",
        "dynamic_batching",
        "dynamic_batching.preferred_batch_size",
        "dynamic_batching.max_queue_delay_microseconds",
        "dynamic_batching.preserve_ordering",
        "dynamic_batching.priority_levels",
        "dynamic_batching.default_priority_level",
        "dynamic_batching.default_queue_policy",
        "dynamic_batching.default_queue_policy.timeout_action",
        "dynamic_batching.default_queue_policy.default_timeout_microseconds",
        "dynamic_batching.default_queue_policy.allow_timeout_override",
        "dynamic_batching.default_queue_policy.max_queue_size",
        "dynamic_batching.priority_queue_policy",
        "dynamic_batching.priority_queue_policy.timeout_action",
        "dynamic_batching.priority_queue_policy.default_timeout_microseconds",
        "dynamic_batching.priority_queue_policy.allow_timeout_override",
        "dynamic_batching.priority_queue_policy.max_queue_size",
        "sequence_batching",
        "sequence_batching.max_sequence_idle_microseconds",
        "sequence_batching.control_input",
        "sequence_batching.control_input.name",
        "sequence_batching.control_input.control",
        "sequence_batching.control_input.control.kind",
        "sequence_batching.control_input.control.int32_false_true",
        "sequence_batching.control_input.control.fp32_false_true",
        "sequence_batching.control_input.control.bool_false_true",
        "sequence_batching.control_input.control.data_type",
        "sequence_batching.direct",
        "sequence_batching.direct.max_queue_delay_microseconds",
        "sequence_batching.direct.minimum_slot_utilization",
        "sequence_batching.oldest",
        "sequence_batching.oldest.max_candidate_sequences",
        "sequence_batching.oldest.preferred_batch_size",
        "sequence_batching.oldest.max_queue_delay_microseconds",
        "sequence_batching.oldest.preserve_ordering",
        "sequence_batching.state",
        "sequence_batching.state.input_name",
        "sequence_batching.state.output_name",
        "sequence_batching.state.data_type",
        "sequence_batching.state.dims",
        "sequence_batching.state.initial_state",
        "sequence_batching.state.initial_state.name",
        "sequence_batching.state.initial_state.data_type",
        "sequence_batching.state.initial_state.dims",
        "sequence_batching.state.initial_state.zero_data",
        "sequence_batching.state.initial_state.data_file",
        "optimization",
        "optimization.graph",
        "optimization.graph.level",
        "optimization.execution_accelerators",
        "optimization.execution_accelerators.gpu_execution_accelerator",
        "optimization.execution_accelerators.gpu_execution_accelerator.name",
        "optimization.execution_accelerators.gpu_execution_accelerator.parameters",
        "optimization.execution_accelerators.cpu_execution_accelerator",
        "optimization.execution_accelerators.cpu_execution_accelerator.name",
        "optimization.execution_accelerators.cpu_execution_accelerator.parameters",
        "optimization.input_pinned_memory",
        "optimization.input_pinned_memory.enable",
        "optimization.output_pinned_memory",
        "optimization.output_pinned_memory.enable",
        "parameters",
        "parameters.string_value",
        "model_warmup",
        "model_warmup.name",
        "model_warmup.batch_size",
        "model_warmup.count",
        "model_warmup.inputs",
        "model_warmup.inputs.data_type",
        "model_warmup.inputs.dims",
        "model_warmup.inputs.zero_data",
        "model_warmup.inputs.random_data",
        "model_warmup.inputs.input_data_file",
        "response_cache",
        "response_cache.enable",
        "ensemble_scheduling",
        "ensemble_scheduling.step",
        "ensemble_scheduling.step.model_name",
        "ensemble_scheduling.step.model_version",
        "ensemble_scheduling.step.input_map",
        "ensemble_scheduling.step.output_map",
        "ensemble_scheduling.max_inflight_requests",
    }
)
"""Fields that do what they say, or say nothing but a hint (`format`, pinned memory)."""

REFUSED: Final = frozenset(
    {
        "cc_model_filenames",
        "metric_tags",
        "sequence_batching.iterative_sequence",
        "sequence_batching.state.use_same_buffer_for_input_output",
        "sequence_batching.state.use_growable_memory",
        "ensemble_scheduling.step.model_namespace",
        "model_operations",
        "model_transaction_policy",
        "model_repository_agents",
        "runtime",
        "model_metrics",
        "input.is_shape_tensor",
        "input.is_non_linear_format_io",
        "output.is_shape_tensor",
        "output.is_non_linear_format_io",
        "instance_group.profile",
        "instance_group.passive",
        "instance_group.secondary_devices",
        "instance_group.host_policy",
        "optimization.priority",
        "optimization.cuda",
        "optimization.gather_kernel_buffer_threshold",
        "optimization.eager_batching",
    }
)
"""Fields that would change what the server does, and don't yet."""


def check_fields(config: ModelConfig, model: str) -> None:
    """Raise ConfigError for the first field that has an effect and is not implemented, or an unnamed enum value."""
    _check(config, "", "", model)


def _check(message: Message, path: str, shown: str, model: str) -> None:
    for field, value in message.ListFields():
        field_path = f"{path}.{field.name}" if path else field.name
        for item_shown, item in _items(field, value, f"{shown}.{field.name}" if shown else field.name):
            if field_path in REFUSED:
                effect = _effect(field_path, item, item_shown, repeated=field.is_repeated)
                if effect:
                    raise ConfigError(
                        f"model '{model}': {effect} is not implemented in this version", model=model, field=effect
                    )
            elif isinstance(item, Message):
                _check(item, field_path, item_shown, model)
            elif field.enum_type is not None and item not in field.enum_type.values_by_number:
                names = ", ".join(value.name for value in field.enum_type.values)
                raise ConfigError(
                    f"model '{model}': {item_shown} is {item}, expected one of {names}", model=model, field=item_shown
                )


def _items(field: FieldDescriptor, value: object, shown: str) -> Iterator[tuple[str, object]]:
    """Each element of a field with its path for people: `input[0]`, `parameters["key"]`."""
    if not field.is_repeated:
        yield shown, value
    elif field.message_type is not None and field.message_type.GetOptions().map_entry:
        for key, item in sorted(value.items()):  # type: ignore[attr-defined] # a protobuf map
            yield f'{shown}["{key}"]', item
    else:
        for index, item in enumerate(value):  # type: ignore[arg-type] # a protobuf list
            yield f"{shown}[{index}]", item


def _effect(path: str, value: object, shown: str, *, repeated: bool) -> str:
    """Give the path of the first thing below a refused field that is not at its default, "" when there is none."""
    if not isinstance(value, Message) or repeated:
        return shown
    for field, below in value.ListFields():
        for item_shown, item in _items(field, below, f"{shown}.{field.name}"):
            effect = _effect(f"{path}.{field.name}", item, item_shown, repeated=field.is_repeated)
            if effect:
                return effect
    return ""
