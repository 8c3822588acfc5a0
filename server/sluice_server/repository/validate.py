"""The rules that a configuration must keep: on its own (ConfigError), and towards the model file (ModelLoadError)."""

import re
from collections.abc import Sequence
from typing import Final

from sluice_proto.model_config_pb2 import ModelConfig, ModelInput, ModelInstanceGroup, ModelOutput, ModelQueuePolicy
from sluice_proto.tensors import BY_CONFIG_TYPE
from sluice_server.graph import VARIABLE, GraphSignature, TensorSpec, format_shape
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.ragged import check_ragged_graph, made_inputs
from sluice_server.repository.sequences import check_sequences, hidden_inputs, hidden_outputs

PLATFORM: Final = "onnxruntime_onnx"
BACKEND: Final = "onnxruntime"

MAX_INSTANCES: Final = 1024
"""Per group. Each instance is a thread; past the number of cores they only queue inside ONNX Runtime."""

MAX_FILE_NAME_BYTES: Final = 255
"""NAME_MAX of the file systems in use: a longer name could never be opened."""

MAX_TIMEOUT_US: Final = 2**53
"""Some 285 years: whatever is longer was not meant, and would not fit the queue's clock."""

NO_LEVELS: Final = "and there are no levels: set priority_levels"

SCALAR_DIMS: Final = (1,)
"""How a configuration writes a tensor that has no dims of its own, as `dims` cannot be empty."""

Tensor = ModelInput | ModelOutput


def check_config(config: ModelConfig, model: str) -> None:
    """Check a normalised configuration that is complete; raises ConfigError with the field that breaks a rule."""
    _check_batching(config, model)
    check_sequences(config, model)
    _check_response_cache(config, model)
    _check_warmup(config, model)
    _check_tensors("input", config.input, config, model)
    _check_tensors("output", config.output, config, model)
    for index, tensor in enumerate(config.input):
        if tensor.optional and config.max_batch_size:
            what = f"of '{tensor.name}' needs max_batch_size 0, which is {config.max_batch_size}"
            raise _config_error(model, f"input[{index}].optional", what)


def check_name(config: ModelConfig, model: str) -> None:
    """Check that a configuration's name, where it says one, is this model's."""
    if config.name not in ("", model):
        raise _config_error(model, "name", f"is '{config.name}', but must equal the directory's name '{model}'")


def check_platform(config: ModelConfig, model: str) -> None:
    """Check that platform and backend are this server's."""
    for field, got, known in (("platform", config.platform, PLATFORM), ("backend", config.backend, BACKEND)):
        if got not in ("", known):
            raise _config_error(model, field, f"is '{got}', which is unknown; this server runs '{known}' only")


def check_batch_size(config: ModelConfig, model: str) -> None:
    """Check max_batch_size, in rows."""
    if config.max_batch_size < 0:
        raise _config_error(model, "max_batch_size", f"is {config.max_batch_size}, expected 0 or more")


def check_instance_groups(groups: Sequence[ModelInstanceGroup], model: str) -> None:
    """Check counts, devices and names of the instance groups with their defaults filled in."""
    names: set[str] = set()
    for index, group in enumerate(groups):
        where = f"instance_group[{index}]"
        if not 1 <= group.count <= MAX_INSTANCES:
            raise _config_error(model, f"{where}.count", f"is {group.count}, expected 1 to {MAX_INSTANCES}")
        if group.kind == ModelInstanceGroup.KIND_MODEL:
            raise _config_error(model, f"{where}.kind KIND_MODEL", "is not implemented in this version")
        if group.kind == ModelInstanceGroup.KIND_CPU and group.gpus:
            raise _config_error(model, f"{where}.gpus", "must be empty for KIND_CPU")
        if any(gpu < 0 for gpu in group.gpus) or len(set(group.gpus)) < len(group.gpus):
            raise _config_error(model, f"{where}.gpus", f"{list(group.gpus)} must be different numbers from 0")
        if group.name in names:
            raise _config_error(model, f"{where}.name", f"'{group.name}' is the name of another instance group")
        names.add(group.name)


