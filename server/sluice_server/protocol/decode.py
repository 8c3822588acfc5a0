"""From the bytes of a ModelInferRequest to a validated request, with Triton's checks in Triton's order.

The order and the codes are the contract (compatibility, section 3): parameters, duplicate names, tensor data, outputs,
number of inputs, their names, batch size, data types, shapes, sizes. Every check happens before the queue. Arrays are
views over the received message: nothing is copied and nothing is allocated for what a request merely claims. What is
in shared memory is found here, and read when the request runs.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from google.protobuf.message import DecodeError

from sluice_proto import errors as proto_errors
from sluice_proto import tensors, wire
from sluice_proto.grpc_service_pb2 import ModelInferRequest
from sluice_server.errors import InvalidArgument, Unimplemented
from sluice_server.execution.request import InferRequest, PrioritizedRequest
from sluice_server.execution.shared_memory import SharedTensor, SharedTensors, Window
from sluice_server.graph import format_shape
from sluice_server.protocol import shared_memory
from sluice_server.protocol.classification import CLASSIFICATION, Classes, class_count
from sluice_server.protocol.sequences import step_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from sluice_server.protocol.interface import ModelInterface, TensorInterface
    from sluice_server.protocol.shared_memory import SharedMemory
    from sluice_server.transport.call import Call

EMPTY_CELLS_MAX = 65_536
"""What the dimensions of a tensor without elements may multiply to, the zeros left out. They cost its sender nothing,
and a model that reduces over the empty dimension would allocate all of the rest."""

SEQUENCE_ID_BYTES_MAX = 128
"""Of a sequence_id that is text: Triton's limit."""

NS_PER_US = 1000
_NO_WISHES: tuple[dict[str, Window], dict[str, int]] = ({}, {})
_ANY_KIND = ("int64_param", "bool_param", "string_param", "double_param")
_BATCH_NOTE = (
    " max_batch_size is set for this model, so the first dimension of every input is the batch and is not part of"
    " the dims in its configuration; set max_batch_size to 0 to give whole shapes there."
)
_RESERVED_PREFIX = "triton_"
_EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"


class ParsedRequest:
    """A request that is valid protobuf: the message without its raw tensors, and views of those."""

    __slots__ = ("message", "model_name", "model_version", "raws")

    def __init__(self, data: bytes | memoryview) -> None:
        """Parse; `InvalidArgument` when `data` is not a ModelInferRequest."""
        try:
            if len(data) < wire.SPLIT_BYTES_MIN:
                message = ModelInferRequest.FromString(data if isinstance(data, bytes) else bytes(data))
                self.raws: Sequence[bytes | memoryview] = message.raw_input_contents
            else:
                head, self.raws = wire.split_raw(data)
                message = ModelInferRequest.FromString(head)
        except (DecodeError, proto_errors.WireError) as error:
            raise InvalidArgument(
                f"the {len(data)} bytes of the request are not a ModelInferRequest message"
            ) from error
        self.message = message
        self.model_name: str = message.model_name
        self.model_version: str = message.model_version


def decode(
    parsed: ParsedRequest, interface: ModelInterface, call: Call, regions: SharedMemory = shared_memory.OFF
) -> InferRequest:
    """Validate a request against the model it names; `InvalidArgument` says what is wrong, and where."""
    message = parsed.message
    wish = check_parameters(message.parameters) if message.parameters else NO_WISH
    inputs = message.inputs
    by_name = {tensor.name: tensor for tensor in inputs}
    if len(by_name) != len(inputs):
        raise _Refusal(message).because(f"input '{_first_duplicate(inputs)}' already exists in request")
    outputs = message.outputs
    output_names = _requested_outputs(message) if outputs else interface.output_names
    sources = _find_data(parsed, interface, call, regions)
    windows, counts = _output_wishes(message, call, regions) if outputs else _NO_WISHES
    _check_names(message, by_name, interface)
    rows = _batch_rows(message, interface)
    arrays: dict[str, Any] = {}
    for tensor, source in zip(inputs, sources, strict=True):
        arrays[tensor.name] = _array(message, tensor, source, interface)
    if not rows:
        raise _Refusal(message).because(
            f"inference request batch-size must be >= 1 for '{interface.name}', got 0: input byte size mismatch, the"
            " inputs hold the data of no row"
        )
    key: Any = output_names
    if interface.variable:
        key = (output_names, *interface.shape_key(arrays))
    shared = None
    if windows or Window in map(type, sources):
        shared = SharedTensors({name: item for name, item in arrays.items() if type(item) is SharedTensor}, windows)
        arrays = {name: item for name, item in arrays.items() if name not in shared.inputs}
        key = (key, shared.kind)
    classes = None
    if counts:
        has_rows = interface.max_batch_rows > 0
        classes = {name: Classes(interface.outputs[name], count, has_rows) for name, count in counts.items()}
        key = (key, CLASSIFICATION)
    if interface.prioritizes:
        return PrioritizedRequest(
            call, message.id, arrays, output_names, rows, key, call.deadline_ns, shared, classes
        ).ask(wish.priority, wish.timeout_us * NS_PER_US)
    deadline_ns = deadline_of(call, wish.timeout_us) if wish.timeout_us else call.deadline_ns
    request = InferRequest(call, message.id, arrays, output_names, rows, key, deadline_ns, shared, classes)
    if interface.sequenced:
        request.step = step_of(message, interface, rows)
    return request


