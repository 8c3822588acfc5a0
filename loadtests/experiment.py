"""The parts of the benchmark that are about promises under load, not about rates: each with its baseline beside it.

A part is an experiment that is repeated in rounds, on a server that it starts itself, with figures that it measures in
each, of our server and of what it is held against. Load is open: a request is sent when it is due (sluice_client.load),
from this process, and where that was late or short of CPU the part says that its generator was the limit.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from loadtests import timed
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
    """Where an experiment runs: its folder, the server's transport, how fast this machine is, how long to measure."""

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


def objective(slo_s: float) -> str:
    """What gives a model this objective, in its configuration."""
    return f'parameters {{ key: "slo_p99_ms" value {{ string_value: "{slo_s * 1e3:.0f}" }} }}'


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
