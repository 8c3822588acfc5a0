"""The decode cache against plain decoding: whatever it has learned, a request or its refusal is the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.decoding import (
    ID_FIELD,
    INTERFACE,
    RAW_FIELD,
    UNKNOWN_FIELD,
    PlainDecoder,
    alone,
    check_same,
    field,
    ids,
    kin,
    make_interface,
    outcome,
    tensor,
    unhashable,
)
from sluice_batching import NO_DEADLINE
from sluice_proto.model_config_pb2 import DataType, ModelConfig
from sluice_proto.wire import SPLIT_BYTES_MIN
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
    pass


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


# --- Hypothesis


@settings(max_examples=400)
@given(st.lists(kin(), min_size=1, max_size=4))
def test_any_message_has_the_same_outcome_whatever_was_learned_before(pairs):
    cache = DecodeCache(learning_stride=1)
    for _ in range(2):
        for message, relative in pairs:
            check_same(cache, message)
            check_same(cache, relative)


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


@pytest.mark.parametrize("parameters", [{}, {"priority": 3}, {"timeout": 7}, {"priority": 2**63 - 1, "timeout": 1}])
def test_what_is_asked_of_a_queue_with_priorities_is_known_too_and_a_timeout_is_no_deadline_there(parameters):
    interface = make_interface("priority_levels: 3 default_priority_level: 1")
    cache = DecodeCache(learning_stride=1)
    for value in (0.5, 1.5):
        message = message_of(value=value, parameters=parameters)
        assert outcome(cache, message, interface) == outcome(PlainDecoder(), message, interface)
    assert known(cache, message)
    request = cache.decode(cache.parse(message), interface, RecordingCall(message))
    asked = (parameters.get("priority", 0), parameters.get("timeout", 0) * 1000)
    assert (request.priority, request.timeout_ns) == asked
    assert request.deadline_ns == NO_DEADLINE


def test_a_priority_may_be_an_unsigned_number():
    interface = make_interface("priority_levels: 3 default_priority_level: 1")
    message = infer_request("m", {"X": np.ones((1, 1), np.float32)})
    message.parameters["priority"].uint64_param = 2**64 - 1
    call = RecordingCall(message.SerializeToString())
    assert decode(ParsedRequest(call.message), interface, call).priority == 2**64 - 1


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
