"""The rules of ragged batching in a configuration: on its own (ConfigError), and towards the model file.

They are Triton's, and those without which a batch could not be made or cut: the model merges requests, and where an
output has an open dimension its source input has that dimension too.
"""

from typing import Final

from sluice_proto.model_config_pb2 import BatchInput, BatchOutput, DataType, ModelConfig
from sluice_proto.tensors import BY_CONFIG_TYPE
from sluice_server.graph import VARIABLE, TensorSpec, format_shape
from sluice_server.repository.errors import ConfigError, ModelLoadError

MADE_TYPES: Final = (DataType.TYPE_INT32, DataType.TYPE_INT64, DataType.TYPE_FP32)
"""What an input that is made for each batch may have: Triton's two, and the type of sizes in ONNX."""


def made_inputs(config: ModelConfig) -> frozenset[str]:
    """The inputs of the model file that are made for each batch, so that no client gives them."""
    return frozenset(name for item in config.batch_input for name in item.target_name)


def check_ragged(config: ModelConfig, model: str) -> None:
    """Check what a configuration says of ragged batching, once its inputs and outputs are complete."""
    ragged = [place for place, tensor in enumerate(config.input) if tensor.allow_ragged_batch]
    fields = [f"input[{place}].allow_ragged_batch" for place in ragged]
    fields += ["batch_input"] if config.batch_input else []
    fields += ["batch_output"] if config.batch_output else []
    if fields and not (config.max_batch_size and config.HasField("dynamic_batching")):
        raise _error(model, fields[0], "needs a max_batch_size above 0 and dynamic_batching")
    _check_batch_inputs(config, model)
    _check_batch_outputs(config, model)


def _check_batch_inputs(config: ModelConfig, model: str) -> None:
    taken = {tensor.name for tensor in config.input}
    for place, item in enumerate(config.batch_input):
        where = f"batch_input[{place}]"
        _check_source(item, where, config, model)
        if item.data_type not in MADE_TYPES:
            names = ", ".join(map(DataType.Name, MADE_TYPES))
            raise _error(model, f"{where}.data_type", f"is {DataType.Name(item.data_type)}, expected one of {names}")
        for name in item.target_name:
            if name in taken:
                raise _error(model, f"{where}.target_name", f"'{name}' is the name of another input")
            taken.add(name)


def _check_batch_outputs(config: ModelConfig, model: str) -> None:
    outputs = {tensor.name: tensor for tensor in config.output}
    inputs = {tensor.name: tensor for tensor in config.input}
    taken: set[str] = set()
    for place, item in enumerate(config.batch_output):
        where = f"batch_output[{place}]"
        _check_source(item, where, config, model)
        source = inputs[item.source_input[0]]
        given = tuple(source.reshape.shape if source.HasField("reshape") else source.dims)
        for name in item.target_name:
            if name not in outputs:
                raise _error(model, f"{where}.target_name", f"'{name}' is no output; there are {', '.join(outputs)}")
            if name in taken:
                raise _error(model, f"{where}.target_name", f"'{name}' is in batch_output already")
            taken.add(name)
            output = outputs[name]
            dims = tuple(output.reshape.shape if output.HasField("reshape") else output.dims)
            if VARIABLE in dims[len(given) :]:
                what = (
                    f"'{name}' has dims {format_shape(dims)}, and its input '{source.name}' has {format_shape(given)}:"
                    " an open dimension is to have the size of the same dimension there"
                )
                raise _error(model, f"{where}.target_name", what)


def _check_source(item: BatchInput | BatchOutput, where: str, config: ModelConfig, model: str) -> None:
    names = [tensor.name for tensor in config.input]
    if not item.target_name or not all(item.target_name):
        raise _error(model, f"{where}.target_name", "is missing")
    if len(item.source_input) != 1:
        raise _error(model, f"{where}.source_input", f"has {len(item.source_input)} names, expected 1")
    if item.source_input[0] not in names:
        what = f"'{item.source_input[0]}' is no input; there are {', '.join(names)}"
        raise _error(model, f"{where}.source_input", what)


def check_ragged_graph(config: ModelConfig, inputs: dict[str, TensorSpec]) -> None:
    """Check that the model file has the inputs that are made, and ragged ones in one dimension; ModelLoadError."""
    for tensor in config.input:
        if tensor.allow_ragged_batch and inputs[tensor.name].shape != (VARIABLE,):
            raise ModelLoadError(
                f"unable to load model '{config.name}', configuration expects model provides input with shape [-1] for"
                f" ragged input '{tensor.name}', model provides {format_shape(inputs[tensor.name].shape)}",
                model=config.name,
            )
    for item in config.batch_input:
        for name in item.target_name:
            if name not in inputs:
                raise ModelLoadError(
                    f"unexpected batch input '{name}', allowed inputs are: {', '.join(sorted(inputs))}",
                    model=config.name,
                )
            _check_made(config, item, inputs[name])


def _check_made(config: ModelConfig, item: BatchInput, spec: TensorSpec) -> None:
    start = f"unable to load model '{config.name}', configuration expects"
    datatype = BY_CONFIG_TYPE[item.data_type].name
    if datatype != spec.datatype:
        raise ModelLoadError(
            f"{start} datatype {datatype} for batch input '{spec.name}', model provides {spec.datatype}",
            model=config.name,
        )
    shape: tuple[int, ...] = (VARIABLE,)
    if item.kind == BatchInput.BATCH_ITEM_SHAPE:
        source = next(tensor for tensor in config.input if tensor.name == item.source_input[0])
        shape = (VARIABLE, len(source.reshape.shape if source.HasField("reshape") else source.dims))
    open_or_same = [got in (VARIABLE, want) for got, want in zip(spec.shape, shape, strict=False)]
    if len(spec.shape) != len(shape) or not all(open_or_same):
        raise ModelLoadError(
            f"{start} shape {format_shape(shape)} for batch input '{spec.name}' of kind"
            f" {BatchInput.Kind.Name(item.kind)}, model provides {format_shape(spec.shape)}",
            model=config.name,
        )


def _error(model: str, field: str, what: str) -> ConfigError:
    return ConfigError(f"model '{model}': {field} {what}", model=model, field=field)
