"""The classes of outputs: their text, order and shape for each type, alone and in a batch, with and without labels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from sluice_proto.tensors import BY_NAME
from sluice_server.errors import InvalidArgument
from sluice_server.protocol.classification import CLASSES_MAX, Classes
from sluice_server.protocol.interface import TensorInterface

SORTABLE = ["UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP32", "FP64"]


def classes(datatype: str, count: int, *, has_rows: bool = False, labels: tuple[bytes, ...] = ()) -> Classes:
    output = TensorInterface("Y", BY_NAME[datatype], (-1,), optional=False, labels=labels)
    return Classes(output, count, has_rows)


@pytest.mark.parametrize(("datatype", "values", "elements"), [
    ("FP32", [0.5, 5, -1e-7], [b"5.000000:1", b"0.500000:0", b"-0.000000:2"]),
    ("FP64", [1e20, 0.1, 1 / 3], [b"100000000000000000000.000000:0", b"0.333333:2", b"0.100000:1"]),
    ("FP32", [0.1, 3e38], [b"%d.000000:1" % int(np.float32(3e38)), b"0.100000:0"]),
    ("FP32", [np.nan, -np.inf, np.inf], [b"inf:2", b"-inf:1", b"nan:0"]),
    ("UINT64", [2**64 - 1, 0, 2**63], [b"18446744073709551615:0", b"9223372036854775808:2", b"0:1"]),
    ("INT64", [-(2**63), 0, 2**63 - 1], [b"9223372036854775807:2", b"0:1", b"-9223372036854775808:0"]),
    ("INT8", [-128, 127, 0], [b"127:1", b"0:2", b"-128:0"]),
    ("INT32", [7, 7, 8], [b"8:2", b"7:0", b"7:1"]),
])  # fmt: skip
def test_elements_are_value_and_index_by_falling_value(datatype, values, elements):
    array = np.array(values, BY_NAME[datatype].numpy)
    assert classes(datatype, 3).of(array).tolist() == elements


def test_a_label_is_added_where_the_file_has_one():
    array = np.array([1, 4, 3, 2], np.int32)
    labels = (b"zero", b"one", b"", b"d\xe9j\xe0: vu")
    assert classes("INT32", 4, labels=labels).of(array).tolist() == [
        b"4:1:one",
        b"3:2",
        b"2:3:d\xe9j\xe0: vu",
        b"1:0:zero",
    ]
    assert classes("INT32", 1, labels=(b"only",)).of(array).tolist() == [b"4:1"]


@pytest.mark.parametrize(("shape", "count", "has_rows", "wanted"), [
    ((10,), 3, False, (3,)),
    ((10,), 2**62, False, (10,)),
    ((2, 5), 3, False, (3,)),
    ((2, 5), 3, True, (2, 3)),
    ((2, 5, 4), 30, True, (2, 20)),
    ((3, 0), 2, True, (3, 0)),
    ((0,), 2, False, (0,)),
    ((3,), 2, True, (3, 1)),
])  # fmt: skip
def test_each_row_has_its_classes_flattened(shape, count, has_rows, wanted):
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    elements = classes("FP32", count, has_rows=has_rows).of(values)
    assert elements.shape == wanted
    if elements.size:
        last = np.prod(shape[1:], dtype=int) - 1 if has_rows else values.size - 1
        assert elements.reshape(-1, wanted[-1])[0, 0].endswith(b":%d" % last)


@given(
    st.sampled_from(SORTABLE).flatmap(
        lambda name: st.tuples(st.just(name), np_st.arrays(BY_NAME[name].numpy, np_st.array_shapes(max_dims=2)))
    ),
    st.integers(1, 6),
    st.booleans(),
)
def test_any_values_are_told_as_they_are_and_in_order(typed, count, has_rows):
    datatype, values = typed
    found = classes(datatype, count, has_rows=has_rows).of(values)
    table = values.reshape(len(values) if has_rows else 1, -1)
    for row, elements in zip(table, found.reshape(len(table), -1), strict=True):
        indices = [int(element.split(b":")[1]) for element in elements]
        assert len(set(indices)) == len(indices) == min(count, row.size)
        best = sorted(row.tolist(), key=lambda value: (value != value, 0 if value != value else -value))
        np.testing.assert_array_equal([row[index] for index in indices], best[:count])


@pytest.mark.parametrize("datatype", sorted(set(BY_NAME) - set(SORTABLE)))
def test_types_without_an_order_or_a_text_are_refused(datatype):
    with pytest.raises(InvalidArgument, match=rf"'Y' due to unsupported type '{datatype}'"):
        classes(datatype, 1)


@pytest.mark.parametrize(("shape", "count"), [((1, CLASSES_MAX + 1), 1), ((CLASSES_MAX // 2 + 1, 2), 2)])
def test_the_work_for_one_answer_is_bounded(shape, count):
    with pytest.raises(InvalidArgument, match=f"too large.*'Y'.*{CLASSES_MAX}"):
        classes("INT8", count, has_rows=True).of(np.zeros(shape, np.int8))
