"""Every element type there and back, raw and typed, and everything that data can be wrong about."""

import math
import struct
import sys
from contextlib import suppress

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sluice_proto import (
    BytesElementCount,
    BytesError,
    BytesTruncatedBody,
    BytesTruncatedLength,
    InvalidShape,
    NoContentsField,
    SeveralContentsFields,
    SizeMismatch,
    TensorError,
    UnsupportedArray,
    UnsupportedElement,
    WrongContentsField,
)
from sluice_proto.grpc_service_pb2 import InferTensorContents
from sluice_proto.model_config_pb2 import DataType
from sluice_proto.tensors import (
    BY_CONFIG_TYPE,
    BY_NAME,
    COPIED_BYTES_MAX,
    contents_fields,
    element_count,
    from_contents,
    of_array,
    set_contents,
    to_buffer,
    view,
)

FP32, BYTES = BY_NAME["FP32"], BY_NAME["BYTES"]
FIXED = [dtype for dtype in BY_NAME.values() if dtype is not BYTES]
TYPED = [dtype for dtype in BY_NAME.values() if dtype.contents_field]

shapes = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
any_shape = st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-2, 5), max_size=70)


@st.composite
def fixed_arrays(draw, dtypes=tuple(FIXED)):
    """Arrays of any bit pattern, NaNs with payloads included."""
    dtype, shape = draw(st.sampled_from(dtypes)), draw(shapes)
    size = math.prod(shape) * dtype.itemsize
    data = draw(st.binary(min_size=size, max_size=size))
    if dtype.name == "BOOL":
        data = bytes(byte & 1 for byte in data)
    return np.frombuffer(data, dtype.numpy).reshape(shape)


@st.composite
def bytes_arrays(draw, elements=st.binary(max_size=9)):  # noqa: B008  (a strategy is immutable)
    shape = draw(shapes)
    count = math.prod(shape)
    array = np.empty(count, object)
    array[:] = draw(st.lists(elements, min_size=count, max_size=count))
    return array.reshape(shape)


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return (left.dtype, left.shape) == (right.dtype, right.shape) and left.tobytes() == right.tobytes()


def test_the_table_has_every_type_of_the_configuration_under_both_keys():
    named = {f"TYPE_{'STRING' if name == 'BYTES' else name}": dtype.config_type for name, dtype in BY_NAME.items()}
    assert named | {"TYPE_INVALID": 0} == dict(DataType.items())
    assert {dtype.config_type: dtype for dtype in BY_NAME.values()} == dict(BY_CONFIG_TYPE)
    assert {dtype.contents_field for dtype in TYPED} == {field.name for field in InferTensorContents.DESCRIPTOR.fields}
    assert [dtype.name for dtype in BY_NAME.values() if not dtype.contents_field] == ["FP16", "BF16"]
    assert [dtype.name for dtype in BY_NAME.values() if not dtype.itemsize] == ["BYTES"]


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        BY_NAME["FP8"] = FP32
    with pytest.raises(AttributeError):
        FP32.itemsize = 5


# Raw data


@given(fixed_arrays())
def test_raw_data_of_fixed_types_comes_back_the_same(array):
    buffer = to_buffer(array)
    assert of_array(array).numpy == array.dtype
    assert len(buffer) == array.nbytes
    back = view(of_array(array), array.shape, buffer)
    assert same(back, array)


@pytest.mark.parametrize("dtype", FIXED, ids=lambda dtype: dtype.name)
def test_large_raw_data_of_fixed_types_is_never_copied(dtype):
    array = np.zeros((2, COPIED_BYTES_MAX), dtype.numpy)
    buffer = to_buffer(array)
    assert len(buffer) == array.nbytes
    back = view(dtype, array.shape, buffer)
    assert same(back, array)
    assert np.shares_memory(back, array)


@pytest.mark.parametrize("dtype", FIXED, ids=lambda dtype: dtype.name)
def test_raw_data_is_little_endian_and_row_major(dtype):
    array = np.array([[0, 1], [1, 0]]).astype(dtype.numpy)
    one = np.array(1).astype(dtype.numpy).tobytes()
    assert bytes(to_buffer(array)) == b"".join([bytes(dtype.itemsize), one, one, bytes(dtype.itemsize)])
    assert bytes(to_buffer(array.T)) == bytes(to_buffer(np.ascontiguousarray(array.T)))


