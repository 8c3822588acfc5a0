"""ONNX models of a batch dimension that keep their rows apart, and such that do not."""

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from support.models import build, tensor

COLUMNS = 4


def mean_over_rows() -> bytes:
    """Y = X minus the mean over the rows of the batch."""
    nodes = [helper.make_node("ReduceMean", ["X"], ["mean"], axes=[0]), helper.make_node("Sub", ["X", "mean"], ["Y"])]
    return build(nodes, [tensor("X")], [tensor("Y")])


def training_batch_norm() -> bytes:
    """Batch normalisation as exported in training mode: by the mean and variance of the batch."""
    ones, zeros = np.ones(COLUMNS, np.float32), np.zeros(COLUMNS, np.float32)
    weights = [numpy_helper.from_array(value, name) for name, value in
               (("scale", ones), ("bias", zeros), ("mean", zeros), ("var", ones))]  # fmt: skip
    node = helper.make_node(
        "BatchNormalization", ["X", "scale", "bias", "mean", "var"], ["Y", "new_mean", "new_var"], training_mode=1
    )
    return build([node], [tensor("X")], [tensor("Y")], weights)


def _hidden(name: str, values: Sequence[int]) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """A constant that ONNX Runtime does not know before the run, so that shapes stay open."""
    nodes = [
        helper.make_node("ReduceMean", ["X"], [f"{name}_mean"], keepdims=0),
        helper.make_node("Cast", [f"{name}_mean"], [f"{name}_whole"], to=TensorProto.INT64),
        helper.make_node("Mul", [f"{name}_whole", f"{name}_zero"], [f"{name}_nothing"]),
        helper.make_node("Add", [f"{name}_nothing", f"{name}_values"], [name]),
    ]
    zero = numpy_helper.from_array(np.array(0, np.int64), f"{name}_zero")
    return nodes, [zero, numpy_helper.from_array(np.array(values, np.int64), f"{name}_values")]


def _reshaped(*shape: int) -> bytes:
    nodes, constants = _hidden("shape", shape)
    nodes.append(helper.make_node("Reshape", ["X", "shape"], ["Y"]))
    return build(nodes, [tensor("X")], [tensor("Y", dims=("M", "K"))], constants)


def fixed_batch() -> bytes:
    """Y = X, by way of a Reshape to one row of four."""
    return _reshaped(1, COLUMNS)


def joined_rows() -> bytes:
    """Y = all rows of X in one."""
    return _reshaped(1, -1)


def masked() -> bytes:
    """Y = the rows less their mean, beside a hundred columns of -1e9: those are no measure for the others."""
    mask = numpy_helper.from_array(np.array(-1e9, np.float32), "mask")
    wide = numpy_helper.from_array(np.array([1, 100], np.int64), "wide")
    nodes = [
        helper.make_node("ReduceMean", ["X"], ["mean"], axes=[0]),
        helper.make_node("Sub", ["X", "mean"], ["centred"]),
        _row_mean("X", "sum"),
        helper.make_node("Mul", ["sum", "zero"], ["nothing"]),
        helper.make_node("Expand", ["mask", "wide"], ["columns"]),
        helper.make_node("Add", ["nothing", "columns"], ["masks"]),
        helper.make_node("Concat", ["centred", "masks"], ["Y"], axis=1),
    ]
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    return build(nodes, [tensor("X")], [tensor("Y", dims=("N", COLUMNS + 100))], [mask, wide, zero])


def _row_mean(of: str, name: str) -> onnx.NodeProto:
    return helper.make_node("ReduceMean", [of], [name], axes=[1], keepdims=1)


def strongest() -> bytes:
    """Y INT64 = 0, whatever the row: the place of its largest element among one."""
    nodes = [_row_mean("X", "one"), helper.make_node("ArgMax", ["one"], ["Y"], axis=1, keepdims=1)]
    return build(nodes, [tensor("X")], [tensor("Y", "INT64", ("N", 1))])


def noise() -> bytes:
    """Y = X and a random number, another one in each run."""
    nodes = [helper.make_node("RandomNormalLike", ["X"], ["noise"]), helper.make_node("Add", ["X", "noise"], ["Y"])]
    return build(nodes, [tensor("X")], [tensor("Y")])


def lookup(rows: int, datatype: str = "INT64") -> bytes:
    """INDEX [N,2] -> Y [N,2], the rows of a table; an index from `rows` on is out of bounds."""
    table = numpy_helper.from_array(np.arange(rows, dtype=np.float32), "table")
    nodes = [
        helper.make_node("Cast", ["INDEX"], ["index"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "index"], ["Y"]),
    ]
    return build(nodes, [tensor("INDEX", datatype, ("N", 2))], [tensor("Y", dims=("N", 2))], [table])


def matmul(datatype: str = "FP32", columns: int = 256) -> bytes:
    """Y = X W: the sums of a batch are added up in another order than those of one row."""
    weights = np.random.default_rng(1).standard_normal((columns, columns))
    cast = [helper.make_node("Cast", ["X"], ["x"], to=TensorProto.FLOAT), helper.make_node("MatMul", ["x", "W"], ["y"])]
    to = {"FP32": TensorProto.FLOAT, "FP16": TensorProto.FLOAT16}[datatype]
    nodes = [*cast, helper.make_node("Cast", ["y"], ["Y"], to=to)]
    shape = ("N", columns)
    tensors = [numpy_helper.from_array(weights.astype(np.float32), "W")]
    return build(nodes, [tensor("X", datatype, shape)], [tensor("Y", datatype, shape)], tensors)


def multiples(of: int) -> bytes:
    """Y = X [N,W] by way of rows of `of`: W must be a multiple of it."""
    parts = numpy_helper.from_array(np.array([0, -1, of], np.int64), "parts")
    nodes = [
        helper.make_node("Reshape", ["X", "parts"], ["in_parts"]),
        helper.make_node("Shape", ["X"], ["shape"]),
        helper.make_node("Reshape", ["in_parts", "shape"], ["Y"]),
    ]
    dims = ("N", "W")
    return build(nodes, [tensor("X", dims=dims)], [tensor("Y", dims=dims)], [parts])


def shared_rows(rows: int) -> bytes:
    """Y = X + a bias for each of `rows` rows: of another number of rows only one fits, and comes out `rows` times."""
    nodes, constants = _hidden("shape", [rows, COLUMNS])
    bias = numpy_helper.from_array(np.array(1, np.float32), "one")
    nodes += [helper.make_node("Expand", ["one", "shape"], ["bias"]), helper.make_node("Add", ["X", "bias"], ["Y"])]
    return build(nodes, [tensor("X")], [tensor("Y", dims=("M", "K"))], [bias, *constants])
