"""The table of bad inference requests: what is wrong with each, the code and the facts of its refusal.

The cases are in the order of the checks. Each begins with a valid request and spoils it. They are messages of gRPC;
another front may translate them, all but those that are `grpc_only`, whose mistake it cannot make.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sluice_proto.grpc_service_pb2 import InferParameter, ModelInferRequest
from sluice_server.status import Code
from support import models
from support.requests import infer_request, parameter

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

INVALID = Code.INVALID_ARGUMENT
NOT_FOUND = Code.NOT_FOUND
UNIMPLEMENTED = Code.UNIMPLEMENTED
INTERNAL = Code.INTERNAL

NO_PATH = (404, ("Not Found",))
"""What REST answers where the path names no model, or a version that is no number."""
NO_DATA = (400, ("must set only one of", "'data'", "'binary_data_size'", "But no field is set"))
NO_SHAPE = (500, ("Unable to parse 'shape'",))
NO_DATATYPE = (400, ("invalid datatype for input INPUT0",))

ID = "r7"
PREFIX = f"[request id: {ID}] "


@dataclass(frozen=True)
class Case:
    name: str
    request: Callable[[], ModelInferRequest]
    facts: tuple[str, ...]
    code: Code = INVALID
    from_core: bool = False
    """Whether the message begins with the request's id, as those of Triton's core do."""
    grpc_only: bool = False
    """Whether only gRPC's messages can be wrong in this way: typed contents, kinds of parameters."""
    rest: tuple[int, tuple[str, ...]] | None = None
    """The status and the facts over REST where they are not those of the code: REST has checks of its own."""


def write_models(repository: Path) -> None:
    """Add the models that the requests name."""
    models.write_model(repository, "simple", models.sum_and_difference(), max_batch_size=8)
    models.write_model(repository, "flat", models.sum_and_difference((16,)))
    models.write_model(repository, "text", models.identity("BYTES", ("N", 2)), max_batch_size=8)
    models.write_model(repository, "half", models.identity("FP16", ("N", 2)), max_batch_size=8)
    models.write_model(repository, "any", models.identity("FP32", ("A", "B")))
    models.write_model(repository, "bias", models.add_bias())
    models.write_model(repository, "picky", models.gather(), max_batch_size=8)


def simple(model: str = "simple", *, typed: bool = False, rows: int = 1) -> ModelInferRequest:
    shape = (16,) if model == "flat" else (rows, 16)
    ones = np.ones(shape, np.int32)
    return infer_request(model, {"INPUT0": ones, "INPUT1": ones}, request_id=ID, typed=typed)


def of_any(shape: tuple[int, ...], data: bytes = b"\0" * 16) -> Callable[[], ModelInferRequest]:
    """A request to a model that takes every shape of two dimensions."""

    def make() -> ModelInferRequest:
        request = ModelInferRequest(model_name="any", id=ID, raw_input_contents=[data])
        request.inputs.add(name="X", datatype="FP32", shape=shape)
        return request

    return make


def spoiled(spoil: Callable[[ModelInferRequest], object], **how: object) -> Callable[[], ModelInferRequest]:
    def make() -> ModelInferRequest:
        request = simple(**how)
        spoil(request)
        return request

    return make


def with_parameter(key: str, value: InferParameter) -> Callable[[], ModelInferRequest]:
    return spoiled(lambda request: request.parameters[key].CopyFrom(value))


def text(*data: bytes) -> Callable[[], ModelInferRequest]:
    """A request for one row of two BYTES elements with this raw data."""

    def make() -> ModelInferRequest:
        request = ModelInferRequest(model_name="text", id=ID, raw_input_contents=[b"".join(data)])
        request.inputs.add(name="X", datatype="BYTES", shape=[1, 2])
        return request

    return make


def element(data: bytes) -> bytes:
    return struct.pack("<I", len(data)) + data


def set_shape(*shape: int) -> Callable[[ModelInferRequest], None]:
    def spoil(request: ModelInferRequest) -> None:
        for tensor in request.inputs:
            tensor.shape[:] = shape

    return spoil


def set_first(field: str, value: object) -> Callable[[ModelInferRequest], None]:
    return lambda request: setattr(request.inputs[0], field, value)