def check_filenames(config: ModelConfig, model: str) -> None:
    """Check that the files which the configuration names lie inside the model's directory."""
    named = [("default_model_filename", config.default_model_filename)]
    named += [(f"output[{i}].label_filename", output.label_filename) for i, output in enumerate(config.output)]
    for i, state in enumerate(config.sequence_batching.state):
        for initial in state.initial_state:
            named.append((f"sequence_batching.state[{i}].initial_state[0].data_file", initial.data_file))
    for field, filename in named:
        problem = path_problem(filename) if filename else ""
        if problem:
            raise _config_error(model, field, f"'{filename}' {problem}")


def check_graph(config: ModelConfig, signature: GraphSignature) -> None:
    """Check a complete configuration against the model file; raises ModelLoadError on the first thing that differs."""
    inputs = {spec.name: spec for spec in signature.inputs}
    outputs = {spec.name: spec for spec in signature.outputs}
    fed, kept = hidden_inputs(config), hidden_outputs(config)
    for tensor in (*_tensors(config), *fed, *kept):
        kind, specs = ("input", inputs) if isinstance(tensor, ModelInput) else ("output", outputs)
        if tensor.name not in specs:
            allowed = ", ".join(sorted(specs))
            raise ModelLoadError(
                f"unexpected inference {kind} '{tensor.name}', allowed {kind}s are: {allowed}", model=config.name
            )
    check_ragged_graph(config, inputs)
    _check_presence(config, signature, {tensor.name for tensor in fed} | made_inputs(config))
    for tensor in (*config.input, *fed):
        spec = inputs[tensor.name]
        if tensor.optional and not spec.optional:
            raise ModelLoadError(
                f"unable to load model '{config.name}', input '{tensor.name}' is optional in the configuration,"
                " but the model file has no value for it",
                model=config.name,
            )
        _check_datatype(config, "input", tensor, spec)
        if not tensor.allow_ragged_batch:
            _check_dims(config, tensor, spec)
    scattered = {name for item in config.batch_output for name in item.target_name}
    for output in (*config.output, *kept):
        _check_datatype(config, "output", output, outputs[output.name])
        if output.name not in scattered:  # those come out in whatever shape has their elements
            _check_dims(config, output, outputs[output.name])


def scalar_tensors(config: ModelConfig, signature: GraphSignature) -> frozenset[str]:
    """Name the inputs and outputs of a model without batches that are scalars in its graph.

    A configuration cannot write a tensor without dims, so these are [1], or [1,1], for clients. Inputs lose the
    dimensions before the run, outputs gain them after, if they do come out as scalars: a signature shows a tensor of
    unknown rank as a scalar too.
    """
    if config.max_batch_size:
        return frozenset()
    scalars = {spec.name for spec in (*signature.inputs, *signature.outputs) if not spec.shape}
    return frozenset(tensor.name for tensor in _tensors(config) if tensor.name in scalars)


def path_problem(path: str) -> str:
    """Say why a relative path may leave its directory or cannot exist, "" when it is sound."""
    parts = path.split("/")
    if "\\" in path or "\0" in path or any(part in ("", ".", "..") for part in parts):
        return "must be a relative path that stays inside the model's directory"
    if any(len(part.encode(errors="surrogatepass")) > MAX_FILE_NAME_BYTES for part in parts):
        return f"has a name longer than {MAX_FILE_NAME_BYTES} bytes"
    return ""


def _tensors(config: ModelConfig) -> list[Tensor]:
    return [*config.input, *config.output]


def _config_error(model: str, field: str, what: str) -> ConfigError:
    return ConfigError(f"model '{model}': {field} {what}", model=model, field=field.split(" ")[0])


def _check_batching(config: ModelConfig, model: str) -> None:
    for size in config.dynamic_batching.preferred_batch_size:
        if not 0 < size <= config.max_batch_size:
            what = f"{size} must be from 1 to max_batch_size, which is {config.max_batch_size}"
            raise _config_error(model, "dynamic_batching.preferred_batch_size", what)
    _check_priorities(config, model)


