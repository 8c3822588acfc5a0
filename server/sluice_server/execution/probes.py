"""Rows that are made up to try a model with at load: of its shapes and types, different from each other, and harmless.

A model may want more of its inputs than a signature says (multiples of 32, an index below 10), so that there are
several candidates, the likeliest first: the shapes of `model_warmup`, then one size after the other for all open
dimensions, as equal sizes fit what several inputs share. The same rows are made at each load.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sluice_proto.tensors import BY_CONFIG_TYPE, BY_NAME
from sluice_server.graph import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.graph import GraphSignature

Array = npt.NDArray[Any]

Row = dict[str, Array]
"""The inputs of one row by name, each of shape [1, ...]."""

ROW_BYTES_MAX = 16 << 20
"""Of one input of a made-up row: a picture of 1024 x 1024 in FP32 has 12 MB, and some rows are alive at once."""

OPEN_SIZES = (16, 32, 64, 1, 8, 128, 224)
"""Tried for open dimensions: sequences take any length, short ones are quick."""

PICTURE_SIZES = (320, 48, 32, 64, 128, 224, 16)
"""Tried where pictures of any size are taken, which is what detection does: first one that costs what real ones cost,
then the heights of lines of text, as runs that fail on large pictures take long."""

PICTURE_RANK = 4
"""Of a batch of pictures: [N, C, H, W] or [N, H, W, C]."""

TEXT_ELEMENT_BYTES = 64
"""What an element of BYTES takes in memory as a Python object, about."""

INTEGERS = 128
"""Integers are below this, which all types have and most tables of embeddings too."""

SEED = 0


@dataclass(frozen=True, slots=True)
class _Input:
    """One input as the session takes it; `shape` is without the batch dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def is_open(self) -> bool:
        return VARIABLE in self.shape

    @property
    def is_picture(self) -> bool:
        return self.is_open and len(self.shape) + 1 == PICTURE_RANK and self.datatype in _PICTURE_TYPES


_PICTURE_TYPES = frozenset({"FP32", "FP16", "BF16", "UINT8"})


def made_up_rows(config: ModelConfig, signature: GraphSignature, count: int) -> Iterator[list[Row]]:
    """Give `count` rows for one candidate after the other; none where every candidate would be too large.

    `config` is complete and has a batch dimension. Floats are of the normal distribution. Integers are first as large
    as those of warm-up, then 0 and 1, as they may be indices or masks.
    """
    inputs = _inputs(config, signature)
    wide = (True, False) if any(item.datatype in _INTEGERS for item in inputs) else (False,)
    for shapes in _shapes(config, inputs):
        for is_wide in wide:
            random = np.random.default_rng(SEED)
            yield [
                {item.name: _values(item.datatype, (1, *shapes[item.name]), row, is_wide, random) for item in inputs}
                for row in range(count)
            ]


def _inputs(config: ModelConfig, signature: GraphSignature) -> list[_Input]:
    """The inputs that requests have, with what the configuration fixes of the model's open dimensions, or the file."""
    in_file = {spec.name: spec.shape[1:] for spec in signature.inputs}
    found = []
    for tensor in config.input:
        shape = tuple(tensor.reshape.shape) if tensor.HasField("reshape") else tuple(tensor.dims)
        known = in_file[tensor.name]
        if len(known) == len(shape):
            shape = tuple(size if size != VARIABLE else other for size, other in zip(shape, known, strict=True))
        found.append(_Input(tensor.name, BY_CONFIG_TYPE[tensor.data_type].name, shape))
    return found


def _shapes(config: ModelConfig, inputs: Sequence[_Input]) -> Iterator[Mapping[str, tuple[int, ...]]]:
    """The candidates that are not too large, by the inputs' names."""
    candidates = [*_warmup_shapes(config, inputs)]
    if any(item.is_open for item in inputs):
        sizes: Sequence[int] = PICTURE_SIZES if any(item.is_picture for item in inputs) else OPEN_SIZES
    else:
        sizes = OPEN_SIZES[:1]
    candidates += [
        {item.name: tuple(size if dim == VARIABLE else dim for dim in item.shape) for item in inputs} for size in sizes
    ]
    for shapes in candidates:
        if all(_row_bytes(item.datatype, shapes[item.name]) <= ROW_BYTES_MAX for item in inputs):
            yield shapes


def _warmup_shapes(config: ModelConfig, inputs: Sequence[_Input]) -> Iterator[Mapping[str, tuple[int, ...]]]:
    """The shapes of warm-up samples that say all of them, as they are."""
    if any(tensor.HasField("reshape") for tensor in config.input):
        return
    for sample in config.model_warmup:
        shapes = {name: tuple(item.dims) for name, item in sample.inputs.items()}
        if all(item.name in shapes for item in inputs):
            yield shapes


def _row_bytes(datatype: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * (BY_NAME[datatype].itemsize or TEXT_ELEMENT_BYTES)


def _values(datatype: str, shape: tuple[int, ...], row: int, is_wide: bool, random: np.random.Generator) -> Array:
    """Values of one row; the first of each differs from the row before, however few there are."""
    dtype = BY_NAME[datatype].numpy
    if datatype in _FLOATS:
        return random.standard_normal(shape).astype(dtype)
    high = INTEGERS if is_wide and datatype in _INTEGERS else 2
    numbers = random.integers(0, high, math.prod(shape))
    numbers[:1] = row % 2
    if datatype == "BYTES":
        return np.array([b"%d" % number for number in numbers], dtype=object).reshape(shape)
    return numbers.astype(dtype).reshape(shape)


_FLOATS = frozenset({"FP16", "BF16", "FP32", "FP64"})
_INTEGERS = frozenset({"INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64"})
