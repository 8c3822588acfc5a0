"""Inference over REST: from a body (JSON head, binary tail) to a ModelInferRequest, and from its answer to a body.

The request becomes the very bytes that a gRPC client would have sent, so that every check, the queue and the statistics
are the same; here is only what JSON and the binary tensor extension add (compatibility, section 17). Knows nothing of
HTTP but one header. Heads of requests and of answers whose tensors are all binary repeat, and are remembered with what
they became.
"""

from __future__ import annotations

from functools import partial
from itertools import chain
from operator import ne
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from sluice_proto import errors as proto_errors
from sluice_proto import tensors, wire
from sluice_proto.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from sluice_server.errors import InvalidArgument
from sluice_server.protocol import rest_json
from sluice_server.protocol.rest_json import MalformedJson, member, optional

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from typing_extensions import Buffer

    from sluice_server.protocol.interface import ModelInterface

HEADS_MAX = 1024
"""Heads that are remembered; with more all are forgotten, and those in use are soon known again."""

HEAD_BYTES_MAX = 1024
"""A dozen tensors. With HEADS_MAX it bounds what strangers can have remembered, to some megabytes."""

_DIMENSION_MAX = (1 << 63) - 1
_RAW_INPUT = ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
_RAW_OUTPUT = ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER
_RESERVED_PREFIX = "triton_"
_SOURCES = ("data", "binary_data_size", "shared_memory_region")
_NO_JSON = frozenset(("FP16", "BF16"))


class OutputForms(NamedTuple):
    """How a client wants its outputs: those named, and all others."""

    by_name: Mapping[str, bool]
    """Whether an output is to be binary."""
    others_binary: bool
    in_memory: frozenset[str]
    """Outputs whose data the client finds in shared memory."""

    @property
    def all_binary(self) -> bool:
        """Whether every output is to be binary."""
        return (all(self.by_name.values()) if self.by_name else self.others_binary) and not self.in_memory


class InferAnswer(NamedTuple):
    """The body of an answer: JSON, and the binary tensors behind it; `is_binary` also when these are empty."""

    head: bytes
    tensors: Sequence[Buffer]
    is_binary: bool


class _Head(NamedTuple):
    """What a JSON head became: a message without its tensors, their sizes by input, and the outputs' forms."""

    message: bytes
    sizes: tuple[tuple[str, int], ...]
    forms: OutputForms


class InferRequests:
    """Makes messages of bodies. For one thread: the front's."""

    def __init__(self) -> None:
        self._heads: dict[tuple[str, str, bytes], _Head] = {}

    def read(
        self, interface: ModelInterface, version: str, body: bytes, head_length: str | None
    ) -> tuple[bytes, OutputForms]:
        """The message of a request and how to answer it.

        `version` is the one asked for, empty for any; `head_length` the header Inference-Header-Content-Length.
        """
        if head_length is None:
            head_bytes = len(body)
        elif head_length.isascii() and head_length.isdecimal() and len(head_length) < 20:
            head_bytes = int(head_length)
        else:
            head_bytes = -1
        if not 0 <= head_bytes <= len(body):
            raise InvalidArgument(
                f"inference header size should be in range (0, {len(body)}), got: {str(head_length)[:40]}"
            )
        if head_bytes == 0 and head_length is not None:
            return _read_raw(interface, version, body)
        text = body if head_bytes == len(body) else body[:head_bytes]
        key = (interface.name, version, text)
        known = self._heads.get(key) if head_bytes <= HEAD_BYTES_MAX else None
        if known is None:
            known, has_data, raws = _read_head(interface.name, version, text)
            if has_data:
                return _with_tail(known, interface.name, body, head_bytes, raws), known.forms
            if head_bytes <= HEAD_BYTES_MAX:
                if len(self._heads) >= HEADS_MAX:
                    self._heads.clear()
                self._heads[key] = known
        return _with_tail(known, interface.name, body, head_bytes, {}), known.forms


