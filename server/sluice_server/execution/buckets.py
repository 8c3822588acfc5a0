"""Shape buckets: requests of different lengths share a batch, padded on the way in and cut on the way out.

A configuration declares them in its `parameters`, under `shape_buckets`, as JSON: by a name of its own, each open
dimension that may be padded.

    {"sequence": {"sizes": [16, 32, 64, 128],
                  "axes": {"input_ids": 0, "attention_mask": 0, "embeddings": 0},
                  "pad": {"input_ids": 1},
                  "mask": "attention_mask"}}

* `sizes`: a length is padded to the first of these that it fits into; a longer one than all of them is left as it is.
* `axes`: by the names of inputs and outputs, which of their `dims` it is (without the batch dimension, from 0). A
  request's lengths must be equal in all of its inputs; outputs are cut to them.
* `pad`: the number that an input is filled up with, 0 where none is given.
* `mask`: an input with this one dimension that tells the model what is padding, as 1 and 0. Clients may leave it out.

Requests whose lengths have the same bucket have the same batch key. Each batch has the bucket's length, whatever its
requests have, so that the model sees few shapes. `batch_buckets`, such as `1,4,16`, does the same for the rows: a batch
is filled up, with its last row, to the first of these sizes that it fits into.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice_server.errors import Internal, InvalidArgument
from sluice_server.execution.instance import check_rows, gather_rows
from sluice_server.graph import format_shape
from sluice_server.protocol.encode import CuttingEncoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sluice_server.execution.instance import Gather
    from sluice_server.execution.request import InferRequest
    from sluice_server.protocol.interface import ModelInterface


@dataclass(frozen=True, slots=True)
class Bucket:
    """One open dimension that is padded; `axes` are without the batch dimension, by the names of tensors."""

    name: str
    sizes: tuple[int, ...]
    input_axes: Mapping[str, int]
    output_axes: Mapping[str, int]
    pad: Mapping[str, float]
    mask: str | None = None

    def padded(self, length: int) -> int:
        """What a length is padded to: the first size that it fits into, or itself."""
        for size in self.sizes:
            if length <= size:
                return size
        return length


@dataclass(frozen=True, slots=True)
class Buckets:
    """All buckets of a model, and the sizes to which its batches are filled up (none: not at all)."""

    model: str
    shapes: tuple[Bucket, ...] = ()
    batch_sizes: tuple[int, ...] = ()

    @property
    def masks(self) -> frozenset[str]:
        """The inputs that clients may leave out."""
        return frozenset(bucket.mask for bucket in self.shapes if bucket.mask is not None)

    def lengths(self, dims: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """A request's own length in each bucket; `dims` are its inputs' shapes without rows.

        InvalidArgument when its inputs have different ones.
        """
        found = []
        for bucket in self.shapes:
            own = {name: dims[name][axis] for name, axis in bucket.input_axes.items() if name in dims}
            if len(set(own.values())) > 1:
                told = ", ".join(f"'{name}' has {length}" for name, length in own.items())
                raise InvalidArgument(f"the inputs of model '{self.model}' differ in '{bucket.name}': {told}")
            found.append(next(iter(own.values())))
        return tuple(found)

    def key(self, dims: Mapping[str, tuple[int, ...]]) -> tuple[object, ...]:
        """What requests that may share a batch have in common of these shapes."""
        lengths = self.lengths(dims)
        padded = {name: list(shape) for name, shape in dims.items() if name not in self.masks}
        for bucket, length in zip(self.shapes, lengths, strict=True):
            for name, axis in bucket.input_axes.items():
                if name in padded:
                    padded[name][axis] = bucket.padded(length)
        return tuple((name, *shape) for name, shape in padded.items())


def gatherer(buckets: Buckets, interface: ModelInterface) -> Gather:
    """What makes the inputs of a batch, [rows, ...], padded."""
    return _Gatherer(buckets, {name: interface.inputs[name].dtype.numpy for name in buckets.masks})


class _Gatherer:
    def __init__(self, buckets: Buckets, mask_types: Mapping[str, np.dtype[Any]]) -> None:
        self._buckets = buckets
        self._mask_types = mask_types

    def __call__(self, batch: Sequence[InferRequest]) -> dict[str, np.ndarray]:
        requests = [self._inputs(request) for request in batch]
        rows = sum([request.rows for request in batch])
        total = _first_from(self._buckets.batch_sizes, rows)
        feeds = {}
        for name, first in requests[0].items():
            shape = (total, *self._padded(name, first.shape[1:]))
            if len(batch) == 1 and first.shape == shape:
                feeds[name] = first
            else:
                feeds[name] = _filled([arrays[name] for arrays in requests], shape, self._pad_of(name))
        return feeds

    def _inputs(self, request: InferRequest) -> Mapping[str, np.ndarray]:
        """A request's arrays, with what it has in shared memory and the masks that it leaves out."""
        arrays = gather_rows([request])
        for name in self._mask_types:
            if name not in arrays:
                bucket = next(bucket for bucket in self._buckets.shapes if bucket.mask == name)
                shape = (request.rows, _length(bucket, arrays))
                arrays = {**arrays, name: np.ones(shape, self._mask_types[name])}
        return arrays

    def _padded(self, name: str, dims: tuple[int, ...]) -> tuple[int, ...]:
        shape = list(dims)
        for bucket in self._buckets.shapes:
            axis = bucket.input_axes.get(name)
            if axis is not None:
                shape[axis] = bucket.padded(dims[axis])
        return tuple(shape)

    def _pad_of(self, name: str) -> float:
        return next((bucket.pad[name] for bucket in self._buckets.shapes if name in bucket.pad), 0)


