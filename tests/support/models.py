"""Tiny ONNX models, built in memory, and model repositories made of them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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


def attention(width: int = 8, words: int = 32) -> bytes:
    """IDS, MASK INT64 [N,L] -> EACH FP32 [N,L,width], each word seen through all that the mask shows, and their mean,
    MEAN [N,width]."""
    table = np.random.default_rng(0).standard_normal((words, width)).astype(np.float32)
    nodes = [
        helper.make_node("Gather", ["table", "IDS"], ["words"]),
        helper.make_node("Cast", ["MASK"], ["shown"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["shown", "one"], ["hidden"]),
        helper.make_node("Mul", ["hidden", "far"], ["off"]),
        helper.make_node("Unsqueeze", ["off", "axis1"], ["off_each"]),
        helper.make_node("Transpose", ["words"], ["turned"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["words", "turned"], ["scores"]),
        helper.make_node("Add", ["scores", "off_each"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["weights"], axis=-1),
        helper.make_node("MatMul", ["weights", "words"], ["EACH"]),
        helper.make_node("Unsqueeze", ["shown", "axis2"], ["shown_each"]),
        helper.make_node("Mul", ["EACH", "shown_each"], ["kept"]),
        helper.make_node("ReduceSum", ["kept", "axis1"], ["sum"], keepdims=0),
        helper.make_node("ReduceSum", ["shown", "axis1"], ["count"], keepdims=1),
        helper.make_node("Div", ["sum", "count"], ["MEAN"]),
    ]
    constants = {"table": table, "one": np.float32(1), "far": np.float32(1e9)}
    constants |= {f"axis{axis}": np.array([axis], np.int64) for axis in (1, 2)}
    return build(
        nodes,
        [tensor(name, "INT64", ("N", "L")) for name in ("IDS", "MASK")],
        [tensor("EACH", dims=("N", "L", width)), tensor("MEAN", dims=("N", width))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )


def twice() -> bytes:
    """X FP32 [N,L] -> Y [N,2L], X two times in a row."""
    node = helper.make_node("Concat", ["X", "X"], ["Y"], axis=1)
    return build([node], [tensor("X", dims=("N", "L"))], [tensor("Y", dims=("N", "L2"))])


RAGGED_INPUTS = """
input { name: "X" data_type: TYPE_FP32 dims: [ -1, -1 ] allow_ragged_batch: true }
input { name: "INDEX" data_type: TYPE_INT64 dims: 1 }
"""
RAGGED_OUTPUTS = """
output { name: "SUM" data_type: TYPE_FP32 dims: 1 }
output { name: "COUNTS" data_type: TYPE_FP32 dims: 2 }
output { name: "SHAPE" data_type: TYPE_INT32 dims: 2 }
output { name: "FLAT" data_type: TYPE_INT64 dims: 2 }
output { name: "PICKED" data_type: TYPE_FP32 dims: 1 }
output { name: "TWICE" data_type: TYPE_FP32 dims: [ -1, -1 ] }
"""
RAGGED_MADE = """
batch_input { kind: BATCH_ELEMENT_COUNT target_name: "COUNT" data_type: TYPE_FP32 source_input: "X" }
batch_input { kind: BATCH_ACCUMULATED_ELEMENT_COUNT target_name: "ENDS" data_type: TYPE_FP32 source_input: "X" }
batch_input {
  kind: BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO target_name: "BOUNDS" data_type: TYPE_INT32 source_input: "X"
}
batch_input { kind: BATCH_MAX_ELEMENT_COUNT_AS_SHAPE target_name: "MOST" data_type: TYPE_INT32 source_input: "X" }
batch_input { kind: BATCH_ITEM_SHAPE target_name: "SIZES" data_type: TYPE_INT32 source_input: "X" }
batch_input { kind: BATCH_ITEM_SHAPE_FLATTEN target_name: "SIZE_LIST" data_type: TYPE_INT64 source_input: "X" }
batch_output { kind: BATCH_SCATTER_WITH_INPUT_SHAPE target_name: "TWICE" source_input: "X" }
"""


def ragged() -> bytes:
    """A model of ragged batches, which RAGGED_INPUTS, RAGGED_OUTPUTS and RAGGED_MADE configure.

    X FP32 [elements], INDEX INT64 [rows,1] -> SUM [requests,1] of X by BOUNDS, COUNTS [requests,2] (COUNT, ENDS and the
    size of MOST added to both), SHAPE [rows,2] and FLAT [rows,2] of SIZES and SIZE_LIST, PICKED as `gather`, and TWICE
    [elements], which is 2 X.
    """
    nodes = [
        helper.make_node("CumSum", ["X", "axis0"], ["running"]),
        helper.make_node("Concat", ["nothing", "running"], ["sums"], axis=0),
        helper.make_node("Gather", ["sums", "BOUNDS"], ["at_bounds"]),
        helper.make_node("Slice", ["at_bounds", "one", "far"], ["until"]),
        helper.make_node("Slice", ["at_bounds", "zero", "last"], ["before"]),
        helper.make_node("Sub", ["until", "before"], ["sum"]),
        helper.make_node("Unsqueeze", ["sum", "one"], ["SUM"]),
        helper.make_node("Unsqueeze", ["COUNT", "one"], ["count"]),
        helper.make_node("Unsqueeze", ["ENDS", "one"], ["ends"]),
        helper.make_node("Concat", ["count", "ends"], ["both"], axis=1),
        helper.make_node("Shape", ["MOST"], ["most"]),
        helper.make_node("Cast", ["most"], ["most_float"], to=TensorProto.FLOAT),
        helper.make_node("Add", ["both", "most_float"], ["COUNTS"]),
        helper.make_node("Identity", ["SIZES"], ["SHAPE"]),
        helper.make_node("Reshape", ["SIZE_LIST", "pairs"], ["FLAT"]),
        helper.make_node("Gather", ["table", "INDEX"], ["PICKED"]),
        helper.make_node("Add", ["X", "X"], ["TWICE"]),
    ]
    constants = {
        "axis0": np.int64(0),
        "nothing": np.zeros(1, np.float32),
        "table": np.array([0.0, 10.0, 20.0, 30.0], np.float32),
        "pairs": np.array([-1, 2], np.int64),
    }
    constants |= {name: np.array([value], np.int64) for name, value in (("zero", 0), ("one", 1), ("last", -1))}
    constants["far"] = np.array([1 << 40], np.int64)
    inputs = [tensor("X", dims=("T",)), tensor("INDEX", "INT64", ("N", 1))]
    inputs += [tensor(name, dims=("R",)) for name in ("COUNT", "ENDS")]
    inputs += [tensor("BOUNDS", "INT32", ("R1",)), tensor("MOST", "INT32", ("M",))]
    inputs += [tensor("SIZES", "INT32", ("N", 2)), tensor("SIZE_LIST", "INT64", ("N2",))]
    outputs = [tensor("SUM", dims=("R", 1)), tensor("COUNTS", dims=("R", 2))]
    outputs += [tensor("SHAPE", "INT32", ("N", 2)), tensor("FLAT", "INT64", ("N", 2))]
    outputs += [tensor("PICKED", dims=("N", 1)), tensor("TWICE", dims=("T",))]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    return build(nodes, inputs, outputs, initializers)


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


def affine(factor: float, offset: float, dims: Dims = ("N", 4), names: tuple[str, str] = ("X", "Y")) -> bytes:
    """Y = factor * X + offset, FP32; `names` are those of the tensors."""
    source, result = names
    values = [numpy_helper.from_array(np.array(value, np.float32), name) for name, value in
              (("factor", factor), ("offset", offset))]  # fmt: skip
    nodes = [
        helper.make_node("Mul", [source, "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "offset"], [result]),
    ]
    return build(nodes, [tensor(source, dims=dims)], [tensor(result, dims=dims)], values)


def add_two(dims: Dims = ("N", 4)) -> bytes:
    """Y = A + B, FP32."""
    node = helper.make_node("Add", ["A", "B"], ["Y"])
    return build([node], [tensor("A", dims=dims), tensor("B", dims=dims)], [tensor("Y", dims=dims)])


def step(model: str, takes: Mapping[str, str], makes: Mapping[str, str], more: str = "model_version: -1") -> str:
    """A step of an ensemble as its configuration writes it; the maps lead from the model's names to tensors."""
    maps = [f'input_map {{ key: "{name}" value: "{tensor}" }}' for name, tensor in takes.items()]
    maps += [f'output_map {{ key: "{name}" value: "{tensor}" }}' for name, tensor in makes.items()]
    return f'step {{ model_name: "{model}" {" ".join(maps)} {more} }}'