def _check_priorities(config: ModelConfig, model: str) -> None:
    """Check priority levels, and that policies are of levels that there are."""
    scheduler = config.dynamic_batching
    levels, default = scheduler.priority_levels, scheduler.default_priority_level
    if scheduler.preserve_ordering and levels > 1:
        what = f"is {levels}, expected 1 at most, as preserve_ordering is true: priorities put requests before others"
        raise _config_error(model, "dynamic_batching.priority_levels", what)
    field = "dynamic_batching.default_priority_level"
    if levels and not 1 <= default <= levels:
        raise _config_error(model, field, f"is {default}, expected 1 to priority_levels, which is {levels}")
    if default and not levels:
        raise _config_error(model, field, f"is {default}, {NO_LEVELS}")
    policies = [("default_queue_policy", scheduler.default_queue_policy)]
    for level, policy in sorted(scheduler.priority_queue_policy.items()):
        where = f'priority_queue_policy["{level}"]'
        if not 1 <= level <= levels:
            reason = f"expected 1 to priority_levels, which is {levels}" if levels else NO_LEVELS
            raise _config_error(model, f"dynamic_batching.{where}", f"is of level {level}, {reason}")
        policies.append((where, policy))
    for where, policy in policies:
        timeout_us = policy.default_timeout_microseconds
        if timeout_us > MAX_TIMEOUT_US:
            what = f"is {timeout_us}, expected {MAX_TIMEOUT_US} at most"
            raise _config_error(model, f"dynamic_batching.{where}.default_timeout_microseconds", what)
        if scheduler.preserve_ordering and timeout_us and policy.timeout_action == ModelQueuePolicy.DELAY:
            field = f"dynamic_batching.{where}.timeout_action"
            raise _config_error(model, field, "DELAY puts requests behind others, which preserve_ordering rules out")


def _check_response_cache(config: ModelConfig, model: str) -> None:
    """Refuse a cache where an answer does not follow from its request alone, or is several, as Triton does."""
    if not config.response_cache.enable:
        return
    without = "is not there for models with"
    for scheduler in ("sequence_batching", "ensemble_scheduling"):
        if config.HasField(scheduler):
            raise _config_error(model, "response_cache.enable", f"{without} {scheduler}")
    if config.model_transaction_policy.decoupled:
        raise _config_error(model, "response_cache.enable", f"{without} decoupled model_transaction_policy")


def _check_warmup(config: ModelConfig, model: str) -> None:
    """Check what a sample says; what its inputs are to be is checked as for any request."""
    for index, sample in enumerate(config.model_warmup):
        where = f"model_warmup[{index}]"
        most = max(1, config.max_batch_size)
        if not 1 <= sample.batch_size <= most:
            what = f"of '{sample.name}' is {sample.batch_size}, expected 1 to {most}"
            raise _config_error(model, f"{where}.batch_size", what)
        for name, item in sorted(sample.inputs.items()):
            within = f'{where}.inputs["{name}"]'
            if item.data_type not in BY_CONFIG_TYPE:
                raise _config_error(model, f"{within}.data_type", "is missing")
            if any(dim < 0 for dim in item.dims):
                what = f"is {format_shape(item.dims)}, and a sample has no open dimension"
                raise _config_error(model, f"{within}.dims", what)
            if item.WhichOneof("input_data_type") is None:
                raise _config_error(model, within, "needs one of zero_data, random_data, input_data_file")
            problem = path_problem(item.input_data_file) if item.HasField("input_data_file") else ""
            if problem:
                raise _config_error(model, f"{within}.input_data_file", f"'{item.input_data_file}' {problem}")


def _check_tensors(kind: str, tensors: Sequence[Tensor], config: ModelConfig, model: str) -> None:
    names: set[str] = set()
    for index, tensor in enumerate(tensors):
        where = f"{kind}[{index}]"
        _check_tensor(tensor, where, model)
        if tensor.HasField("reshape"):
            _check_reshape(tensor, f"{where}.reshape", config.max_batch_size, model)
        if tensor.name in names:
            raise _config_error(model, f"{where}.name", f"'{tensor.name}' is the name of another {kind}")
        names.add(tensor.name)


def _check_tensor(tensor: Tensor, where: str, model: str) -> None:
    if not tensor.name:
        raise _config_error(model, f"{where}.name", "is missing")
    if tensor.data_type not in BY_CONFIG_TYPE:
        raise _config_error(model, f"{where}.data_type", f"of '{tensor.name}' is missing")
    if not tensor.dims:
        raise _config_error(model, f"{where}.dims", f"of '{tensor.name}' is missing")
    if any(dim < 1 and dim != VARIABLE for dim in tensor.dims):
        what = f"of '{tensor.name}' is {format_shape(tensor.dims)}, expected sizes of 1 and more, or -1 for any"
        raise _config_error(model, f"{where}.dims", what)