def _with_tail(head: _Head, model: str, body: bytes, offset: int, raws: Mapping[str, bytes]) -> bytes:
    """The whole message: each tensor behind its prefix, from the body's tail or, of JSON data, from `raws`."""
    parts: list[Buffer] = [head.message]
    view = memoryview(body)
    for name, size_bytes in head.sizes:
        raw: Buffer | None = raws.get(name)
        if raw is None:
            stop = offset + size_bytes
            if stop > len(body):
                raise InvalidArgument(
                    f"unexpected size for input '{name}', expecting {stop - len(body)} additional bytes"
                    f" for model '{model}'"
                )
            raw = view[offset:stop]
            offset = stop
        parts += (wire.length_delimited(_RAW_INPUT, size_bytes), raw)
    if offset != len(body):
        raise InvalidArgument(f"unexpected additional input data for model '{model}': {len(body) - offset} bytes")
    return b"".join(parts)


def _read_head(model: str, version: str, text: bytes) -> tuple[_Head, bool, dict[str, bytes]]:
    """What a JSON head says; whether any of its inputs has JSON data, and that data by input."""
    head = rest_json.load_object(text)
    message = ModelInferRequest(model_name=model, model_version=version)
    rest_json.set_text(message, "id", optional(head, "id", str))
    parameters = optional(head, "parameters", dict)
    all_binary = optional(parameters, "binary_data_output", bool)
    for key, value in parameters.items():
        if key.startswith(_RESERVED_PREFIX):
            raise InvalidArgument(
                f"parameter keys starting with '{_RESERVED_PREFIX}' are reserved for Triton usage and should not be"
                f" specified: '{key}'"
            )
        if key != "binary_data_output":
            _set_parameter(message.parameters, key, value)
    sizes: list[tuple[str, int]] = []
    raws: dict[str, bytes] = {}
    for item in _objects(member(head, "inputs", list), "inputs"):
        _read_input(message.inputs.add(), item, sizes, raws)
    names = [tensor.name for tensor in message.inputs]
    if len(set(names)) != len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidArgument(f"[request id: {message.id or '<id_unknown>'}] input '{twice}' already exists in request")
    forms = _read_outputs(message, head, all_binary=all_binary)
    return _Head(message.SerializeToString(), tuple(sizes), forms), bool(raws), raws


def _objects(items: list[Any], name: str) -> list[dict[str, Any]]:
    if not all(isinstance(item, dict) for item in items):
        raise MalformedJson(f"Unable to parse '{name}': attempt to access JSON non-object as object")
    return items


def _read_input(tensor: Any, item: dict[str, Any], sizes: list[tuple[str, int]], raws: dict[str, bytes]) -> None:
    """Fill a request's input; tensors of JSON data go to `raws`, and what is in raw form has its size in `sizes`."""
    name = member(item, "name", str)
    rest_json.set_text(tensor, "name", name)
    shape = _read_shape(item)
    tensor.shape.extend(shape)
    datatype = member(item, "datatype", str)
    dtype = tensors.BY_NAME.get(datatype)
    if dtype is None:
        raise InvalidArgument(f"invalid datatype for input {name}: '{datatype}'")
    tensor.datatype = datatype
    parameters = optional(item, "parameters", dict)
    given = [source for source in _SOURCES if source in (item if source == "data" else parameters)]
    if len(given) != 1:
        raise InvalidArgument(
            "Input must set only one of the following fields: 'data', 'binary_data_size' in 'parameters',"
            " 'shared_memory_region' in 'parameters'. But "
            + ("set " + " ".join(f"'{source}'" for source in given) if given else "no field is set")
            + f", for input '{name}'"
        )
    for key, value in parameters.items():
        if key != "binary_data_size":
            _set_parameter(tensor.parameters, key, value)
    if given[0] == "binary_data_size":
        size_bytes = member(parameters, "binary_data_size", int)
        if size_bytes < 0:
            raise MalformedJson(f"Unable to parse 'binary_data_size': {size_bytes} for input '{name}' is negative")
        sizes.append((name, size_bytes))
    elif given[0] == "data":
        raws[name] = _raw_of(name, item["data"], shape, dtype)
        sizes.append((name, len(raws[name])))


def _read_shape(item: dict[str, Any]) -> list[int]:
    shape: list[Any] = member(item, "shape", list)
    for dimension in shape:
        if type(dimension) is not int or not 0 <= dimension <= _DIMENSION_MAX:
            raise MalformedJson(
                f"Unable to parse 'shape': a dimension is a whole number from 0 on, got {str(dimension)[:40]}"
            )
    return shape