def port(kind: str, name: str, dims: Sequence[int] = (4,), datatype: str = "FP32", more: str = "") -> str:
    """An input or output of an ensemble as its configuration writes it."""
    return f'{kind} {{ name: "{name}" data_type: TYPE_{datatype} dims: {list(dims)} {more} }}\n'


def write_ensemble(
    repository: Path,
    name: str,
    ports: str,
    steps: Sequence[str],
    *,
    max_batch_size: int = 8,
    version: int = 1,
    scheduling: str = "",
    more: str = "",
) -> Path:
    """Add an ensemble to a repository: nothing but a configuration, and an empty folder for its version."""
    directory = repository / name
    (directory / str(version)).mkdir(parents=True, exist_ok=True)
    text = f'platform: "ensemble"\nmax_batch_size: {max_batch_size}\n{ports}{more}\n'
    text += "ensemble_scheduling {\n" + "\n".join([scheduling, *steps]) + "\n}\n"
    (directory / "config.pbtxt").write_text(text)
    return directory


def accumulator(*, rows: bool = True, ids: str = "UINT64") -> bytes:
    """OUTPUT = the sum of a sequence's INPUTs, FLAGS = start + 10 * end + 100 * ready, ID = the sequence's id.

    INPUT, OUTPUT and the states IN and OUT are INT64; the flags START, END and READY are FP32, INT32 and BOOL. All are
    [N,1], or [1] without `rows`. A negative INPUT fails the whole run.
    """
    dims: Dims = ("N", 1) if rows else (1,)
    flags = {"START": ("FP32", 1), "END": ("INT32", 10), "READY": ("BOOL", 100)}
    nodes = [
        helper.make_node("Less", ["INPUT", "zero"], ["negative"]),
        helper.make_node("Where", ["negative", "outside", "zero"], ["index"]),
        helper.make_node("Gather", ["table", "index"], ["checked"]),
        helper.make_node("Add", ["INPUT", "IN"], ["sum"]),
        helper.make_node("Mul", ["sum", "checked"], ["OUTPUT"]),
        helper.make_node("Identity", ["OUTPUT"], ["OUT"]),
        helper.make_node("Identity", ["CORRID"], ["ID"]),
    ]
    for name, (_, weight) in flags.items():
        nodes.append(helper.make_node("Cast", [name], [f"{name}_n"], to=TensorProto.INT64))
        nodes.append(helper.make_node("Mul", [f"{name}_n", f"weight_{weight}"], [f"{name}_w"]))
    nodes.append(helper.make_node("Add", ["START_w", "END_w"], ["begin_or_end"]))
    nodes.append(helper.make_node("Add", ["begin_or_end", "READY_w"], ["FLAGS"]))
    numbers = {"zero": 0, "outside": 9, "table": [1], "weight_1": 1, "weight_10": 10, "weight_100": 100}
    initializers = [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in numbers.items()]
    inputs = [tensor(name, kind, dims) for name, (kind, _) in flags.items()]
    inputs += [tensor("INPUT", "INT64", dims), tensor("CORRID", ids, dims), tensor("IN", "INT64", dims)]
    outputs = [tensor(name, "INT64", dims) for name in ("OUTPUT", "OUT", "FLAGS")] + [tensor("ID", ids, dims)]
    return build(nodes, inputs, outputs, initializers)


