"""Prints the results: one Markdown table, the goals below it, and the machine."""

import math
from collections.abc import Mapping, Sequence

from loadtests.results import Goal, Memory, Row
from loadtests.summary import Summary

COLUMNS = ("model", "who", "in flight", "requests/s", "server CPU us/request", "p50 ms", "p99 ms", "mean batch",
           "h2load CPU us/request")  # fmt: skip


def render_report(
    rows: Sequence[Row], memories: Sequence[Memory], goals: Sequence[Goal], facts: Mapping[str, str]
) -> str:
    """Everything that was measured, the goals last but for the machine; what was not measured is left out."""
    parts = [
        render_rows(rows) if rows else "",
        "\n".join(map(render_memory, memories)),
        render_goals(goals) if goals else "",
    ]
    return "\n\n".join([part for part in parts if part] + [render_machine(facts)])


def render_rows(rows: Sequence[Row]) -> str:
    """The table; `±` is half the distance between the best and the worst round."""
    return markdown([COLUMNS, *map(_cells, rows)], words=3)


def markdown(cells: Sequence[Sequence[str]], words: int) -> str:
    """A table whose first columns are words, to the left, and the others numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        [text.ljust(w) if n < words else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True))]
        for line in cells
    ]
    rule = ["-" * width if number < words else "-" * (width - 1) + ":" for number, width in enumerate(widths)]
    return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.title,
        row.who,
        row.load,
        _with_spread(row.summary(lambda sample: sample.requests_per_s)),
        _with_spread(row.summary(lambda sample: sample.cpu_us_per_request)),
        _plain(row.summary(lambda sample: sample.p50_ms)),
        _plain(row.summary(lambda sample: sample.p99_ms)),
        _plain(row.summary(lambda sample: sample.mean_batch_rows)),
        _plain(row.summary(lambda sample: sample.generator_cpu_us_per_request)),
    )


def render_goals(goals: Sequence[Goal]) -> str:
    """A line for each goal: its limit, the median and the extremes of what was measured, and whether it is met."""
    cells = [("goal", "", "limit", "measured", "rounds")]
    for goal in goals:
        value, limit = goal.value, f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}"
        rounds = f"{value.low:.3g} to {value.high:.3g}" if value.low != value.high else ""
        cells.append((goal.text, "met" if goal.is_met else "MISSED", limit, f"{value.median:.3g}", rounds))
    return markdown(cells, words=2)


def render_memory(memory: Memory) -> str:
    """Resident memory before and after."""
    before, after = memory.before_bytes / 2**20, memory.after_bytes / 2**20
    return (
        f"{memory.who}: resident memory after the warm-up {before:.1f} MiB,"
        f" after {memory.requests:,} requests more {after:.1f} MiB ({memory.ratio - 1:+.1%})"
    )


def render_machine(facts: Mapping[str, str]) -> str:
    """One line for each fact."""
    return "\n".join(f"{name:<10} {value}" for name, value in facts.items())


def _with_spread(summary: Summary) -> str:
    return f"{_plain(summary)} ±{summary.spread:.0%}"


def _plain(summary: Summary) -> str:
    """Three digits, or all of a larger number; nothing for what was not measured."""
    value = summary.median
    if math.isnan(value):
        return ""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}"
