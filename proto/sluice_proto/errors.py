"""What can be wrong with bytes or arrays, as facts; whoever answers a client chooses the words.

ProtoError
├── TensorError
│   ├── InvalidShape             a negative dimension, too many of them, or more than numpy can address
│   ├── SizeMismatch             as many bytes as the shape does not need
│   ├── BytesError               BYTES data that is not what the shape or the length words say
│   │   ├── BytesElementCount
│   │   ├── BytesTruncatedLength
│   │   └── BytesTruncatedBody
│   ├── ContentsError            typed contents that the datatype does not allow
│   │   ├── WrongContentsField
│   │   ├── SeveralContentsFields
│   │   └── NoContentsField
│   ├── UnsupportedArray         a numpy type that the protocol has no name for
│   └── UnsupportedElement       an object in an array that is neither bytes nor text
├── WireError                    a message that is not protobuf
└── CaptureError                 a capture file that is damaged, or none
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class ProtoError(Exception):
    """Anything this package refuses; the classes below say what and carry the facts."""


class TensorError(ProtoError):
    """A tensor that cannot be read or written as asked."""


class InvalidShape(TensorError):
    """No array can have this shape."""

    def __init__(self, shape: Sequence[int], reason: str) -> None:
        super().__init__(f"invalid shape: {reason}")
        self.shape = shape
        self.reason = reason


class SizeMismatch(TensorError):
    """The data of a fixed-size type has another size than datatype and shape give."""

    def __init__(self, expected_bytes: int, got_bytes: int) -> None:
        super().__init__(f"the tensor's data type and shape need {expected_bytes} bytes, got {got_bytes}")
        self.expected_bytes = expected_bytes
        self.got_bytes = got_bytes


class BytesError(TensorError):
    """BYTES data that is not the elements that the shape promises."""


class BytesElementCount(BytesError):
    """Too few elements, or too many (`more`); raw data is then counted only up to the first that is too many."""

    def __init__(self, expected: int, got: int, *, more: bool) -> None:
        super().__init__(f"expected {expected} BYTES elements, got {got}{' or more' if more else ''}")
        self.expected = expected
        self.got = got
        self.more = more


class BytesTruncatedLength(BytesError):
    """The data ends within the 4 bytes that tell an element's length."""

    def __init__(self, available: int) -> None:
        super().__init__(f"an element's length takes 4 bytes, only {available} are left")
        self.available = available


class BytesTruncatedBody(BytesError):
    """The data ends before the element does."""

    def __init__(self, length: int, available: int) -> None:
        super().__init__(f"an element says it has {length} bytes, only {available} are left")
        self.length = length
        self.available = available


class ContentsError(TensorError):
    """Typed contents that cannot be this tensor's data."""


class WrongContentsField(ContentsError):
    """The filled field belongs to another datatype: `got` and `expected` are datatype names."""

    def __init__(self, field: str, got: str, expected: str) -> None:
        super().__init__(f"{field} holds {got} data, but the tensor is {expected}")
        self.field = field
        self.got = got
        self.expected = expected


class SeveralContentsFields(ContentsError):
    """More than one field is filled; the datatype can use one only."""

    def __init__(self, fields: Sequence[str]) -> None:
        super().__init__(f"a tensor's contents may fill one field, got {', '.join(fields)}")
        self.fields = fields


class NoContentsField(ContentsError):
    """The datatype has no typed field; its data travels only in raw form."""

    def __init__(self, datatype: str) -> None:
        super().__init__(f"{datatype} data has no typed field; send it as raw contents")
        self.datatype = datatype


class UnsupportedArray(TensorError):
    """The array's type has no counterpart in the protocol."""

    def __init__(self, numpy_name: str) -> None:
        super().__init__(f"arrays of {numpy_name} cannot be sent; convert the array to a type of the protocol first")
        self.numpy_name = numpy_name


class UnsupportedElement(TensorError):
    """An element of a BYTES array is not bytes and not text that UTF-8 can hold."""

    def __init__(self, found: str) -> None:
        super().__init__(f"elements of a BYTES tensor must be bytes or str, got {found}")
        self.found = found


class WireError(ProtoError):
    """The message is cut off or not protobuf; `offset` (bytes) is where the wrong part begins."""

    def __init__(self, reason: str, offset: int) -> None:
        super().__init__(f"malformed message at byte {offset}: {reason}")
        self.reason = reason
        self.offset = offset


class CaptureError(ProtoError):
    """A file cannot be read as a capture; `offset` (bytes) is where what is wrong begins."""

    def __init__(self, path: Path, offset: int, reason: str) -> None:
        super().__init__(f"{path} at byte {offset}: {reason}")
        self.path = path
        self.offset = offset
        self.reason = reason
