"""Prints the results: one Markdown table, the goals below it, and the machine."""

import math
from collections.abc import Mapping, Sequence

from loadtests.results import Goal, Memory, Row
from loadtests.summary import Summary

COLUMNS = ("model", "who", "in flight", "requests/s", "server CPU us/request", "p50 ms", "p99 ms", "mean batch",
           "h2load CPU us/request")  # fmt: skip


def render_rows(rows: Sequence[Row]) -> str:
    """The table; `±` is half the distance between the best and the worst round."""
    cells = [COLUMNS, *map(_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    # Words to the left, numbers to the right.
    lines = [[text.ljust(w) if n < 3 else text.rjust(w) for n, (text, w) in enumerate(zip(line, widths, strict=True))]
             for line in cells]  # fmt: skip
    rule = ["-" * width if number < 3 else "-" * (width - 1) + ":" for number, width in enumerate(widths)]
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
    """One line for each goal: pass or MISS, what was measured, and the limit."""
    width = max(len(goal.text) for goal in goals)
    lines = []
    for goal in goals:
        value, limit = goal.value, f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}"
        rounds = f" ({value.low:.3g} to {value.high:.3g})" if value.low != value.high else ""
        lines.append(f"{'pass' if goal.is_met else 'MISS'}  {goal.text:<{width}}  {value.median:.3g}{rounds}, {limit}")
    return "\n".join(lines)


def render_memory(memory: Memory) -> str:
    """Resident memory before and after."""
    before, after = memory.before_bytes / 2**20, memory.after_bytes / 2**20
    return (
        f"resident memory before {before:.1f} MiB, after {memory.requests:,} requests {after:.1f} MiB"
        f" ({memory.growth:+.1%})"
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