def ask(*names: str, model: str = "simple", **parameters: object) -> Callable[[], ModelInferRequest]:
    """A request for these outputs, each with these parameters."""

    def make() -> ModelInferRequest:
        if model in ("text", "half"):
            row = np.array([[b"a", b"b"]], object) if model == "text" else np.ones((1, 2), np.float16)
            request = infer_request(model, {"X": row}, request_id=ID)
        else:
            request = simple(model)
        for name in names:
            output = request.outputs.add(name=name)
            for key, value in parameters.items():
                given = value if isinstance(value, InferParameter) else parameter(value)
                output.parameters[key].CopyFrom(given)
        return request

    return make


def bias(*names: str) -> Callable[[], ModelInferRequest]:
    return lambda: infer_request("bias", {name: np.ones(2, np.float32) for name in names}, request_id=ID)


def name_requests() -> list[Case]:
    def version(text: str) -> Callable[[], ModelInferRequest]:
        return spoiled(lambda request: setattr(request, "model_version", text))

    return [
        Case(
            "an unknown model",
            spoiled(lambda r: setattr(r, "model_name", "nope")),
            ("Request for unknown model", "'nope' is not found"),
            NOT_FOUND,
        ),
        Case(
            "no model's name",
            ModelInferRequest,
            ("Request for unknown model", "'' is not found"),
            NOT_FOUND,
            rest=NO_PATH,
        ),
        Case("a version that is not served", version("9"), ("'simple'", "version 9 is not found"), NOT_FOUND),
        Case("version 0", version("0"), ("'simple'", "is not found"), NOT_FOUND),
        *(
            Case(f"a version that is {what}", version(text), ("version", f"'{text}'", fact), rest=NO_PATH)
            for what, text, fact in [
                ("no number", "abc", "should be an integral value > 0"),
                ("a fraction", "1.0", "should be an integral value > 0"),
                ("blank in part", " 1", "should be an integral value > 0"),
                ("in other digits", "\uff11", "should be an integral value > 0"),
                ("negative", "-1", "> 0"),
            ]
        ),
        Case("a version beyond 64 bits", version("9" * 20), ("version", "should be an integral value > 0")),
        Case("a version of 5000 digits", version("9" * 5000), ("version", "should be an integral value > 0")),
    ]


def parameter_requests() -> list[Case]:
    wrong_kinds: list[tuple[str, InferParameter, str]] = [
        ("sequence_id", parameter(True), "int64_param or string_param"),
        ("sequence_start", parameter(1), "bool_param"),
        ("sequence_end", parameter("true"), "bool_param"),
        ("priority", parameter("1"), "int64_param or uint64_param"),
        ("timeout", parameter("1000"), "int64_param"),
        ("timeout", InferParameter(uint64_param=1000), "int64_param"),
        ("timeout", InferParameter(), "int64_param"),
        ("triton_enable_empty_final_response", parameter(1), "bool_param"),
    ]
    return [
        *(
            Case(
                f"{key} as {value.WhichOneof('parameter_choice')}",
                with_parameter(key, value),
                (f"invalid value type for '{key}' parameter", f"expected {expected}"),
                grpc_only=True,
            )
            for key, value, expected in wrong_kinds
        ),
        Case(
            "a parameter without a value",
            with_parameter("mine", InferParameter()),
            ("invalid value type for 'mine' parameter", "int64_param, bool_param, string_param"),
            grpc_only=True,
        ),
        Case(
            "a sequence_id of too much text",
            with_parameter("sequence_id", parameter("s" * 129)),
            ("sequence_id", "longer than 128 characters"),
            UNIMPLEMENTED,
        ),
        Case("a negative priority", with_parameter("priority", parameter(-1)), ("'priority'", "value >= 0")),
        Case("a negative timeout", with_parameter("timeout", parameter(-1)), ("'timeout'", ">= 0", "-1")),
        Case(
            "a reserved parameter that nobody knows",
            with_parameter("triton_magic", parameter(True)),
            ("triton_magic", "starting with 'triton_' are reserved", "triton_enable_empty_final_response"),
            rest=(400, ("starting with 'triton_' are reserved", "should not be specified", "triton_magic")),
        ),
    ]


