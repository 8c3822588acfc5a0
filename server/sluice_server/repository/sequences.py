"""What `sequence_batching` says: its defaults, its rules, and the tensors of the graph that clients do not see."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from sluice_proto.model_config_pb2 import ModelConfig, ModelInput, ModelOutput, ModelSequenceBatching
from sluice_proto.tensors import BY_CONFIG_TYPE, BY_NAME
from sluice_server.graph import VARIABLE, format_shape
from sluice_server.repository.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator

Control = ModelSequenceBatching.Control

DEFAULT_IDLE_US: Final = 1_000_000
"""Triton's default of max_sequence_idle_microseconds."""

INITIAL_STATE_DIRECTORY: Final = "initial_state"
"""Where the files of `data_file` are, in the model's directory, as in Triton."""

PAIRS: Final = {"int32_false_true": "INT32", "fp32_false_true": "FP32", "bool_false_true": "BOOL"}
"""The fields that hold the two values of a flag, and the data type that each gives its tensor."""

ID_TYPES: Final = ("UINT64", "INT64", "UINT32", "INT32", "BYTES")
"""The data types that a sequence's id can have as a tensor."""

_FLAG_DIMS = [1]


def fill_defaults(config: ModelConfig) -> None:
    """Fill in what Triton fills in for a model with sequences."""
    if not config.HasField("sequence_batching"):
        return
    batching = config.sequence_batching
    batching.max_sequence_idle_microseconds = batching.max_sequence_idle_microseconds or DEFAULT_IDLE_US
    if batching.HasField("oldest") and config.max_batch_size and not batching.oldest.preferred_batch_size:
        batching.oldest.preferred_batch_size.append(config.max_batch_size)


def hidden_inputs(config: ModelConfig) -> list[ModelInput]:
    """The graph's inputs that the server feeds: controls and states; `sequence_batching` must have been checked."""
    batching = config.sequence_batching
    controls = [
        ModelInput(name=item.name, data_type=_config_type(control_datatype(item.control[0])), dims=_FLAG_DIMS)
        for item in batching.control_input
    ]
    states = [ModelInput(name=each.input_name, data_type=each.data_type, dims=each.dims) for each in batching.state]
    return controls + states


def hidden_outputs(config: ModelConfig) -> list[ModelOutput]:
    """The graph's outputs that the server keeps: states, those too that clients see."""
    return [
        ModelOutput(name=each.output_name, data_type=each.data_type, dims=each.dims)
        for each in config.sequence_batching.state
    ]


def control_datatype(control: Control) -> str:
    """The protocol's name of a control's data type; empty when the control does not say one."""
    if control.kind == Control.CONTROL_SEQUENCE_CORRID:
        dtype = BY_CONFIG_TYPE.get(control.data_type)
        return dtype.name if dtype is not None else ""
    given = [datatype for field, datatype in PAIRS.items() if getattr(control, field)]
    return given[0] if len(given) == 1 else ""


def check_sequences(config: ModelConfig, model: str) -> None:
    """Raise ConfigError for the first rule of sequence_batching that a configuration breaks."""
    if not config.HasField("sequence_batching"):
        return
    for field, problem in _problems(config):
        path = f"sequence_batching.{field}"
        raise ConfigError(f"model '{model}': {path} {problem}", model=model, field=path)


def _problems(config: ModelConfig) -> Iterator[tuple[str, str]]:
    batching = config.sequence_batching
    yield from _strategy_problems(batching, config.max_batch_size)
    listed = {tensor.name for tensor in config.input}
    kinds: set[int] = set()
    for index, item in enumerate(batching.control_input):
        for field, problem in _control_problems(item, listed, kinds):
            yield f"control_input[{index}]{field}", problem
        listed.add(item.name)
    outputs: set[str] = set()
    for index, state in enumerate(batching.state):
        for field, problem in _state_problems(state, listed, outputs):
            yield f"state[{index}]{field}", problem
        listed.add(state.input_name)
        outputs.add(state.output_name)


