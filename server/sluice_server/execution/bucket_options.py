"""Reads a model's buckets from its configuration's `parameters`; the errors say which key of the JSON is wrong."""

from __future__ import annotations

import itertools
import json
import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from sluice_proto.tensors import BY_CONFIG_TYPE
from sluice_server.execution.buckets import Bucket, Buckets
from sluice_server.execution.merging import MERGE, merges
from sluice_server.execution.parameters import BadOption, parameter_values
from sluice_server.execution.ragged import is_ragged
from sluice_server.graph import VARIABLE

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sluice_proto.model_config_pb2 import ModelConfig, ModelInput, ModelOutput

SHAPES, BATCHES = "shape_buckets", "batch_buckets"
"""The keys in `parameters`."""

_KEYS = ("sizes", "axes", "pad", "mask")


def read_buckets(config: ModelConfig) -> Buckets | None:
    """The buckets of a complete configuration, None without any; BadOption for those that cannot be."""
    parameters = parameter_values(config)
    if SHAPES not in parameters and BATCHES not in parameters:
        return None
    for key in (SHAPES, BATCHES):
        if key in parameters and not merges(config):
            expected = f"no value: max_batch_size is 0 or 1, dynamic_batching is missing, or {MERGE} is false"
            raise BadOption(config.name, key, parameters[key], expected)
        if key in parameters and is_ragged(config):
            raise BadOption(config.name, key, parameters[key], "no value: ragged batches are not padded")
    shapes = _Shapes(config, parameters[SHAPES]).read() if SHAPES in parameters else ()
    batches = _batch_sizes(config, parameters[BATCHES]) if BATCHES in parameters else ()
    return Buckets(config.name, shapes, batches)


def _batch_sizes(config: ModelConfig, text: str) -> tuple[int, ...]:
    words = [word.strip() for word in text.split(",")]
    limit = config.max_batch_size
    sizes = [int(word) if word.isascii() and word.isdecimal() and len(word) < 10 else 0 for word in words]
    if not _ascend(sizes) or sizes[-1] > limit:
        raise BadOption(config.name, BATCHES, text, f"different numbers of rows from 1 to {limit}, the smallest first")
    return tuple(sizes)


def _ascend(sizes: list[int]) -> bool:
    return bool(sizes) and sizes[0] > 0 and all(one < other for one, other in itertools.pairwise(sizes))


class _Shapes:
    """Reads and checks `shape_buckets` of one configuration."""

    def __init__(self, config: ModelConfig, text: str) -> None:
        self._model = config.name
        self._text = text
        self._inputs: Mapping[str, ModelInput] = {tensor.name: tensor for tensor in config.input}
        self._outputs: Mapping[str, ModelOutput] = {tensor.name: tensor for tensor in config.output}
        self._taken: set[tuple[str, int]] = set()

    def read(self) -> tuple[Bucket, ...]:
        try:
            buckets = json.loads(self._text)
        except ValueError as error:
            raise self._bad(f"JSON: {error}") from error
        if not isinstance(buckets, dict) or not buckets:
            raise self._bad("an object with a bucket under each name")
        return tuple(self._bucket(name, bucket) for name, bucket in buckets.items())

    def _bad(self, expected: str) -> BadOption:
        return BadOption(self._model, SHAPES, self._text, expected)

    def _bucket(self, name: str, bucket: Any) -> Bucket:
        if not isinstance(bucket, dict) or not {"sizes", "axes"} <= bucket.keys() <= set(_KEYS):
            raise self._bad(f"an object with sizes and axes, and maybe pad and mask, as '{name}'")
        sizes = bucket["sizes"]
        if not isinstance(sizes, list) or not all(map(_is_size, sizes)) or not _ascend(sizes):
            raise self._bad(f"'{name}.sizes' to be a list of different whole numbers above 0, the smallest first")
        axes = self._axes(name, bucket["axes"])
        input_axes = {tensor: axis for tensor, axis in axes.items() if tensor in self._inputs}
        output_axes = {tensor: axis for tensor, axis in axes.items() if tensor not in self._inputs}
        mask = self._mask(name, bucket.get("mask"), input_axes)
        if not input_axes.keys() - {mask}:
            raise self._bad(f"'{name}.axes' to name an input that tells the length")
        pad = self._pad(name, bucket.get("pad", {}), input_axes)
        return Bucket(name, tuple(sizes), input_axes, output_axes, pad, mask)

    def _axes(self, name: str, axes: Any) -> dict[str, int]:
        if not isinstance(axes, dict):
            raise self._bad(f"'{name}.axes' to be an object with a dimension under the name of each tensor")
        for tensor_name, axis in axes.items():
            tensor = self._inputs.get(tensor_name) or self._outputs.get(tensor_name)
            where = f"'{name}.axes.{tensor_name}'"
            if tensor is None:
                raise self._bad(f"{where} to be a tensor of the model: {', '.join([*self._inputs, *self._outputs])}")
            if tensor.HasField("reshape"):
                raise self._bad(f"{where} to be a tensor without reshape")
            if not _is_index(axis, tensor.dims):
                raise self._bad(f"{where} to be the index of an open dimension in its dims {list(tensor.dims)}")
            if not BY_CONFIG_TYPE[tensor.data_type].itemsize:
                raise self._bad(f"{where} to have a datatype of numbers, as BYTES cannot be padded")
            if (tensor_name, axis) in self._taken:
                raise self._bad(f"{where} to be in one bucket only")
            self._taken.add((tensor_name, axis))
        return axes

    def _mask(self, name: str, mask: Any, input_axes: Mapping[str, int]) -> str | None:
        if mask is None:
            return None
        if mask not in input_axes or len(self._inputs[mask].dims) != 1:
            raise self._bad(f"'{name}.mask' to be an input in its axes that has this dimension only")
        return str(mask)

    def _pad(self, name: str, pad: Any, input_axes: Mapping[str, int]) -> dict[str, float]:
        if not isinstance(pad, dict):
            raise self._bad(f"'{name}.pad' to be an object with a number under the name of each input")
        for tensor_name, value in pad.items():
            where = f"'{name}.pad.{tensor_name}'"
            if tensor_name not in input_axes:
                raise self._bad(f"{where} to be for an input in its axes")
            dtype = BY_CONFIG_TYPE[self._inputs[tensor_name].data_type]
            if type(value) not in (int, float) or not _holds(dtype.numpy, value):
                raise self._bad(f"{where} to be a number that {dtype.name} holds")
        return pad


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_index(axis: Any, dims: Any) -> bool:
    return type(axis) is int and 0 <= axis < len(dims) and dims[axis] == VARIABLE


def _holds(dtype: np.dtype[Any], value: float) -> bool:
    """Whether a type has this number: whole numbers exactly, floating-point ones within their range."""
    if dtype.kind == "b":
        return value in (0, 1)
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return type(value) is int and limits.min <= value <= limits.max
    return math.isfinite(value) and abs(value) <= float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
