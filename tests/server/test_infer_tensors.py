"""Tensors of every type through a real server and back: raw, typed, empty, scalar, optional, some of the outputs."""

from __future__ import annotations

import grpc
import ml_dtypes
import numpy as np
import pytest

from sluice_proto.tensors import BY_NAME
from support import models
from support.requests import answer_arrays, infer_request
from support.server import running, server_settings

ROWS = {
    "BOOL": np.array([[True, False, True], [False, False, True]]),
    "UINT8": np.array([[0, 1, 255], [7, 8, 9]], np.uint8),
    "UINT16": np.array([[0, 1, 2**16 - 1], [7, 8, 9]], np.uint16),
    "UINT32": np.array([[0, 1, 2**32 - 1], [7, 8, 9]], np.uint32),
    "UINT64": np.array([[0, 1, 2**64 - 1], [7, 8, 9]], np.uint64),
    "INT8": np.array([[-128, 0, 127], [7, 8, 9]], np.int8),
    "INT16": np.array([[-(2**15), 0, 2**15 - 1], [7, 8, 9]], np.int16),
    "INT32": np.array([[-(2**31), 0, 2**31 - 1], [7, 8, 9]], np.int32),
    "INT64": np.array([[-(2**63), 0, 2**63 - 1], [7, 8, 9]], np.int64),
    "FP16": np.array([[1.5, np.inf, -0.0], [6e-8, -65504, np.nan]], np.float16),
    "FP32": np.array([[0.1, np.inf, -0.0], [1e-45, -np.inf, np.nan]], np.float32),
    "FP64": np.array([[0.1, np.inf, -0.0], [5e-324, -np.inf, np.nan]], np.float64),
    "BYTES": np.array([[b"", b"\0", b"a\0b\0"], ["\N{KATAKANA LETTER TU}".encode(), b"x" * 5000, b"end"]], object),
    "BF16": np.array([[1.5, np.inf, -0.0], [1e-38, -2, np.nan]], ml_dtypes.bfloat16),
}
TYPED = [name for name in ROWS if BY_NAME[name].contents_field]

by_datatype = pytest.mark.parametrize("datatype", ROWS)


@pytest.fixture(scope="module")
def module_server(transport, tmp_path_factory):
    repository = tmp_path_factory.mktemp("tensors")
    for datatype in ROWS:
        name = datatype.lower()
        models.write_model(repository, name, models.identity(datatype, ("N", 3)), max_batch_size=8)
        models.write_model(repository, f"{name}_open", models.identity(datatype, ("A", "B")))
        models.write_model(repository, f"{name}_scalar", models.identity(datatype, ()))
    models.write_model(repository, "vector", models.identity("FP32", ("N",)), max_batch_size=8)
    models.write_model(repository, "open_rows", models.identity("FP32", ("N", "W")), max_batch_size=8)
    models.write_model(repository, "pair", models.sum_and_difference((4,)))
    models.write_model(repository, "pair_rows", models.sum_and_difference(("N", 4)), max_batch_size=8)
    models.write_model(repository, "pair_open", models.sum_and_difference(("A", "B")))
    models.write_model(repository, "bias", models.add_bias())
    models.write_model(repository, "row_sums", models.row_sums())
    with running(server_settings(repository), transport) as server:
        yield server


@pytest.fixture
def server(module_server, no_errors_logged):
    return module_server


def same(got: np.ndarray, wanted: np.ndarray) -> bool:
    """Equal to the bit, NaN and the sign of zero included."""
    if wanted.dtype == object:
        return got.shape == wanted.shape and got.tolist() == wanted.tolist()
    return got.dtype == wanted.dtype and got.shape == wanted.shape and got.tobytes() == wanted.tobytes()


@by_datatype
def test_raw_values_come_back_to_the_bit(datatype, server):
    answer = server.infer(infer_request(datatype.lower(), {"X": ROWS[datatype]}))
    assert answer.outputs[0].datatype == datatype
    assert same(answer_arrays(answer)["Y"], ROWS[datatype])


@pytest.mark.parametrize("datatype", TYPED)
def test_typed_values_come_back_raw_and_to_the_bit(datatype, server):
    answer = server.infer(infer_request(datatype.lower(), {"X": ROWS[datatype]}, typed=True))
    assert not answer.outputs[0].HasField("contents")
    # A NaN that went through a Python float may be another NaN.
    rows = np.nan_to_num(ROWS[datatype]) if ROWS[datatype].dtype.kind == "f" else ROWS[datatype]
    got = answer_arrays(answer)["Y"]
    assert same(np.nan_to_num(got) if got.dtype.kind == "f" else got, rows)


@pytest.mark.parametrize(("datatype", "field", "sent", "kept"), [
    ("UINT8", "uint_contents", 256 + 7, 7),
    ("UINT16", "uint_contents", 2**16 + 7, 7),
    ("INT8", "int_contents", 128, -128),
    ("INT16", "int_contents", -(2**15) - 1, 2**15 - 1),
])  # fmt: skip
def test_narrow_typed_values_are_cut_from_the_low_bytes(datatype, field, sent, kept, server):
    request = infer_request(datatype.lower(), {"X": ROWS[datatype][:1]}, typed=True)
    getattr(request.inputs[0].contents, field)[0] = sent
    assert answer_arrays(server.infer(request))["Y"][0, 0] == kept