class Wish(NamedTuple):
    """What a request's parameters ask of the queue: a priority, and for how long it may wait; 0 for nothing."""

    priority: int = 0
    timeout_us: int = 0


NO_WISH = Wish()


class _Refusal:
    """Makes the error of a check in the core: Triton puts the request's id before it."""

    def __init__(self, message: ModelInferRequest) -> None:
        self._prefix = f"[request id: {message.id or '<id_unknown>'}] "

    def because(self, text: str) -> InvalidArgument:
        return InvalidArgument(self._prefix + text)


def deadline_of(call: Call, timeout_us: int) -> int:
    """When a request with this `timeout` is not worth running any more, on the monotonic clock."""
    return min(call.deadline_ns, call.received_ns + timeout_us * NS_PER_US)


def check_parameters(parameters: Any) -> Wish:
    """Check the reserved parameters and give what they ask of the queue; others have no effect."""
    for key in parameters:
        expected = _PARAMETER_KINDS.get(key)
        kind = parameters[key].WhichOneof("parameter_choice")
        if expected is not None:
            if kind not in expected:
                raise InvalidArgument(f"invalid value type for '{key}' parameter, expected {' or '.join(expected)}.")
        elif kind is None:
            raise InvalidArgument(f"invalid value type for '{key}' parameter, expected one of {', '.join(_ANY_KIND)}.")
        elif key.startswith(_RESERVED_PREFIX):
            raise InvalidArgument(
                f"parameter '{key}' is not known: keys starting with '{_RESERVED_PREFIX}' are reserved, and only"
                f" {_EMPTY_FINAL_RESPONSE} is allowed"
            )
    if "sequence_id" in parameters and len(parameters["sequence_id"].string_param.encode()) > SEQUENCE_ID_BYTES_MAX:
        raise Unimplemented(f"a sequence_id of text cannot be longer than {SEQUENCE_ID_BYTES_MAX} characters")
    priority: int = 0
    if "priority" in parameters:
        # Only one of the two is set, and the other reads as 0.
        priority = parameters["priority"].int64_param or parameters["priority"].uint64_param
    if priority < 0:
        raise InvalidArgument("invalid value for 'priority', expected value >= 0.")
    timeout_us: int = parameters["timeout"].int64_param if "timeout" in parameters else 0
    if timeout_us < 0:
        raise InvalidArgument(f"invalid value for 'timeout', expected microseconds >= 0, got {timeout_us}.")
    return Wish(priority, timeout_us)


# Triton's reserved request parameters and the kinds of value each may have.
_PARAMETER_KINDS: dict[str, tuple[str, ...]] = {
    "sequence_id": ("int64_param", "string_param"),
    "sequence_start": ("bool_param",),
    "sequence_end": ("bool_param",),
    "priority": ("int64_param", "uint64_param"),
    "timeout": ("int64_param",),
    _EMPTY_FINAL_RESPONSE: ("bool_param",),
}


def _first_duplicate(named: Any) -> str:
    seen: set[str] = set()
    for item in named:
        if item.name in seen:
            return str(item.name)
        seen.add(item.name)
    raise AssertionError("called for names that repeat")


def _find_data(parsed: ParsedRequest, interface: ModelInterface, call: Call, regions: SharedMemory) -> list[Any]:
    """The source of each input's data in request order: a window of shared memory, a raw buffer or the typed contents.

    Surplus raw buffers are ignored.
    """
    raws = parsed.raws
    next_raw = 0
    sources: list[Any] = []
    for tensor in parsed.message.inputs:
        if tensor.parameters and shared_memory.REGION in tensor.parameters:
            if tensor.HasField("contents"):
                raise InvalidArgument(
                    f"unexpected 'content' provided when using shared memory for input tensor '{tensor.name}' for model"
                    f" '{interface.name}'"
                )
            sources.append(regions.window(f"input tensor '{tensor.name}'", tensor.parameters, call))
        elif tensor.HasField("contents"):
            sources.append(_typed_source(tensor, interface, raw_is_used=bool(raws)))
        elif next_raw < len(raws):
            sources.append(raws[next_raw])
            next_raw += 1
        else:
            raise InvalidArgument(
                f"unable to find data for input tensor '{tensor.name}' for model '{interface.name}' in request."
            )
    return sources


