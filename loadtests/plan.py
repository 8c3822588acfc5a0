"""What the benchmark measures: its parts, whom each of them loads and how, and for how long."""

from collections.abc import Iterable
from dataclasses import dataclass

from loadtests.burst import Burst
from loadtests.coalesce import Coalesce
from loadtests.experiment import Experiment
from loadtests.h2load import Load
from loadtests.models import OCR_SIZES, PIPELINE
from loadtests.overload import Overload
from loadtests.peers import CACHED, ECHO, FEATURES, GRPCIO, LOOP, NATIVE, REST, SHARED, STREAM, UNIQUE
from loadtests.steps import Steps


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table; the bare loop has no load, but batches."""

    model: str
    who: str
    load: Load | None


def _cases(model: str, load: Load, *whos: str) -> tuple[Case, ...]:
    return tuple(Case(model, who, None if who == LOOP else load) for who in whos)


LONE, BASE, BUSY, CROWD, APART = Load(1, 1), Load(2, 16), Load(4, 32), Load(1000, 1), Load(32, 1)
LARGE, LARGER, IMAGES, MIXED = Load(4, 16), Load(4, 25), Load(2, 4), Load(4, 16)

OCR = "ocr"
"""The part that needs a model from a package."""

MEMORY = "memory"
"""The part that is no row of the table."""

EXPERIMENTS: dict[str, type[Experiment]] = {
    "burst": Burst,
    "overload": Overload,
    "steps": Steps,
    "coalesce": Coalesce,
}
"""The parts about promises under load, which are no rows either (`loadtests.scheduling`)."""

PARTS: dict[str, tuple[Case, ...]] = {
    "identity": _cases("identity", BASE, GRPCIO, NATIVE, ECHO, LOOP),
    "lone": _cases("identity", LONE, GRPCIO, NATIVE, ECHO),
    "digits": _cases("digits_mlp", BUSY, GRPCIO, NATIVE, ECHO, LOOP),
    "large": _cases("large_mlp", LARGE, GRPCIO, NATIVE, LOOP) + _cases("large_mlp", LARGER, GRPCIO, NATIVE),
    "images": _cases("images", IMAGES, GRPCIO, NATIVE, SHARED),
    "crowd": _cases("identity", BASE, NATIVE) + _cases("identity", CROWD, NATIVE),
    "rest": _cases("identity", APART, NATIVE, REST),
    "stream": _cases("identity", BASE, NATIVE, STREAM),
    "lengths": _cases("lengths", MIXED, NATIVE) + _cases("lengths_bucketed", MIXED, NATIVE),
    "cache": _cases("digits_cached", BUSY, NATIVE, CACHED, UNIQUE)
    + _cases("digits_mlp", BUSY, UNIQUE)
    + _cases("identity_cached", BASE, UNIQUE)
    + _cases("identity", BASE, UNIQUE),
    "ensemble": tuple(case for model in (*PIPELINE, "pipeline") for case in _cases(model, LONE, NATIVE)),
    OCR: tuple(Case(model, NATIVE, IMAGES) for model in ("ocr", *(f"ocr_{most}" for most in OCR_SIZES))),
    "features": _cases("identity", BASE, NATIVE, FEATURES),
    **dict.fromkeys(EXPERIMENTS, ()),
    MEMORY: (),
}
"""Each part has everything in it that its goals compare."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    parts: tuple[str, ...] = tuple(PARTS)
    rounds: int = 5
    round_s: float = 2.5
    trial_s: float = 0.5
    """Each trial before the rounds: the request rate of a server, a batch size of the bare loop."""
    soak_warmup_requests: int = 10_000
    soak_requests: tuple[tuple[str, int], ...] = ((GRPCIO, 100_000), (NATIVE, 1_000_000))
    """How many requests follow the warm-up, for each of our transports."""
    open_rounds: int = 3
    open_s: float = 8.0
    """Rounds of the experiments, and how long an open loop goes on in each;"""
    overload_s: float = 30.0
    """that of too much, of which a run that the machine held up would else be a hundredth."""

    def experiment_s(self, part: str) -> float:
        """How long an open loop of this experiment goes on."""
        return self.overload_s if EXPERIMENTS[part] is Overload else self.open_s

    def cases(self, transports: Iterable[str]) -> list[Case]:
        """The rows to measure with our transports that there are; what two parts share is measured once."""
        measurable = {*transports, ECHO, LOOP}
        if NATIVE in measurable:
            measurable |= {FEATURES, SHARED, REST, UNIQUE, STREAM, CACHED}
        found = dict.fromkeys(case for part in self.parts for case in PARTS[part])
        return [case for case in found if case.who in measurable]


QUICK = Plan(rounds=1, round_s=1.5, trial_s=0.25, soak_requests=((GRPCIO, 30_000), (NATIVE, 100_000)), open_rounds=1,
             open_s=4.0, overload_s=4.0)  # fmt: skip
"""Some three minutes: enough to see about where the figures are; one round has no spread."""
