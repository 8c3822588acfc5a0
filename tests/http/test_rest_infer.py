"""Inference over REST: JSON and binary tensors both ways, and what bodies that are wrong get."""

from __future__ import annotations

import json
import math
import struct
from typing import Any

import numpy as np
import pytest

from support import models
from support.rest import post_infer, split_answer
from support.server import running, server_settings

pytestmark = pytest.mark.usefixtures("no_errors_logged")

NUMBERS = ["BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP32", "FP64"]


@pytest.fixture(scope="module")
def server(transport, tmp_path_factory):
    repository = tmp_path_factory.mktemp("models")
    for datatype in (*NUMBERS, "FP16", "BF16", "BYTES"):
        opset = 17 if datatype != "BF16" else 16
        models.write_model(repository, datatype.lower(), models.identity(datatype, opset=opset), max_batch_size=8)
    models.write_model(repository, "sums", models.sum_and_difference(), max_batch_size=8)
    models.write_model(repository, "word", models.identity("BYTES", ("N", 1)), max_batch_size=8)
    models.write_model(repository, "open", models.identity(dims=("N", "W")), max_batch_size=8)
    models.write_model(repository, "wide", models.identity(dims=("N", "W", "H")), max_batch_size=8)
    models.write_model(repository, "picky", models.gather(), max_batch_size=8)
    models.write_model(repository, "unbatched", models.identity(dims=("A",)))
    with running(server_settings(repository), transport) as server:
        yield server


def x(data: Any = None, *, shape=(1, 4), datatype="FP32", name="X", **parameters: Any) -> dict[str, Any]:
    """An input; without data it has parameters only."""
    tensor = {"name": name, "shape": list(shape), "datatype": datatype}
    if data is not None:
        tensor["data"] = data
    return tensor | ({"parameters": parameters} if parameters else {})


VALUES = {
    "BOOL": [True, False, True, True],
    "UINT64": [0, 1, 2**63, 2**64 - 1],
    "INT64": [-(2**63), -1, 0, 2**63 - 1],
    "INT8": [-128, 0, 1, 127],
    "FP32": [0.5, -1.5, 0, 3],
    "FP64": [0.1, -1e300, 5e-324, 7],
    "BYTES": ["", "a", "\u00e9\u4e16\x00", "\U0001f600"],
}


@pytest.mark.parametrize("datatype", [*NUMBERS, "BYTES"])
@pytest.mark.parametrize("nested", [False, True])
def test_json_data_comes_back_as_it_went_flat(datatype, nested, server):
    values = VALUES.get(datatype, [0, 1, 2, 3])
    answer = post_infer(server, datatype.lower(), {"inputs": [x([values] if nested else values, datatype=datatype)]})
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    (output,) = answer.json()["outputs"]
    assert output == {"name": "Y", "datatype": datatype, "shape": [1, 4], "data": values}
    assert answer.json()["model_name"] == datatype.lower()
    assert answer.json()["model_version"] == "1"


def test_bare_words_of_numbers_are_read_and_written(server):
    body = b'{"inputs":[{"name":"X","shape":[1,4],"datatype":"FP32","data":[NaN,Infinity,-Infinity,-0.0]}]}'
    answer = post_infer(server, "fp32", body)
    assert b"[NaN, Infinity, -Infinity, -0.0]" in answer.body
    first, *others = json.loads(answer.body)["outputs"][0]["data"]
    assert math.isnan(first)
    assert others[:2] == [math.inf, -math.inf]
    assert math.copysign(1, others[2]) == -1


@pytest.mark.parametrize("datatype", [*NUMBERS, "FP16", "BF16"])
def test_binary_data_passes_bit_for_bit(datatype, server):
    itemsize = {"BOOL": 1, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}.get(datatype) or int(
        datatype[-2:].strip("NT")
    ) // 8
    data = bytes(index % 2 for index in range(2 * 4 * itemsize))
    head = {
        "id": "me",
        "inputs": [x(shape=(2, 4), datatype=datatype, binary_data_size=len(data))],
        "outputs": [{"name": "Y", "parameters": {"binary_data": True}}],
    }
    for _ in range(3):  # from the second on its head is known
        answer = post_infer(server, datatype.lower(), head, data)
        assert answer.status == 200
        assert answer.headers["content-type"] == "application/octet-stream"
        told, tensors = split_answer(answer)
        assert tensors == {"Y": data}
        assert told["id"] == "me"
        assert told["outputs"] == [
            {"name": "Y", "datatype": datatype, "shape": [2, 4], "parameters": {"binary_data_size": len(data)}}
        ]


def test_large_binary_tensors_pass(server):
    data = np.random.default_rng(1).standard_normal((8, 50_000)).astype(np.float32).tobytes()
    head = {"inputs": [x(shape=(8, 50_000), binary_data_size=len(data))], "parameters": {"binary_data_output": True}}
    assert split_answer(post_infer(server, "open", head, data))[1] == {"Y": data}