def data_requests() -> list[Case]:
    def add_contents(request: ModelInferRequest) -> None:
        request.inputs[0].contents.int_contents.append(1)

    def fill(field: str, values: list[object]) -> Callable[[ModelInferRequest], None]:
        def spoil(request: ModelInferRequest) -> None:
            request.inputs[0].contents.Clear()  # leaves it present and empty
            getattr(request.inputs[0].contents, field).extend(values)

        return spoil

    def half() -> ModelInferRequest:
        request = ModelInferRequest(model_name="half", id=ID)
        tensor = request.inputs.add(name="X", datatype="FP16", shape=[1, 2])
        tensor.contents.fp32_contents.extend([1, 2])
        return request

    where = ("'INPUT0'", "'simple'")
    return [
        Case("an input twice",
             spoiled(lambda r: (r.inputs.append(r.inputs[1]), r.raw_input_contents.append(b"\0" * 64))),
             ("input 'INPUT1' already exists in request",), from_core=True),
        Case("contents beside raw data", spoiled(add_contents),
             ("contents field must not be specified when using raw_input_contents", *where), grpc_only=True),
        Case("no data at all", spoiled(lambda r: r.ClearField("raw_input_contents")),
             ("unable to find data for input tensor", *where), rest=NO_DATA),
        Case("too few raw tensors", spoiled(lambda r: r.raw_input_contents.pop()),
             ("unable to find data for input tensor", "'INPUT1'", "'simple'"), rest=NO_DATA),
        Case("contents of another type", spoiled(fill("int64_contents", [1] * 16), typed=True),
             ("unexpected explicit tensor data", *where, "of type 'INT64'", "expected datatype 'INT32'"),
             grpc_only=True),
        Case("contents of an unknown type", spoiled(set_first("datatype", "INT31"), typed=True),
             ("unexpected explicit tensor data", *where, "of type 'INT32'", "INT31"), grpc_only=True),
        Case("two kinds of contents", spoiled(lambda r: r.inputs[0].contents.fp32_contents.append(1), typed=True),
             ("unexpected explicit tensor data", *where, "fp32_contents", "int_contents"), grpc_only=True),
        Case("contents for a type that has none", half,
             ("unexpected explicit tensor data", "'X'", "'half'", "of type 'FP32'", "FP16", "raw_input_contents"),
             grpc_only=True),
        Case("too little contents", spoiled(lambda r: r.inputs[0].contents.int_contents.pop(), typed=True),
             ("byte size mismatch", *where, "64", "60"), from_core=True, grpc_only=True),
        Case("too much contents", spoiled(lambda r: r.inputs[0].contents.int_contents.append(1), typed=True),
             ("byte size mismatch", *where, "64", "68"), from_core=True, grpc_only=True),
        Case("contents without a value", spoiled(fill("int_contents", []), typed=True),
             ("byte size mismatch", *where, "64", "0"), from_core=True, grpc_only=True),
    ]  # fmt: skip


def output_requests() -> list[Case]:
    def both(request: ModelInferRequest) -> None:
        request.inputs[0].parameters["shared_memory_region"].CopyFrom(parameter("s"))

    wrong_count = "invalid value for 'classification' parameter"
    wrong_kind = ("invalid value type for 'classification' parameter", "expected int64_param")
    return [
        Case("an output twice", ask("OUTPUT0", "OUTPUT0"), ("output 'OUTPUT0' already exists",), from_core=True),
        Case("an unknown output", ask("OUTPUT1", "NOPE"), ("unexpected inference output", "'NOPE'", "'simple'")),
        Case("no output's name", ask(""), ("unexpected inference output", "''", "'simple'")),
        Case("no classes", ask("OUTPUT0", classification=0), (wrong_count, ">= 1", "0"), grpc_only=True),
        Case("less than no classes", ask("OUTPUT0", classification=-(2**63)), (wrong_count, str(-(2**63)))),
        *(
            Case(f"classes as {value.WhichOneof('parameter_choice')}", ask("OUTPUT0", classification=value), wrong_kind,
                 grpc_only=True)
            for value in (parameter("3"), parameter(True), parameter(3.0), InferParameter(uint64_param=3),
                          InferParameter())
        ),
        Case("classes of an unknown output", ask("NOPE", classification=3),
             ("unexpected inference output", "'NOPE'", "'simple'")),
        *(
            Case(f"classes of {datatype}", ask("Y", model=model, classification=3),
                 ("class result not available", "'Y'", f"unsupported type '{datatype}'"))
            for model, datatype in (("text", "BYTES"), ("half", "FP16"))
        ),
        Case("an input in shared memory, which is off",
             spoiled(lambda r: r.inputs[0].parameters["shared_memory_region"].CopyFrom(parameter("s"))),
             ("shared memory", "'INPUT0'", "--allow-client-shm"), UNIMPLEMENTED),
        Case("an output in shared memory, which is off", ask("OUTPUT0", shared_memory_region="region"),
             ("shared memory", "'OUTPUT0'", "--allow-client-shm"), UNIMPLEMENTED),
        Case("shared memory and contents", spoiled(both, typed=True),
             ("unexpected 'content' provided when using shared memory", "'INPUT0'", "'simple'"), grpc_only=True),
    ]  # fmt: skip


