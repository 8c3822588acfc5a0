"""What `sluice load` prints: the table of a load, the curve of a search as it grows, and both as JSON. Pure."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from sluice_client.load.capacity import End, Verdict, replicas_needed, windows_needed
from sluice_client.load.latencies import summarize
from sluice_client.load.tables import columns, json_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_client.load.capacity import Capacity, Plan, Step
    from sluice_client.load.counters import Counters
    from sluice_client.load.latencies import Generator, Quantiles, Records, Summary
    from sluice_client.load.objectives import Objective

JSON_WINDOW_S: Final = 1.0
"""Of the windows over time: long enough for quantiles at some hundred requests a second, short enough for a plot."""


@dataclass(frozen=True, slots=True)
class Report:
    """A load that is over: what was asked for, and what came of it. `records` are those that count."""

    requested_per_s: float
    first_s: float
    span_s: float
    deadline_s: float
    records: Records
    generator: Generator
    counted: Counters | None
    objectives: tuple[Objective, ...]

    @property
    def summary(self) -> Summary:
        """Of all requests that count."""
        return summarize(self.records, self.span_s, self.deadline_s)

    @property
    def is_good(self) -> bool:
        """Whether this is a measurement of the server, and what it had to be: every objective, or any answer at all."""
        if self.generator.problem:
            return False
        if self.objectives:
            return all(objective.is_met(self.records) for objective in self.objectives)
        return bool(len(self.records.response_s))

    def text(self) -> str:
        """The table."""
        summary = self.summary
        failed = {name: count for name, count in summary.outcomes.items() if name != "OK"}
        codes = "".join(f", {name} {count}" for name, count in failed.items())
        rates = (self.requested_per_s, summary.sent_per_s, summary.answered_per_s, summary.goodput_per_s)
        generator = self.generator
        lines = [
            *columns(
                [
                    ("", "requested", "sent", "answered", "goodput"),
                    ("requests/s", *(f"{rate:,.1f}" for rate in rates)),
                ]
            ),
            "",
            *columns(
                [
                    ("ms", "p50", "p95", "p99", "p99.9", "max"),
                    ("response time, from the intended sending", *_quantiles_ms(summary.response)),
                    ("service time, from the real sending", *_quantiles_ms(summary.service)),
                    ("lag of the generator", *_quantiles_ms(summary.lag)),
                ]
            ),
            "",
            f"errors     {summary.error_ratio:.2%} of {summary.requests:,} requests{codes}",
        ]
        if self.counted is not None:
            lines.append(f"server     {_counted(self.counted)}")
        verdict = generator.problem or "not the bottleneck"
        lines.append(
            f"generator  {generator.cpu_share:.2f} of a core, at most {generator.most_in_flight:,} in flight; {verdict}"
        )
        lines += [f"objective  {_objective(objective, self.records)}" for objective in self.objectives]
        return "\n".join(lines)

    def json(self) -> dict[str, Any]:
        """The same, and the windows over time, for programs."""
        windows = [
            {"from_s": self.first_s + index * JSON_WINDOW_S} | _summary_json(summarize(window, JSON_WINDOW_S))
            for index, window in enumerate(
                self.records.windows(self.first_s, JSON_WINDOW_S, int(self.span_s / JSON_WINDOW_S))
            )
        ]
        objectives = [
            {
                "objective": objective.text,
                "value": json_number(objective.value(self.records)),
                "met": objective.is_met(self.records),
            }
            for objective in self.objectives
        ]
        return {
            "requested_per_s": self.requested_per_s,
            **_summary_json(self.summary),
            "generator": asdict(self.generator) | {"problem": self.generator.problem},
            "server": _counted_json(self.counted),
            "objectives": objectives,
            "windows": windows,
        }


CURVE_TITLES: Final = (
    "requests/s", "p50 ms", "p95 ms", "p99 ms", "p99.9 ms", "errors", "mean batch", "windows met", "verdict",
)  # fmt: skip


def curve_head() -> str:
    """The titles of the curve."""
    return _curve_line(CURVE_TITLES)


def curve_row(step: Step, verdict: Verdict, counted: Counters | None) -> str:
    """One measurement of a search."""
    reason = ", falls behind" if step.is_behind else ""
    # A rate that holds is no worse for a generator that was late.
    problem = f"; {step.problem}" if step.problem and verdict is not Verdict.HOLDS else ""
    response = step.response
    return _curve_line(
        (
            f"{step.rate_per_s:,.1f}",
            *_quantiles_ms(response)[:4],
            f"{step.error_ratio:.2%}",
            "" if counted is None else f"{counted.mean_batch_rows:.1f}",
            f"{step.met} of {step.windows}",
            verdict.value + reason + problem,
        )
    )


def capacity_text(capacity: Capacity, plan: Plan, windows: int, objectives: Sequence[Objective]) -> str:
    """What a search found, in a sentence."""
    wanted = " ".join(objective.text for objective in objectives)
    needed = windows_needed(windows, plan.confidence)
    if capacity.end is End.FOUND:
        return (
            f"capacity: {_rate(capacity.rate_per_s)} requests/s keep {wanted} ({needed} of {windows} windows, twice; "
            f"{plan.precision:.0%} more do not)"
        )
    if capacity.end is End.ALWAYS:
        return f"capacity: at least {_rate(capacity.rate_per_s)} requests/s keep {wanted}; try more with --max-rate"
    if capacity.end is End.NEVER:
        return f"no capacity: {wanted} is not kept at {_rate(plan.least_per_s)} requests/s either"
    if capacity.end is End.GENERATOR:
        last = capacity.steps[-1]
        kept = f"; {_rate(capacity.rate_per_s)} requests/s keep {wanted}" if capacity.rate_per_s else ""
        at = f"at {_rate(last.rate_per_s)} requests/s"
        return f"no capacity found: {last.problem}, {at}, so this is no limit of the server{kept}"
    return (
        f"no capacity found: measurements of the same rate contradict each other, {len(capacity.steps)} times; "
        "is something else using the machine? Longer windows (--window) help"
    )


def replicas_text(target_per_s: float, capacity: Capacity, headroom: float) -> str:
    """How many replicas a rate takes."""
    replicas = replicas_needed(target_per_s, capacity.rate_per_s, headroom)
    return (
        f"replicas: {_rate(target_per_s)} requests/s take {replicas} at {headroom:.0%} headroom "
        f"({_rate(target_per_s / replicas)} requests/s each), {replicas + 1} if one may be away"
    )


def replicas_json(target_per_s: float, capacity: Capacity, headroom: float) -> dict[str, float]:
    """The same for programs."""
    replicas = replicas_needed(target_per_s, capacity.rate_per_s, headroom)
    return {"target_per_s": target_per_s, "headroom": headroom, "replicas": replicas}


def capacity_json(
    capacity: Capacity, objectives: Sequence[Objective], curve: Sequence[tuple[Step, Verdict, Counters | None]]
) -> dict[str, Any]:
    """A search for programs; `capacity_per_s` is null where there is none."""
    return {
        "capacity_per_s": capacity.rate_per_s if capacity.end in (End.FOUND, End.ALWAYS) else None,
        "kept_at_per_s": capacity.rate_per_s or None,
        "end": capacity.end.name.lower(),
        "objectives": [objective.text for objective in objectives],
        "curve": [
            {
                "rate_per_s": step.rate_per_s,
                "response": _quantiles_json(step.response),
                "error_ratio": json_number(step.error_ratio),
                "windows": step.windows,
                "windows_met": step.met,
                "falls_behind": step.is_behind,
                "generator_problem": step.problem,
                "verdict": verdict.value,
                "server": _counted_json(counted),
            }
            for step, verdict, counted in curve
        ],
    }


def _rate(per_s: float) -> str:
    return f"{per_s:,.1f}".removesuffix(".0")


def _objective(objective: Objective, records: Records) -> str:
    value = objective.value(records)
    shown = f"{value * 1e3:,.1f} ms" if objective.share else f"{value:.2%}"
    if math.isnan(value):
        shown = "nothing was answered"
    return f"{objective.text}: {shown}, {'met' if objective.is_met(records) else 'MISSED'}"


def _counted(counted: Counters) -> str:
    return (
        f"mean batch {counted.mean_batch_rows:.1f} rows, {counted.queue_ms:.2f} ms in the queue, "
        f"{counted.compute_ms:.2f} ms in runs (warm-up included)"
    )


def _counted_json(counted: Counters | None) -> dict[str, float] | None:
    if counted is None:
        return None
    return {
        "requests": counted.requests,
        "mean_batch_rows": counted.mean_batch_rows,
        "queue_ms": counted.queue_ms,
        "compute_ms": counted.compute_ms,
    }


def _summary_json(summary: Summary) -> dict[str, Any]:
    values: dict[str, Any] = {
        "requests": summary.requests,
        "sent_per_s": summary.sent_per_s,
        "answered_per_s": summary.answered_per_s,
        "goodput_per_s": summary.goodput_per_s,
        "error_ratio": json_number(summary.error_ratio),
        "outcomes": dict(summary.outcomes),
    }
    return values | {name: _quantiles_json(getattr(summary, name)) for name in ("response", "service", "lag")}


def _quantiles_json(quantiles: Quantiles) -> dict[str, float | None]:
    return {name: json_number(value) for name, value in asdict(quantiles).items()}


def _quantiles_ms(quantiles: Quantiles) -> tuple[str, ...]:
    return tuple("-" if math.isnan(value) else f"{value * 1e3:,.2f}" for value in asdict(quantiles).values())


def _curve_line(cells: Sequence[str]) -> str:
    *numbers, verdict = cells
    widths = (12, 9, 9, 9, 9, 8, 10, 11)
    return "  ".join([*(cell.rjust(width) for cell, width in zip(numbers, widths, strict=True)), verdict])