def test_a_view_is_over_the_received_bytes_and_cannot_be_written():
    data = np.arange(6, dtype=np.float32).tobytes()
    array = view(FP32, [2, 3], data)
    assert array.base is data
    assert not array.flags.writeable
    assert array.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_a_view_may_start_at_an_odd_address():
    data = b"x" + np.arange(3, dtype=np.float64).tobytes()
    assert view(BY_NAME["FP64"], (3,), memoryview(data)[1:]).tolist() == [0, 1, 2]


def test_any_byte_but_zero_is_true():
    array = view(BY_NAME["BOOL"], (4,), b"\x00\x01\x02\xff")
    assert np.logical_not(array).tolist() == [True, False, False, False]
    assert bytes(to_buffer(array)) == b"\x00\x01\x02\xff"


def test_bfloat16_has_the_upper_half_of_a_float():
    array = np.array([1.5, -2], ml_dtypes.bfloat16)
    assert of_array(array).name == "BF16"
    assert bytes(to_buffer(array)) == struct.pack("<f", 1.5)[2:] + struct.pack("<f", -2)[2:]


ROW_MAJOR = np.arange(6, dtype="<i4").reshape(2, 3)


@pytest.mark.parametrize(
    "array",
    [ROW_MAJOR.astype(">i4"), np.repeat(ROW_MAJOR, 2, axis=1)[:, ::2], np.asfortranarray(ROW_MAJOR)],
    ids=["big-endian", "strided", "column-major"],
)
def test_arrays_in_another_layout_are_sent_in_the_wires(array):
    assert same(view(BY_NAME["INT32"], (2, 3), to_buffer(array)), ROW_MAJOR)


@given(st.sampled_from(FIXED), shapes, st.integers(0, 300))
def test_fixed_data_of_another_size_is_refused_with_both_sizes(dtype, shape, got):
    expected = math.prod(shape) * dtype.itemsize
    if expected == got:
        got += 1
    with pytest.raises(SizeMismatch) as caught:
        view(dtype, shape, bytes(got))
    assert (caught.value.expected_bytes, caught.value.got_bytes) == (expected, got)
    assert str(caught.value) == f"the tensor's data type and shape need {expected} bytes, got {got}"


# Shapes from strangers


@given(st.sampled_from(list(BY_NAME.values())), any_shape, st.binary(max_size=40))
@example(FP32, [0, 2**62, 2**62], b"")
@example(BYTES, [0, 2**62, 2**62], b"")
@example(FP32, [2**62, 4], b"")
@example(FP32, [2**32, 2**32], b"")
@example(FP32, [-1, -1], bytes(4))
@example(FP32, [-1, 0], b"")
@example(FP32, [1] * 65, bytes(4))
@example(FP32, [2**70, 0], b"")
@example(BYTES, [2**70], b"\1\0\0\0a")
def test_no_shape_gives_anything_but_an_array_of_that_shape_or_a_tensor_error(dtype, shape, data):
    with suppress(TensorError):
        assert view(dtype, shape, data).shape == tuple(shape)
    with suppress(TensorError):
        array = from_contents(dtype, shape, InferTensorContents())
        assert (array.shape, array.size) == (tuple(shape), 0)


@given(st.lists(st.integers(0, 2**63 - 1), max_size=64))
def test_the_element_count_is_exact_however_large(shape):
    assert element_count(shape) == math.prod(shape)


@pytest.mark.parametrize(
    ("shape", "reason"),
    [
        ([2, -1], "dimension -1 is negative"),
        ([-2, -3], "dimension -2 is negative"),
        ([-5, 0], "dimension -5 is negative"),
        ([1] * 65, "65 dimensions, at most 64"),
    ],
)
def test_a_shape_that_no_array_can_have_is_refused(shape, reason):
    with pytest.raises(InvalidShape, match=reason) as caught:
        element_count(shape)
    assert caught.value.shape == shape


@pytest.mark.parametrize("dtype", [FP32, BYTES], ids=["FP32", "BYTES"])
def test_an_empty_tensor_whose_other_dimensions_overflow_is_an_invalid_shape(dtype):
    with pytest.raises(InvalidShape, match="too big"):
        view(dtype, [0, 2**62, 2**62], b"")
    with pytest.raises(InvalidShape, match="too big"):
        from_contents(dtype, [0, 2**62, 2**62], InferTensorContents())


