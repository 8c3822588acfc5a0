"""A replay's verdict as text and as JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

from sluice_client.load.tables import columns, json_number
from sluice_client.replay.verdict import DIFFERENT, SAME, UNDECIDED

if TYPE_CHECKING:
    from sluice_client.replay.differences import Difference
    from sluice_client.replay.verdict import Differing, Quantile, Verdict
    from sluice_proto.capture import Capture

SHOWN_TEXT, SHOWN_JSON = 10, 1000
"""Requests whose differences are told one by one."""

VERDICTS: Final = {SAME: "same", DIFFERENT: "different", UNDECIDED: "none"}


def as_text(verdict: Verdict, capture: Capture) -> str:
    """For people."""
    run = verdict.replayed.run
    outcomes = ", ".join(f"{code} {count}" for code, count in run.records.outcomes.items())
    skipped = "".join(f", {count} not compared ({reason})" for reason, count in verdict.incomparable.items())
    lines = [
        f"{len(run.records)} requests, a share of {capture.head.rate:g} of those that came: {outcomes}",
        f"answers: {len(verdict.differing)} of {verdict.compared} differ from {_of(verdict)}{skipped}",
    ]
    if capture.truncated_bytes:
        lines.insert(0, f"the file ends within a record: its last {capture.truncated_bytes} bytes were passed over")
    for differing in verdict.differing[:SHOWN_TEXT]:
        lines += [
            f"  request {differing.number}, {differing.model}: {_sentence(each)}" for each in differing.differences
        ]
    if len(verdict.differing) > SHOWN_TEXT:
        lines.append(f"  and {len(verdict.differing) - SHOWN_TEXT} more requests")
    lines += ["", *_table(verdict), "", _sending(verdict)]
    if verdict.exit_status == UNDECIDED:
        lines.append(f"no verdict: {verdict.problem}")
    else:
        lines.append(f"verdict: {VERDICTS[verdict.exit_status]}")
    return "\n".join(lines)


def _of(verdict: Verdict) -> str:
    return "the recorded ones" if verdict.source == "recorded" else f"those of {verdict.source}"


def _sentence(difference: Difference) -> str:
    where = f"output {difference.output!r}" if difference.output else "the answer"
    if not difference.elements:
        change = f": {difference.expected} became {difference.actual}" if difference.expected else ""
        return f"{where}, {difference.reason}{change}"
    largest = "" if difference.largest is None else f"; the largest difference is {difference.largest:.6g}"
    return (
        f"{where}, {difference.count} of {difference.elements} values, first at {list(difference.index)}: "
        f"{difference.expected} became {difference.actual}{largest}"
    )


def _table(verdict: Verdict) -> list[str]:
    head = ("latency", f"{verdict.source} ms", "replayed ms", "ratio", "limit", "")
    lines = columns([head, *map(_row, verdict.quantiles)])
    if verdict.source == "recorded":
        lines.append("recorded: measured in the server; replayed: with the network and this client")
    return lines


def _row(each: Quantile) -> tuple[str, ...]:
    limit = "" if each.limit is None else f"{each.limit:g}"
    kept = "" if each.limit is None else "pass" if each.is_met else "FAIL"
    return (
        f"p{each.percent:g}",
        f"{each.expected_s * 1e3:.3f}",
        f"{each.actual_s * 1e3:.3f}",
        f"{each.ratio:.2f}",
        limit,
        kept,
    )


def _sending(verdict: Verdict) -> str:
    generator = verdict.replayed.run.generator
    return (
        f"sending: p99 of the error of the gaps between requests {verdict.replayed.gap_error_p99_s * 1e3:.2f} ms, "
        f"of the lag {generator.lag_p99_s * 1e3:.2f} ms; {generator.cpu_share:.2f} of a core; "
        f"up to {generator.most_in_flight} in flight"
    )


def as_json(verdict: Verdict, capture: Capture) -> dict[str, Any]:
    """For programs; numbers that are none are null."""
    run = verdict.replayed.run
    return {
        "verdict": VERDICTS[verdict.exit_status],
        "requests": len(run.records),
        "captured_share": capture.head.rate,
        "truncated_bytes": capture.truncated_bytes,
        "outcomes": dict(run.records.outcomes),
        "expected": verdict.source,
        "compared": verdict.compared,
        "not_compared": dict(verdict.incomparable),
        "differing": len(verdict.differing),
        "differences": [one for each in verdict.differing[:SHOWN_JSON] for one in _differences(each)],
        "latency": [
            {
                "percent": each.percent,
                "expected_ms": json_number(each.expected_s * 1e3),
                "replayed_ms": json_number(each.actual_s * 1e3),
                "ratio": json_number(each.ratio),
                "limit": each.limit,
                "met": each.is_met,
            }
            for each in verdict.quantiles
        ],
        "gap_error_p99_ms": json_number(verdict.replayed.gap_error_p99_s * 1e3),
        "generator": {
            "lag_p99_ms": json_number(run.generator.lag_p99_s * 1e3),
            "cpu_share": run.generator.cpu_share,
            "most_in_flight": run.generator.most_in_flight,
            "not_sent": run.generator.not_sent,
            "problem": verdict.problem,
        },
    }


def _differences(differing: Differing) -> list[dict[str, Any]]:
    return [
        {
            "request": differing.number,
            "model": differing.model,
            **asdict(each),
            "index": list(each.index),
            "largest": json_number(each.largest),
        }
        for each in differing.differences
    ]
