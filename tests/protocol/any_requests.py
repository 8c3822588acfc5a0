"""Inference requests as nobody would write them: valid ones with any number of mistakes, for Hypothesis; and the judge.

Whatever a request is, its outcome is an answer that is whole, or a refusal with one of the codes for requests.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from hypothesis import strategies as st

from protocol import bad_requests
from sluice_proto.grpc_service_pb2 import InferParameter, ModelInferRequest
from sluice_proto.tensors import BY_NAME, element_count, view
from support import models
from support.requests import infer_request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from sluice_proto.grpc_service_pb2 import ModelInferResponse

MISTAKES_MAX = 4
"""In one request: with more, all but the first are never reached."""

CODES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.DEADLINE_EXCEEDED,  # its own `timeout`, which may be a microsecond
    }
)  # what a refusal of a request may have

RESHAPED = """
max_batch_size: 4
dynamic_batching { }
input { name: "X" data_type: TYPE_FP32 dims: [ 6, -1 ] reshape { shape: [ 2, 3, -1 ] } }
output { name: "Y" data_type: TYPE_FP32 dims: [ -1 ] label_filename: "labels.txt" reshape { shape: [ 1, 1, -1 ] } }
"""


def write_models(repository: Path) -> None:
    """Add the models that the requests are for: those of the table of bad requests, and one with reshape and labels."""
    bad_requests.write_models(repository)
    reshaped = models.build(
        [models.helper.make_node("ReduceSum", ["X", "axes"], ["Y"])],
        [models.tensor("X", dims=("N", 2, 3, "W"))],
        [models.tensor("Y", dims=("N", 1, 1, "W"))],
        [models.numpy_helper.from_array(np.array([1, 2], np.int64), "axes")],
    )
    directory = models.write_configured(repository, "reshaped", reshaped, RESHAPED)
    (directory / "labels.txt").write_text("zero\none\n")


def _ints(*shape: int) -> np.ndarray:
    return np.ones(shape, np.int32)


VALID: dict[str, Callable[[], dict[str, np.ndarray]]] = {
    "simple": lambda: {"INPUT0": _ints(2, 16), "INPUT1": _ints(2, 16)},
    "flat": lambda: {"INPUT0": _ints(16), "INPUT1": _ints(16)},
    "text": lambda: {"X": np.array([[b"a", b"bc"]], object)},
    "half": lambda: {"X": np.ones((3, 2), np.float16)},
    "any": lambda: {"X": np.ones((2, 3), np.float32)},
    "bias": lambda: {"X": np.ones(2, np.float32), "B": np.ones(2, np.float32)},
    "picky": lambda: {"INDEX": np.ones((1, 1), np.int64)},
    "reshaped": lambda: {"X": np.ones((2, 6, 4), np.float32)},
}
"""A good request's tensors, by model."""

names = st.sampled_from(["X", "Y", "B", "INPUT0", "INPUT1", "OUTPUT0", "OUTPUT1", "INDEX", ""]) | st.text(max_size=2)
dimensions = st.sampled_from([0, 1, 2, 3, 4, 6, 8, 9, 16, -1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)])
datatypes = st.sampled_from([*BY_NAME, "", "INT31", "fp32"])
values = st.one_of(
    st.builds(InferParameter),
    st.builds(InferParameter, bool_param=st.booleans()),
    st.builds(InferParameter, int64_param=st.sampled_from([0, 1, 3, -1, 2**63 - 1, -(2**63), 1_000_000])),
    st.builds(InferParameter, uint64_param=st.sampled_from([0, 2**64 - 1])),
    st.builds(InferParameter, string_param=st.sampled_from(["", "s", "x" * 129])),
    st.builds(InferParameter, double_param=st.floats()),
)
keys = st.sampled_from([
    "sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "triton_enable_empty_final_response",
    "triton_x", "mine", "", "classification", "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset",
])  # fmt: skip
data = st.binary(max_size=70) | st.sampled_from([bytes(size) for size in (4, 8, 64, 128, 192)])
CONTENTS: dict[str, st.SearchStrategy[Any]] = {
    "bool_contents": st.booleans(),
    "int_contents": st.sampled_from([0, -(2**31), 2**31 - 1]),
    "int64_contents": st.sampled_from([0, 3, 99, -(2**63)]),
    "uint_contents": st.sampled_from([0, 2**32 - 1]),
    "uint64_contents": st.sampled_from([0, 2**64 - 1]),
    "fp32_contents": st.floats(width=32),
    "fp64_contents": st.floats(),
    "bytes_contents": st.binary(max_size=3),
}