def test_json_and_binary_mix_in_the_order_of_the_inputs(server):
    values = np.arange(16, dtype=np.int32)
    head = {
        "inputs": [
            x(values.tolist(), shape=(1, 16), datatype="INT32", name="INPUT1"),
            x(shape=(1, 16), datatype="INT32", name="INPUT0", binary_data_size=64),
        ],
        "outputs": [{"name": "OUTPUT1"}, {"name": "OUTPUT0", "parameters": {"binary_data": True}}],
    }
    told, tensors = split_answer(post_infer(server, "sums", head, (values * 3).tobytes()))
    assert [output["name"] for output in told["outputs"]] == ["OUTPUT1", "OUTPUT0"]
    assert told["outputs"][0]["data"] == (values * 2).tolist()
    assert tensors == {"OUTPUT0": (values * 4).tobytes()}


def test_outputs_that_are_listed_are_json_unless_they_say_otherwise(server):
    head = {"inputs": [x([1, 2, 3, 4])], "parameters": {"binary_data_output": True}}
    assert split_answer(post_infer(server, "fp32", head))[1] == {"Y": struct.pack("<4f", 1, 2, 3, 4)}
    listed = post_infer(server, "fp32", head | {"outputs": [{"name": "Y"}]})
    assert listed.json()["outputs"][0]["data"] == [1.0, 2.0, 3.0, 4.0]


def test_a_raw_request_is_the_data_of_the_only_input(server):
    data = struct.pack("<6f", *range(6))
    for model, shape in (("open", [1, 6]), ("unbatched", [6])):
        answer = post_infer(server, model, data, head_length=0)
        told, tensors = split_answer(answer)
        assert (told["outputs"][0]["shape"], tensors) == (shape, {"Y": data})
    assert split_answer(post_infer(server, "word", b"a b", head_length=0))[1] == {"Y": b"\x03\0\0\0a b"}


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("sums", "Raw request must only have 1 input (found 1) to be deduced but got 2 inputs in 'sums'"),
        ("wide", "more than one variable-sized dimension"),
        ("bytes", "the model must have input shape [1]"),
        ("fp32", "byte size mismatch"),
    ],
)
def test_a_raw_request_whose_shape_does_not_follow_is_refused(model, text, server):
    answer = post_infer(server, model, b"\0" * 12, head_length=0)
    assert answer.status == 400
    assert text in answer.json()["error"]


