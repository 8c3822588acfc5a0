"""What requests carry: rows of a model's golden sample, cut once, and the answers that belong to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy.typing as npt

    Array = npt.NDArray[Any]

VARIANTS: Final = 16
"""Requests of each number of rows that differ: enough that no two in flight are often the same."""

TOLERANCE: Final = {"rtol": 1e-4, "atol": 1e-5}
"""Float32 rounds otherwise in a batch than alone, and on another machine."""


class PayloadError(Exception):
    """A golden sample does not fit its model; the text says what is missing or differs."""


@dataclass(frozen=True, slots=True)
class Payload:
    """One request: arrays by input, and the model's answer by output, as far as the golden sample has it."""

    inputs: Mapping[str, Array]
    answer: Mapping[str, Array]

    def check(self, outputs: Mapping[str, Array | None], model: str) -> None:
        """Hold an answer against the golden one. PayloadError when they differ."""
        for name, wanted in self.answer.items():
            got = outputs[name]
            is_float = np.issubdtype(wanted.dtype, np.floating)
            if got is None or got.shape != wanted.shape:
                shape = None if got is None else got.shape
                raise PayloadError(f"model {model!r}: output {name!r} has the shape {shape}, the golden {wanted.shape}")
            if not (np.allclose(got, wanted, **TOLERANCE) if is_float else np.array_equal(got, wanted)):
                raise PayloadError(f"model {model!r}: output {name!r} differs from the golden sample")


def cut_payloads(golden: Path, inputs: Sequence[str], outputs: Sequence[str], rows: Sequence[int]) -> list[Payload]:
    """`VARIANTS` payloads of each number of rows, from the arrays [rows, ...] of a golden sample (numpy.savez).

    Rows are taken from the sample one after the other, and from its start again at its end. PayloadError when an array
    is missing, empty or not of the others' length.
    """
    try:
        with np.load(golden) as file:
            arrays = {name: file[name] for name in file.files if name in {*inputs, *outputs}}
    except (OSError, ValueError) as error:
        raise PayloadError(f"{golden} cannot be read: {error}") from None
    missing = [name for name in inputs if name not in arrays]
    if missing:
        raise PayloadError(f"{golden} has no array for the inputs {', '.join(missing)}")
    lengths = {array.shape[:1] for array in arrays.values()}
    if len(lengths) != 1 or lengths & {(), (0,)}:
        raise PayloadError(f"{golden}: inputs and outputs need one array [rows, ...] each, of the same number of rows")
    ((length,),) = lengths
    payloads, first = [], 0
    for number in [number for number in rows for _ in range(VARIANTS)]:
        index = np.arange(first, first + number) % length
        first = (first + number) % length
        cut = {name: np.ascontiguousarray(array[index]) for name, array in arrays.items()}
        payloads.append(
            Payload({name: cut[name] for name in inputs}, {name: cut[name] for name in outputs if name in cut})
        )
    return payloads
