"""How `sluice load` and `sluice replay` print: tables of numbers as text, and numbers as JSON has them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table: its first column to the left, the others, of numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]


def json_number(value: float | None) -> float | None:
    """The number; None for NaN and infinities, which JSON does not know."""
    return value if value is not None and math.isfinite(value) else None
