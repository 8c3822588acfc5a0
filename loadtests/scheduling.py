"""Repeats the experiments of the benchmark, and makes figures and goals of what they find."""

from collections.abc import Callable, Sequence
from pathlib import Path

from loadtests import timed
from loadtests.experiment import Figure, Outcome, Place, Promise
from loadtests.plan import EXPERIMENTS, Plan
from loadtests.results import Finding, Goal


def measure(plan: Plan, transport: str, scratch: Path, say: Callable[[str], None]) -> tuple[list[Finding], list[Goal]]:
    """The experiments among the parts of the plan: their figures, and what they promise."""
    wanted = {part: kind for part, kind in EXPERIMENTS.items() if part in plan.parts}
    findings: list[Finding] = []
    goals: list[Goal] = []
    if not wanted:
        return findings, goals
    iterations_per_ms = timed.calibrate()
    for part, kind in wanted.items():
        folder = scratch / part
        folder.mkdir()
        experiment = kind(Place(folder, transport, iterations_per_ms, plan.experiment_s(part)))
        outcomes = []
        for number in range(1, plan.open_rounds + 1):
            outcomes.append(experiment.measure())
            say(f"round {number} of {plan.open_rounds}: {experiment.case}: {_brief(outcomes[-1])}")
        findings += to_findings(experiment.case, outcomes)
        goals += to_goals(experiment.promises, outcomes)
    return findings, goals


def to_findings(case: str, outcomes: Sequence[Outcome]) -> list[Finding]:
    """Each figure over the rounds."""
    return [
        Finding(case, figure.who, figure.name, figure.unit, _rounds(figure, outcomes)) for figure in outcomes[0].figures
    ]


def to_goals(promises: Sequence[Promise], outcomes: Sequence[Outcome]) -> list[Goal]:
    """What was promised; the generator counts as the limit where it was that in most rounds."""
    was_limit = sum(bool(each.problem) for each in outcomes) * 2 > len(outcomes)
    return [Goal(each.text, _rounds(each.figure, outcomes), each.limit, each.at_least, was_limit) for each in promises]


def _rounds(figure: Figure, outcomes: Sequence[Outcome]) -> tuple[float, ...]:
    """Its value in each round, as Python's number whatever measured it."""
    return tuple(float(each.figures[figure]) for each in outcomes)


def _brief(outcome: Outcome) -> str:
    figures = (
        f"{figure.who} {figure.name} {value:.3g} {figure.unit}".strip() for figure, value in outcome.figures.items()
    )
    return "; ".join([*figures, *([outcome.problem] if outcome.problem else [])])