def _strategy_problems(batching: ModelSequenceBatching, max_batch_size: int) -> Iterator[tuple[str, str]]:
    utilization = batching.direct.minimum_slot_utilization
    if not 0 <= utilization <= 1:
        yield "direct.minimum_slot_utilization", f"is {utilization:g}, expected 0 to 1"
    if not batching.HasField("oldest"):
        return
    candidates = batching.oldest.max_candidate_sequences
    if candidates < 1:
        yield "oldest.max_candidate_sequences", f"is {candidates}, expected 1 or more"
    for size in batching.oldest.preferred_batch_size:
        if not 0 < size <= max_batch_size:
            what = f"{size} must be from 1 to max_batch_size, which is {max_batch_size}"
            yield "oldest.preferred_batch_size", what


def _control_problems(item: Any, listed: set[str], kinds: set[int]) -> Iterator[tuple[str, str]]:
    if not item.name:
        yield ".name", "is missing"
    if item.name in listed:
        yield ".name", f"'{item.name}' is the name of another input"
    if len(item.control) != 1:
        yield ".control", f"of '{item.name}' has {len(item.control)} entries, expected one"
    control = item.control[0]
    kind = Control.Kind.Name(control.kind)
    if control.kind in kinds:
        yield ".control[0].kind", f"{kind} is given twice"
    kinds.add(control.kind)
    pairs = [field for field in PAIRS if getattr(control, field)]
    if control.kind == Control.CONTROL_SEQUENCE_CORRID:
        if pairs:
            yield f".control[0].{pairs[0]}", f"has no meaning for {kind}, which has a data_type"
        if control_datatype(control) not in ID_TYPES:
            allowed = ", ".join(_type_name(name) for name in ID_TYPES)
            yield ".control[0].data_type", f"of {kind} must be one of {allowed}"
        return
    if control.data_type:
        yield ".control[0].data_type", f"has no meaning for {kind}, whose type is that of its two values"
    if len(pairs) != 1:
        yield ".control[0]", f"of {kind} needs one of {', '.join(PAIRS)}, got {' and '.join(pairs) or 'none'}"
    elif len(getattr(control, pairs[0])) != 2:
        yield f".control[0].{pairs[0]}", "must have two values, the one for false and the one for true"


def _state_problems(state: Any, listed: set[str], outputs: set[str]) -> Iterator[tuple[str, str]]:
    for field in ("input_name", "output_name"):
        if not getattr(state, field):
            yield f".{field}", "is missing"
    if state.input_name in listed:
        yield ".input_name", f"'{state.input_name}' is the name of another input"
    if state.output_name in outputs:
        yield ".output_name", f"'{state.output_name}' is the output of another state"
    if state.data_type not in BY_CONFIG_TYPE:
        yield ".data_type", f"of '{state.input_name}' is missing"
    if not state.dims:
        yield ".dims", f"of '{state.input_name}' is missing"
    if any(dim < 1 and dim != VARIABLE for dim in state.dims):
        yield ".dims", f"is {format_shape(state.dims)}, expected sizes of 1 and more, or -1 for any"
    if len(state.initial_state) > 1:
        yield ".initial_state", f"of '{state.input_name}' has {len(state.initial_state)} entries, expected one"
    for initial in state.initial_state:
        for field, problem in _initial_problems(initial, state):
            yield f".initial_state[0]{field}", problem


def _initial_problems(initial: Any, state: Any) -> Iterator[tuple[str, str]]:
    if not initial.name:
        yield ".name", "is missing"
    if initial.data_type != state.data_type:
        yield ".data_type", f"of '{initial.name}' must be that of the state, {_type_of(state.data_type)}"
    fits = len(initial.dims) == len(state.dims) and all(
        got >= 0 and want in (VARIABLE, got) for got, want in zip(initial.dims, state.dims, strict=True)
    )
    if not fits:
        what = f"is {format_shape(initial.dims)}, expected sizes that fit the state's {format_shape(state.dims)}"
        yield ".dims", what
    kind = initial.WhichOneof("state_data")
    if kind is None or (kind == "zero_data" and not initial.zero_data):
        yield "", f"'{initial.name}' needs zero_data: true or a data_file"


def _config_type(datatype: str) -> Any:
    return BY_NAME[datatype].config_type


def _type_of(config_type: int) -> str:
    return _type_name(BY_CONFIG_TYPE[config_type].name)


def _type_name(datatype: str) -> str:
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
