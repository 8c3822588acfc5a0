"""Fills in what a configuration leaves out: first from defaults alone, then from the model file.

Triton's rules: inputs and outputs are filled only when one of the two lists is missing, and only then does the model
get a batch size and the dynamic batcher. Both steps leave a configuration that has been through them as it is.
"""

from typing import TYPE_CHECKING, Final, cast

from sluice_proto.model_config_pb2 import ModelConfig, ModelInstanceGroup, ModelVersionPolicy
from sluice_proto.tensors import BY_NAME
from sluice_server.graph import VARIABLE, GraphSignature, TensorSpec, format_shape
from sluice_server.repository import ensembles
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.fields import check_fields
from sluice_server.repository.ragged import check_ragged, made_inputs
from sluice_server.repository.sequences import check_sequences, fill_defaults, hidden_inputs, hidden_outputs
from sluice_server.repository.validate import (
    BACKEND,
    PLATFORM,
    SCALAR_DIMS,
    Tensor,
    check_batch_size,
    check_config,
    check_filenames,
    check_graph,
    check_instance_groups,
    check_name,
    check_platform,
)

if TYPE_CHECKING:
    from sluice_proto.model_config_pb2 import DataType

DEFAULT_MODEL_FILENAME: Final = "model.onnx"

DEFAULT_MAX_BATCH_SIZE: Final = 4
"""Triton's default for ONNX models that can batch."""

DEFAULT_CPU_INSTANCES: Final = 2
"""Triton's default for ONNX models: one gathers while the other computes."""


def normalize(
    config: ModelConfig | None, *, name: str, auto_complete: bool = True, gpu_available: bool = False
) -> ModelConfig:
    """Give a copy with every default filled in that needs no model file; None stands for a missing config.pbtxt.

    That is all that is needed to choose versions and to open the model file; of an ensemble, which has none, it is
    everything. Raises ConfigError for whatever is wrong with the configuration itself, fields that are not implemented
    included; what it says of ragged batching needs all tensors, and is checked by `complete`.
    """
    if config is None and not auto_complete:
        raise ConfigError(f"model '{name}' has no config.pbtxt, and auto-complete is off", model=name)
    filled = ModelConfig()
    if config is not None:
        filled.CopyFrom(config)
    check_name(filled, name)
    check_fields(filled, name)
    check_filenames(filled, name)
    check_batch_size(filled, name)
    if ensembles.is_ensemble(filled):
        return _normalize_ensemble(filled, name)
    check_platform(filled, name)
    filled.name, filled.platform, filled.backend = name, PLATFORM, BACKEND
    filled.default_model_filename = filled.default_model_filename or DEFAULT_MODEL_FILENAME
    _fill_version_policy(filled.version_policy)
    _fill_instance_groups(filled, gpu_available=gpu_available)
    check_instance_groups(filled.instance_group, name)
    for field in ("input_pinned_memory", "output_pinned_memory"):
        if not filled.optimization.HasField(field):
            getattr(filled.optimization, field).enable = True
    _fill_preferred_batch_size(filled)
    fill_defaults(filled)
    if filled.max_batch_size or not (auto_complete and needs_tensors(filled)):  # else the batch size is still open
        check_config(filled, name)
    return filled


def _normalize_ensemble(filled: ModelConfig, name: str) -> ModelConfig:
    """An ensemble's configuration is complete as it is written, apart from its name, platform and versions."""
    ensembles.check_ensemble(filled, name)
    check_config(filled, name)
    filled.name, filled.platform = name, ensembles.PLATFORM
    _fill_version_policy(filled.version_policy)
    return filled