class PaddedEncoder(CuttingEncoder):
    """Encodes the answers of batches that were padded, each cut out of the model's outputs."""

    __slots__ = ("_buckets",)

    def __init__(self, interface: ModelInterface, buckets: Buckets) -> None:
        super().__init__(interface)
        self._buckets = buckets

    def apart(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Each request's own rows, without what the padding made of them."""
        rows = _first_from(self._buckets.batch_sizes, sum([request.rows for request in batch]))
        names = batch[0].output_names
        for name, array in zip(names, arrays, strict=True):
            check_rows(name, array, rows)
        axes = self._padded_axes(names, arrays, batch[0])
        start = 0
        cut = []
        for request in batch:
            stop = start + request.rows
            own = [array[start:stop] for array in arrays]
            start = stop
            for place, axis, bucket in axes:
                length = _length(bucket, request.inputs)
                own[place] = own[place][(slice(None),) * axis + (slice(length),)]
            cut.append(own)
        return cut

    def _padded_axes(
        self, names: Sequence[str], arrays: Sequence[np.ndarray], request: InferRequest
    ) -> list[tuple[int, int, Bucket]]:
        """What is to be cut: (number of the output, its dimension with rows, bucket); one request speaks for all."""
        axes = []
        for bucket in self._buckets.shapes:
            padded = bucket.padded(_length(bucket, request.inputs))
            for place, name in enumerate(names):
                axis = bucket.output_axes.get(name)
                if axis is None:
                    continue
                shape = arrays[place].shape
                if len(shape) <= axis + 1 or shape[axis + 1] != padded:
                    raise Internal(
                        f"output '{name}' came out with shape {format_shape(shape)}, and shape_buckets say that its"
                        f" dimension {axis} is '{bucket.name}', which is {padded} here"
                    )
                axes.append((place, axis + 1, bucket))
        return axes


def _length(bucket: Bucket, arrays: Mapping[str, Any]) -> int:
    """A request's own length, of the first input that has it; `arrays` have shapes with rows."""
    for name, axis in bucket.input_axes.items():
        if name in arrays:
            length: int = arrays[name].shape[axis + 1]
            return length
    raise AssertionError(f"a request has an input of bucket '{bucket.name}': only its mask may be left out")


def _filled(parts: Sequence[np.ndarray], shape: tuple[int, ...], pad: float) -> np.ndarray:
    """The rows of all parts, each at the start of its place, and the last row again for those that are left."""
    out = np.full(shape, pad, parts[0].dtype)
    start = 0
    for part in parts:
        rows, *dims = part.shape
        stop = start + rows
        if len(dims) == 1:
            out[start:stop, : dims[0]] = part
        else:
            out[(slice(start, stop), *map(slice, dims))] = part
        start = stop
    if start < len(out):
        out[start:] = out[start - 1]
    return out


def _first_from(sizes: Sequence[int], number: int) -> int:
    """The first size that is at least as large; without one the number itself."""
    return next((size for size in sizes if size >= number), number)
