"""Requests as the bytes that other implementations read, answers as the arrays that they meant, and what is refused."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sluice_client import InvalidRequest, InvalidResponse, Result, Timing, operations
from sluice_client.flow import Operation
from sluice_client.retries import Safety
from sluice_proto import grpc_service_pb2 as pb

TIMING = Timing(1_000_000, 1, "localhost:8001")
FIXED = [np.bool_, np.uint8, np.int16, np.uint32, np.int64, np.float16, np.float32, np.float64]


def infer(inputs: dict[str, Any], model: str = "m", **arguments: Any) -> Operation[Result]:
    defaults = {"outputs": None, "version": "", "request_id": "", "priority": 0, "timeout_us": 0, "parameters": None}
    return operations.infer(model, inputs, **(defaults | arguments))


def sent(operation: Operation[Any]) -> Any:
    return getattr(pb, f"{operation.rpc}Request").FromString(operation.request)


def echo(request: Any) -> bytes:
    """The answer of a model that gives its inputs back."""
    response = pb.ModelInferResponse(model_name=request.model_name, model_version="7", id=request.id)
    for tensor in request.inputs:
        response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
    response.raw_output_contents.extend(request.raw_input_contents)
    return response.SerializeToString()


@given(
    st.lists(
        st.sampled_from(FIXED).flatmap(lambda t: hnp.arrays(t, hnp.array_shapes(min_dims=0, min_side=0))), max_size=4
    )
)
def test_arrays_come_back_bit_for_bit(arrays: list[np.ndarray]) -> None:
    operation = infer({f"I{index}": array for index, array in enumerate(arrays)})
    result = operation.parse(echo(sent(operation)), TIMING)
    assert list(result) == [f"I{index}" for index in range(len(arrays))]
    for array, back in zip(arrays, result.values(), strict=True):
        assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.arange(6, dtype=np.float32).reshape(2, 3).T, np.arange(6, dtype=np.float32).reshape(2, 3).T),
        (np.array([1, 2], dtype=">i4"), np.array([1, 2], dtype=np.int32)),
        (np.ones(2, ml_dtypes.bfloat16), np.ones(2, ml_dtypes.bfloat16)),
        (np.array(["é", ""]), np.array(["é".encode(), b""], dtype=object)),
        (np.array([[b"a\0b"]], dtype=object), np.array([[b"a\0b"]], dtype=object)),
    ],
)
def test_layouts_byte_orders_and_texts_become_what_the_protocol_has(array: np.ndarray, expected: np.ndarray) -> None:
    operation = infer({"X": array})
    back = operation.parse(echo(sent(operation)), TIMING)["X"]
    assert back.dtype == expected.dtype
    np.testing.assert_array_equal(back, expected)


def test_every_argument_is_in_the_message() -> None:
    parameters = {"s": "text", "b": True, "i": -1, "u": 2**63, "d": 0.5}
    message = sent(
        infer({}, outputs=["Y"], version="3", request_id="r", priority=2, timeout_us=500, parameters=parameters)
    )
    assert (message.model_name, message.model_version, message.id) == ("m", "3", "r")
    assert [output.name for output in message.outputs] == ["Y"]
    values = {
        key: (value.WhichOneof("parameter_choice"), operations._parameter_value(value))
        for key, value in message.parameters.items()
    }
    assert values == {
        "s": ("string_param", "text"),
        "b": ("bool_param", True),
        "i": ("int64_param", -1),
        "u": ("uint64_param", 2**63),
        "d": ("double_param", 0.5),
        "priority": ("int64_param", 2),
        "timeout": ("int64_param", 500),
    }


@pytest.mark.parametrize(
    ("sequence_id", "safety"),
    [(0, Safety.REPEATABLE), ("", Safety.REPEATABLE), (5, Safety.UNSENT), ("user", Safety.UNSENT)],
)
def test_a_step_of_a_sequence_is_not_repeatable(sequence_id: int | str, safety: Safety) -> None:
    assert infer({}, parameters={"sequence_id": sequence_id}).safety is safety


@pytest.mark.parametrize(
    ("inputs", "arguments", "reason"),
    [
        ({"X": [1.0]}, {}, "input 'X' must be a numpy array, got list"),
        ({"X": np.ones(1, np.complex64)}, {}, "input 'X': arrays of complex64"),
        ({"X": np.array([None])}, {}, "input 'X': .*NoneType"),
        ({"": np.ones(1)}, {}, "the input name is empty"),
        ({1: np.ones(1)}, {}, "the input name must be a str"),
        ({}, {"model": ""}, "the model name is empty"),
        ({}, {"model": "\ud800"}, "not valid Unicode"),
        ({}, {"version": 1}, "version must be a str, got int"),
        ({}, {"request_id": b"x"}, "request_id must be a str"),
        ({}, {"outputs": "Y"}, r"write \['Y'\]"),
        ({}, {"outputs": [""]}, "the output name is empty"),
        ({}, {"priority": -1}, "priority must be a whole number"),
        ({}, {"timeout_us": 1.5}, "timeout must be a whole number"),
        ({}, {"priority": 1, "parameters": {"priority": 2}}, "'priority' is given as a parameter and"),
        ({}, {"parameters": {"p": 2**64}}, "does not fit into 64 bits"),
        ({}, {"parameters": {"p": None}}, "must be bool, int, float or str"),
    ],
)
def test_what_cannot_be_sent_is_refused_by_name(inputs: dict[str, Any], arguments: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        infer(inputs, **arguments)


def test_a_request_above_the_message_limit_is_refused_before_it_is_copied() -> None:
    half = np.zeros(2**30, np.uint8)  # never touched, so the system gives it no memory
    with pytest.raises(InvalidRequest, match="gRPC carries at most 2147483647"):
        infer({"A": half, "B": half})


def test_a_load_carries_config_and_files() -> None:
    message = sent(operations.load_model("m", {"max_batch_size": 4}, {"1/model.onnx": b"\0onnx"}))
    assert message.parameters["config"].string_param == '{"max_batch_size": 4}'
    assert message.parameters["file:1/model.onnx"].bytes_param == b"\0onnx"
    assert sent(operations.load_model("m", "{}", None)).parameters["config"].string_param == "{}"
    assert operations.load_model("m", None, None).safety is operations.unload_model("m", unload_dependents=True).safety
    assert sent(operations.unload_model("m", unload_dependents=True)).parameters["unload_dependents"].bool_param


@pytest.mark.parametrize(
    ("config", "files", "reason"),
    [
        (None, {"1/model.onnx": b""}, "need a config"),
        ({"a": object()}, None, "cannot be written as JSON"),
        ("{}", {"1/model.onnx": "text"}, "must be bytes, got str"),
        ("{}", {"": b""}, "the file name is empty"),
    ],
)
def test_a_load_that_cannot_be_meant_is_refused(config: Any, files: Any, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        operations.load_model("m", config, files)


def test_a_result_is_a_read_only_mapping_that_shows_what_it_holds() -> None:
    operation = infer({"X": np.zeros((1, 3), np.float32)}, request_id="r")
    result = operation.parse(echo(sent(operation)), TIMING)
    assert (len(result), "X" in result, result.id, result.model_version) == (1, True, "r", "7")
    assert repr(result) == "<Result of m version 7: X: float32[1, 3]; 1.00 ms from localhost:8001>"
    assert not result["X"].flags.writeable
    with pytest.raises(KeyError, match=r"no output 'Y'; there are \['X'\]"):
        result["Y"]


def test_typed_contents_in_an_answer_are_read_too() -> None:
    response = pb.ModelInferResponse(model_name="m")
    response.outputs.add(name="A", datatype="INT8", shape=[2]).contents.int_contents.extend([1, -1])
    response.outputs.add(name="B", datatype="BYTES", shape=[1]).contents.bytes_contents.append(b"x")
    response.parameters["n"].int64_param = 3
    response.parameters["unset"].SetInParent()
    result = infer({}).parse(response.SerializeToString(), TIMING)
    assert result["A"].tolist() == [1, -1]
    assert result["B"].tolist() == [b"x"]
    assert result.parameters == {"n": 3, "unset": ""}


@pytest.mark.parametrize(
    ("datatype", "shape", "raws", "reason"),
    [
        ("FP32", [2], [b"1234"], "output 'Y': .*8 bytes, got 4"),
        ("FP32", [-1], [b""], "output 'Y': .*negative"),
        ("FP33", [1], [b"1234"], "unknown datatype 'FP33'"),
        ("FP32", [1], [], "no data for output 'Y'"),
        ("BYTES", [1], [b"\5\0\0\0ab"], "output 'Y': .*5 bytes, only 2"),
        ("FP32", [2**40, 2**40], [b"1234"], "output 'Y'"),
    ],
)
def test_an_answer_that_breaks_the_protocol_is_an_error(
    datatype: str, shape: list[int], raws: list[bytes], reason: str
) -> None:
    response = pb.ModelInferResponse(model_name="m", raw_output_contents=raws)
    response.outputs.add(name="Y", datatype=datatype, shape=shape)
    with pytest.raises(InvalidResponse, match=reason):
        infer({}).parse(response.SerializeToString(), TIMING)


@given(st.binary(max_size=100))
def test_any_bytes_as_an_answer_are_a_result_or_an_invalid_response(answer: bytes) -> None:
    try:
        result = infer({}).parse(answer, TIMING)
    except InvalidResponse:
        return
    assert isinstance(result, Result)
