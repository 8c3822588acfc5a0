"""Tensors between numpy and the wire: the one table of element types, and the four ways through it.

    raw bytes -> array   view           typed contents -> array   from_contents
    array -> raw bytes   to_buffer      array -> typed contents   set_contents

Raw data is row-major and little-endian. Types of a fixed size are viewed in place, never copied. A BYTES element
is a little-endian uint32 length and then that many bytes of any value. Sizes are compared as exact Python integers
before anything is allocated, so a shape from a stranger costs nothing, however large it claims to be.
"""

import struct
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from sluice_proto import model_config_pb2
from sluice_proto.errors import (
    BytesElementCount,
    BytesTruncatedBody,
    BytesTruncatedLength,
    InvalidShape,
    NoContentsField,
    SeveralContentsFields,
    SizeMismatch,
    UnsupportedArray,
    UnsupportedElement,
    WrongContentsField,
)
from sluice_proto.grpc_service_pb2 import InferTensorContents

if sys.byteorder != "little":
    raise ImportError("sluice_proto views tensors in place and so needs a little-endian machine")

# What numpy allows an array to have; also keeps the product of a stranger's dimensions a small number.
MAX_DIMENSIONS: Final = 64

# Up to this size a copy takes less time than a view.
COPIED_BYTES_MAX: Final = 4096

Array: TypeAlias = npt.NDArray[Any]
ByteBuffer: TypeAlias = bytes | bytearray | memoryview | npt.NDArray[np.uint8]

_LENGTH: Final = struct.Struct("<I")


@dataclass(frozen=True, slots=True, eq=False)
class DType:
    """An element type; there is one object per type, so compare with `is`.

    `name` is the protocol's ("FP32"), `config_type` the value of ModelConfig's enum DataType, `itemsize` the bytes of
    an element (0 for BYTES: it varies), `contents_field` the field of InferTensorContents ("": raw form only).
    """

    name: str
    config_type: int
    numpy: np.dtype[Any]
    itemsize: int
    contents_field: str


def _dtype(name: str, numpy: npt.DTypeLike, contents_field: str, config_name: str = "") -> DType:
    dtype = np.dtype(numpy)
    config_type = model_config_pb2.DataType.Value("TYPE_" + (config_name or name))
    return DType(name, config_type, dtype, 0 if dtype.hasobject else dtype.itemsize, contents_field)


_DTYPES: Final = (
    _dtype("BOOL", np.bool_, "bool_contents"),
    _dtype("UINT8", np.uint8, "uint_contents"),
    _dtype("UINT16", np.uint16, "uint_contents"),
    _dtype("UINT32", np.uint32, "uint_contents"),
    _dtype("UINT64", np.uint64, "uint64_contents"),
    _dtype("INT8", np.int8, "int_contents"),
    _dtype("INT16", np.int16, "int_contents"),
    _dtype("INT32", np.int32, "int_contents"),
    _dtype("INT64", np.int64, "int64_contents"),
    _dtype("FP16", np.float16, ""),
    _dtype("FP32", np.float32, "fp32_contents"),
    _dtype("FP64", np.float64, "fp64_contents"),
    _dtype("BYTES", np.object_, "bytes_contents", config_name="STRING"),
    _dtype("BF16", ml_dtypes.bfloat16, ""),
)
BY_NAME: Final[Mapping[str, DType]] = MappingProxyType({dtype.name: dtype for dtype in _DTYPES})
BY_CONFIG_TYPE: Final[Mapping[int, DType]] = MappingProxyType({dtype.config_type: dtype for dtype in _DTYPES})
_BY_NUMPY: Final = {dtype.numpy: dtype for dtype in _DTYPES}
_BYTES: Final = BY_NAME["BYTES"]

# The type in which a field of InferTensorContents holds its values. Narrower ones travel in the 32-bit fields.
_FIELD_TYPES: Final = {
    dtype.contents_field: dtype
    for dtype in _DTYPES
    if dtype.contents_field and dtype.name not in {"UINT8", "UINT16", "INT8", "INT16"}
}

# numpy's kinds of bytes, text, objects and variable-width text.
_BYTES_KINDS: Final = frozenset("SUOT")


def of_array(array: Array) -> DType:
    """Returns the type that `array` is sent as; raises UnsupportedArray for a type that the protocol does not have."""
    dtype = _BY_NUMPY.get(array.dtype)
    if dtype is not None:
        return dtype
    if array.dtype.kind in _BYTES_KINDS:
        return _BYTES
    dtype = _BY_NUMPY.get(array.dtype.newbyteorder("="))
    if dtype is None:
        raise UnsupportedArray(str(array.dtype))
    return dtype


def element_count(shape: Sequence[int]) -> int:
    """Returns the exact number of elements, 1 for no dimensions; raises InvalidShape for a shape no array can have."""
    if len(shape) > MAX_DIMENSIONS:
        raise InvalidShape(shape, f"{len(shape)} dimensions, at most {MAX_DIMENSIONS} are possible")
    count = 1
    for dimension in shape:
        if dimension < 0:
            raise InvalidShape(shape, f"dimension {dimension} is negative")
        count *= dimension
    return count