# The data type that a field of InferTensorContents is named for: the widest that it carries.
_TYPES_OF_CONTENTS = {dtype.contents_field: dtype.name for dtype in tensors.BY_NAME.values()}


def _typed_source(tensor: Any, interface: ModelInterface, *, raw_is_used: bool) -> Any:
    where = f"for input tensor '{tensor.name}' for model '{interface.name}'"
    if raw_is_used:
        raise InvalidArgument(f"contents field must not be specified when using raw_input_contents {where}")
    filled = tensors.contents_fields(tensor.contents)
    if len(filled) > 1:
        raise InvalidArgument(
            f"unexpected explicit tensor data {where}: more than one field is filled: {', '.join(filled)}"
        )
    dtype = tensors.BY_NAME.get(tensor.datatype)
    if filled and (dtype is None or filled[0] != dtype.contents_field):
        carried = (
            "is unknown" if dtype is None else f"is carried by {dtype.contents_field or 'raw_input_contents only'}"
        )
        raise InvalidArgument(
            f"unexpected explicit tensor data {where} of type '{_TYPES_OF_CONTENTS[filled[0]]}', expected datatype"
            f" '{tensor.datatype}', which {carried}"
        )
    return tensor.contents


def _requested_outputs(message: ModelInferRequest) -> tuple[str, ...]:
    """The names asked for, in that order; a name twice is refused, as newer Triton does."""
    names = tuple([output.name for output in message.outputs])
    if len(set(names)) != len(names):
        raise _Refusal(message).because(f"output '{_first_duplicate(message.outputs)}' already exists in request")
    return names


def _output_wishes(
    message: ModelInferRequest, call: Call, regions: SharedMemory
) -> tuple[dict[str, Window], dict[str, int]]:
    """Where outputs go that are to be in shared memory, and of how many classes those are that are to be classified."""
    windows, counts = {}, {}
    for output in message.outputs:
        if not output.parameters:
            continue
        if shared_memory.REGION in output.parameters:
            windows[output.name] = regions.window(f"output '{output.name}'", output.parameters, call)
        count = class_count(output.parameters)
        if count and output.name in windows:
            raise InvalidArgument(
                f"output '{output.name}' has both '{CLASSIFICATION}' and '{shared_memory.REGION}': the classes of an"
                " output do not go to shared memory"
            )
        if count:
            counts[output.name] = count
    return windows, counts


def _check_names(message: ModelInferRequest, by_name: dict[str, Any], interface: ModelInterface) -> None:
    """First the outputs' names, then the number of inputs, then their names: Triton's order."""
    for output in message.outputs:
        if output.name not in interface.outputs:
            raise InvalidArgument(
                f"unexpected inference output '{output.name}' for model '{interface.name}',"
                f" it has {', '.join(interface.outputs)}"
            )
    if not interface.required_inputs <= len(by_name) <= len(interface.inputs):
        raise _Refusal(message).because(_count_text(by_name, interface))
    for name in by_name:
        if name not in interface.inputs:
            raise InvalidArgument(
                f"unexpected inference input '{name}' for model '{interface.name}',"
                f" it has {', '.join(interface.inputs)}"
            )
    if interface.required_inputs != len(interface.inputs):
        missing = [name for name, tensor in interface.inputs.items() if not tensor.optional and name not in by_name]
        if missing:
            raise _Refusal(message).because(_count_text(by_name, interface))


def _count_text(by_name: dict[str, Any], interface: ModelInterface) -> str:
    most, least = len(interface.inputs), interface.required_inputs
    expected = f"{most} inputs" if least == most else f"number of inputs between {least} and {most}"
    missing = [name for name, tensor in interface.inputs.items() if not tensor.optional and name not in by_name]
    return (
        f"expected {expected} but got {len(by_name)} inputs for model '{interface.name}'."
        f" Got input(s) {list(by_name)}, missing required input(s) {missing}, the model has {list(interface.inputs)}."
    )