# BYTES


@given(bytes_arrays())
def test_bytes_elements_come_back_the_same_raw(array):
    buffer = to_buffer(array)
    back = view(BYTES, array.shape, buffer)
    assert (back.dtype, back.shape, back.ravel().tolist()) == (object, array.shape, array.ravel().tolist())
    assert len(buffer) == sum(4 + len(element) for element in array.ravel())


@given(bytes_arrays(st.text(max_size=5) | st.binary(max_size=5)))
def test_text_elements_are_sent_as_utf_8(array):
    back = view(BYTES, array.shape, to_buffer(array))
    expected = [element.encode() if isinstance(element, str) else element for element in array.ravel()]
    assert back.ravel().tolist() == expected


@pytest.mark.parametrize(
    "array",
    [np.array(["a", "\u03b2"]), np.array([b"a", b"\xce\xb2"]), np.array(["a", "\u03b2"], np.dtypes.StringDType())],
    ids=["U", "S", "T"],
)
def test_fixed_and_variable_width_text_arrays_are_bytes_too(array):
    assert of_array(array) is BYTES
    assert to_buffer(array) == b"\1\0\0\0a\2\0\0\0\xce\xb2"


def test_elements_of_every_buffer_kind_are_plain_bytes():
    for buffer in (
        b"\1\0\0\0a",
        bytearray(b"\1\0\0\0a"),
        memoryview(b"\1\0\0\0a"),
        np.frombuffer(b"\1\0\0\0a", np.uint8),
    ):
        element = view(BYTES, (), buffer)[()]
        assert (type(element), element) == (bytes, b"a")


@pytest.mark.parametrize(
    ("count", "data", "error", "facts"),
    [
        (2, b"\1\0\0\0a", BytesElementCount, {"expected": 2, "got": 1, "more": False}),
        (1, b"", BytesElementCount, {"expected": 1, "got": 0, "more": False}),
        (1, b"\0\0\0\0\0\0\0\0", BytesElementCount, {"expected": 1, "got": 2, "more": True}),
        (0, b"\1\0\0\0a", BytesElementCount, {"expected": 0, "got": 1, "more": True}),
        (1, b"\1\0", BytesTruncatedLength, {"available": 2}),
        (1, b"\1\0\0\0a\0\0\0", BytesTruncatedLength, {"available": 3}),
        (2, b"\1\0\0\0a\0\0\0", BytesTruncatedLength, {"available": 3}),
        (1, b"\5\0\0\0ab", BytesTruncatedBody, {"length": 5, "available": 2}),
        (3, b"\0\0\0\0\xff\xff\xff\xff", BytesTruncatedBody, {"length": 2**32 - 1, "available": 0}),
    ],
)
def test_bytes_data_that_is_not_the_promised_elements_is_refused_with_the_facts(count, data, error, facts):
    with pytest.raises(error) as caught:
        view(BYTES, (count,), data)
    assert vars(caught.value) == facts
    assert str(next(iter(facts.values()))) in str(caught.value)


@given(st.integers(0, 5), st.binary(max_size=40))
def test_bytes_data_is_either_all_its_elements_or_a_bytes_error(count, data):
    with suppress(BytesError):
        assert to_buffer(view(BYTES, (count,), data)) == data


@pytest.mark.parametrize(
    ("element", "found"),
    [(1, "int"), (None, "NoneType"), (bytearray(b"a"), "bytearray"), ("\ud800", r"text with '\\ud800'")],
)
def test_elements_that_are_neither_bytes_nor_text_are_refused(element, found):
    array = np.array([b"a", "b", None], object)
    array[2] = element
    with pytest.raises(UnsupportedElement, match=found):
        to_buffer(array)
    contents = InferTensorContents(fp32_contents=[1])
    with pytest.raises(UnsupportedElement, match=found):
        set_contents(contents, array)
    assert contents == InferTensorContents(fp32_contents=[1])


@pytest.mark.parametrize("dtype", ["complex64", "datetime64[s]", "longdouble", "V3"])
def test_arrays_of_other_types_are_refused_by_name(dtype):
    array = np.zeros(2, dtype)
    with pytest.raises(UnsupportedArray) as caught:
        to_buffer(array)
    assert caught.value.numpy_name == str(array.dtype)


# Typed contents


