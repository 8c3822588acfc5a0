"""A table in Markdown that is read as it is, too: the one way in which everything here prints its results."""

import math
from collections.abc import Sequence


def markdown(cells: Sequence[Sequence[str]], words: int) -> str:
    """A table whose first columns are words, to the left, and the others numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [text.ljust(w) if n < words else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in cells
    ]
    rule = ["-" * width if number < words else "-" * (width - 1) + ":" for number, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def plain(value: float | None) -> str:
    """Three digits, or all of a larger number; a dash for what was not measured."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