def _raw_of(name: str, data: Any, shape: list[int], dtype: tensors.DType) -> bytes:
    """JSON data, flat or nested, in raw form."""
    if dtype.name in _NO_JSON:
        raise InvalidArgument(
            f"receiving {dtype.name} data via JSON is not supported. Please use the binary data format for input {name}"
        )
    if not isinstance(data, list):
        raise MalformedJson(f"Unable to parse 'data': attempt to access JSON non-array as array, for input '{name}'")
    flat, kinds = _flatten(name, data)
    try:
        count = tensors.element_count(shape)
    except proto_errors.TensorError as error:
        raise InvalidArgument(f"Unable to parse 'shape' of input '{name}': {error}") from error
    if len(flat) != count:
        raise InvalidArgument(
            f"Unable to parse 'data': Shape does not match true shape of 'data' field: input '{name}' has"
            f" {len(flat)} elements and its shape asks for {count}"
        )
    allowed, words = _KINDS["O" if not dtype.itemsize else dtype.numpy.kind]
    if not kinds <= allowed:
        raise MalformedJson(
            f"Unable to parse 'data': attempt to access JSON non-{words}: input '{name}' has datatype {dtype.name}"
        )
    try:
        with np.errstate(over="ignore"):  # what FP32 cannot hold is infinite, as a cast has it
            return bytes(tensors.to_buffer(np.array(flat, dtype.numpy)))
    except (OverflowError, proto_errors.TensorError) as error:
        raise MalformedJson(f"Unable to parse 'data': an element of input '{name}' is no {dtype.name}") from error


_INTEGERS = (frozenset((int,)), "integer as integer")
_KINDS: dict[str, tuple[frozenset[type], str]] = {
    "b": (frozenset((bool,)), "boolean as boolean"),
    "i": _INTEGERS,
    "u": _INTEGERS,
    "f": (frozenset((int, float)), "number as number"),
    "O": (frozenset((str,)), "string as string"),
}


def _flatten(name: str, data: list[Any]) -> tuple[list[Any], set[type]]:
    """All elements in order, and their types; one pass for each level of nesting."""
    while list in (kinds := set(map(type, data))):
        if len(kinds) > 1:
            raise MalformedJson(
                f"Unable to parse 'data': attempt to access JSON non-array as array, for input '{name}'"
            )
        data = list(chain.from_iterable(data))
    return data, kinds


def _read_outputs(message: ModelInferRequest, head: dict[str, Any], *, all_binary: bool) -> OutputForms:
    if "outputs" not in head:
        return OutputForms({}, all_binary, frozenset())
    by_name = {}
    in_memory = set()
    items = _objects(member(head, "outputs", list), "outputs")
    for item in items:
        output = message.outputs.add()
        name = member(item, "name", str)
        rest_json.set_text(output, "name", name)
        parameters = optional(item, "parameters", dict)
        by_name[name] = optional(parameters, "binary_data", bool)
        if "shared_memory_region" in parameters:
            in_memory.add(name)
        for key, value in parameters.items():
            # Over REST a classification of 0 is none.
            if key != "binary_data" and (key, value) != ("classification", 0):
                _set_parameter(output.parameters, key, value)
    # An empty list asks for all outputs.
    return OutputForms(by_name, all_binary and not items, frozenset(in_memory))


def _set_parameter(parameters: Any, key: str, value: Any) -> None:
    try:
        target = parameters[key]
    except ValueError as error:
        raise MalformedJson("failed to parse the request JSON buffer: a key is not Unicode text") from error
    rest_json.set_parameter(target, key, value)


def _read_raw(interface: ModelInterface, version: str, body: bytes) -> tuple[bytes, OutputForms]:
    """A body that is nothing but the data of the model's one input; its shape follows from its size."""
    if len(interface.inputs) != 1:
        raise InvalidArgument(
            f"Raw request must only have 1 input (found 1) to be deduced but got {len(interface.inputs)} inputs in"
            f" '{interface.name}' model configuration"
        )
    (tensor,) = interface.inputs.values()
    dims = list(tensor.dims)
    if not tensor.dtype.itemsize:
        if dims != [1]:
            raise InvalidArgument(
                f"For BYTE datatype raw input '{tensor.name}', the model must have input shape [1], and it has {dims}"
            )
        body = len(body).to_bytes(4, "little") + body
    elif dims.count(-1) > 1:
        raise InvalidArgument(
            f"The shape of the raw input '{tensor.name}' can not be deduced because there are more than one"
            f" variable-sized dimension"
        )
    elif -1 in dims:
        fixed = tensor.dtype.itemsize * -int(np.prod(dims, dtype=object))
        dims[dims.index(-1)] = len(body) // fixed if fixed else 0
    shape = [1, *dims] if interface.max_batch_rows else dims
    message = ModelInferRequest(model_name=interface.name, model_version=version)
    message.inputs.add(name=tensor.name, datatype=tensor.dtype.name, shape=shape)
    message.raw_input_contents.append(body)
    return message.SerializeToString(), OutputForms({}, others_binary=True, in_memory=frozenset())