@given(fixed_arrays(tuple(dtype for dtype in TYPED if dtype is not BYTES)))
def test_typed_contents_of_fixed_types_come_back_the_same(array):
    contents = InferTensorContents(bytes_contents=[b"from before"])
    set_contents(contents, array)
    assert contents_fields(contents) == ([of_array(array).contents_field] if array.size else [])
    back = from_contents(of_array(array), array.shape, InferTensorContents.FromString(contents.SerializeToString()))
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    # The bits of a NaN are not promised: it passes through a Python float.
    assert np.array_equal(back, array, equal_nan=array.dtype.kind == "f")


@given(bytes_arrays(st.binary(max_size=9) | st.text(max_size=5)))
def test_typed_contents_of_bytes_come_back_the_same(array):
    contents = InferTensorContents()
    set_contents(contents, array)
    assert to_buffer(from_contents(BYTES, array.shape, contents)) == to_buffer(array)


@pytest.mark.parametrize(
    ("name", "field", "values", "expected"),
    [
        ("INT8", "int_contents", [127, 128, -129, 2**31 - 1], [127, -128, 127, -1]),
        ("INT16", "int_contents", [32768, -32769], [-32768, 32767]),
        ("UINT8", "uint_contents", [256, 255, 2**32 - 1], [0, 255, 255]),
        ("UINT16", "uint_contents", [65536, 65537], [0, 1]),
    ],
)
def test_narrow_integers_are_cut_from_the_low_bytes(name, field, values, expected):
    array = from_contents(BY_NAME[name], [len(values)], InferTensorContents(**{field: values}))
    assert (array.dtype, array.tolist()) == (BY_NAME[name].numpy, expected)


@pytest.mark.parametrize("dtype", BY_NAME.values(), ids=lambda dtype: dtype.name)
@pytest.mark.parametrize("source", TYPED, ids=lambda dtype: dtype.name)
def test_only_the_field_of_the_datatype_is_read(dtype, source):
    contents = InferTensorContents()
    set_contents(contents, np.array([1]).astype(source.numpy) if source is not BYTES else np.array([b"1"], object))
    if source.contents_field == dtype.contents_field:
        assert from_contents(dtype, [1], contents).shape == (1,)
        return
    with pytest.raises(WrongContentsField) as caught:
        from_contents(dtype, [1], contents)
    assert (caught.value.field, caught.value.expected) == (source.contents_field, dtype.name)
    assert BY_NAME[caught.value.got].contents_field == source.contents_field
    assert caught.value.got not in {"INT8", "INT16", "UINT8", "UINT16"}


def test_two_filled_fields_are_refused_by_name():
    contents = InferTensorContents(fp32_contents=[1], int_contents=[1])
    with pytest.raises(SeveralContentsFields) as caught:
        from_contents(FP32, [1], contents)
    assert list(caught.value.fields) == contents_fields(contents) == ["int_contents", "fp32_contents"]


@pytest.mark.parametrize("name", ["FP16", "BF16"])
def test_half_floats_have_no_typed_field(name):
    with pytest.raises(NoContentsField, match=name):
        set_contents(InferTensorContents(), np.zeros(1, BY_NAME[name].numpy))


def test_another_number_of_values_is_refused_in_the_types_own_measure():
    with pytest.raises(SizeMismatch) as size:
        from_contents(BY_NAME["INT16"], [3], InferTensorContents(int_contents=[1, 2]))
    assert (size.value.expected_bytes, size.value.got_bytes) == (6, 4)
    with pytest.raises(SizeMismatch) as nothing:
        from_contents(BY_NAME["FP16"], [2], InferTensorContents())
    assert (nothing.value.expected_bytes, nothing.value.got_bytes) == (4, 0)
    for count, more in ((1, True), (3, False)):
        with pytest.raises(BytesElementCount) as elements:
            from_contents(BYTES, [count], InferTensorContents(bytes_contents=[b"a", b"b"]))
        assert vars(elements.value) == {"expected": count, "got": 2, "more": more}


def test_contents_hold_no_reference_to_the_message():
    contents = InferTensorContents(fp32_contents=[1, 2])
    before = sys.getrefcount(contents)
    array = from_contents(FP32, [2], contents)
    array += 1
    assert (sys.getrefcount(contents), list(contents.fp32_contents)) == (before, [1, 2])