def input_requests() -> list[Case]:
    def third(request: ModelInferRequest) -> None:
        request.inputs.add(name="INPUT2", datatype="INT32", shape=[1, 16])
        request.raw_input_contents.append(b"\0" * 64)

    return [
        Case("too few inputs", spoiled(lambda r: r.inputs.pop()),
             ("expected 2 inputs but got 1 inputs for model 'simple'", "['INPUT0']", "['INPUT1']"), from_core=True),
        Case("no inputs", spoiled(lambda r: r.ClearField("inputs")),
             ("expected 2 inputs but got 0", "['INPUT0', 'INPUT1']"), from_core=True),
        Case("too many inputs", spoiled(third),
             ("expected 2 inputs but got 3 inputs for model 'simple'", "INPUT2"), from_core=True),
        Case("an unknown input", spoiled(set_first("name", "NOPE")),
             ("unexpected inference input", "'NOPE'", "'simple'")),
        Case("an input without a name", spoiled(set_first("name", "")),
             ("unexpected inference input", "''", "'simple'")),
        Case("only the optional input", bias("B"),
             ("expected number of inputs between 1 and 2 but got 1", "'bias'", "['B']", "['X']"), from_core=True),
        Case("no input where one is optional", bias(),
             ("expected number of inputs between 1 and 2 but got 0 inputs for model 'bias'", "[]", "['X']"),
             from_core=True),
    ]  # fmt: skip


def shape_requests() -> list[Case]:
    def shape_of_first(*shape: int, **how: object) -> Callable[[], ModelInferRequest]:
        return spoiled(lambda r: r.inputs[0].shape.__setitem__(slice(None), shape), **how)

    return [
        Case("no batch dimension", spoiled(set_shape()),
             ("input 'INPUT0' has no shape but model requires batch dimension for 'simple'",), from_core=True),
        Case("unequal batches", shape_of_first(2, 16), ("batch size does not match other inputs for 'simple'",),
             from_core=True),
        Case("a batch above the limit", lambda: simple(rows=9),
             ("inference request batch-size must be <= 8 for 'simple'", "9"), from_core=True),
        Case("a tensor without the batch dimension", spoiled(set_shape(16)),
             ("batch-size must be <= 8 for 'simple'", "16"), from_core=True),
        Case("a batch of none",
             spoiled(lambda r: (set_shape(0, 16)(r), r.raw_input_contents.__setitem__(slice(None), [b"", b""]))),
             ("batch-size must be >= 1 for 'simple'", "byte size mismatch", "got 0"), from_core=True),
        Case("a batch of none with data", spoiled(set_shape(0, 16)),
             ("byte size mismatch", "'INPUT0'", "'simple'", "64"), from_core=True),
        Case("a negative batch", spoiled(set_shape(-1, 16)),
             ("dimensions should be specified for input 'INPUT0' for model 'simple'", "[-1,16]"), from_core=True,
             rest=NO_SHAPE),
        Case("another data type", spoiled(set_first("datatype", "FP32")),
             ("'INPUT0' data-type is 'FP32', but model 'simple' expects 'INT32'",), from_core=True),
        Case("an unknown data type", spoiled(set_first("datatype", "INT31")),
             ("'INPUT0' data-type is", "but model 'simple' expects 'INT32'"), from_core=True, rest=NO_DATATYPE),
        Case("no data type", spoiled(set_first("datatype", "")),
             ("'INPUT0' data-type is", "but model 'simple' expects 'INT32'"), from_core=True, rest=NO_DATATYPE),
        Case("a negative dimension", spoiled(set_shape(1, -1)),
             ("dimensions should be specified for input 'INPUT0' for model 'simple'", "[1,-1]"), from_core=True,
             rest=NO_SHAPE),
        Case("another dimension", shape_of_first(1, 8),
             ("unexpected shape for input 'INPUT0' for model 'simple'", "[-1,16]", "[1,8]", "max_batch_size"),
             from_core=True),
        Case("a dimension too many", shape_of_first(1, 16, 1),
             ("unexpected shape for input 'INPUT0' for model 'simple'", "[-1,16]", "[1,16,1]"), from_core=True),
        Case("another shape without batches", shape_of_first(8, model="flat"),
             ("unexpected shape for input 'INPUT0' for model 'flat'", "Expected [16], got [8]"), from_core=True),
        Case("a scalar for a vector", shape_of_first(model="flat"),
             ("unexpected shape for input 'INPUT0' for model 'flat'", "Expected [16], got []"), from_core=True),
        Case("a thousand dimensions", shape_of_first(*[1] * 1000),
             ("unexpected shape for input 'INPUT0' for model 'simple'", "Expected [-1,16]"), from_core=True),
    ]  # fmt: skip


