"""Prometheus's text format: the lines of one metric.

The writer is ours because prometheus_client appends `_total` to every counter, and Triton's names have none.
Format: https://prometheus.io/docs/instrumenting/exposition_formats/#text-based-format
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence


@dataclass(frozen=True, slots=True)
class Sample:
    """One line: the value, the labels in their order, what is appended to the metric's name."""

    value: float
    labels: Sequence[tuple[str, str]] = ()
    suffix: str = ""


@dataclass(frozen=True, slots=True)
class Family:
    """One metric: its name, its type and its help."""

    name: str
    kind: str
    help: str


def write_family(lines: list[str], family: Family, samples: Iterable[Sample]) -> None:
    """Append a metric's lines, each with its end of line; nothing for one without any sample."""
    header = f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.kind}\n"
    for sample in samples:
        lines.append(header)
        header = ""
        labels = ",".join(f'{name}="{_escape(value)}"' for name, value in sample.labels)
        lines.append(f"{family.name}{sample.suffix}{{{labels}}} " if labels else f"{family.name}{sample.suffix} ")
        lines.append("NaN\n" if math.isnan(sample.value) else f"{sample.value}\n")


def _escape(value: str) -> str:
    # A lone surrogate (a name from a directory entry that is not UTF-8) has no UTF-8 form.
    text = value.encode(errors="backslashreplace").decode()
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