def view(dtype: DType, shape: Sequence[int], buffer: ByteBuffer) -> Array:
    """Returns the raw data as an array of `shape`, in place and as writable as `buffer` is (bytes are not).

    The array need not be aligned to its element size where `buffer` is not. Elements of BOOL keep their byte: any
    that is not zero counts as true. For BYTES the result is a new object array of bytes.
    Raises SizeMismatch, a BytesError or InvalidShape.
    """
    count = element_count(shape)
    if dtype is _BYTES:
        return _object_array(_decode(buffer, count), shape)
    if count * dtype.itemsize != len(buffer):
        raise SizeMismatch(count * dtype.itemsize, len(buffer))
    try:
        return np.ndarray(shape, dtype.numpy, buffer)
    except ValueError as error:
        raise InvalidShape(shape, str(error)) from None


def _decode(buffer: ByteBuffer, count: int) -> list[bytes]:
    """Cuts BYTES wire data into exactly `count` elements; raises a BytesError if it is anything else."""
    data = bytes(buffer)  # no copy of bytes; and slices of bytes are elements as they are
    end = len(data)
    elements: list[bytes] = []
    append = elements.append
    length_at = _LENGTH.unpack_from
    offset = length = 0
    try:
        for _ in range(count):
            (length,) = length_at(data, offset)
            body = offset + 4
            offset = body + length
            append(data[body:offset])
    except struct.error:
        # The data ended; below is how.
        pass
    if offset > end:
        raise BytesTruncatedBody(length, end - offset + length)
    if 0 < end - offset < _LENGTH.size:
        raise BytesTruncatedLength(end - offset)
    if len(elements) != count:
        raise BytesElementCount(count, len(elements), more=False)
    if offset != end:
        raise BytesElementCount(count, count + 1, more=True)
    return elements


def _object_array(elements: list[bytes], shape: Sequence[int]) -> Array:
    array = np.empty(len(elements), np.object_)
    array[:] = elements
    try:
        return array.reshape(tuple(shape))
    except ValueError as error:
        raise InvalidShape(shape, str(error)) from None


def contents_fields(contents: InferTensorContents) -> list[str]:
    """Returns the names of the fields that hold at least one value, in the order of their numbers."""
    return [descriptor.name for descriptor, _ in contents.ListFields()]


def from_contents(dtype: DType, shape: Sequence[int], contents: InferTensorContents) -> Array:
    """Returns the typed contents as a new array of `shape`.

    8- and 16-bit types are cut from the low bytes of their 32-bit field. Raises SeveralContentsFields or
    WrongContentsField (no field is right for FP16 and BF16); SizeMismatch or, for BYTES, BytesElementCount when the
    number of values is not the shape's; InvalidShape.
    """
    count = element_count(shape)
    fields = contents_fields(contents)
    if len(fields) > 1:
        raise SeveralContentsFields(fields)
    if fields and fields[0] != dtype.contents_field:
        raise WrongContentsField(fields[0], _FIELD_TYPES[fields[0]].name, dtype.name)
    values = getattr(contents, fields[0]) if fields else ()
    if len(values) != count:
        if dtype is _BYTES:
            raise BytesElementCount(count, len(values), more=len(values) > count)
        raise SizeMismatch(count * dtype.itemsize, len(values) * dtype.itemsize)
    if dtype is _BYTES:
        return _object_array(list(values), shape)
    wide = _FIELD_TYPES[fields[0]].numpy if fields else dtype.numpy
    array = np.fromiter(values, wide, count).astype(dtype.numpy, copy=False)
    try:
        return array.reshape(tuple(shape))
    except ValueError as error:
        raise InvalidShape(shape, str(error)) from None


def to_buffer(array: Array) -> bytes | npt.NDArray[np.uint8]:
    """Returns the raw data of `array`, whose len() is its size in bytes.

    A C-contiguous array of a fixed-size type is not copied, unless it is small: the result shares its memory. Bytes,
    text (as UTF-8) and object arrays become BYTES data. numpy itself drops NUL bytes at the end of the elements of a
    fixed-width array.
    Raises UnsupportedArray or UnsupportedElement.
    """
    dtype = of_array(array)
    if dtype is _BYTES:
        elements = _elements(array)
        return b"".join(chain.from_iterable(zip(map(_LENGTH.pack, map(len, elements)), elements, strict=True)))
    if not array.dtype.isnative:
        array = array.astype(dtype.numpy)
    if array.nbytes <= COPIED_BYTES_MAX:
        return array.tobytes()
    return array.ravel().view(np.uint8)


def set_contents(tensor_contents: InferTensorContents, array: Array) -> None:
    """Replaces the contents by the values of `array`, in the field of its type.

    Raises NoContentsField for FP16 and BF16, UnsupportedArray or UnsupportedElement.
    """
    dtype = of_array(array)
    if not dtype.contents_field:
        raise NoContentsField(dtype.name)
    values = _elements(array) if dtype is _BYTES else array.ravel().tolist()
    tensor_contents.Clear()
    getattr(tensor_contents, dtype.contents_field).extend(values)


def _elements(array: Array) -> list[bytes]:
    """Returns the elements of a bytes, text or object array in row-major order, text as UTF-8."""
    elements: list[Any] = array.ravel().tolist()
    if set(map(type, elements)) <= {bytes}:
        return elements
    try:
        return [element if isinstance(element, bytes) else str.encode(element) for element in elements]
    except UnicodeEncodeError as error:
        raise UnsupportedElement(f"text with {error.object[error.start]!a}") from None
    except TypeError:
        strangers = (type(element).__name__ for element in elements if not isinstance(element, bytes | str))
        raise UnsupportedElement(next(strangers)) from None
