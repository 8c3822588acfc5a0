"""Tiny ONNX models, made in memory, for the tests of execution."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

OPSET = 17
IR_VERSION = 8

Dims = Sequence[int | str | None] | None


def tensor(name: str, onnx_type: int = TensorProto.FLOAT, dims: Dims = ("N", 2)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx_type, dims)


def model(
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    nodes: Sequence[onnx.NodeProto],
    initializers: Sequence[onnx.TensorProto] = (),
    opset: int = OPSET,
    ir_version: int = IR_VERSION,
) -> bytes:
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializer=initializers)
    opsets = [helper.make_opsetid("", opset)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version).SerializeToString())


def identity(
    onnx_type: int = TensorProto.FLOAT,
    dims: Dims = ("N", 2),
    output_dims: Dims = (),
    opset: int = OPSET,
    ir_version: int = IR_VERSION,
) -> bytes:
    """X -> Y, unchanged; `output_dims` when Y is declared otherwise than X."""
    node = helper.make_node("Identity", ["X"], ["Y"])
    outputs = [tensor("Y", onnx_type, output_dims or dims)]
    return model([tensor("X", onnx_type, dims)], outputs, [node], opset=opset, ir_version=ir_version)


def add_bias() -> bytes:
    """Y = X + B, where B is an input with a default of [1, 2]."""
    bias = helper.make_tensor("B", TensorProto.FLOAT, [2], [1.0, 2.0])
    node = helper.make_node("Add", ["X", "B"], ["Y"])
    return model([tensor("X"), tensor("B", dims=[2])], [tensor("Y")], [node], [bias])


def gather() -> bytes:
    """Y = X[J]; an index out of bounds fails the run."""
    node = helper.make_node("Gather", ["X", "J"], ["Y"])
    return model([tensor("X"), tensor("J", TensorProto.INT64, ["M"])], [tensor("Y", dims=["M", 2])], [node])


def constant_text(value: bytes) -> bytes:
    """X -> Y unchanged, and S, the given bytes as a string tensor [1]."""
    constant = helper.make_tensor("c", TensorProto.STRING, [1], [value])
    nodes = [helper.make_node("Identity", ["X"], ["Y"]), helper.make_node("Constant", [], ["S"], value=constant)]
    return model([tensor("X")], [tensor("Y"), tensor("S", TensorProto.STRING, [1])], nodes)


def bfloat16_and_text() -> bytes:
    nodes = [helper.make_node("Identity", ["X"], ["Y"]), helper.make_node("Identity", ["T"], ["U"])]
    inputs = [tensor("X", TensorProto.BFLOAT16), tensor("T", TensorProto.STRING)]
    return model(inputs, [tensor("Y", TensorProto.BFLOAT16), tensor("U", TensorProto.STRING)], nodes)


def sequence_output() -> bytes:
    output = helper.make_tensor_sequence_value_info("Y", TensorProto.FLOAT, None)
    return model([tensor("X")], [output], [helper.make_node("SequenceConstruct", ["X"], ["Y"])])


def optional_output() -> bytes:
    kind = helper.make_optional_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, ["N", 2]))
    return model([tensor("X")], [helper.make_value_info("Y", kind)], [helper.make_node("Optional", ["X"], ["Y"])])


def save_with_external_data(path: Path) -> None:
    """Y = X + [1, 2] at `path`, its weights in the file `weights.bin` beside it."""
    weights = onnx.numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "B")
    node = helper.make_node("Add", ["X", "B"], ["Y"])
    proto = onnx.load_from_string(model([tensor("X")], [tensor("Y")], [node], [weights]))
    onnx.save_model(
        proto, path, save_as_external_data=True, all_tensors_to_one_file=True, location="weights.bin", size_threshold=0
    )
