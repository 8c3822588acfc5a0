"""The little of protobuf's wire format that lets large tensors pass without being copied.

A parsed ModelInferRequest owns a copy of its raw tensors, and reading one from the message copies it again.
`split_raw` cuts them out first, as views of the bytes that arrived, and leaves a small message to parse;
`length_delimited` writes what goes before a tensor in an answer, so that the answer is one join of its parts.
The format: https://protobuf.dev/programming-guides/encoding/
"""

from functools import lru_cache
from typing import Final

from sluice_proto.errors import WireError
from sluice_proto.grpc_service_pb2 import ModelInferRequest

# Wire types, the low three bits of a tag.
_VARINT: Final = 0
_FIXED64: Final = 1
_LENGTH_DELIMITED: Final = 2
_FIXED32: Final = 5
_FIXED_SIZES_BYTES: Final = {_FIXED64: 8, _FIXED32: 4}

_RAW_INPUT: Final = ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER

# protobuf's own parser reads no more bytes than these of a tag and of any other number, and keeps 64 bits.
_MAX_TAG_BYTES: Final = 5
_MAX_NUMBER_BYTES: Final = 10
_64_BITS: Final = (1 << 64) - 1

# From this size on, cutting the raw tensors out of a message first saves more (two copies) than it costs.
SPLIT_BYTES_MIN: Final = 48 * 1024

# Each field of the outermost message costs interpreter time; an honest one has a few per tensor.
MAX_FIELDS: Final = 65_536


def split_raw(message: bytes | memoryview, field_number: int = _RAW_INPUT) -> tuple[bytes, list[memoryview]]:
    """Splits a serialized ModelInferRequest into the message without raw_input_contents, and those as views of it.

    Any message's field of bytes can be cut out so, by its number: a ModelInferResponse's raw_output_contents too.

    The views keep `message` alive; they start at any address, so arrays over them may be unaligned. All other
    fields, unknown ones too, stay in the first part in their order; whether that parses is for FromString to say.
    Raises WireError if the outermost message is cut off or not protobuf, holds a group (proto3 has none), or has more
    than MAX_FIELDS fields.
    """
    whole = memoryview(message)
    raw_tag = field_number << 3 | _LENGTH_DELIMITED
    end = len(whole)
    head: list[memoryview] = []
    raws: list[memoryview] = []
    offset = head_start = 0
    for _ in range(MAX_FIELDS):
        if offset == end:
            break
        start = offset
        tag, offset = whole[offset], offset + 1
        if tag > 0x7F:
            tag, offset = _read_varint(whole, start, _MAX_TAG_BYTES)
        wire_type = tag & 7
        if wire_type == _LENGTH_DELIMITED:
            length, body = _read_varint(whole, offset, _MAX_NUMBER_BYTES)
            offset = body + length
            if tag == raw_tag:
                raws.append(whole[body:offset])
                head.append(whole[head_start:start])
                head_start = offset
        elif wire_type == _VARINT:
            _, offset = _read_varint(whole, offset, _MAX_NUMBER_BYTES)
        elif wire_type in _FIXED_SIZES_BYTES:
            offset += _FIXED_SIZES_BYTES[wire_type]
        else:
            raise WireError(f"wire type {wire_type} is a group's or unknown", start)
        if offset > end:
            raise WireError(f"a field ends {offset - end} bytes after the message", start)
        if not 8 <= tag < 1 << 32:
            raise WireError(f"{tag >> 3} is no field number", start)
    else:
        if offset != end:
            raise WireError(f"more than {MAX_FIELDS} fields", offset)
    head.append(whole[head_start:])
    return b"".join(head), raws


def _read_varint(data: memoryview, offset: int, max_bytes: int) -> tuple[int, int]:
    """Returns the number at `offset` and where it ends; raises WireError if it has no end within `max_bytes`."""
    if offset < len(data) and data[offset] <= 0x7F:
        return data[offset], offset + 1
    value = shift = 0
    for byte in data[offset : offset + max_bytes]:
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & _64_BITS, offset
        shift += 7
    raise WireError("a number is cut off or too long", offset)


@lru_cache(maxsize=1024)  # a model's answers have few sizes
def length_delimited(field_number: int, length: int) -> bytes:
    """Returns what precedes `length` bytes of a bytes, string or message field on the wire: its tag and the length."""
    return _varint(field_number << 3 | _LENGTH_DELIMITED) + _varint(length)


def _varint(value: int) -> bytes:
    parts = bytearray()
    while value > 0x7F:
        parts.append(value & 0x7F | 0x80)
        value >>= 7
    parts.append(value)
    return bytes(parts)