@by_datatype
@pytest.mark.parametrize("shape", [(1, 0), (0, 3), (0, 0)])
def test_tensors_without_elements_are_legal(shape, datatype, server):
    empty = np.empty(shape, ROWS[datatype].dtype)
    answer = server.infer(infer_request(f"{datatype.lower()}_open", {"X": empty}))
    assert tuple(answer.outputs[0].shape) == shape
    assert list(answer.raw_output_contents) == [b""]
    assert same(answer_arrays(answer)["Y"], empty)


def test_a_model_that_reduces_over_nothing_gives_rows(server):
    """Which is why the other dimensions of an empty tensor are bounded: a model makes them real."""
    answer = server.infer(infer_request("row_sums", {"X": np.empty((65_536, 0), np.float32)}))
    assert same(answer_arrays(answer)["Y"], np.zeros((65_536, 1), np.float32))
    with pytest.raises(grpc.RpcError, match="has no elements") as caught:
        server.infer(infer_request("row_sums", {"X": np.empty((65_537, 0), np.float32)}))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_rows_without_elements_are_merged_like_others(server):
    empty = np.empty((2, 0), np.float32)
    assert answer_arrays(server.infer(infer_request("open_rows", {"X": empty})))["Y"].shape == (2, 0)


@by_datatype
def test_a_scalar_is_one_element_for_clients(datatype, server):
    one = ROWS[datatype][0, :1]
    answer = server.infer(infer_request(f"{datatype.lower()}_scalar", {"X": one}))
    assert tuple(answer.outputs[0].shape) == (1,)
    assert same(answer_arrays(answer)["Y"], one)


def test_a_batch_of_scalars_has_a_column_for_clients(server):
    column = np.array([[1], [2], [3]], np.float32)
    answer = server.infer(infer_request("vector", {"X": column}))
    assert same(answer_arrays(answer)["Y"], column)


def test_what_the_metadata_says_of_a_scalar_is_what_is_taken(server):
    metadata = server.call("ModelMetadata", b"\x0a\x06vector")
    assert [list(tensor.shape) for tensor in (*metadata.inputs, *metadata.outputs)] == [[-1, 1], [-1, 1]]
    metadata = server.call("ModelMetadata", b"\x0a\x0bfp32_scalar")
    assert [list(tensor.shape) for tensor in (*metadata.inputs, *metadata.outputs)] == [[1], [1]]


@pytest.mark.parametrize("size_bytes", [3_000, 3_000_000])
@pytest.mark.parametrize("pad", range(9))
def test_values_at_any_place_of_the_message_are_read_right(pad, size_bytes, server):
    """Arrays are views of the message: what comes before them moves them, to addresses of any alignment."""
    array = np.arange(size_bytes // 8, dtype=np.float64).reshape(1, -1)
    answer = server.infer(infer_request("fp64_open", {"X": array}, request_id="i" * pad))
    assert same(answer_arrays(answer)["Y"], array)
    assert answer.id == "i" * pad


@pytest.mark.parametrize("pad", range(5))
def test_a_model_computes_with_unaligned_values_as_with_others(pad, server):
    a = np.arange(100_000, dtype=np.int32).reshape(100, 1000)
    request = infer_request("pair_open", {"INPUT0": a, "INPUT1": a[::-1]}, request_id="i" * pad)
    got = answer_arrays(server.infer(request))
    assert same(got["OUTPUT0"], a + a[::-1])
    assert same(got["OUTPUT1"], a - a[::-1])


@pytest.mark.parametrize("request_id", ["", "7", "\N{KATAKANA LETTER TU}\0%", "i" * 100_000])
def test_the_id_comes_back(request_id, server):
    answer = server.infer(infer_request("int32", {"X": ROWS["INT32"]}, request_id=request_id))
    assert (answer.id, answer.model_name, answer.model_version) == (request_id, "int32", "1")


@pytest.mark.parametrize("model", ["pair", "pair_rows"])
@pytest.mark.parametrize("outputs", [
    (), ("OUTPUT0",), ("OUTPUT1",), ("OUTPUT0", "OUTPUT1"), ("OUTPUT1", "OUTPUT0"),
])  # fmt: skip
def test_the_outputs_asked_for_come_in_that_order(outputs, model, server):
    shape = (4,) if model == "pair" else (2, 4)
    a, b = np.full(shape, 7, np.int32), np.full(shape, 2, np.int32)
    got = answer_arrays(server.infer(infer_request(model, {"INPUT0": a, "INPUT1": b}, outputs=outputs)))
    wanted = {"OUTPUT0": a + b, "OUTPUT1": a - b}
    assert list(got) == list(outputs or wanted)
    assert all(same(got[name], wanted[name]) for name in got)


def test_inputs_in_any_order_are_told_apart(server):
    a, b = np.full(4, 7, np.int32), np.full(4, 2, np.int32)
    got = answer_arrays(server.infer(infer_request("pair", {"INPUT1": b, "INPUT0": a})))
    assert same(got["OUTPUT1"], a - b)


def test_an_optional_input_may_be_left_out(server):
    x = np.array([10, 20], np.float32)
    assert same(answer_arrays(server.infer(infer_request("bias", {"X": x})))["Y"], x + np.float32([1, 2]))
    with_bias = infer_request("bias", {"X": x, "B": np.float32([5, 6])})
    assert same(answer_arrays(server.infer(with_bias))["Y"], x + np.float32([5, 6]))
    assert same(answer_arrays(server.infer(infer_request("bias", {"X": x})))["Y"], x + np.float32([1, 2]))


def test_typed_and_raw_data_take_turns(server):
    for typed in (True, False, True):
        answer = server.infer(infer_request("int32", {"X": ROWS["INT32"]}, typed=typed))
        assert same(answer_arrays(answer)["Y"], ROWS["INT32"])
