"""Answers compared: what counts as the same, and what is told of what does not, for every datatype and form."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_client.load.latencies import CODES, NOT_SENT
from sluice_client.replay.differences import (
    BY_LOAD,
    DEFAULT_TOLERANCES,
    Answer,
    Difference,
    Tolerance,
    compare,
    incomparable,
)
from sluice_proto.grpc_service_pb2 import ModelInferResponse
from sluice_proto.tensors import BY_NAME, of_array, set_contents, to_buffer

NOTHING = Tolerance(0, 0)


def ok(typed: bool = False, **outputs: np.ndarray) -> Answer:
    response = ModelInferResponse(model_name="m", model_version="1")
    for name, array in outputs.items():
        tensor = response.outputs.add(name=name, datatype=of_array(array).name, shape=array.shape)
        if typed:
            set_contents(tensor.contents, array)
        else:
            response.raw_output_contents.append(bytes(to_buffer(array)))
    return Answer(0, response.SerializeToString())


def differences(before: Answer, after: Answer, tolerances=DEFAULT_TOLERANCES) -> list[Difference]:
    assert incomparable(before, after) == ""
    return compare(before, after, tolerances)


def texts(*values: bytes) -> np.ndarray:
    array = np.empty(len(values), object)
    array[:] = values
    return array


def sample(name: str) -> np.ndarray:
    if name == "BYTES":
        return texts(b"one", b"", b"\xff")
    return np.array([0, 1, 1], BY_NAME[name].numpy)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_same_is_the_same_in_every_datatype_and_form(name):
    raw = ok(Y=sample(name))
    assert differences(raw, raw) == []
    assert differences(raw, Answer(0, memoryview(bytes(raw.response)))) == []
    if BY_NAME[name].contents_field:
        assert differences(raw, ok(typed=True, Y=sample(name))) == []


@pytest.mark.parametrize("name", BY_NAME)
def test_another_value_is_found_in_every_datatype_and_form(name):
    other = sample(name)
    other[1] = b"two" if name == "BYTES" else 0
    for typed in (False, True) if BY_NAME[name].contents_field else (False,):
        (found,) = differences(ok(Y=sample(name)), ok(typed=typed, Y=other))
        assert (found.reason, found.output, found.count, found.elements, found.index) == ("values", "Y", 1, 3, (1,))
        assert found.largest == (None if name == "BYTES" else 1)


@given(
    st.sampled_from([np.float16, ml_dtypes.bfloat16, np.float32, np.float64]),
    st.lists(st.floats(width=16) | st.floats(), max_size=4),
)
def test_a_float_is_itself_whatever_it_is_and_whatever_is_allowed(dtype, values):
    with np.errstate(over="ignore"):
        array = np.array(values, np.float64).astype(dtype)
    response = ModelInferResponse.FromString(ok(Y=array).response)
    response.id = "so that the bytes are not the same"
    assert differences(ok(Y=array), Answer(0, response.SerializeToString()), dict.fromkeys(BY_NAME, NOTHING)) == []


@pytest.mark.parametrize(("before", "after", "largest"), [
    (1.0, math.nan, math.nan), (math.nan, 1.0, math.nan), (math.inf, 1.0, math.inf), (1.0, math.inf, math.inf),
    (math.inf, -math.inf, math.inf),
])  # fmt: skip
def test_nan_and_infinities_are_near_to_nothing_else(before, after, largest):
    generous = dict.fromkeys(BY_NAME, Tolerance(1e9, 1e9))
    (found,) = differences(ok(Y=np.array([before])), ok(Y=np.array([after])), generous)
    assert found.largest == pytest.approx(largest, nan_ok=True)


def test_floats_may_be_off_by_what_is_allowed_and_no_more():
    base = np.array([[1.0, 100.0]], np.float32)
    allowed = {"FP32": Tolerance(0.01, 0.5)}
    assert differences(ok(Y=base), ok(Y=base + np.float32([[0.5, 1.5]])), allowed) == []
    (found,) = differences(ok(Y=base), ok(Y=base + np.float32([[0.5, 1.75]])), allowed)
    assert found == Difference("values", "Y", 1, 2, (0, 1), "100.0", "101.75", 1.75)


def test_integers_are_exact_where_floats_could_not_tell():
    big = np.array([2**63 - 1], np.int64)
    (found,) = differences(ok(Y=big), ok(Y=big - 1))
    assert (found.expected, found.actual) == ("9223372036854775807", "9223372036854775806")


def test_a_scalar_and_no_elements_at_all():
    (found,) = differences(ok(Y=np.array(1)), ok(Y=np.array(2)))
    assert (found.index, found.elements) == ((), 1)
    assert differences(ok(Y=np.zeros((0, 3))), ok(Y=np.zeros((0, 3)), typed=True)) == []


def test_outputs_datatypes_and_shapes():
    one = np.ones((2, 3), np.float32)
    found = differences(
        ok(gone=one, other=one, shaped=one, same=one),
        ok(same=one, other=one.astype(np.float64), shaped=one.T, new=one),
    )
    assert found == [
        Difference("missing", "gone"),
        Difference("not expected", "new"),
        Difference("datatype", "other", expected="FP32", actual="FP64"),
        Difference("shape", "shaped", expected="[2, 3]", actual="[3, 2]"),
    ]


def test_long_values_are_cut():
    (found,) = differences(ok(Y=texts(b"x" * 99)), ok(Y=texts(b"")))
    assert len(found.expected) < 70
    assert found.expected.endswith("...")


def test_codes():
    internal, invalid = Answer(CODES.index("INTERNAL")), Answer(CODES.index("INVALID_ARGUMENT"))
    assert differences(internal, internal) == []
    expected = [Difference("code", expected="OK", actual="INTERNAL")]
    assert differences(ok(), internal) == expected
    assert differences(Answer(0, b""), internal) == expected
    assert differences(internal, invalid) == [Difference("code", expected="INTERNAL", actual="INVALID_ARGUMENT")]


@pytest.mark.parametrize("code", sorted(BY_LOAD))
def test_what_the_load_decided_is_not_expected_again_but_no_excuse_for_an_error(code):
    ended = Answer(code)
    assert incomparable(ended, ok()).startswith("expected ")
    assert incomparable(ended, ended).startswith("expected ")
    assert len(differences(ended, Answer(CODES.index("INTERNAL")))) == 1
    # the other way round the load is what differs
    assert len(differences(ok(), ended)) == 1
    assert NOT_SENT in BY_LOAD


def test_an_answer_that_was_not_kept_is_not_compared():
    assert incomparable(Answer(0, b""), ok()) == "the answer was not kept"


@pytest.mark.parametrize("broken", [
    b"\xff",
    ModelInferResponse(outputs=[{"name": "Y", "datatype": "FP32", "shape": [1]}]).SerializeToString(),
    ModelInferResponse(outputs=[{"name": "Y", "datatype": "FP1", "shape": [1]}]).SerializeToString(),
])  # fmt: skip
def test_an_answer_that_cannot_be_read_is_different(broken):
    (found,) = differences(ok(), Answer(0, broken))
    assert found.reason.startswith("the answer cannot be read: ")
    (found,) = differences(Answer(0, broken), ok())
    assert found.reason.startswith("the expected answer cannot be read: ")
