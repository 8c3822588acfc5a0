"""The decode cache against plain decoding: whatever it has learned, a request or its refusal is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice_proto import wire
from sluice_proto.grpc_service_pb2 import ModelInferRequest
from sluice_proto.model_config_pb2 import DataType, ModelConfig
from sluice_proto.wire import SPLIT_BYTES_MIN
from sluice_server.errors import SluiceError
from sluice_server.protocol.decode import ParsedRequest, decode
from sluice_server.protocol.decode_cache import (
    HEAD_BYTES_MAX,
    HEADS_PER_KIND_MAX,
    KINDS_MAX,
    LEARNING_STRIDE,
    DecodeCache,
    KnownHead,
)
from sluice_server.protocol.interface import ModelInterface
from support.fakes import RecordingCall
from support.requests import infer_request

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_server.execution.request import InferRequest

RAW_FIELD = ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
ID_FIELD = ModelInferRequest.ID_FIELD_NUMBER
UNKNOWN_FIELD = 99


def make_interface() -> ModelInterface:
    """A batching model whose requests may have many forms; each call gives another object."""
    config = ModelConfig(name="m", max_batch_size=4)
    config.input.add(name="X", data_type=DataType.TYPE_FP32, dims=[-1])
    config.input.add(name="N", data_type=DataType.TYPE_INT16, dims=[2], optional=True)
    config.input.add(name="T", data_type=DataType.TYPE_STRING, dims=[1], optional=True)
    config.output.add(name="Y", data_type=DataType.TYPE_FP32, dims=[-1])
    config.output.add(name="Z", data_type=DataType.TYPE_FP32, dims=[-1])
    return ModelInterface.of(config, 1)


INTERFACE = make_interface()


def facts(request: InferRequest) -> tuple[Any, ...]:
    """All that a request says."""
    arrays = [(name, each.dtype, each.shape, each.tobytes()) for name, each in request.arrays.items()]
    assert not any(each.flags.writeable for each in request.arrays.values() if each.dtype != object)
    told = (request.id, request.output_names, request.rows, request.key, request.size_bytes, request.deadline_ns)
    return (*told, arrays)


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
    wanted = outcome(PlainDecoder(), message)
    assert outcome(cache, message) == wanted
    assert outcome(cache, unhashable(message)) == wanted


def known(cache: DecodeCache, message: bytes) -> bool:
    return isinstance(cache.parse(message), KnownHead)


def learned(*messages: Any) -> DecodeCache:
    cache = DecodeCache(learning_stride=1)
    for message in messages:
        outcome(cache, message)
    return cache


def message_of(size: int = 3, *, rows: int = 1, value: float = 0.5, name: str = "m", **details: Any) -> bytes:
    array = np.full((rows, size), value, np.float32)
    return infer_request(name, {"X": array}, **details).SerializeToString()


# --- Hypothesis: messages put together from fields, in protobuf's order and in any other


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


@settings(max_examples=400, deadline=None)
@given(st.lists(kin(), min_size=1, max_size=4))
def test_any_message_has_the_same_outcome_whatever_was_learned_before(pairs):
    cache = DecodeCache(learning_stride=1)
    for _ in range(2):
        for message, relative in pairs:
            check_same(cache, message)
            check_same(cache, relative)


@settings(deadline=None)
@given(st.integers(1, 3), st.integers(0, 4), ids, ids, st.booleans(), st.sampled_from([0, 7, 1000]), st.binary())
def test_what_differs_in_id_and_tensors_alone_is_known(rows, size, first_id, second_id, asks, timeout_us, data):
    details = {"outputs": ("Z", "Y") if asks else (), "parameters": {"timeout": timeout_us} if timeout_us else {}}
    first = message_of(size, rows=rows, request_id=first_id, **details)
    second = message_of(size, rows=rows, value=float(len(data)), request_id=second_id, **details)
    cache = learned(first)
    check_same(cache, second)
    same_length = len(first_id.encode()) == len(second_id.encode())
    assert known(learned(first), second) == (same_length and second_id.isascii())
    assert known(learned(unhashable(first)), second) == (same_length and second_id.isascii())


# --- Single facts


def test_several_tensors_and_large_ones_are_known_too_and_never_copied():
    arrays = {"X": np.arange(2 * SPLIT_BYTES_MIN, dtype=np.float32).reshape(2, -1), "N": np.ones((2, 2), np.int16)}
    message = infer_request("m", arrays, request_id="7").SerializeToString()
    cache = learned(message)
    for form in (message, unhashable(message)):
        parsed = cache.parse(form)
        assert isinstance(parsed, KnownHead)
        request = cache.decode(parsed, INTERFACE, RecordingCall(form))
        for name, array in arrays.items():
            np.testing.assert_array_equal(request.arrays[name], array)
            assert np.shares_memory(request.arrays[name], np.frombuffer(message, np.uint8))


def test_elements_of_bytes_are_always_checked():
    good = infer_request("m", {"X": np.ones((1, 1), np.float32), "T": np.array([[b"ab"]], object)}).SerializeToString()
    bad = good.replace(b"\x02\0\0\0ab", b"\x03\0\0\0ab")
    cache = learned(good)
    assert not known(cache, good)
    check_same(cache, bad)


def test_another_model_behind_the_name_is_asked_anew():
    message = message_of()
    cache = learned(message)
    config = ModelConfig(name="m", max_batch_size=4)
    config.input.add(name="X", data_type=DataType.TYPE_INT32, dims=[-1])
    other = ModelInterface.of(config, 2)
    assert known(cache, message)
    assert outcome(cache, message, other) == outcome(PlainDecoder(), message, other)
    assert not known(cache, message)


def test_a_learned_head_keeps_nothing_of_the_request_that_it_was_learned_from():
    message = message_of()
    call = RecordingCall(message)
    cache = DecodeCache()
    array = cache.decode(cache.parse(message), INTERFACE, call).arrays["X"]
    assert known(cache, message)
    assert all(array is not kept and call is not kept and message is not kept for kept in _reachable(cache))


NAME, ID, X, RAW = alone(model_name="m"), field(ID_FIELD, b"a"), tensor("X", "FP32", [1, 1]), field(RAW_FIELD, b"abcd")


@pytest.mark.parametrize(("message", "relative"), [
    # The end is inside of an unknown field, and the tensor is before it.
    (NAME + RAW + X + field(UNKNOWN_FIELD, RAW), NAME + RAW + X + field(UNKNOWN_FIELD, field(RAW_FIELD, b"efgh"))),
    # The end is an unknown field, as long as the tensor before it.
    (NAME + X + RAW + field(UNKNOWN_FIELD, b"abc"), NAME + X + RAW + field(RAW_FIELD, b"efgh")),
    # What looks like the id is inside of an unknown field, and the id is behind it.
    (NAME + field(UNKNOWN_FIELD, ID) + ID + X + RAW, NAME + field(UNKNOWN_FIELD, ID) + field(ID_FIELD, b"b") + X + RAW),
    (NAME + field(UNKNOWN_FIELD, ID) + ID + X + RAW, NAME + field(UNKNOWN_FIELD, field(ID_FIELD, b"b")) + ID + X + RAW),
    # The second id is the one that counts.
    (NAME + ID + ID + X + RAW, NAME + field(ID_FIELD, b"b") + ID + X + RAW),
    (NAME + ID + ID + X + RAW, NAME + ID + field(ID_FIELD, b"b") + X + RAW),
    # The second tensor has no input.
    (NAME + X + RAW + RAW, NAME + X + RAW + field(RAW_FIELD, b"efgh")),
])  # fmt: skip
def test_a_message_in_another_form_than_writers_give_it_is_decoded_as_ever(message, relative):
    cache = learned(message)
    check_same(cache, message)
    check_same(cache, relative)


def test_most_unknown_heads_are_not_learned():
    cache = DecodeCache()
    lengths = range(1, 3 * LEARNING_STRIDE + 1)
    for size in lengths:
        outcome(cache, message_of(size))
    assert [size for size in lengths if known(cache, message_of(size))] == [
        1 + LEARNING_STRIDE * turn for turn in range(3)
    ]


@pytest.mark.parametrize("alternating", [2, 3, 16])
def test_clients_that_take_turns_are_all_learned_in_time(alternating):
    cache = DecodeCache()
    for _ in range(LEARNING_STRIDE * alternating):
        for size in range(alternating):
            outcome(cache, message_of(size))
    assert all(known(cache, message_of(size)) for size in range(alternating))


def test_the_memory_for_heads_is_bounded():
    cache = DecodeCache(learning_stride=1)
    config = ModelConfig(name="m", max_batch_size=4)
    config.input.add(name="X", data_type=DataType.TYPE_INT8, dims=[-1])
    config.output.add(name="Y", data_type=DataType.TYPE_FP32, dims=[-1])
    interface = ModelInterface.of(config, 1)
    for size in range(KINDS_MAX + 10):
        outcome(cache, infer_request("m", {"X": np.zeros((1, size), np.int8)}).SerializeToString(), interface)
        assert len(cache._heads) <= KINDS_MAX
    long = message_of(parameters={"x": "y" * HEAD_BYTES_MAX})
    assert not known(learned(long), long)


def test_of_heads_that_only_their_last_bytes_tell_apart_the_newest_are_known():
    same_length = [message_of(parameters={"x": letter}) for letter in "abcdefgh"]
    cache = learned(*same_length)
    newest = same_length[-HEADS_PER_KIND_MAX:]
    assert [message for message in same_length if known(cache, message)] == newest


def _reachable(root: object) -> list[object]:
    import gc

    seen: dict[int, object] = {}
    waiting = [root]
    while waiting:
        item = waiting.pop()
        if id(item) not in seen and not isinstance(item, type) and not hasattr(item, "__globals__"):
            seen[id(item)] = item
            waiting += gc.get_referents(item)
    return list(seen.values())