BAD = {
    "broken": (b'{"inputs":[', None, 500, "failed to parse the request JSON buffer"),
    "not UTF-8": (b'{"id":"\xff"}', None, 500, "failed to parse"),
    "half a surrogate": (b'{"id":"\\ud800","a":NaN}', None, 500, "failed to parse"),
    "no object": (b"[]", None, 500, "failed to parse"),
    "deep": (b"[" * 100_000, None, 500, "failed to parse"),
    "deep with NaN": (b"[" * 100_000 + b"NaN", None, 500, "failed to parse"),
    "empty": (b"", None, 500, "Unable to parse 'inputs'"),
    "no inputs": ({}, None, 500, "attempt to access non-existing object member 'inputs'"),
    "inputs no list": ({"inputs": {}}, None, 500, "Unable to parse 'inputs'"),
    "inputs of numbers": ({"inputs": [1]}, None, 500, "Unable to parse 'inputs'"),
    "no name": ({"inputs": [{"shape": [1, 4]}]}, None, 500, "non-existing object member 'name'"),
    "id no string": ({"id": 7, "inputs": []}, None, 500, "Unable to parse 'id'"),
    "no source": ({"inputs": [x()]}, None, 400, "But no field is set"),
    "two sources": (
        {"inputs": [x([1, 2, 3, 4], binary_data_size=16)]},
        b"\0" * 16,
        400,
        "But set 'data' 'binary_data_size'",
    ),
    "scalar data": ({"inputs": [x(1)]}, None, 500, "Unable to parse 'data': attempt to access JSON non-"),
    "text for numbers": ({"inputs": [x(["a"] * 4)]}, None, 500, "Unable to parse 'data': attempt to access JSON non-"),
    "mixed nesting": ({"inputs": [x([[1, 2, 3], 4])]}, None, 500, "Unable to parse 'data'"),
    "too few": ({"inputs": [x([1, 2, 3])]}, None, 400, "Shape does not match true shape of 'data' field"),
    "negative dim": ({"inputs": [x([], shape=(1, -1))]}, None, 500, "Unable to parse 'shape'"),
    "fraction dim": ({"inputs": [x([], shape=(1, 1.5))]}, None, 500, "Unable to parse 'shape'"),
    "many dims": ({"inputs": [x([1], shape=(1,) * 100)]}, None, 400, "shape"),
    "huge dims": ({"inputs": [x([1], shape=(2**62, 2**62))]}, None, 400, "Shape does not match"),
    "unknown datatype": ({"inputs": [x([1], datatype="FP33")]}, None, 400, "invalid datatype for input X"),
    "FP16 in JSON": ({"inputs": [x([1], datatype="FP16")]}, None, 400, "receiving FP16 data via JSON is not supported"),
    "object parameter": ({"inputs": [], "parameters": {"z": {}}}, None, 400, "parameter 'z' has invalid type"),
    "reserved parameter": (
        {"inputs": [], "parameters": {"triton_enable_empty_final_response": True}},
        None,
        400,
        "parameter keys starting with 'triton_' are reserved",
    ),
    "too little": ({"inputs": [x(binary_data_size=16)]}, b"\0" * 12, 400, "expecting 4 additional bytes for model"),
    "too much": ({"inputs": [x(binary_data_size=16)]}, b"\0" * 20, 400, "unexpected additional input data"),
    "negative size": ({"inputs": [x(binary_data_size=-1)]}, None, 500, "binary_data_size"),
    "twice": ({"inputs": [x([1, 2, 3, 4])] * 2}, None, 400, "input 'X' already exists in request"),
    "unknown input": ({"inputs": [x([1, 2, 3, 4], name="Z")]}, None, 400, "unexpected inference input 'Z'"),
    "unknown output": (
        {"inputs": [x([1, 2, 3, 4])], "outputs": [{"name": "Z"}]},
        None,
        400,
        "unexpected inference output 'Z'",
    ),
    "wrong datatype": ({"inputs": [x([1, 2, 3, 4], datatype="INT32")]}, None, 400, "data-type is 'INT32'"),
    "wrong shape": ({"inputs": [x([1, 2], shape=(1, 2))]}, None, 400, "unexpected shape for input 'X'"),
    "large batch": ({"inputs": [x([0] * 36, shape=(9, 4))]}, None, 400, "batch-size must be <= 8"),
    "wrong size": ({"inputs": [x(binary_data_size=12)]}, b"\0" * 12, 400, "byte size mismatch"),
    "wrong priority": (
        {"inputs": [x([1, 2, 3, 4])], "parameters": {"priority": "high"}},
        None,
        400,
        "invalid value type for 'priority' parameter",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_request_gets_its_code_and_facts_and_harms_nobody(name, server):
    head, tail, status, text = BAD[name]
    for _ in range(2):
        answer = post_infer(server, "fp32", head, tail)
        assert (answer.status, text in answer.json()["error"]) == (status, True), answer.json()
    assert post_infer(server, "fp32", {"inputs": [x([1, 2, 3, 4])]}).status == 200


@pytest.mark.parametrize(
    ("datatype", "values"),
    [("INT8", [300, 0, 0, 0]), ("UINT8", [-1, 0, 0, 0]), ("INT64", [2**64, 0, 0, 0]), ("INT32", [1.0, 0, 0, 0]),
     ("INT32", [True, 0, 0, 0]), ("BOOL", [1, 0, 0, 0]), ("BYTES", [1, 0, 0, 0]), ("UINT64", [2**65, 0, 0, 0])],
)  # fmt: skip
def test_an_element_that_the_datatype_cannot_hold_is_refused(datatype, values, server):
    answer = post_infer(server, datatype.lower(), {"inputs": [x(values, datatype=datatype)]})
    assert answer.status == 500
    assert "Unable to parse 'data'" in answer.json()["error"]


def test_what_fp32_cannot_hold_is_infinite(server):
    answer = post_infer(server, "fp32", {"inputs": [x([1e300, -1e300, 0, 10**30])]})
    assert json.loads(answer.body)["outputs"][0]["data"][:2] == [math.inf, -math.inf]


def test_what_json_cannot_carry_is_to_be_asked_for_in_binary_form(server):
    half = {"inputs": [x(shape=(1, 4), datatype="FP16", binary_data_size=8)]}
    answer = post_infer(server, "fp16", half, b"\0" * 8)
    assert answer.status == 400
    assert "sending FP16 data via JSON is not supported" in answer.json()["error"]
    word = {"inputs": [x(shape=(1, 1), datatype="BYTES", binary_data_size=5)]}
    answer = post_infer(server, "word", word, b"\x01\0\0\0\xff")
    assert answer.status == 400
    assert "not UTF-8" in answer.json()["error"]


@pytest.mark.parametrize("value", ["-1", "abc", "99999", "1e2", "9" * 5000, "\u0661"])
def test_a_bad_length_of_the_head_is_refused(value, server):
    answer = post_infer(server, "fp32", b"{}", head_length=value)
    assert answer.status == 400
    assert "inference header size should be in range (0, 2), got: " in answer.json()["error"]


def test_models_and_versions_that_are_not_there_come_before_the_body(server):
    for path, text in (("nope", "'nope' is not found"), ("fp32/versions/7", "version 7 is not found")):
        answer = post_infer(server, path, b"{broken")
        assert answer.status == 404
        assert text in answer.json()["error"]
    assert post_infer(server, "fp32/versions/1", {"inputs": [x([1, 2, 3, 4])]}).status == 200
    assert post_infer(server, "fp32/versions/x", {"inputs": [x([1, 2, 3, 4])]}).json() == {"error": "Not Found"}


def test_a_failing_model_is_500_with_its_text(server):
    bad = {"inputs": [x([77], shape=(1, 1), datatype="INT64", name="INDEX")]}
    answer = post_infer(server, "picky", bad)
    assert answer.status == 500
    assert "onnx runtime error" in answer.json()["error"]