def _batch_rows(message: ModelInferRequest, interface: ModelInterface) -> int:
    """The request's rows: dimension 0, equal in all inputs; 1 for a model without a batch dimension."""
    limit = interface.max_request_rows
    if limit == 0:
        return 1
    rows = None
    for tensor in message.inputs:
        if not tensor.shape:
            raise _Refusal(message).because(
                f"input '{tensor.name}' has no shape but model requires batch dimension for '{interface.name}'"
            )
        if rows is None:
            rows = tensor.shape[0]
        elif tensor.shape[0] != rows:
            raise _Refusal(message).because(
                f"input '{tensor.name}' batch size does not match other inputs for '{interface.name}':"
                f" {tensor.shape[0]} and {rows}"
            )
    if rows is None or rows > limit:
        raise _Refusal(message).because(
            f"inference request batch-size must be <= {limit} for '{interface.name}', got {rows}"
        )
    return int(rows)


def _array(
    message: ModelInferRequest, tensor: Any, source: Any, interface: ModelInterface
) -> np.ndarray | SharedTensor:
    """Check one input's data type, shape and size, in this order, and give the view of its data."""
    expected = interface.inputs[tensor.name]
    if tensor.datatype != expected.dtype.name:
        raise _Refusal(message).because(
            f"inference input '{tensor.name}' data-type is '{tensor.datatype}', but model '{interface.name}' expects"
            f" '{expected.dtype.name}'"
        )
    shape = tuple(tensor.shape)
    dims = shape[1:] if interface.max_batch_rows else shape
    if not expected.accepts(dims) or min(shape, default=0) < 0:
        raise _shape_error(message, expected, shape, interface)
    if expected.graph_dims is not None:
        shape = expected.to_graph(shape, 1 if interface.max_batch_rows else 0)
    array: np.ndarray | SharedTensor
    try:
        if isinstance(source, (bytes, memoryview)):
            array = tensors.view(expected.dtype, shape, source)
        elif isinstance(source, Window):
            array = _shared_tensor(message, expected, shape, source, interface)
        else:
            array = tensors.from_contents(expected.dtype, shape, source)
    except proto_errors.TensorError as error:
        raise _data_error(message, expected, error, interface) from error
    if 0 in shape and math.prod(filter(None, shape)) > EMPTY_CELLS_MAX:
        raise _Refusal(message).because(
            f"input '{expected.name}' for model '{interface.name}' has no elements: the other dimensions of its shape"
            f" {format_shape(shape)} may multiply to {EMPTY_CELLS_MAX} at most"
        )
    return array


def _shared_tensor(
    message: ModelInferRequest,
    expected: TensorInterface,
    shape: tuple[int, ...],
    window: Window,
    interface: ModelInterface,
) -> SharedTensor:
    """An input to be read from shared memory; BYTES are looked at only then."""
    expected_bytes = tensors.element_count(shape) * expected.dtype.itemsize
    if expected.dtype.itemsize and expected_bytes != window.size_bytes:
        raise proto_errors.SizeMismatch(expected_bytes, window.size_bytes)
    return SharedTensor(window, expected.dtype, shape, lambda error: _data_error(message, expected, error, interface))


def _shape_error(
    message: ModelInferRequest, expected: TensorInterface, shape: tuple[int, ...], interface: ModelInterface
) -> InvalidArgument:
    where = f"for input '{expected.name}' for model '{interface.name}'"
    if min(shape, default=0) < 0:
        return _Refusal(message).because(f"All input dimensions should be specified {where}, got {format_shape(shape)}")
    batch, note = ((-1,), _BATCH_NOTE) if interface.max_batch_rows else ((), "")
    return _Refusal(message).because(
        f"unexpected shape {where}. Expected {format_shape(batch + expected.dims)}, got {format_shape(shape)}.{note}"
    )


def _data_error(
    message: ModelInferRequest, expected: TensorInterface, error: proto_errors.TensorError, interface: ModelInterface
) -> InvalidArgument:
    """The size check's refusal, with Triton's facts for fixed-size types and for BYTES."""
    where = f"for inference input '{expected.name}' for model '{interface.name}'"
    match error:
        case proto_errors.SizeMismatch():
            text = (
                f"input byte size mismatch for input '{expected.name}' for model '{interface.name}'."
                f" Expected {error.expected_bytes}, got {error.got_bytes}"
            )
        case proto_errors.BytesElementCount(more=False):
            text = f"expected {error.expected} string elements {where}, got {error.got}"
        case proto_errors.BytesElementCount():
            text = f"unexpected number of string elements {error.got} {where}, expecting {error.expected}"
        case proto_errors.BytesTruncatedLength():
            text = f"incomplete string length indicator {where}, expecting 4 bytes but only {error.available} available"
        case proto_errors.BytesTruncatedBody():
            text = (
                f"incomplete string data {where}, expecting string of length {error.length} but only"
                f" {error.available} bytes available"
            )
        case _:
            text = f"input '{expected.name}' for model '{interface.name}' cannot be read: {error}"
    return _Refusal(message).because(text)
