"""How a tensor of an ensemble becomes an input of a part: its batch dimension, its shape, and what a part refuses.

Triton's rule between who has a batch dimension and who has not: where the dims agree without it, it is put on or, when
it is 1, taken off; else the whole shape is to agree.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sluice_server.errors import InvalidArgument
from sluice_server.graph import VARIABLE, format_shape

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from sluice_server.protocol.interface import ModelInterface


class Tensor(NamedTuple):
    """A tensor of one request; `rows` is its batch dimension, 0 for one that has none."""

    array: np.ndarray
    rows: int


class Inlet:
    """One input of a part, and the tensor that it takes."""

    __slots__ = ("_batches", "_dims", "_interface", "_wanted", "is_text", "name", "tensor")

    def __init__(self, interface: ModelInterface, name: str, tensor: str) -> None:
        """`interface` is the part's."""
        self.name = name
        self.tensor = tensor
        self._interface = interface
        self._wanted = interface.inputs[name]
        self.is_text = not self._wanted.dtype.itemsize
        self._batches = interface.max_batch_rows > 0
        # Of a tensor with just these dims nothing is left to be done.
        self._dims = self._wanted.dims if self._wanted.graph_dims is None else None

    def fit(self, tensor: Tensor) -> np.ndarray:
        """The tensor as the part's graph takes it; `InvalidArgument` when it is none that the part accepts."""
        array, rows = tensor
        if self._batches:
            if rows and array.shape[1:] == self._dims:
                return array
        elif not rows and array.shape == self._dims:
            return array
        return self._fit(conform(tensor, self._wanted.dims, batches=self._batches))

    def _fit(self, array: np.ndarray) -> np.ndarray:
        batch_dims, wanted = self._interface.batch_dims, self._wanted
        if array.ndim < batch_dims or not wanted.accepts(array.shape[batch_dims:]):
            expected = (VARIABLE,) * batch_dims + wanted.dims
            raise InvalidArgument(
                f"unexpected shape for input '{self.name}' for model '{self._interface.name}'. Expected"
                f" {format_shape(expected)}, got {format_shape(array.shape)}"
            )
        return array if wanted.graph_dims is None else array.reshape(wanted.to_graph(array.shape, batch_dims))

    def check_rows(self, rows: int, others: int) -> None:
        """Refuse more rows than the part takes, none at all, and other ones than another input has (0: the first)."""
        name, most = self._interface.name, self._interface.max_batch_rows
        if others and rows != others:
            raise InvalidArgument(
                f"input '{self.name}' batch size does not match other inputs for '{name}': {rows} and {others}"
            )
        if not 1 <= rows <= most:
            raise InvalidArgument(
                f"inference request batch-size must be <= {most} and >= 1 for '{name}', got {rows} of input"
                f" '{self.name}'"
            )


def conform(tensor: Tensor, dims: Sequence[int], *, batches: bool) -> np.ndarray:
    """A tensor for who wants it with these dims, behind a batch dimension or without one."""
    array, rows = tensor
    if batches == (rows > 0):
        return array
    fits = len(dims) == array.ndim and all(dim in (VARIABLE, size) for dim, size in zip(dims, array.shape, strict=True))
    if batches:
        return array[None] if fits else array
    return array[0] if not fits and rows == 1 else array


def size_bytes(array: np.ndarray, *, is_text: bool) -> int:
    """What an array holds in memory; of one of BYTES, its elements."""
    return sum(map(len, array.ravel().tolist())) if is_text else array.nbytes
