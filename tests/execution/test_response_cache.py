"""What requests are told apart by in the response cache, and that what it says of its size is true."""

from __future__ import annotations

import gc
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_batching import NO_DEADLINE
from sluice_proto.model_config_pb2 import ModelConfig
from sluice_proto.tensors import BY_NAME
from sluice_server.execution.request import InferRequest
from sluice_server.execution.response_cache import SMALL_BYTES_MAX, SPECS_MAX, Fingerprints, ResponseCache, make_entries
from sluice_server.protocol.classification import Classes
from sluice_server.protocol.interface import ModelInterface
from support.fakes import RecordingCall

ONE, TWO = np.array([[1.0, 2.0]], np.float32), np.array([[1.0, 3.0]], np.float32)
LARGE_WIDTH = SMALL_BYTES_MAX // 4 + 1


def interface(inputs: dict[str, str], *, optional: bool = False, max_batch_rows: int = 8) -> ModelInterface:
    """A model of these inputs by name and data type, all of any size, and the outputs Y and Z."""
    config = ModelConfig(name="m", max_batch_size=max_batch_rows)
    for name, datatype in inputs.items():
        config.input.add(name=name, data_type=BY_NAME[datatype].config_type, dims=[-1], optional=optional)
    for name in ("Y", "Z"):
        config.output.add(name=name, data_type=BY_NAME["FP32"].config_type, dims=[-1])
    return ModelInterface.of(config, 1)


def request(
    arrays: dict[str, np.ndarray],
    outputs: tuple[str, ...] = ("Y", "Z"),
    *,
    classes: dict[str, Classes] | None = None,
    message: bytes = b"message",
) -> InferRequest:
    key: Any = (outputs, *((name, array.shape[1:]) for name, array in arrays.items()))
    if classes:
        key = (key, "classification")
    rows = len(next(iter(arrays.values()))) if arrays else 1
    return InferRequest(RecordingCall(message), "", arrays, outputs, rows, key, NO_DEADLINE, classes=classes)


class Asking:
    """One version's requests and a cache of its own."""

    def __init__(self, of: ModelInterface, max_bytes: int = 1 << 20) -> None:
        self.cache = ResponseCache(max_bytes)
        self.interface = of
        self.owner = self.cache.new_owner()
        self.fingerprints = Fingerprints(of, self.owner, self.cache.digest)

    def keep(self, asked: InferRequest, *answer: bytes, shares_memory: bool = False) -> None:
        (asked.fingerprint,) = self.fingerprints.of([asked])
        entries = make_entries([asked], [answer], shares_memory=shares_memory)
        with self.cache.lock:
            self.cache.table.put([asked.fingerprint[0]], entries)

    def find(self, asked: InferRequest) -> bytes | None:
        (fingerprint,) = self.fingerprints.of([asked])
        with self.cache.lock:
            payload = self.cache.find(fingerprint)
        return payload if payload is None or isinstance(payload, bytes) else b"".join(payload)


@pytest.fixture
def single() -> Asking:
    return Asking(interface({"X": "FP32"}))


def test_the_same_inputs_are_found_whatever_else_the_message_says(single):
    single.keep(request({"X": ONE}), b"head", b"raw")
    assert single.find(request({"X": ONE.copy()}, message=b"another message")) == b"headraw"


def test_what_differs_in_a_byte_is_not_found(single):
    single.keep(request({"X": ONE}), b"answer")
    assert single.find(request({"X": TWO})) is None
    assert single.find(request({"X": -ONE})) is None


def test_zeros_of_both_signs_and_each_nan_are_themselves(single):
    nan, zero, minus = (np.array([[value]], np.float32) for value in (np.nan, 0.0, -0.0))
    single.keep(request({"X": nan}), b"nan")
    single.keep(request({"X": zero}), b"zero")
    assert single.find(request({"X": nan.copy()})) == b"nan"
    assert single.find(request({"X": minus})) is None


def test_shapes_outputs_and_classes_are_told_apart(single):
    single.keep(request({"X": ONE}), b"answer")
    output = single.interface.outputs["Y"]
    assert single.find(request({"X": ONE.reshape(2, 1)})) is None
    assert single.find(request({"X": ONE}, ("Y",))) is None
    assert single.find(request({"X": ONE}, ("Z", "Y"))) is None
    for count in (1, 2):
        classes = {"Y": Classes(output, count, has_rows=True)}
        assert single.find(request({"X": ONE}, classes=classes)) is None
        single.keep(request({"X": ONE}, classes=classes), b"%d" % count)
    assert single.find(request({"X": ONE}, classes={"Y": Classes(output, 1, has_rows=True)})) == b"1"
    assert single.find(request({"X": ONE})) == b"answer"


def test_two_versions_do_not_share_answers(single):
    other = Asking(single.interface)
    other.cache = single.cache
    other.owner = other.cache.new_owner()
    other.fingerprints = Fingerprints(single.interface, other.owner, single.cache.digest)
    single.keep(request({"X": ONE}), b"mine")
    assert other.find(request({"X": ONE})) is None
    other.keep(request({"X": ONE}), b"other")
    single.cache.forget(single.owner)
    assert single.find(request({"X": ONE})) is None
    assert other.find(request({"X": ONE})) == b"other"