class InferAnswers:
    """Makes bodies of answers. For one thread: the front's.

    The JSON of answers whose tensors are all binary repeats, and is remembered by the parts that are no tensors.
    """

    def __init__(self) -> None:
        self._heads: dict[tuple[bytes, tuple[int, ...]], bytes] = {}

    def write(self, parts: Sequence[Buffer], forms: OutputForms) -> InferAnswer:
        """The body of an answer from the parts of its ModelInferResponse."""
        cut = cut_raws(parts) if forms.all_binary else None
        if cut is None:
            return _write(parts, forms)
        known = self._heads.get(cut)
        if known is not None:
            return InferAnswer(known, parts[2::2], is_binary=True)
        answer = _write(parts, forms)
        if len(answer.tensors) == len(cut[1]):  # else the first part has some of them in it
            if len(self._heads) >= HEADS_MAX:
                self._heads.clear()
            self._heads[cut] = answer.head
        return answer


def cut_raws(parts: Sequence[Buffer]) -> tuple[bytes, tuple[int, ...]] | None:
    """The first part of an answer and the sizes of its raw tensors, where the others are those, each behind its prefix.

    None of any other parts, also those of an answer with an id; where there are no tensors; and of a large first part.
    """
    head = parts[0]
    if type(head) is not bytes or len(parts) < 3 or len(head) > HEAD_BYTES_MAX:
        return None
    sizes = tuple(map(len, parts[2::2]))  # type: ignore[arg-type] # every part is bytes, or a view of bytes
    prefixes = parts[1::2]
    if len(prefixes) != len(sizes) or any(map(ne, prefixes, map(_raw_prefix, sizes))):
        return None
    return head, sizes


_raw_prefix = partial(wire.length_delimited, _RAW_OUTPUT)


def _write(parts: Sequence[Buffer], forms: OutputForms) -> InferAnswer:
    data = b"".join(parts)
    raws: Any
    if len(data) < wire.SPLIT_BYTES_MIN:
        response = ModelInferResponse.FromString(data)
        raws = response.raw_output_contents
    else:
        head, raws = wire.split_raw(data, _RAW_OUTPUT)
        response = ModelInferResponse.FromString(head)
    outputs = []
    binary: list[Buffer] = []
    is_binary = False
    for output, raw in zip(response.outputs, raws, strict=True):
        name = output.name
        item: dict[str, Any] = {"name": name, "datatype": output.datatype, "shape": list(output.shape)}
        if name in forms.in_memory:
            pass  # the client knows where it is
        elif forms.by_name.get(name, forms.others_binary):
            item["parameters"] = {"binary_data_size": len(raw)}
            binary.append(raw)
            is_binary = True
        else:
            item["data"] = _json_of(output, raw)
        outputs.append(item)
    fields: dict[str, Any] = {"id": response.id} if response.id else {}
    fields |= {"model_name": response.model_name, "model_version": response.model_version}
    if response.parameters:
        fields["parameters"] = {
            key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in response.parameters.items()
        }
    return InferAnswer(rest_json.dumps(fields | {"outputs": outputs}), binary, is_binary)


def _json_of(output: Any, raw: bytes | memoryview) -> Any:
    dtype = tensors.BY_NAME[output.datatype]
    if dtype.name in _NO_JSON:
        raise InvalidArgument(
            f"sending {dtype.name} data via JSON is not supported. Please use the binary data format for output"
            f" {output.name}"
        )
    array = tensors.view(dtype, tuple(output.shape), raw)
    if dtype.itemsize:
        return rest_json.dump_numbers(array)
    try:
        return [element.decode() for element in array.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InvalidArgument(
            f"output '{output.name}' has an element that is not UTF-8, which JSON cannot carry. Please use the binary"
            " data format for it"
        ) from error
