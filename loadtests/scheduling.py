"""The parts of the benchmark that are about promises under load, not about rates: each with its baseline beside it.

A part is an experiment that is repeated in rounds, on a server that it starts itself, with figures that it measures in
each, of our server and of what it is held against. Load is open: a request is sent when it is due (sluice_client.load),
from this process, and where that was late or short of CPU the part says that its generator was the limit.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from loadtests import timed
from loadtests.plan import Plan
from loadtests.results import Finding, Goal
from loadtests.timed import Times
from sluice_batching.arrivals import Constant, arrivals, exponential
from sluice_client.load.open_loop import Run, Sender, run_precisely, send_at

OURS = "sluice"


@dataclass(frozen=True, slots=True)
class Figure:
    """What is measured: of whom, what, in which unit."""

    who: str
    name: str
    unit: str = ""


@dataclass(frozen=True, slots=True)
class Promise:
    """The limit that a figure of an experiment is held to."""

    text: str
    figure: Figure
    limit: float
    at_least: bool


@dataclass(frozen=True, slots=True)
class Outcome:
    """One round: the figures, and why the generator was the limit, "" when it was not."""

    figures: Mapping[Figure, float]
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Place:
    """Where an experiment runs: a folder of its own, the server's transport, the speed of this machine, and for how long
    a measurement goes on."""

    scratch: Path
    transport: str
    iterations_per_ms: float
    measure_s: float

    @property
    def repository(self) -> Path:
        """The models of the experiment."""
        return self.scratch / "models"

    def write(self, name: str, times: Times, config: str) -> None:
        """Write a model that takes these times."""
        timed.write(self.repository / name, times, self.iterations_per_ms, config)


class Experiment(ABC):
    """One part."""

    case: str
    promises: tuple[Promise, ...]

    def __init__(self, place: Place) -> None:
        """Write its models."""
        self.place = place

    @abstractmethod
    def measure(self) -> Outcome:
        """One round, on a server of its own."""


def at_random(rate: float, over_s: float) -> list[float]:
    """Poisson arrivals, the same ones each time."""
    return list(takewhile(lambda time_s: time_s < over_s, arrivals(Constant(rate), exponential(seed=0))))


def open_load(
    address: str, request: bytes, times_s: Iterable[float], deadline_s: float, connecting: bytes | None = None
) -> Run:
    """Send a request to HOST:PORT at these times, each with this deadline.

    The one that is sent before, to connect, is `connecting` where it is to be another.
    """

    async def load() -> Run:
        async with Sender(address, [connecting or request, request], deadline_s=deadline_s) as sender:
            await sender(0)
            return await send_at(times_s, lambda number: sender(2 * number + 1))

    return run_precisely(load())


def measure(
    kinds: Mapping[str, type[Experiment]], plan: Plan, transport: str, scratch: Path, say: Callable[[str], None]
) -> tuple[list[Finding], list[Goal]]:
    """The experiments among the parts of the plan: their figures, and what they promise."""
    wanted = {part: kind for part, kind in kinds.items() if part in plan.parts}
    findings: list[Finding] = []
    goals: list[Goal] = []
    if not wanted:
        return findings, goals
    iterations_per_ms = timed.calibrate()
    for part, kind in wanted.items():
        folder = scratch / part
        folder.mkdir()
        experiment = kind(Place(folder, transport, iterations_per_ms, plan.open_s))
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
        Finding(case, figure.who, figure.name, figure.unit, tuple(each.figures[figure] for each in outcomes))
        for figure in outcomes[0].figures
    ]


def to_goals(promises: Sequence[Promise], outcomes: Sequence[Outcome]) -> list[Goal]:
    """What was promised; the generator counts as the limit where it was that in most rounds."""
    was_limit = sum(bool(each.problem) for each in outcomes) * 2 > len(outcomes)
    return [
        Goal(each.text, tuple(outcome.figures[each.figure] for outcome in outcomes), each.limit, each.at_least, was_limit)
        for each in promises
    ]


def _brief(outcome: Outcome) -> str:
    figures = (f"{figure.who} {figure.name} {value:.3g} {figure.unit}".strip() for figure, value in outcome.figures.items())
    return "; ".join([*figures, *([outcome.problem] if outcome.problem else [])])