def sequence_config(
    *, strategy: str = "", rows: int = 4, ids: str = "UINT64", instances: int = 1, more: str = ""
) -> str:
    """The config.pbtxt of an `accumulator`, whose states OUT clients see too; `more` goes into sequence_batching."""
    pair = {"START": "fp32_false_true: [ 0, 1 ]", "END": "int32_false_true: [ 0, 1 ]"}
    pair["READY"] = "bool_false_true: [ false, true ]"
    controls = "".join(
        f'control_input {{ name: "{name}" control {{ kind: CONTROL_SEQUENCE_{name} {values} }} }}\n'
        for name, values in pair.items()
    )
    config_type = "STRING" if ids == "BYTES" else ids
    corrid = f"kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_{config_type}"
    controls += f'control_input {{ name: "CORRID" control {{ {corrid} }} }}\n'
    state = 'state { input_name: "IN" output_name: "OUT" data_type: TYPE_INT64 dims: [ 1 ] }'
    tensors = 'input { name: "INPUT" data_type: TYPE_INT64 dims: [ 1 ] }\n'
    for name in ("OUTPUT", "OUT", "FLAGS"):
        tensors += f'output {{ name: "{name}" data_type: TYPE_INT64 dims: [ 1 ] }}\n'
    tensors += f'output {{ name: "ID" data_type: TYPE_{config_type} dims: [ 1 ] }}\n'
    head = f'backend: "onnxruntime"\nmax_batch_size: {rows}\ninstance_group {{ count: {instances} kind: KIND_CPU }}\n'
    return f"{head}{tensors}sequence_batching {{ {strategy}\n{controls}{state}\n{more} }}\n"


def write_accumulator(repository: Path, name: str = "sums", *, ids: str = "UINT64", rows: int = 4, **how: Any) -> Path:
    """Add an `accumulator` to a repository; `how` is for `sequence_config`. Gives its directory."""
    directory = repository / name
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.onnx").write_bytes(accumulator(rows=rows > 0, ids=ids))
    (directory / "config.pbtxt").write_text(sequence_config(rows=rows, ids=ids, **how))
    return directory