def test_the_order_of_inputs_does_not_matter_and_their_names_do():
    asking = Asking(interface({"A": "FP32", "B": "FP32"}))
    asking.keep(request({"A": ONE, "B": TWO}), b"answer")
    assert asking.find(request({"B": TWO, "A": ONE})) == b"answer"
    assert asking.find(request({"A": TWO, "B": ONE})) is None


def test_an_input_that_is_left_out_is_told_apart():
    asking = Asking(interface({"A": "FP32", "B": "FP32"}, optional=True, max_batch_rows=0))
    asking.keep(request({"A": ONE}), b"only A")
    assert asking.find(request({"B": ONE})) is None
    assert asking.find(request({})) is None
    asking.keep(request({}), b"none")
    assert asking.find(request({})) == b"none"


def test_the_elements_of_text_are_told_apart():
    asking = Asking(interface({"A": "BYTES", "B": "BYTES"}))

    def text(*elements: bytes) -> np.ndarray:
        array = np.empty((1, len(elements)), object)
        array[0] = elements
        return array

    asking.keep(request({"A": text(b"ab", b"c"), "B": text(b"")}), b"answer")
    assert asking.find(request({"A": text(b"ab", b"c"), "B": text(b"")})) == b"answer"
    assert asking.find(request({"A": text(b"a", b"bc"), "B": text(b"")})) is None
    assert asking.find(request({"A": text(b"ab", b""), "B": text(b"c")})) is None


@pytest.mark.parametrize("width", [3, LARGE_WIDTH])
@pytest.mark.parametrize("datatype", sorted(BY_NAME))
def test_every_data_type_is_found_small_and_large(datatype, width):
    asking = Asking(interface({"X": datatype}))
    if datatype == "BYTES":
        array = np.full((1, width), b"ab", object)
        other = np.full((1, width), b"ac", object)
    else:
        numpy_type = ml_dtypes.bfloat16 if datatype == "BF16" else BY_NAME[datatype].numpy
        array, other = np.zeros((1, width), numpy_type), np.ones((1, width), numpy_type)
    asking.keep(request({"X": array}), b"answer")
    assert asking.find(request({"X": array.copy()})) == b"answer"
    assert asking.find(request({"X": other})) is None


def test_large_inputs_and_answers_stay_in_place_unless_they_are_part_of_more(single):
    large = np.arange(LARGE_WIDTH, dtype=np.float32)[None]
    part = memoryview(bytes(SMALL_BYTES_MAX + 1))
    for shares_memory in (False, True):
        asked = request({"X": large})
        single.keep(asked, b"head", part, shares_memory=shares_memory)  # type: ignore[arg-type] # a view
        entry = single.cache.table.peek(asked.fingerprint[0])  # type: ignore[index]
        assert not isinstance(entry, bytes)
        assert entry is not None
        assert entry.content[0] is large
        assert (entry.payload[1] is part) is not shares_memory
        assert single.find(request({"X": large.copy()})) == b"head" + bytes(part)
    other = large.copy()
    other[0, -1] = 7
    assert single.find(request({"X": other})) is None


def test_a_small_request_with_a_large_answer_is_found(single):
    single.keep(request({"X": ONE}), bytes(SMALL_BYTES_MAX + 1))
    assert single.find(request({"X": ONE})) == bytes(SMALL_BYTES_MAX + 1)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 2)), min_size=1, max_size=20))
def test_a_list_has_the_fingerprints_of_its_requests(asked):
    """Those of one kind are made together."""
    asking = Asking(interface({"X": "FP32"}))
    requests = [request({"X": np.full((rows, 2), value, np.float32)}) for value, rows in asked]
    shared_key = ("Y", "Z")
    for each in requests:
        each.key = shared_key
    together = asking.fingerprints.of(requests)
    assert together == [asking.fingerprints.of([each])[0] for each in requests]
    assert len(set(together)) == len(set(asked))


def test_shapes_without_end_are_not_remembered_without_end(single):
    row = np.zeros((1, SPECS_MAX + 10), np.bool_)
    for width in range(1, row.size):
        single.fingerprints.of([request({"X": row[:, :width]})])
    assert len(single.fingerprints._specs) <= SPECS_MAX
    assert len(single.fingerprints._plain_specs) <= SPECS_MAX
    single.keep(request({"X": ONE}), b"answer")
    assert single.find(request({"X": ONE})) == b"answer"


def test_the_size_says_what_the_entries_really_take():
    entries = 20_000
    asking = Asking(interface({"X": "FP32"}), max_bytes=1 << 30)
    gc.collect()
    tracemalloc.start()
    try:
        for number in range(entries):
            asking.keep(request({"X": np.array([[number, 1, 2, 3]], np.float32)}), b"head" * 10, bytes(40))
        gc.collect()
        taken = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    usage = asking.cache.usage()
    assert usage.entries == entries
    assert 0.8 < taken / usage.size_bytes < 1.1, (taken, usage)