@st.composite
def requests(draw: st.DrawFn) -> ModelInferRequest:
    """A good request for one of the models, with up to MISTAKES_MAX changes."""
    model = draw(st.sampled_from(list(VALID)))
    typed = draw(st.booleans()) and model != "half"
    request = infer_request(model, VALID[model](), request_id=draw(st.sampled_from(["", "7", "\u00e9"])), typed=typed)
    spoil(draw, request, VALID)
    return request


def spoil(draw: st.DrawFn, request: ModelInferRequest, model_names: Iterable[str]) -> None:
    """Make up to MISTAKES_MAX changes to a request; one of them may send it to another of the models."""
    changes = (functools.partial(_change_names, (*model_names, "")), *CHANGES)
    for _ in range(draw(st.integers(0, MISTAKES_MAX))):
        draw(st.sampled_from(changes))(draw, request)


def _change_names(model_names: Sequence[str], draw: st.DrawFn, request: ModelInferRequest) -> None:
    request.model_name = draw(st.sampled_from(model_names))
    request.model_version = draw(st.sampled_from(["", "1", "2", "-1", "x"]))


def _add_parameter(draw: st.DrawFn, request: ModelInferRequest) -> None:
    place = draw(st.sampled_from([request, *request.inputs, *request.outputs]))
    place.parameters[draw(keys)].CopyFrom(draw(values))


def _add_output(draw: st.DrawFn, request: ModelInferRequest) -> None:
    output = request.outputs.add(name=draw(names))
    if draw(st.booleans()):
        output.parameters["classification"].CopyFrom(draw(values))


def _change_shape(draw: st.DrawFn, request: ModelInferRequest) -> None:
    for tensor in request.inputs[: draw(st.integers(1, 2))]:
        tensor.shape[:] = draw(st.lists(dimensions, max_size=4) | st.permutations(tensor.shape))


def _change_batch(draw: st.DrawFn, request: ModelInferRequest) -> None:
    first = draw(dimensions)
    for tensor in request.inputs:
        tensor.shape[:1] = [first]


def _change_input(draw: st.DrawFn, request: ModelInferRequest) -> None:
    if request.inputs:
        tensor = draw(st.sampled_from(list(request.inputs)))
        if draw(st.booleans()):
            tensor.name = draw(names)
        else:
            tensor.datatype = draw(datatypes)


def _change_count(draw: st.DrawFn, request: ModelInferRequest) -> None:
    if request.inputs and draw(st.booleans()):
        request.inputs.pop()
    else:
        request.inputs.add(name=draw(names), datatype=draw(datatypes), shape=draw(st.lists(dimensions, max_size=3)))


def _change_raw(draw: st.DrawFn, request: ModelInferRequest) -> None:
    request.raw_input_contents[:] = [*request.raw_input_contents[:1], *draw(st.lists(data, max_size=2))]


def _replace_raw(draw: st.DrawFn, request: ModelInferRequest) -> None:
    request.raw_input_contents[:] = draw(st.lists(data, max_size=2))


def _fill_contents(draw: st.DrawFn, request: ModelInferRequest) -> None:
    if request.inputs:
        field = draw(st.sampled_from(list(CONTENTS)))
        contents = draw(st.sampled_from(list(request.inputs))).contents
        getattr(contents, field).extend(draw(st.lists(CONTENTS[field], max_size=17)))


CHANGES = (
    _add_parameter, _add_output, _change_shape, _change_batch, _change_input, _change_count, _change_raw, _replace_raw,
    _fill_contents,
)  # fmt: skip


def check_refusal(code: grpc.StatusCode, message: str) -> None:
    """A refusal has a code for requests; or the model itself has failed, and that is told."""
    assert code in CODES or message.startswith("onnx runtime error"), f"{code.name}: {message}"
    assert message


def check_answer(request: ModelInferRequest, answer: ModelInferResponse) -> None:
    """An answer has the id and what was asked for, each tensor as many bytes as its shape says."""
    assert answer.id == request.id
    assert answer.model_name == request.model_name
    names = [output.name for output in answer.outputs]
    assert len(names) == len(answer.raw_output_contents)
    assert [output.name for output in request.outputs] in ([], names)
    for output, raw in zip(answer.outputs, answer.raw_output_contents, strict=True):
        array = view(BY_NAME[output.datatype], tuple(output.shape), raw)
        assert array.size == element_count(output.shape)
