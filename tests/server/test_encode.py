"""Whether the parts of an answer, joined, are the message that it should be, for any arrays, in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as np_st

from sluice_batching import NO_DEADLINE
from sluice_proto.grpc_service_pb2 import ModelInferResponse
from sluice_proto.model_config_pb2 import ModelConfig
from sluice_proto.tensors import BY_NAME
from sluice_server.errors import Internal
from sluice_server.execution.request import InferRequest
from sluice_server.protocol.encode import HEADS_MAX, Encoder
from sluice_server.protocol.interface import ModelInterface
from support.fakes import RecordingCall
from support.requests import answer_arrays

if TYPE_CHECKING:
    from typing_extensions import Buffer

NUMERIC = ["BOOL", "UINT8", "UINT64", "INT8", "INT64", "FP16", "FP32", "FP64"]


def interface(
    *datatypes: str, max_batch_size: int = 0, dims: tuple[int, ...] = (-1,), reshape: tuple[int, ...] | None = None
):
    config = ModelConfig(name="m", max_batch_size=max_batch_size)
    for number, datatype in enumerate(datatypes):
        output = config.output.add(name=f"Y{number}", data_type=BY_NAME[datatype].config_type, dims=dims)
        if reshape is not None:
            output.reshape.shape[:] = reshape
            output.reshape.SetInParent()
    return ModelInterface.of(config, 3)


def asked(names: tuple[str, ...], rows: int = 1, request_id: str = "") -> InferRequest:
    return InferRequest(RecordingCall(), request_id, {}, names, rows=rows, key="", deadline_ns=NO_DEADLINE)


def encode_parts(encoder: Encoder, arrays: list[np.ndarray], request_id: str = "") -> list[Buffer]:
    names = tuple(f"Y{number}" for number in range(len(arrays)))
    (parts,) = encoder([asked(names, request_id=request_id)], arrays)
    return parts


def encode(encoder: Encoder, arrays: list[np.ndarray], request_id: str = "") -> ModelInferResponse:
    return ModelInferResponse.FromString(b"".join(encode_parts(encoder, arrays, request_id)))


@given(
    st.lists(
        st.sampled_from(NUMERIC).flatmap(
            lambda name: st.tuples(
                st.just(name),
                np_st.arrays(BY_NAME[name].numpy, np_st.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)),
            )
        ),
        min_size=1,
        max_size=4,
    ),
    st.text(max_size=200),
)
def test_any_arrays_come_back_from_their_answer(outputs, request_id):
    arrays = [array for _, array in outputs]
    response = encode(Encoder(interface(*(name for name, _ in outputs))), arrays, request_id)
    assert (response.model_name, response.model_version, response.id) == ("m", "3", request_id)
    assert [tensor.datatype for tensor in response.outputs] == [name for name, _ in outputs]
    for got, wanted in zip(answer_arrays(response).values(), arrays, strict=True):
        assert got.shape == wanted.shape
        assert got.tobytes() == wanted.tobytes()


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[InferRequest], list[str], list[np.ndarray]]:
    """Requests, the types of the outputs, and the outputs with the rows of all requests."""
    rows = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5) | st.lists(st.just(2), min_size=1, max_size=5))
    datatypes = draw(st.lists(st.sampled_from(["FP32", "INT8", "BYTES"]), min_size=1, max_size=3))
    ids = draw(st.lists(st.sampled_from(["", "a", "\u00e9", "0" * 200]), min_size=len(rows), max_size=len(rows)))
    names = tuple(f"Y{number}" for number in range(len(datatypes)))
    arrays = []
    for datatype in datatypes:
        shape = (sum(rows), *draw(st.sampled_from([(), (0,), (3,), (2, 2), (1200,)])))
        values = np.arange(np.prod(shape, dtype=int)).reshape(shape)
        text = datatype == "BYTES"
        arrays.append(values.astype(bytes).astype(object) if text else values.astype(BY_NAME[datatype].numpy))
    requests = [asked(names, each, request_id) for each, request_id in zip(rows, ids, strict=True)]
    return requests, datatypes, arrays


@given(batches())
def test_each_request_of_a_batch_gets_its_own_rows_and_its_id(drawn):
    batch, datatypes, arrays = drawn
    encoder = Encoder(interface(*datatypes, max_batch_size=100))
    start = 0
    for request, parts in zip(batch, encoder(batch, arrays), strict=True):
        response = ModelInferResponse.FromString(b"".join(parts))
        assert response.id == request.id
        for array, got in zip(arrays, answer_arrays(response).values(), strict=True):
            np.testing.assert_array_equal(got, array[start : start + request.rows], strict=True)
        start += request.rows


@pytest.mark.parametrize("array", [
    np.arange(12.0, dtype=np.float32).reshape(3, 4).T,
    np.arange(12.0, dtype=np.float32)[::-2],
    np.arange(12.0, dtype=np.float32).astype(">f4"),
    np.broadcast_to(np.float32(7), (3, 2)),
])  # fmt: skip
def test_arrays_of_any_layout_are_written_in_row_major_order(array):
    got = answer_arrays(encode(Encoder(interface("FP32")), [array]))["Y0"]
    np.testing.assert_array_equal(got, array)


def test_the_kept_heads_stay_bounded_and_right_whatever_the_shapes():
    encoder = Encoder(interface("INT8"))
    for size in [*range(2 * HEADS_MAX + 10), 0, 1, 2]:
        response = encode(encoder, [np.zeros(size, np.int8)])
        assert list(response.outputs[0].shape) == [size]
        assert len(encoder._heads) <= HEADS_MAX


def test_a_large_array_is_not_copied_before_it_is_sent():
    array = np.zeros((1000, 1000), np.float32)
    encoder = Encoder(interface("FP32", max_batch_size=1000))
    (parts,) = encoder([asked(("Y0",), rows=1000)], [array])
    assert _shares_memory(parts[-1], array)
    for parts in encoder([asked(("Y0",), rows=400), asked(("Y0",), rows=600)], [array]):
        assert _shares_memory(parts[-1], array)


def _shares_memory(part: Buffer, array: np.ndarray) -> bool:
    return np.shares_memory(np.frombuffer(part, np.uint8), array)


@pytest.mark.parametrize(("batch", "graph_shape", "reshape", "dims", "shape"), [
    (0, (), (), (1,), [1]),
    (0, (), (), (1, 1), [1, 1]),
    (8, (3,), (), (1,), [3, 1]),
    # A graph that does not say its output's rank may give any.
    (0, (2, 2), (), (1,), [2, 2]),
    (0, (6,), (6,), (2, 3), [2, 3]),
    (8, (3, 6), (6,), (2, 3), [3, 2, 3]),
    (8, (3, 7, 6, 0), (-1, 6, -1), (-1, 2, 3, -1), [3, 7, 2, 3, 0]),
])  # fmt: skip
def test_an_output_has_the_dims_of_the_configuration_for_clients(batch, graph_shape, reshape, dims, shape):
    encoder = Encoder(interface("FP32", max_batch_size=batch, dims=dims, reshape=reshape))
    array = np.arange(np.prod(graph_shape), dtype=np.float32).reshape(graph_shape)
    response = encode(encoder, [array])
    assert list(response.outputs[0].shape) == shape
    assert response.raw_output_contents[0] == array.tobytes()


def test_an_output_of_another_size_than_the_configuration_says_is_the_models_fault():
    encoder = Encoder(interface("FP32", dims=(2, 3), reshape=(6,)))
    with pytest.raises(Internal, match=r"'Y0' came out with shape \[5\], which .* makes \[2,3\]"):
        encode(encoder, [np.zeros(5, np.float32)])
