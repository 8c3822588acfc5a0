"""Ragged batching: requests of different shapes share a batch without padding.

A configuration marks inputs with `allow_ragged_batch`. The model gets such an input as one dimension, [elements of the
whole batch], the requests one behind the other, whatever their shapes and however many of them there are. What it needs
to find its way in there, `batch_input` has made for each batch, by the shapes of a source input:

    kind                                        shape                   values
    BATCH_ELEMENT_COUNT                         [requests]              elements of each request
    BATCH_ACCUMULATED_ELEMENT_COUNT             [requests]              elements up to the end of each request
    BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO   [requests + 1]          the same behind a 0
    BATCH_MAX_ELEMENT_COUNT_AS_SHAPE            [elements of the        zeros: only the shape tells
                                                largest request]
    BATCH_ITEM_SHAPE                            [rows, dimensions]      each row's own shape
    BATCH_ITEM_SHAPE_FLATTEN                    [rows x dimensions]     the same, flat

Elements are counted over all rows of a request, shapes are without rows. An output is cut by rows as ever, or, as
`batch_output` says, by elements: of a flat tensor each request gets as many as its own shape has, which is that of
`output`, with the source input's sizes in the place of its open dimensions. All of it is as Triton's backend API and
ONNX Runtime backend have it, except that the tensor of zeros has whatever there was in memory there.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from sluice_proto.model_config_pb2 import BatchInput
from sluice_proto.tensors import BY_CONFIG_TYPE
from sluice_server.errors import Internal
from sluice_server.execution.instance import check_rows, gather_rows
from sluice_server.graph import VARIABLE, format_shape
from sluice_server.protocol.encode import CuttingEncoder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_proto.tensors import DType
    from sluice_server.execution.request import InferRequest
    from sluice_server.protocol.interface import ModelInterface

Shape = tuple[int, ...]


def is_ragged(config: ModelConfig) -> bool:
    """Whether a model has anything of ragged batching."""
    return bool(config.batch_input or config.batch_output) or any(each.allow_ragged_batch for each in config.input)


@dataclass(frozen=True, slots=True)
class MadeInput:
    """An input that is made for each batch from the shapes of a source, one shape for each request, rows included."""

    names: tuple[str, ...]
    dtype: DType
    source: str
    make: Callable[[Sequence[Shape]], np.ndarray]
    """Gives INT64."""

    def of(self, shapes: Sequence[Shape]) -> np.ndarray:
        """The tensor; Internal when the datatype does not hold its numbers."""
        values = self.make(shapes)
        dtype = self.dtype.numpy
        if dtype.kind == "i" and values.size and int(values.max()) > np.iinfo(dtype).max:
            raise Internal(
                f"batch input '{self.names[0]}' would hold {values.max()}, which is more than {self.dtype.name} does:"
                f" the requests of the batch have too many elements of '{self.source}'"
            )
        return values.astype(dtype)


def _element_counts(shapes: Sequence[Shape]) -> np.ndarray:
    return np.array([math.prod(shape) for shape in shapes], np.int64)


def _accumulated(shapes: Sequence[Shape]) -> np.ndarray:
    return np.cumsum(_element_counts(shapes))


def _accumulated_with_zero(shapes: Sequence[Shape]) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), _accumulated(shapes)])


def _zeros_of_the_largest(shapes: Sequence[Shape]) -> np.ndarray:
    return np.zeros(int(_element_counts(shapes).max()), np.int64)


def _item_shapes(shapes: Sequence[Shape]) -> np.ndarray:
    return np.repeat([shape[1:] for shape in shapes], [shape[0] for shape in shapes], axis=0).astype(np.int64)


def _item_shapes_flat(shapes: Sequence[Shape]) -> np.ndarray:
    return _item_shapes(shapes).reshape(-1)


_MAKERS: Mapping[int, Callable[[Sequence[Shape]], np.ndarray]] = {
    BatchInput.BATCH_ELEMENT_COUNT: _element_counts,
    BatchInput.BATCH_ACCUMULATED_ELEMENT_COUNT: _accumulated,
    BatchInput.BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO: _accumulated_with_zero,
    BatchInput.BATCH_MAX_ELEMENT_COUNT_AS_SHAPE: _zeros_of_the_largest,
    BatchInput.BATCH_ITEM_SHAPE: _item_shapes,
    BatchInput.BATCH_ITEM_SHAPE_FLATTEN: _item_shapes_flat,
}


class RaggedGatherer:
    """Makes the inputs of a batch: ragged ones flat, others [rows, ...], and those that tell of the batch."""

    def __init__(self, config: ModelConfig) -> None:
        """`config` is complete and checked."""
        self._ragged = frozenset(tensor.name for tensor in config.input if tensor.allow_ragged_batch)
        self._made = tuple(
            MadeInput(tuple(item.target_name), BY_CONFIG_TYPE[item.data_type], item.source_input[0], _MAKERS[item.kind])
            for item in config.batch_input
        )

    def __call__(self, batch: Sequence[InferRequest]) -> dict[str, np.ndarray]:
        """The inputs of a batch by their names; Internal for numbers that the type of an input does not hold."""
        requests = [gather_rows([request]) for request in batch]
        feeds = {}
        for name in requests[0]:
            parts = [arrays[name] for arrays in requests]
            if name in self._ragged:
                parts = [part.reshape(-1) for part in parts]
            feeds[name] = parts[0] if len(parts) == 1 else np.concatenate(parts)
        for made in self._made:
            array = made.of([arrays[made.source].shape for arrays in requests])
            feeds |= dict.fromkeys(made.names, array)
        return feeds


class RaggedEncoder(CuttingEncoder):
    """Encodes the answers of a model with ragged batches: outputs are cut by rows, or by the shapes of an input."""

    __slots__ = ("_scattered",)

    def __init__(self, interface: ModelInterface, config: ModelConfig) -> None:
        super().__init__(interface)
        # By the output's name: the graph's own dims, and the input whose sizes its open ones have.
        self._scattered: dict[str, tuple[Shape, str]] = {}
        for item in config.batch_output:
            for name in item.target_name:
                output = interface.outputs[name]
                dims = output.dims if output.graph_dims is None else output.graph_dims
                self._scattered[name] = (dims, item.source_input[0])

    def apart(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Each request's own part of each output; Internal for one that cannot be told apart."""
        rows = [request.rows for request in batch]
        columns = []
        for name, array in zip(batch[0].output_names, arrays, strict=True):
            if name in self._scattered:
                columns.append(self._scatter(name, array, batch))
            else:
                check_rows(name, array, sum(rows))
                columns.append(_pieces(array, rows))
        return [list(own) for own in zip(*columns, strict=True)]

    def _scatter(self, name: str, array: np.ndarray, batch: Sequence[InferRequest]) -> list[np.ndarray]:
        dims, source = self._scattered[name]
        shapes = []
        for request in batch:
            given = request.inputs[source].shape
            sizes = [given[place + 1] if dim == VARIABLE else dim for place, dim in enumerate(dims)]
            shapes.append((request.rows, *sizes))
        counts = [math.prod(shape) for shape in shapes]
        if array.size != sum(counts):
            raise Internal(
                f"output '{name}' came out with shape {format_shape(array.shape)}, and batch_output says that it has"
                f" the {sum(counts)} elements of {', '.join(map(format_shape, shapes))}, by the shapes of '{source}'"
            )
        pieces = _pieces(array.reshape(-1), counts)
        return [piece.reshape(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _pieces(array: np.ndarray, lengths: Sequence[int]) -> list[np.ndarray]:
    """An array cut along its first dimension."""
    stops = itertools.accumulate(lengths)
    return [array[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]
