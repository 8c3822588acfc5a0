"""Prints a run of the benchmark: Markdown tables of what was measured and of the goals, and the machine."""

import math
from collections.abc import Mapping, Sequence

from loadtests.markdown import markdown, plain
from loadtests.record import Record
from loadtests.results import Finding, Goal, Memory, Row
from loadtests.summary import Summary

COLUMNS = ("model", "who", "in flight", "requests/s", "server CPU us/request", "p50 ms", "p99 ms", "mean batch",
           "generator CPU us/request")  # fmt: skip

LIMITED = "†"
LIMITED_NOTE = (
    f"{LIMITED} the load generator was the limit: nine tenths of its time busy or waiting for a CPU, or late."
)


def render_report(record: Record) -> str:
    """Everything that was measured, and then the machine."""
    return f"{render_tables(record)}\n\n{render_machine(record.machine)}"


def render_tables(record: Record) -> str:
    """Everything that was measured, the goals last; what was not measured is left out."""
    limited = any(each.generator_was_limit for each in (*record.rows, *record.goals))
    parts = [
        render_rows(record.rows) if record.rows else "",
        render_findings(record.findings) if record.findings else "",
        "\n".join(map(render_memory, record.memories)),
        render_goals(record.goals) if record.goals else "",
        LIMITED_NOTE if limited else "",
        "\n".join(f"Not measured: {text}" for text in record.skipped),
    ]
    return "\n\n".join(part for part in parts if part)


def render_rows(rows: Sequence[Row]) -> str:
    """The table; `±` is half the distance between the best and the worst round."""
    return markdown([COLUMNS, *map(_cells, rows)], words=3)


def render_findings(findings: Sequence[Finding]) -> str:
    """A line for each figure of the parts that are no rows: the median, and the extremes of the rounds."""
    head = ("case", "who", "figure", "measured", "rounds")
    return markdown([head, *map(_finding_cells, findings)], words=3)


def _finding_cells(each: Finding) -> tuple[str, ...]:
    measured = f"{plain(each.value.median)} {each.unit}".strip()
    return (each.case, each.who, each.figure, measured, _extremes(each.value))


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
        _plain(row.summary(lambda sample: sample.generator_cpu_us_per_request)) + LIMITED * row.generator_was_limit,
    )


def render_goals(goals: Sequence[Goal]) -> str:
    """A line for each goal: its limit, the median and the extremes of what was measured, and whether it is met."""
    cells = [("goal", "", "limit", "measured", "rounds")]
    for goal in goals:
        limit = "" if goal.limit is None else f"{'at least' if goal.at_least else 'at most'} {goal.limit:g}"
        verdict = "" if goal.is_met is None else "met" if goal.is_met else "MISSED"
        measured = plain(goal.value.median) + LIMITED * goal.generator_was_limit
        cells.append((goal.text, verdict, limit, measured, _extremes(goal.value)))
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


def _extremes(value: Summary) -> str:
    return f"{plain(value.low)} to {plain(value.high)}" if value.low != value.high else ""


def _with_spread(summary: Summary) -> str:
    return f"{_plain(summary)} ±{summary.spread:.0%}"


def _plain(summary: Summary) -> str:
    """Three digits, or all of a larger number; nothing for what was not measured."""
    value = summary.median
    if math.isnan(value):
        return ""
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2
    return f"{value:,.{decimals}f}"