def complete(
    normalized: ModelConfig,
    signature: GraphSignature,
    *,
    auto_complete: bool = True,
    default_max_batch_size: int = DEFAULT_MAX_BATCH_SIZE,
) -> ModelConfig:
    """Give the whole configuration as ModelConfig reports it: what `normalize` gave, and what the model file says.

    `default_max_batch_size` is what a model that can batch gets when the configuration names no size (0: none).
    Inputs that have a value in the file are left out unless the configuration lists them.
    Raises ConfigError for what is wrong with the configuration once it is complete, and ModelLoadError when the
    configuration and the model file disagree.
    """
    filled = ModelConfig()
    filled.CopyFrom(normalized)
    if auto_complete and needs_tensors(filled):
        _fill_batching(filled, signature, default_max_batch_size)
        batch_dims = 1 if filled.max_batch_size else 0
        fill_defaults(filled)
        check_sequences(filled, filled.name)
        fed = {tensor.name for tensor in hidden_inputs(filled)} | {tensor.name for tensor in hidden_outputs(filled)}
        fed |= made_inputs(filled)
        for tensors, specs in ((filled.input, signature.inputs), (filled.output, signature.outputs)):
            if not tensors:
                for spec in specs:
                    if not spec.optional and spec.name not in fed:
                        _fill_tensor(tensors.add(), spec, batch_dims, filled.name)
        check_config(filled, filled.name)
    check_ragged(filled, filled.name)
    check_graph(filled, signature)
    return filled


def needs_tensors(config: ModelConfig) -> bool:
    """Whether a list of tensors is missing, so that auto-complete has something to do."""
    return not (config.input and config.output)


def _fill_version_policy(policy: ModelVersionPolicy) -> None:
    if policy.WhichOneof("policy_choice") in (None, "latest"):
        policy.latest.num_versions = policy.latest.num_versions or 1


def _fill_instance_groups(config: ModelConfig, *, gpu_available: bool) -> None:
    if not config.instance_group:
        config.instance_group.add(name=config.name)
    for index, group in enumerate(config.instance_group):
        group.name = group.name or f"{config.name}_{index}"
        if group.kind == ModelInstanceGroup.KIND_AUTO:
            group.kind = ModelInstanceGroup.KIND_GPU if gpu_available else ModelInstanceGroup.KIND_CPU
            if not gpu_available:
                del group.gpus[:]  # "these GPUs, if there are any"
        group.count = group.count or (DEFAULT_CPU_INSTANCES if group.kind == ModelInstanceGroup.KIND_CPU else 1)


def _fill_preferred_batch_size(config: ModelConfig) -> None:
    policy = config.dynamic_batching
    if config.HasField("dynamic_batching") and config.max_batch_size and not policy.preferred_batch_size:
        policy.preferred_batch_size.append(config.max_batch_size)


def _fill_batching(config: ModelConfig, signature: GraphSignature, default_max_batch_size: int) -> None:
    if not signature.batchable:
        if config.max_batch_size:
            raise ModelLoadError(
                f"autofill failed for model '{config.name}': model does not support batching while non-zero"
                f" max_batch_size is specified: {config.max_batch_size}, but {fixed_tensor(signature)}",
                model=config.name,
            )
        return
    config.max_batch_size = config.max_batch_size or default_max_batch_size
    if config.max_batch_size > 1 and config.WhichOneof("scheduling_choice") is None:
        config.dynamic_batching.SetInParent()
    _fill_preferred_batch_size(config)


def fixed_tensor(signature: GraphSignature) -> str:
    """Say which tensor keeps a model from batching, "" when none does."""
    required = (spec for spec in signature.inputs if not spec.optional)
    for kind, specs in (("input", required), ("output", signature.outputs)):
        for spec in specs:
            if not spec.shape:
                return f"{kind} '{spec.name}' is a scalar"
            if spec.shape[0] != VARIABLE:
                shape = format_shape(spec.shape)
                return f"dimension 0 of {kind} '{spec.name}' is fixed at {spec.shape[0]} (shape {shape})"
    return ""


def _fill_tensor(tensor: Tensor, spec: TensorSpec, batch_dims: int, model: str) -> None:
    """List a tensor of the model without its batch dimension; one that has no dimension left gets [1]."""
    if spec.datatype not in BY_NAME:
        raise ModelLoadError(
            f"unable to load model '{model}', tensor '{spec.name}' has datatype {spec.datatype},"
            " which the protocol does not have",
            model=model,
        )
    tensor.name = spec.name
    tensor.data_type = cast("DataType", BY_NAME[spec.datatype].config_type)
    dims = spec.shape[batch_dims:]
    tensor.dims.extend(dims or SCALAR_DIMS)
    if batch_dims and not dims:
        tensor.reshape.SetInParent()
