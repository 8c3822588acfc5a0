"""Tiny ONNX models, built in memory, and model repositories made of them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8

ONNX_TYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
    "BF16": TensorProto.BFLOAT16,
}
"""The protocol's name of each data type, and ONNX's number for it."""

Dims = Sequence[int | str]
"""A shape: a name is an open dimension."""


def tensor(name: str, datatype: str = "FP32", dims: Dims = ("N", 4)) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ONNX_TYPES[datatype], dims)


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    initializers: Sequence[onnx.TensorProto] = (),
    opset: int = OPSET,
) -> bytes:
    """The bytes of a model file."""
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializer=initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=IR_VERSION)
    return bytes(model.SerializeToString())


def identity(datatype: str = "FP32", dims: Dims = ("N", 4), opset: int = OPSET) -> bytes:
    """X -> Y, unchanged."""
    node = helper.make_node("Identity", ["X"], ["Y"])
    return build([node], [tensor("X", datatype, dims)], [tensor("Y", datatype, dims)], opset=opset)


def sum_and_difference(dims: Dims = ("N", 16)) -> bytes:
    """INPUT0, INPUT1 -> OUTPUT0 (their sum), OUTPUT1 (their difference), all INT32."""
    names = ["INPUT0", "INPUT1"]
    nodes = [helper.make_node("Add", names, ["OUTPUT0"]), helper.make_node("Sub", names, ["OUTPUT1"])]
    return build(
        nodes,
        [tensor(name, "INT32", dims) for name in names],
        [tensor(name, "INT32", dims) for name in ("OUTPUT0", "OUTPUT1")],
    )


def gather(table: Sequence[float] = (0.0, 10.0, 20.0, 30.0)) -> bytes:
    """INDEX INT64 [N,1] -> Y FP32 [N,1], the table's value at each index; one out of range fails the whole run."""
    values = numpy_helper.from_array(np.array(table, np.float32), "table")
    node = helper.make_node("Gather", ["table", "INDEX"], ["Y"])
    return build([node], [tensor("INDEX", "INT64", ("N", 1))], [tensor("Y", "FP32", ("N", 1))], [values])


def add_bias() -> bytes:
    """Y = X + B, all FP32 [2], where B may be left out and is then [1, 2]."""
    bias = numpy_helper.from_array(np.array([1.0, 2.0], np.float32), "B")
    node = helper.make_node("Add", ["X", "B"], ["Y"])
    inputs = [tensor("X", dims=(2,)), tensor("B", dims=(2,))]
    return build([node], inputs, [tensor("Y", dims=(2,))], [bias])


def row_sums() -> bytes:
    """Y [A,1] = the sum of each row of X [A,B], FP32, of no elements too."""
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    node = helper.make_node("ReduceSum", ["X", "axes"], ["Y"])
    return build([node], [tensor("X", dims=("A", "B"))], [tensor("Y", dims=("A", 1))], [axes])


def slow(iterations: int) -> bytes:
    """X -> Y unchanged, FP32 [N,1], after a loop that takes about a second for each million iterations."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["going_on_in"], ["going_on"]),
            helper.make_node("Identity", ["value_in"], ["value"]),
        ],
        "body",
        [
            tensor("iteration", "INT64", ()),
            tensor("going_on_in", "BOOL", ()),
            tensor("value_in", dims=("N", 1)),
        ],
        [tensor("going_on", "BOOL", ()), tensor("value", dims=("N", 1))],
    )
    limit = numpy_helper.from_array(np.array(iterations, np.int64), "iterations")
    always = numpy_helper.from_array(np.array(True), "always")
    loop = helper.make_node("Loop", ["iterations", "always", "X"], ["Y"], body=body)
    return build([loop], [tensor("X", dims=("N", 1))], [tensor("Y", dims=("N", 1))], [limit, always])


def slower_in_batches(iterations: int) -> bytes:
    """As `slow`, but N rows take N x N times the iterations: two rows together take twice as long as one by one."""
    proto = onnx.load_from_string(slow(iterations))
    loop = proto.graph.node[0]
    loop.input[0] = "limit"
    nodes = [
        helper.make_node("Shape", ["X"], ["shape"]),
        helper.make_node("Gather", ["shape", "first"], ["rows"]),
        helper.make_node("Mul", ["rows", "rows"], ["square"]),
        helper.make_node("Mul", ["square", "iterations"], ["limit"]),
        onnx.NodeProto.FromString(loop.SerializeToString()),
    ]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    proto.graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "first"))
    return bytes(proto.SerializeToString())


def write_model(
    repository: Path,
    name: str,
    model: bytes,
    *,
    max_batch_size: int = 0,
    batching: bool = True,
    instances: int = 1,
    version: int = 1,
    more: str = "",
) -> Path:
    """Add a model to a repository, with a complete config.pbtxt; `more` is added to that. Gives its directory.

    `batching` is whether a model with a max_batch_size merges requests. `more` may say how: `dynamic_batching {...}`.
    """
    directory = repository / name
    (directory / str(version)).mkdir(parents=True)
    (directory / str(version) / "model.onnx").write_bytes(model)
    text = config_text(model, max_batch_size, instances)
    if batching and max_batch_size and "dynamic_batching" not in more:
        text += "dynamic_batching { }\n"
    (directory / "config.pbtxt").write_text(f'name: "{name}"\n{text}{more}\n')
    return directory


def write_configured(repository: Path, name: str, model: bytes, text: str) -> Path:
    """Add a model with one instance and the rest of its config.pbtxt as `text` says. Gives its directory."""
    directory = repository / name
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.onnx").write_bytes(model)
    group = "instance_group { count: 1 kind: KIND_CPU }"
    (directory / "config.pbtxt").write_text(f'backend: "onnxruntime"\n{group}\n{text}\n')
    return directory


def config_text(model: bytes, max_batch_size: int, instances: int) -> str:
    """A config.pbtxt that says of the tensors what the model file says; without the name and the scheduler."""
    graph = onnx.load_from_string(model).graph
    optional = {initializer.name for initializer in graph.initializer}
    text = f'backend: "onnxruntime"\nmax_batch_size: {max_batch_size}\n'
    text += f"instance_group {{ count: {instances} kind: KIND_CPU }}\n"
    for kind, infos in (("input", graph.input), ("output", graph.output)):
        for info in infos:
            extra = "optional: true" if info.name in optional else ""
            text += f'{kind} {{ name: "{info.name}" {_type_and_dims(info, bool(max_batch_size))} {extra} }}\n'
    return text


def _type_and_dims(info: onnx.ValueInfoProto, has_batch_dimension: bool) -> str:
    of_tensor = info.type.tensor_type
    datatype = next(name for name, number in ONNX_TYPES.items() if number == of_tensor.elem_type)
    dims = [-1 if dim.dim_param else dim.dim_value for dim in of_tensor.shape.dim]
    dims = dims[1:] if has_batch_dimension else dims
    config_type = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    # A configuration cannot write a tensor without dims: it says [1], and of rows of those that the 1 is taken away.
    reshape = " reshape { }" if has_batch_dimension and not dims else ""
    return f"data_type: {config_type} dims: {dims or [1]}{reshape}"
