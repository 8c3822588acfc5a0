"""Says what became worse between two runs of the benchmark: `python -m loadtests.compare OLD.json NEW.json`.

Only ratios are compared, each taken within its own run, so that the two runs may be of different days. A ratio is worse
when its median moved to the bad side by more than the spreads of the two runs, half the distance between their extreme
rounds each, and a floor explain. A run of fewer than three rounds tells no spread: its ratios are not judged.
Exit codes: 0 nothing is worse, 1 something is, 2 the two cannot be compared.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from loadtests.markdown import markdown
from loadtests.record import Record, RecordError, read
from loadtests.results import Goal

FLOOR = 0.03
"""Three rounds that happen to agree do not make a change of so little a fact."""

ROUNDS_MIN = 3


class Verdict(StrEnum):
    """What became of a ratio."""

    WORSE = "WORSE"
    BETTER = "better"
    SAME = "same"
    UNKNOWN = "not judged"
    GONE = "not in the new run"
    NEW = "not in the old run"


@dataclass(frozen=True, slots=True)
class Change:
    """One ratio in both runs; None where it was not measured."""

    text: str
    old: Goal | None
    new: Goal | None
    verdict: Verdict
    move: float = math.nan
    """How far the median moved to the bad side, as a share of the old one."""
    explained: float = math.nan
    """How far it may move by chance, as a share too."""


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, print, and give the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.compare", description=__doc__, allow_abbrev=False)
    parser.add_argument("old", type=Path, metavar="OLD.json")
    parser.add_argument("new", type=Path, metavar="NEW.json")
    args = parser.parse_args(argv)
    try:
        old, new = read(args.old), read(args.new)
    except RecordError as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    changes = compare(old.goals, new.goals)
    if not any(change.old and change.new for change in changes):
        print("compare: the two runs have no ratio in common: did they measure the same --parts?", file=sys.stderr)
        return 2
    print(render(old, new, changes))
    judged = [change for change in changes if change.verdict in (Verdict.WORSE, Verdict.BETTER, Verdict.SAME)]
    if not judged:
        print(f"compare: nothing can be judged, measure {ROUNDS_MIN} rounds or more in both runs", file=sys.stderr)
        return 2
    return int(any(change.verdict is Verdict.WORSE for change in judged))


def compare(old: Sequence[Goal], new: Sequence[Goal]) -> list[Change]:
    """Every ratio of either run, those of the old one first."""
    before, after = ({goal.text: goal for goal in goals} for goals in (old, new))
    return [_change(text, before.get(text), after.get(text)) for text in {**before, **after}]


def _change(text: str, old: Goal | None, new: Goal | None) -> Change:
    if old is None or new is None:
        return Change(text, old, new, Verdict.NEW if old is None else Verdict.GONE)
    is_measured = not any(map(math.isnan, (*old.rounds, *new.rounds)))
    if old.at_least != new.at_least or min(len(old.rounds), len(new.rounds)) < ROUNDS_MIN or not is_measured:
        return Change(text, old, new, Verdict.UNKNOWN)
    was, now = old.value, new.value
    move = was.median - now.median if old.at_least else now.median - was.median
    chance = (was.high - was.low) / 2 + (now.high - now.low) / 2 + FLOOR * abs(was.median)
    verdict = Verdict.WORSE if move > chance else Verdict.BETTER if -move > chance else Verdict.SAME
    scale = abs(was.median) or math.nan
    return Change(text, old, new, verdict, move / scale, chance / scale)


def render(old: Record, new: Record, changes: Sequence[Change]) -> str:
    """Where the runs come from, a table of all ratios, and what to know about them."""
    lines = [f"old: {_origin(old)}", f"new: {_origin(new)}"]
    lines += [
        f"note: {name} differs: {old.machine.get(name, 'unknown')} / {new.machine.get(name, 'unknown')}"
        for name in ("processor", "cores")
        if old.machine.get(name) != new.machine.get(name)
    ]
    head = ("ratio", "verdict", "old", "new", "moved", "by chance up to")
    return "\n".join([*lines, "", markdown([head, *map(_cells, changes)], words=2)])


def _origin(record: Record) -> str:
    return f"{record.measured_at}, commit {record.commit[:12]}{'-dirty' * record.commit.endswith('-dirty')}"


def _cells(change: Change) -> tuple[str, ...]:
    limited = [goal for goal in (change.old, change.new) if goal is not None and goal.generator_was_limit]
    verdict = change.verdict + (" (a load generator was the limit)" if limited else "")
    if math.isnan(change.move):
        return (change.text, verdict, _median(change.old), _median(change.new), "", "")
    # `move` is towards the bad side; shown is whether the ratio rose.
    rose = -change.move if change.old is not None and change.old.at_least else change.move
    return (change.text, verdict, _median(change.old), _median(change.new), f"{rose:+.1%}", f"{change.explained:.1%}")


def _median(goal: Goal | None) -> str:
    return "" if goal is None else f"{goal.value.median:.3g}"


if __name__ == "__main__":
    sys.exit(main())
