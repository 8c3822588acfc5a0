"""Tensors from and to the command line: what `sluice infer` reads as inputs, makes up, and prints as JSON."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final
from zipfile import BadZipFile

import numpy as np
from numpy.lib.npyio import NpzFile

from sluice_client.errors import InvalidRequest
from sluice_client.results import Array, TensorMetadata
from sluice_proto import tensors

_RANDOM_SEED: Final = 0  # the same command sends the same data
_MAX_FILL_ELEMENTS: Final = 2**29  # 2 GiB of FP32, all that a message can carry


def parse_assignments(option: str, texts: Iterable[str]) -> dict[str, str]:
    """`NAME=VALUE` texts as a dict. InvalidRequest for one that is not, or a name given twice."""
    parsed: dict[str, str] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals or not value:
            raise InvalidRequest(f"{option} {text!r} is not NAME=VALUE")
        if name in parsed:
            raise InvalidRequest(f"{option} gives {name!r} twice")
        parsed[name] = value
    return parsed


def parse_shapes(texts: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """`NAME=D,D` texts as shapes."""
    shapes = {}
    for name, text in parse_assignments("--shape", texts).items():
        dims = text.split(",")
        if not all(dim.isascii() and dim.isdigit() for dim in dims):
            raise InvalidRequest(f"--shape {name}={text}: write whole numbers, like {name}=1,16")
        shapes[name] = tuple(map(int, dims))
    return shapes


def read_input(name: str, text: str, described: Mapping[str, TensorMetadata]) -> Array:
    """The array that `text` means: a .npy file, `@file.npz:key`, or JSON in the datatype that the model declares.

    OSError when a file cannot be read, InvalidRequest for everything else that is wrong.
    """
    if text.startswith("@"):
        path, _, key = text[1:].rpartition(":")
        if not path.endswith(".npz"):
            raise InvalidRequest(f"--input {name}={text}: write @file.npz:key")
        return _read_npz(name, path, key)
    if text.endswith(".npy"):
        return _read_npy(name, text)
    if name not in described:
        raise InvalidRequest(f"--input {name}: the model has no such input; it has {', '.join(sorted(described))}")
    return _from_json(name, text, described[name].datatype)


def fill(tensor: TensorMetadata, how: str, shape: tuple[int, ...] | None) -> Array:
    """Zeros or random values for an input; its batch dimension is 1 unless `shape` says otherwise."""
    if shape is None:
        shape = tuple(1 if index == 0 and size < 0 else size for index, size in enumerate(tensor.shape))
    if min(shape, default=0) < 0:
        example = ",".join("1" if size < 0 else str(size) for size in shape)
        raise InvalidRequest(
            f"input {tensor.name!r} has the open shape {list(tensor.shape)}: say which, --shape {tensor.name}={example}"
        )
    if math.prod(shape) > _MAX_FILL_ELEMENTS:
        raise InvalidRequest(f"input {tensor.name!r}: a shape of {list(shape)} is more than one message can carry")
    dtype = _dtype(tensor.name, tensor.datatype)
    if dtype.name == "BYTES":
        return np.full(shape, b"" if how == "zeros" else b"sluice", np.object_)
    if how == "zeros":
        return np.zeros(shape, dtype.numpy)
    generator = np.random.default_rng(_RANDOM_SEED)
    # Whole numbers stay small: they are often indices, and 0 and 1 are valid for all types.
    values = generator.integers(0, 2, shape) if dtype.numpy.kind in "biu" else generator.random(shape)
    return np.asarray(values).astype(dtype.numpy)


def json_value(array: Array) -> Any:
    """The array as nested lists that JSON can carry: bytes as text, NaN and infinities as strings."""
    if array.dtype.kind == "O":
        return _map(array.tolist(), lambda element: element.decode("utf-8", "backslashreplace"))
    if array.dtype.kind in "biu":
        return array.tolist()
    values = array.astype(np.float64).tolist()
    return values if np.isfinite(array.astype(np.float64)).all() else _map(values, _json_float)


def _json_float(value: float) -> float | str:
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _map(value: Any, function: Any) -> Any:
    return [_map(each, function) for each in value] if isinstance(value, list) else function(value)


def _read_npy(name: str, path: str) -> Array:
    try:
        with Path(path).open("rb") as file:
            array: Array = np.lib.format.read_array(file, allow_pickle=False)
    except ValueError as error:
        raise InvalidRequest(f"--input {name}: {path} is not a .npy file of plain values: {error}") from None
    return array


def _read_npz(name: str, path: str, key: str) -> Array:
    try:
        archive = np.load(path, allow_pickle=False)
        if not isinstance(archive, NpzFile):
            raise InvalidRequest(f"--input {name}: {path} holds one array and no names; write {name}=file.npy")
        with archive:
            if key not in archive:
                raise InvalidRequest(f"--input {name}: {path} holds no array {key!r}; it has {', '.join(archive)}")
            array: Array = archive[key]
    except (ValueError, EOFError, BadZipFile) as error:
        raise InvalidRequest(f"--input {name}: {path} is not a .npz file of plain values: {error}") from None
    return array


def _from_json(name: str, text: str, datatype: str) -> Array:
    dtype = _dtype(name, datatype)
    try:
        value = json.loads(text)
    except ValueError as error:
        raise InvalidRequest(f"--input {name}={text}: neither a .npy file nor JSON: {error}") from None
    try:
        if dtype.name == "BYTES":
            return np.asarray(value, np.str_)
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise InvalidRequest(
                f"--input {name}: {datatype} needs numbers or true and false, in lists of equal length"
            )
        with np.errstate(invalid="ignore", over="ignore"):
            converted: Array = array.astype(dtype.numpy)
    except (ValueError, OverflowError) as error:
        raise InvalidRequest(f"--input {name}: not an array of {datatype}: {error}") from None
    fits = np.array_equal if dtype.numpy.kind in "biu" else _same_finite
    if not fits(converted, array):
        raise InvalidRequest(f"--input {name}: some values do not fit into {datatype}")
    return converted


def _same_finite(converted: Array, array: Array) -> bool:
    """Whether no number became infinite by the conversion."""
    return bool(np.array_equal(np.isfinite(converted), np.isfinite(array)))


def _dtype(name: str, datatype: str) -> tensors.DType:
    if datatype not in tensors.BY_NAME:
        raise InvalidRequest(f"input {name!r}: the model declares the unknown datatype {datatype!r}")
    return tensors.BY_NAME[datatype]
