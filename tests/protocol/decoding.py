"""Decoding with the cache against decoding without; and messages for it, put together from fields by Hypothesis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from google.protobuf import text_format
from hypothesis import strategies as st

from sluice_proto import wire
from sluice_proto.grpc_service_pb2 import ModelInferRequest
from sluice_proto.model_config_pb2 import DataType, ModelConfig
from sluice_server.errors import SluiceError
from sluice_server.protocol.decode import ParsedRequest, decode
from sluice_server.protocol.interface import ModelInterface
from support.fakes import RecordingCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_server.execution.request import InferRequest
    from sluice_server.protocol.decode_cache import DecodeCache

RAW_FIELD = ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
ID_FIELD = ModelInferRequest.ID_FIELD_NUMBER
UNKNOWN_FIELD = 99


def make_interface(scheduler: str = "") -> ModelInterface:
    """A batching model whose requests may have many forms; each call gives another object."""
    config = ModelConfig(name="m", max_batch_size=4)
    text_format.Parse(scheduler, config.dynamic_batching)
    config.input.add(name="X", data_type=DataType.TYPE_FP32, dims=[-1])
    config.input.add(name="N", data_type=DataType.TYPE_INT16, dims=[2], optional=True)
    config.input.add(name="T", data_type=DataType.TYPE_STRING, dims=[1], optional=True)
    config.output.add(name="Y", data_type=DataType.TYPE_FP32, dims=[-1])
    config.output.add(name="Z", data_type=DataType.TYPE_FP32, dims=[-1])
    return ModelInterface.of(config, 1)


INTERFACE = make_interface()


def facts(request: InferRequest) -> tuple[Any, ...]:
    """All that a request says."""
    # An array of objects has addresses for bytes, which are the same for equal elements of one byte only.
    arrays = [
        (name, each.dtype, each.shape, each.tolist() if each.dtype == object else each.tobytes())
        for name, each in request.arrays.items()
    ]
    assert not any(each.flags.writeable for each in request.arrays.values() if each.dtype != object)
    told = (request.id, request.output_names, request.rows, request.key, request.size_bytes, request.deadline_ns)
    return (*told, request.priority, request.timeout_ns, arrays)


def outcome(decoder: Any, message: Any, interface: ModelInterface = INTERFACE) -> tuple[Any, ...]:
    """What becomes of a message: the model it is for and the facts of the request, or the error."""
    call = RecordingCall(message)
    call.received_ns, call.deadline_ns = 1_000_000, 5_000_000
    try:
        parsed = decoder.parse(message)
        return parsed.model_name, parsed.model_version, facts(decoder.decode(parsed, interface, call))
    except SluiceError as error:
        return type(error), str(error)


class PlainDecoder:
    """Decoding without a cache, in the cache's form."""

    parse = staticmethod(ParsedRequest)
    decode = staticmethod(decode)


def unhashable(message: bytes) -> np.ndarray:
    """A message as a transport may have it: a read-only buffer, and nothing more."""
    return np.frombuffer(message, np.uint8)


def check_same(cache: DecodeCache, message: bytes) -> None:
    """Whatever the cache has learned, a message has the outcome of plain decoding, in any form."""
    wanted = outcome(PlainDecoder(), message)
    assert outcome(cache, message) == wanted
    assert outcome(cache, unhashable(message)) == wanted


# Messages put together from fields, in protobuf's order and in any other.


def field(number: int, data: bytes) -> bytes:
    return wire.length_delimited(number, len(data)) + data


def alone(**fields: Any) -> bytes:
    return ModelInferRequest(**fields).SerializeToString()


def tensor(name: str, datatype: str, shape: Sequence[int]) -> bytes:
    return alone(inputs=[{"name": name, "datatype": datatype, "shape": shape}])


ids = st.sampled_from(["", "a", "b", "42", "\u00e9", "\x00", "m"]) | st.text(max_size=3)
id_fields = ids.map(lambda text: field(ID_FIELD, text.encode()))
raw_fields = st.sampled_from([0, 4, 8]).map(lambda size: field(RAW_FIELD, bytes(size)))
other_fields = st.one_of(
    st.sampled_from([
        tensor("T", "BYTES", [1, 1]),
        tensor("NOPE", "FP32", [1, 1]),
        alone(model_version="1"),
        alone(outputs=[{"name": "Y"}]),
        alone(outputs=[{"name": "Z"}, {"name": "Y"}]),
        alone(parameters={"timeout": {"int64_param": 7}}),
        alone(parameters={"timeout": {"int64_param": -7}}),
        alone(parameters={"triton_x": {"int64_param": 7}}),
        alone(inputs=[{"name": "X", "datatype": "FP32", "shape": [1, 1], "contents": {"fp32_contents": [1.0]}}]),
        field(ID_FIELD, b"\xff"),
        b"\x0b",  # the start of a group
        b"\x0c",  # and its end
    ]),
    id_fields,
    raw_fields,
    # What looks like raw tensors or ids and is inside of another field.
    st.lists(raw_fields | id_fields, max_size=3).map(lambda parts: field(UNKNOWN_FIELD, b"".join(parts))),
)  # fmt: skip


@st.composite
def messages(draw: st.DrawFn) -> list[bytes]:
    """The fields of a message that is valid unless what is drawn in addition, or the order, spoils it."""
    rows, size = draw(st.sampled_from([(1, 1), (1, 2), (2, 1), (2, 2), (1, 0), (5, 1)]))
    parts = [alone(model_name="m"), draw(id_fields), tensor("X", "FP32", [rows, size])]
    raws = [field(RAW_FIELD, bytes(4 * rows * size))]
    if draw(st.booleans()):
        parts.append(tensor("N", "INT16", [rows, 2]))
        raws.append(field(RAW_FIELD, bytes(4 * rows)))
    parts += [*raws, *draw(st.lists(other_fields, max_size=2))]
    order = draw(st.sampled_from(["by number", "as drawn", "any"]))
    if order == "by number":
        return sorted(parts, key=lambda part: part[0] >> 3 if part[0] < 128 else UNKNOWN_FIELD)
    return draw(st.permutations(parts)) if order == "any" else parts


@st.composite
def kin(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """A message, and one of the same length that differs from it in some bytes, most often inside of fields."""
    parts = draw(messages())
    changed = [bytearray(part) for part in parts]
    for part in changed:
        if draw(st.sampled_from([True, False, False])):
            place = draw(st.integers(min(2, len(part) - 1), len(part) - 1) | st.integers(0, len(part) - 1))
            part[place] = draw(st.sampled_from([0, 1, 0x1A, 0x3A, 0x41, 0x61, 0x80, 0xFF]) | st.integers(0, 255))
    return b"".join(parts), b"".join(changed)
