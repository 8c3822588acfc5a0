"""JSON of the REST protocol: reading it with bare NaN and Infinity, writing it, and protobuf messages as JSON.

orjson reads and writes numbers some ten times as fast as the standard library, and holds the interpreter lock for as
much less; but it has no NaN and no infinities, which the protocol writes as bare words. So text with such a word, and
tensors with such a value, go through the standard library.
"""

from __future__ import annotations

import base64
import json
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson
from google.protobuf.descriptor import FieldDescriptor

from sluice_server.errors import Internal, InvalidArgument

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from typing_extensions import Buffer

    from sluice_proto.grpc_service_pb2 import InferParameter, ModelRepositoryParameter

_NUMBER_WORD = re.compile(rb"NaN|Infinity")
_INT64_MAX, _UINT64_MAX = (1 << 63) - 1, (1 << 64) - 1


class MalformedJson(Internal):
    """JSON that is broken, lacks a member, or has one of a wrong type. HTTP 500, as in Triton."""


def loads(data: Buffer) -> Any:
    """The value of a JSON text in UTF-8; `MalformedJson` says what is wrong with it."""
    try:
        return orjson.loads(data)  # type: ignore[arg-type] # any buffer will do
    except orjson.JSONDecodeError as error:
        problem: Exception = error
    if _NUMBER_WORD.search(data):
        try:
            return json.loads(str(data, "utf-8"))
        except (ValueError, RecursionError) as error:
            problem = error
    raise MalformedJson(f"failed to parse the request JSON buffer: {problem}")


def load_object(data: Buffer) -> dict[str, Any]:
    """The JSON object that a body is; an empty body is an empty one."""
    if not len(memoryview(data)):
        return {}
    value = loads(data)
    if not isinstance(value, dict):
        raise MalformedJson("failed to parse the request JSON buffer: it is not an object")
    return value


def dumps(value: Any) -> bytes:
    """JSON text of a value whose floats are finite."""
    return orjson.dumps(value)


def dump_numbers(array: np.ndarray) -> orjson.Fragment:
    """The values of an array of numbers or booleans as a flat list, to be put into what `dumps` is given."""
    flat = array.ravel()
    if flat.dtype.kind == "f" and not np.isfinite(flat).all():
        return orjson.Fragment(json.dumps(flat.tolist()).encode())
    if not flat.flags.c_contiguous or not flat.flags.aligned:
        flat = flat.copy()
    return orjson.Fragment(orjson.dumps(flat, option=orjson.OPT_SERIALIZE_NUMPY))


_TYPE_WORDS = {str: "string", bool: "boolean", int: "integer", list: "array", dict: "object"}


def member(owner: dict[str, Any], name: str, kind: type) -> Any:
    """A member that is to be there and of a type."""
    if name not in owner:
        raise MalformedJson(f"Unable to parse '{name}': attempt to access non-existing object member '{name}'")
    value = owner[name]
    if type(value) is not kind:
        word = _TYPE_WORDS[kind]
        raise MalformedJson(f"Unable to parse '{name}': attempt to access JSON non-{word} as {word}")
    return value


def optional(owner: dict[str, Any], name: str, kind: type) -> Any:
    """A member that may be left out; then the type's empty value."""
    return member(owner, name, kind) if name in owner else kind()


def set_parameter(target: InferParameter | ModelRepositoryParameter, key: str, value: Any) -> None:
    """Write a parameter's JSON value into the protobuf field of its kind, of those that the message has."""
    kind = _parameter_kind(value)
    if kind not in target.DESCRIPTOR.fields_by_name:
        raise InvalidArgument(f"parameter '{key}' has invalid type. It should be either 'int', 'bool', or 'string'.")
    if isinstance(value, str):
        set_text(target, kind, value)
    else:
        setattr(target, kind, value)


def _parameter_kind(value: Any) -> str:
    if isinstance(value, bool):
        return "bool_param"
    if isinstance(value, str):
        return "string_param"
    if isinstance(value, float):
        return "double_param"
    if isinstance(value, int) and -_INT64_MAX - 1 <= value <= _UINT64_MAX:
        return "int64_param" if value <= _INT64_MAX else "uint64_param"
    return ""


def set_text(target: Message, field: str, value: str) -> None:
    """Set a string field; JSON can write text that UTF-8 cannot, half of a surrogate pair."""
    try:
        setattr(target, field, value)
    except ValueError as error:
        raise MalformedJson(f"failed to parse the request JSON buffer: {field} is not Unicode text") from error


def to_json(message: Message) -> dict[str, Any]:
    """All fields of a message by their names in protobuf, empty ones too; enums as names, all numbers as numbers.

    Messages that are not set and the members of a oneof that were not chosen are left out.
    """
    fields: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if not field.is_repeated:
            fields[field.name] = _scalar(field, value)
        elif field.message_type is not None and field.message_type.GetOptions().map_entry:
            of_value = field.message_type.fields_by_name["value"]
            fields[field.name] = {str(key): _scalar(of_value, value[key]) for key in value}
        else:
            fields[field.name] = [_scalar(field, item) for item in value]
    return fields


def _scalar(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is not None:
        return to_json(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return value if known is None else known.name
    if field.type == FieldDescriptor.TYPE_BYTES:
        return base64.b64encode(value).decode()
    return value
