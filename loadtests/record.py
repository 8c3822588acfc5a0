"""A run of the benchmark as a file: what was measured, where, with which versions and flags, as JSON.

    schema       the version of this format; another one is not read
    measured_at  UTC
    commit       of the checkout, with "-dirty" where files differed from it
    flags        of `python -m loadtests.bench`
    machine, versions, plan
    skipped      what was not measured, and why
    rows         of the table: for each value of a sample its rounds, median, extremes and spread; the generator's CPU,
                 how busy it was, how long it waited for a CPU, and whether it was the limit
    findings     figures of the parts that are no rows of the table
    memories     resident memory before and after many requests
    goals        what rows are held against, in the same run: rounds, median, extremes, spread, limit, whether it is met

What is computed from the rounds is there for other programs; reading takes the rounds. What a peer cannot tell is null.
"""

import json
import math
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loadtests.peers import Sample
from loadtests.results import Finding, Goal, Memory, Row
from loadtests.summary import Summary, summarize
from sluice_client.load.tables import json_number

SCHEMA = 1

ROOT = Path(__file__).resolve().parents[1]

FOLDER = Path(__file__).with_name("results")
LATEST = FOLDER / "latest.json"
"""Where a run is written by default; never committed."""
PUBLISHED = FOLDER / "published.json"
"""The run of which README shows the tables."""


class RecordError(Exception):
    """A file is no result of this benchmark; the text says which, and what is wrong with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """One run; see the top of the file."""

    measured_at: str = ""
    commit: str = ""
    flags: tuple[str, ...] = ()
    machine: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    rows: tuple[Row, ...] = ()
    findings: tuple[Finding, ...] = ()
    memories: tuple[Memory, ...] = ()
    goals: tuple[Goal, ...] = ()


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def commit(root: Path = ROOT) -> str:
    """The commit that is checked out; "unknown" outside of a repository."""
    try:
        found = _git(root, "rev-parse", "HEAD")
        changed = _git(root, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{found}-dirty" if changed else found


def _git(root: Path, *words: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write(path: Path, record: Record) -> None:
    """Write the file, and the folders that it is in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(to_json(record), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> Record:
    """Read a file; RecordError for one that is not there or not of this schema."""
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise RecordError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise RecordError(f"{path} is no JSON: {error}") from error
    try:
        return from_json(content)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError(f"{path} is no result of this benchmark: {error!r}") from error


def to_json(record: Record) -> dict[str, Any]:
    """Plain data."""
    head = {name: getattr(record, name) for name in ("measured_at", "commit", "flags", "machine", "versions", "plan")}
    return {
        "schema": SCHEMA,
        **head,
        "skipped": list(record.skipped),
        "rows": [_row_to_json(row) for row in record.rows],
        "findings": [
            {name: getattr(finding, name) for name in ("case", "who", "figure", "unit")} | _rounds(finding.rounds)
            for finding in record.findings
        ],
        "memories": [asdict(memory) | {"ratio": memory.ratio} for memory in record.memories],
        "goals": [_goal_to_json(goal) for goal in record.goals],
    }


def from_json(content: Mapping[str, Any]) -> Record:
    """The record again; RecordError for another schema, other errors for what is not as `to_json` has it."""
    schema = content.get("schema")
    if schema != SCHEMA:
        found = "no schema" if schema is None else f"schema {schema}"
        raise RecordError(f"it has {found}, and this version reads {SCHEMA}: measure again with `make bench`")
    return Record(
        measured_at=content["measured_at"],
        commit=content["commit"],
        flags=tuple(content["flags"]),
        machine=content["machine"],
        versions=content["versions"],
        plan=content["plan"],
        skipped=tuple(content["skipped"]),
        rows=tuple(map(_row_from_json, content["rows"])),
        findings=tuple(
            Finding(each["case"], each["who"], each["figure"], each["unit"], _numbers(each["rounds"]))
            for each in content["findings"]
        ),
        memories=tuple(
            Memory(each["who"], each["requests"], each["before_bytes"], each["after_bytes"])
            for each in content["memories"]
        ),
        goals=tuple(
            Goal(each["text"], _numbers(each["rounds"]), each["limit"], each["at_least"], each["generator_was_limit"])
            for each in content["goals"]
        ),
    )


def _row_to_json(row: Row) -> dict[str, Any]:
    return {
        "model": row.model,
        "title": row.title,
        "who": row.who,
        "in_flight": row.in_flight,
        "load": row.load,
        "generator": row.generator,
        "generator_was_limit": row.generator_was_limit,
        "values": {
            each.name: _rounds([getattr(sample, each.name) for sample in row.samples]) for each in fields(Sample)
        },
    }


def _row_from_json(content: Mapping[str, Any]) -> Row:
    rounds = {name: _numbers(value["rounds"]) for name, value in content["values"].items()}
    names = list(rounds)
    samples = [Sample(**dict(zip(names, values, strict=True))) for values in zip(*rounds.values(), strict=True)]
    known = {name: content[name] for name in ("model", "title", "who", "in_flight", "load", "generator")}
    return Row(**known, samples=tuple(samples))


def _goal_to_json(goal: Goal) -> dict[str, Any]:
    return {
        "text": goal.text,
        "limit": goal.limit,
        "at_least": goal.at_least,
        "met": goal.is_met,
        "generator_was_limit": goal.generator_was_limit,
        **_rounds(goal.rounds),
    }


def _rounds(values: Sequence[float]) -> dict[str, Any]:
    """What was measured round by round, and what it comes to."""
    summary = summarize(values) if not any(map(math.isnan, values)) else Summary(math.nan, math.nan, math.nan)
    whole = {"median": summary.median, "low": summary.low, "high": summary.high, "spread": summary.spread}
    return {
        "rounds": [json_number(value) for value in values],
        **{name: json_number(value) for name, value in whole.items()},
    }


def _numbers(values: Sequence[float | None]) -> tuple[float, ...]:
    return tuple(math.nan if value is None else float(value) for value in values)
