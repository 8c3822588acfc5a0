"""What a model file says of its own inputs and outputs, as plain data that any part of the server may hold."""

from collections.abc import Iterable
from dataclasses import dataclass

VARIABLE = -1
"""A dimension that the model leaves open."""


def format_shape(shape: Iterable[int]) -> str:
    """Write a shape as Triton does, without blanks: `[1,16]`."""
    return f"[{','.join(map(str, shape))}]"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output of a model's graph.

    `datatype` is the protocol's name (`FP32`, `BYTES`, ...); `shape` is the whole shape, the batch dimension
    included, with -1 for each open dimension, and `()` for a scalar. `optional` inputs have an initializer in the
    file that counts when a request leaves them out.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class GraphSignature:
    """All inputs (optional ones too) and outputs of a model's graph, in the file's order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def batchable(self) -> bool:
        """Whether dimension 0 of every required input and of every output is open, so that rows can be merged."""
        tensors = (*(spec for spec in self.inputs if not spec.optional), *self.outputs)
        return all(spec.shape and spec.shape[0] == VARIABLE for spec in tensors)
