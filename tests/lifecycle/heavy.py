"""A model whose load takes long: ONNX Runtime computes what is constant in a graph when it is loaded."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from support import models

WIDE, NARROW = 40_000, 128
"""A product of [NARROW, WIDE] and [WIDE, NARROW] takes some 20 ms on one core and leaves 64 KiB."""


def slow_to_load(products: int) -> bytes:
    """X -> Y = X + a constant, FP32 [N,1]; loading it takes some 20 ms for each of the products."""
    ones = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    shape = numpy_helper.from_array(np.array([NARROW, WIDE], np.int64), "shape")
    nodes = [
        helper.make_node("ConstantOfShape", ["shape"], ["ones"], value=ones),
        # different in alpha, so that they are not found to be one and the same
        *(
            helper.make_node("Gemm", ["ones", "ones"], [f"p{number}"], transB=1, alpha=1.0 + number)
            for number in range(products)
        ),
        helper.make_node("Sum", [f"p{number}" for number in range(products)], ["sum"]),
        helper.make_node("ReduceMax", ["sum"], ["constant"], keepdims=0),
        helper.make_node("Add", ["X", "constant"], ["Y"]),
    ]
    tensors = models.tensor("X", dims=("N", 1)), models.tensor("Y", dims=("N", 1))
    return models.build(nodes, [tensors[0]], [tensors[1]], [shape])