def size_requests() -> list[Case]:
    def raw(data: bytes) -> Callable[[], ModelInferRequest]:
        return spoiled(lambda r: r.raw_input_contents.__setitem__(0, data))

    where = ("input 'INPUT0'", "'simple'")
    huge = 2**62
    return [
        Case("too few bytes", raw(b"\0" * 60), ("byte size mismatch", *where, "64", "60"), from_core=True),
        Case("a byte too many", raw(b"\0" * 65), ("byte size mismatch", *where, "64", "65"), from_core=True),
        Case("no bytes", raw(b""), ("byte size mismatch", *where, "64", "0"), from_core=True),
        Case("a size beyond 64 bits", of_any((huge, huge)),
             ("byte size mismatch", "'X'", "'any'", str(huge * huge * 4), "16"), from_core=True),
        Case("a size that is 16 modulo 64 bits", of_any((2**62, 4)),
             ("byte size mismatch", "'X'", "'any'", str(2**66), "16"), from_core=True),
        Case("a size that is 0 modulo 64 bits", of_any((2**32, 2**32), b""),
             ("byte size mismatch", "'X'", "'any'", str(2**66), "0"), from_core=True),
        Case("a terabyte", of_any((2**20, 2**20)), ("byte size mismatch", "'X'", "'any'", str(2**42)), from_core=True),
        Case("nothing of an impossible size", of_any((0, 2**63 - 1), b""), ("'X'", "'any'", "shape"), from_core=True),
        Case("nothing, a terabyte wide", of_any((2**40, 0), b""),
             ("'X'", "'any'", "no elements", f"[{2**40},0]", "65536"), from_core=True),
        Case("the largest negative", of_any((-(2**63), -(2**63))), ("[-92233", "'X'", "'any'"), from_core=True,
             rest=NO_SHAPE),
        Case("two negatives that make a positive", of_any((-2, -2)), ("[-2,-2]", "'X'", "'any'"), from_core=True,
             rest=NO_SHAPE),
        Case("a text too few", text(element(b"one")),
             ("expected 2 string elements", "'X'", "'text'", "got 1"), from_core=True),
        Case("a text too many", text(element(b"one") * 3),
             ("unexpected number of string elements 3", "'X'", "'text'", "2"), from_core=True),
        Case("no text", text(), ("expected 2 string elements", "'X'", "'text'", "got 0"), from_core=True),
        Case("a text's length cut", text(element(b"one"), b"\1\0"),
             ("incomplete string length indicator", "'X'", "'text'", "4 bytes", "2 available"), from_core=True),
        Case("a text cut", text(element(b"one"), element(b"three")[:-3]),
             ("incomplete string data", "'X'", "length 5", "2 bytes available")),
        Case("a text of four gigabytes", text(element(b"one"), b"\xff\xff\xff\xff", b"no"),
             ("incomplete string data", "'X'", "length 4294967295", "2 bytes available")),
    ]  # fmt: skip


def run_requests() -> list[Case]:
    index = np.array([[99]], np.int64)
    not_utf8 = np.array([[b"fine", b"\xff\xfe"]], object)
    return [
        Case(
            "a value that fails the run",
            lambda: infer_request("picky", {"INDEX": index}, request_id=ID),
            ("onnx runtime error", "99"),
            INTERNAL,
        ),
        Case(
            "a text that is not UTF-8",
            lambda: infer_request("text", {"X": not_utf8}, request_id=ID),
            ("'X'", "element 1", "UTF-8"),
        ),
    ]


CASES = [
    *name_requests(), *parameter_requests(), *data_requests(), *output_requests(), *input_requests(),
    *shape_requests(), *size_requests(), *run_requests(),
]  # fmt: skip
