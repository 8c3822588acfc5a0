"""Fuzzed here: the decode cache against plain decoding, the wire format against protobuf, and tensors of any bytes."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError
from hypothesis import strategies as st

from fuzz.subject import joined, parted
from protocol.decoding import RAW_FIELD, alone, check_same, field, kin, tensor
from sluice_proto import TensorError
from sluice_proto.grpc_service_pb2 import InferTensorContents
from sluice_proto.tensors import BY_NAME, from_contents, to_buffer, view
from sluice_server.protocol.decode_cache import DecodeCache
from support.wire import agrees_with_parser

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


class Cache:
    """Several messages, which a cache learns from: each has the outcome of plain decoding, twice."""

    def check(self, data: bytes) -> None:
        """All of them, and once more when all have been seen."""
        cache = DecodeCache(learning_stride=1)
        messages = parted(data)
        for message in (*messages, *messages):
            check_same(cache, message)

    def look(self) -> None:
        """What is known is known."""
        self.check(cache_seeds()[0])


def cache_seeds() -> list[bytes]:
    """Pairs of requests that differ in what the cache knows apart, and one that it must not."""
    name, x, raw = alone(model_name="m"), tensor("X", "FP32", [1, 1]), field(RAW_FIELD, b"abcd")
    first, second = alone(model_name="m", id="a"), alone(model_name="m", id="b")
    asked = alone(outputs=[{"name": "Z"}], parameters={"timeout": {"int64_param": 7}})
    two = tensor("N", "INT16", [1, 2]), field(RAW_FIELD, b"efgh")
    return [
        joined([first + x + raw, second + x + field(RAW_FIELD, b"efgh")]),
        joined([name + x + raw, name + x + raw]),
        joined([first + x + two[0] + raw + two[1], second + x + two[0] + two[1] + raw]),
        joined([first + asked + x + raw, second + asked + x + raw]),
        joined([name + tensor("T", "BYTES", [1, 1]) + x + field(RAW_FIELD, b"\1\0\0\0a") + raw]),
        joined([name + tensor("T", "BYTES", [1, 1]) + x + field(RAW_FIELD, b"\2\0\0\0ab") + raw]),
        joined([first + x + raw, first + x + raw + field(99, raw), name + raw + x]),
    ]


built_pairs = st.lists(kin(), min_size=1, max_size=3).map(
    lambda pairs: joined([message for pair in pairs for message in pair])
)


@contextmanager
def open_cache(_directory: Path) -> Iterator[Cache]:
    yield Cache()


# --- the wire format and tensors

DTYPES = tuple(BY_NAME.values())

DIMENSIONS_MAX = 3


class Wire:
    """Any bytes as a message, as a tensor of any data type and shape, and as typed contents.

    The first byte says what: as a message, or a data type and how many of the bytes behind it are dimensions.
    """

    def check(self, data: bytes) -> None:
        """Whatever it is, it is that or the one error."""
        if not data or data[0] % 2:
            agrees_with_parser(data[1:])
            return
        dtype = DTYPES[data[0] // 2 % len(DTYPES)]
        rank = min(data[1] % (DIMENSIONS_MAX + 1) if len(data) > 1 else 0, max(0, len(data) - 2))
        shape, rest = tuple(data[2 : 2 + rank]), data[2 + rank :]
        try:
            array = view(dtype, shape, rest)
        except TensorError:
            pass
        else:
            assert array.shape == shape
            assert bytes(to_buffer(array)) == rest
        try:
            contents = InferTensorContents.FromString(rest)
            array = from_contents(dtype, shape, contents)
        except (TensorError, DecodeError):
            return
        assert array.size == math.prod(shape)

    def look(self) -> None:
        """There is nothing to be left behind."""


def wire_seeds() -> list[bytes]:
    """Requests, and a tensor of every data type, raw and typed."""
    message = alone(model_name="m", id="a") + tensor("X", "FP32", [1, 1]) + field(RAW_FIELD, b"abcd")
    found = [b"\1" + message, b"\1" + message * 2, b"\1" + field(99, message) + message]
    for number, dtype in enumerate(DTYPES):
        head = bytes([number * 2, 2, 1, 2])
        raw = bytes(dtype.itemsize * 2) if dtype.itemsize else b"\2\0\0\0ab\0\0\0\0"
        found.append(head + raw)
        if dtype.contents_field:
            contents = InferTensorContents()
            values = [b"a", b"b"] if dtype.contents_field == "bytes_contents" else [1, 0]
            getattr(contents, dtype.contents_field).extend(values)
            found.append(head + contents.SerializeToString())
    return found


@st.composite
def built_wire(draw: st.DrawFn) -> bytes:
    """Messages of a pair, tensors of a shape that fits, or any bytes."""
    if draw(st.booleans()):
        return b"\1" + draw(kin())[1]
    number = draw(st.integers(0, len(DTYPES) - 1))
    shape = draw(st.lists(st.integers(0, 4) | st.just(255), max_size=DIMENSIONS_MAX))
    size = math.prod(shape) * (DTYPES[number].itemsize or 4) + draw(st.sampled_from([0, 0, 0, -1, 1]))
    body = draw(st.just(bytes(min(max(size, 0), 512))) | st.binary(max_size=40))
    return bytes([number * 2, len(shape), *shape]) + body


@contextmanager
def open_wire(_directory: Path) -> Iterator[Wire]:
    yield Wire()