def _check_reshape(tensor: Tensor, where: str, max_batch_size: int, model: str) -> None:
    """Check that dims and reshape hold the same elements: as many between each two dimensions that are open."""
    dims, shape = tuple(tensor.dims), tuple(tensor.reshape.shape)
    if not (shape or max_batch_size):
        raise ConfigError(
            f"model {where.partition('[')[0]} '{tensor.name}' cannot have empty reshape for non-batching model"
            f" as scalar tensors are not supported for {model}",
            model=model,
            field=where,
        )
    of = f"of '{tensor.name}' is {format_shape(shape)}"
    if any(dim < 1 and dim != VARIABLE for dim in shape):
        raise _config_error(model, where, f"{of}, expected sizes of 1 and more, or -1 for any")
    if shape.count(VARIABLE) != dims.count(VARIABLE):
        what = f"{of}, which has a different number of variable-size dimensions than dims {format_shape(dims)}"
        raise _config_error(model, where, what)
    if _sizes_between_open(shape) != _sizes_between_open(dims):
        raise _config_error(model, where, f"{of}, which has a different size than dims {format_shape(dims)}")


def _sizes_between_open(dims: tuple[int, ...]) -> list[int]:
    """How many elements the dimensions before, between and behind the open ones have."""
    sizes = [1]
    for dim in dims:
        if dim == VARIABLE:
            sizes.append(1)
        else:
            sizes[-1] *= dim
    return sizes


def _check_presence(config: ModelConfig, signature: GraphSignature, fed: set[str]) -> None:
    """Check that every required input is listed, or is fed by the server, and that there are outputs."""
    listed = {tensor.name for tensor in config.input} | fed
    missing = [spec.name for spec in signature.inputs if not spec.optional and spec.name not in listed]
    if missing:
        names = ", ".join(f"'{name}'" for name in missing)
        raise ModelLoadError(
            f"unable to load model '{config.name}', configuration expects {len(listed)} inputs,"
            f" model provides {len(listed) + len(missing)}: missing {names}",
            model=config.name,
        )
    if not config.output:
        raise ModelLoadError(
            f"unable to load model '{config.name}', configuration expects 0 outputs,"
            f" model provides {len(signature.outputs)}",
            model=config.name,
        )


def _check_datatype(config: ModelConfig, kind: str, tensor: Tensor, spec: TensorSpec) -> None:
    dtype = BY_CONFIG_TYPE[tensor.data_type]
    if dtype.name != spec.datatype:
        raise ModelLoadError(
            f"unable to load model '{config.name}', configuration expects datatype {_config_name(dtype.name)}"
            f" for {kind} '{tensor.name}', model provides {_config_name(spec.datatype)}",
            model=config.name,
        )


def _check_dims(config: ModelConfig, tensor: Tensor, spec: TensorSpec) -> None:
    dims = tuple(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
    start = f"model '{config.name}', tensor '{tensor.name}': "
    if config.max_batch_size:
        if not spec.shape or spec.shape[0] != VARIABLE:
            raise ModelLoadError(
                f"{start}for the model to support batching the shape should have at least 1 dimension and the first"
                f" dimension must be -1; but shape expected by the model is {format_shape(spec.shape)}",
                model=config.name,
            )
        dims = (VARIABLE, *dims)
        how = (
            " (an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, making"
            f" complete shape {format_shape(dims)})"
        )
    else:
        if not spec.shape and set(dims) == set(SCALAR_DIMS):
            return
        how = f" (shape {format_shape(dims)})"
    if not _fits(dims, spec.shape):
        raise ModelLoadError(
            f"{start}the model expects {len(spec.shape)} dimensions (shape {format_shape(spec.shape)})"
            f" but the model configuration specifies {len(dims)} dimensions{how}",
            model=config.name,
        )


def _fits(dims: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """A dimension that the model leaves open may be narrowed; one that it fixes must be the same."""
    return len(dims) == len(shape) and all(want in (VARIABLE, dim) for dim, want in zip(dims, shape, strict=True))


def _config_name(datatype: str) -> str:
    return f"TYPE_{re.sub('^BYTES$', 'STRING', datatype)}"
