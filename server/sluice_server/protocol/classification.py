"""The classification extension: in place of an output's values, the strongest classes of each row (compatibility, 5).

An element is `<value>:<index>`, and `:<label>` behind it where the output's label file has one, strongest first; the
classes of a row are all of its values, flattened. Of equal values the one with the smaller index comes first, and NaN
comes last; Triton leaves both open.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice_server.errors import InvalidArgument

if TYPE_CHECKING:
    from sluice_server.protocol.interface import TensorInterface

CLASSIFICATION = "classification"
"""The parameter of a requested output; its value is the number of classes."""

CLASSES_MAX = 1_000_000
"""Values of one row that are looked through, and elements of one answer: Triton's bound on the former. An element
costs about a microsecond, in which no other Python code runs."""

_DATATYPES = frozenset(
    {"UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP32", "FP64"}
)  # those that Triton can sort


def class_count(parameters: Any) -> int:
    """How many classes an output's parameters ask for, 0 for its values; `InvalidArgument` for what is no count."""
    if CLASSIFICATION not in parameters:
        return 0
    value = parameters[CLASSIFICATION]
    if value.WhichOneof("parameter_choice") != "int64_param":
        raise InvalidArgument(f"invalid value type for '{CLASSIFICATION}' parameter, expected int64_param")
    count: int = value.int64_param
    if count <= 0:
        raise InvalidArgument(f"invalid value for '{CLASSIFICATION}' parameter, expected classes >= 1, got {count}")
    return count


@dataclass(frozen=True, slots=True)
class Classes:
    """What one request wants of an output: `count` classes of each row, or of the tensor when it `has_rows` not."""

    output: TensorInterface
    count: int
    has_rows: bool

    def __post_init__(self) -> None:
        """Refuse an output whose values have no order, or no form as text."""
        if self.output.dtype.name not in _DATATYPES:
            raise InvalidArgument(
                f"class result not available for output '{self.output.name}' due to unsupported type"
                f" '{self.output.dtype.name}'"
            )

    def of(self, values: np.ndarray) -> np.ndarray:
        """The elements as an object array of bytes, [rows, k] or [k], where k is at most the number of classes."""
        rows = len(values) if self.has_rows else 1
        table = values.reshape(rows, values.size // rows)
        count = min(self.count, table.shape[1])
        if max(table.shape[1], rows * count) > CLASSES_MAX:
            raise InvalidArgument(
                f"classification output tensor too large: output '{self.output.name}' has {table.shape[1]} classes in"
                f" each of {rows} rows, of which {count} are asked for; {CLASSES_MAX} are possible at most"
            )
        elements = np.empty((rows, count), object)
        places = _strongest_first(table)[:, :count]
        for row, (strongest, indices) in enumerate(
            zip(np.take_along_axis(table, places, 1).tolist(), places.tolist(), strict=True)
        ):
            elements[row] = [self._element(value, index) for value, index in zip(strongest, indices, strict=True)]
        return elements if self.has_rows else elements[0]

    def _element(self, value: float, index: int) -> bytes:
        text = b"%f:%d" % (value, index) if isinstance(value, float) else b"%d:%d" % (value, index)
        labels = self.output.labels
        return b"%s:%s" % (text, labels[index]) if index < len(labels) and labels[index] else text


def _strongest_first(table: np.ndarray) -> np.ndarray:
    """The indices of each row by falling value."""
    # Both turn the order around and keep every value apart, which the negative of a whole number does not.
    turned = -table if table.dtype.kind == "f" else ~table
    return np.argsort(turned, axis=1, kind="stable")
