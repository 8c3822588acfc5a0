"""Load that rises and falls under a latency objective: is it kept, and what does that cost beside the best by hand?

By hand means: a batch size, and as many requests waiting as one batch has, so that nobody waits for more than the run
that has begun and the own one. The sizes of the grid are tried in the same round, under more load than they can take;
of those that keep the objective the one with the most answers a second is the best, and what it answers is the
capacity.
"""

from dataclasses import dataclass

from loadtests import processes, timed
from loadtests.experiment import OURS, Experiment, Figure, Outcome, Place, Promise, at_random, objective, open_load
from loadtests.h2load import LoadError
from loadtests.processes import ServerProcess
from loadtests.timed import Times
from sluice_client.load.latencies import quantile

RUN, ROWS, SLO_S = Times(10, 2.5), 32, 0.15
GRID = (8, 16, 24)
"""With RUN, two runs of 24 rows just end within the objective."""
OVERLOAD = 1.4
"""What a size is tried with, over what it should be able to do."""
STEPS = (0.1, 1.0, 0.3)
TRIAL_SHARE, STEP_SHARE = 0.25, 0.4
"""Of a measurement: how long a size of the grid is tried, and a step is held."""
SETTLING = 0.25
"""After a change of the load, over what is measured then."""
PATIENCE_S = 10.0

STATIC = "best static setting"
SIZE = Figure(STATIC, "batch size", "rows")
CAPACITY = Figure(STATIC, "answers at more load than it can take", "/s")
AT_FULL = Figure(STATIC, "answers at 100 % of that", "/s")
P99 = {step: Figure(OURS, f"p99 at {step:.0%} of the capacity", "ms") for step in STEPS}
P99_WORST = Figure(f"{OURS} over the objective", "p99 in the worst step")
OURS_AT_FULL = Figure(OURS, AT_FULL.name, "/s")
RATIO = Figure(f"{OURS} over {STATIC}", AT_FULL.name)


@dataclass(frozen=True, slots=True)
class Window:
    """What was measured of one load, and why the generator was the limit, "" when it was not."""

    answers_per_s: float
    p99_s: float
    problem: str


@dataclass(frozen=True, slots=True)
class Trial:
    """A static setting under more load than it can take."""

    size: int
    answers_per_s: float
    p99_s: float


class Steps(Experiment):
    """The grid, the best of it at 100 %, and our server at 10, 100 and 30 % with `slo_p99_ms` alone."""

    case = f"load steps of {', '.join(f'{step:.0%}' for step in STEPS)}, objective {SLO_S * 1e3:.0f} ms"
    promises = (
        Promise(f"{case}: p99 in the worst step, over the objective", P99_WORST, 1, at_least=False),
        Promise(f"{case}: answers at 100 %, over the {STATIC}'s", RATIO, 0.9, at_least=True),
    )

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        for size in GRID:
            policy = f"default_queue_policy {{ max_queue_size: {size} }}"
            place.write(_static(size), RUN, f"max_batch_size: {size}\ndynamic_batching {{ {policy} }}")
        place.write("objective", RUN, f"max_batch_size: {ROWS}\ndynamic_batching {{ }}\n{objective(SLO_S)}")

    def measure(self) -> Outcome:
        """Seven loads: those of the grid a quarter of a measurement each, the others two fifths."""
        place = self.place
        with processes.sluice(place.repository, place.scratch, place.transport) as server:
            best = pick([self._try(server, size) for size in GRID])
            steady_s = place.measure_s * STEP_SHARE
            by_hand = load(server, _static(best.size), best.answers_per_s, steady_s)
            runs = {step: load(server, "objective", step * best.answers_per_s, steady_s) for step in STEPS}
        p99_s = {step: window.p99_s for step, window in runs.items()}
        at_full, ours = by_hand.answers_per_s, runs[1.0].answers_per_s
        figures = {
            SIZE: best.size,
            CAPACITY: best.answers_per_s,
            **{P99[step]: p99_s[step] * 1e3 for step in STEPS},
            P99_WORST: max(p99_s.values()) / SLO_S,
            AT_FULL: at_full,
            OURS_AT_FULL: ours,
            RATIO: ours / at_full,
        }
        return Outcome(figures, next(filter(None, (window.problem for window in (by_hand, *runs.values()))), ""))

    def _try(self, server: ServerProcess, size: int) -> Trial:
        rate = OVERLOAD * RUN.rows_per_s(size)
        found = load(server, _static(size), rate, self.place.measure_s * TRIAL_SHARE)
        return Trial(size, found.answers_per_s, found.p99_s)


def load(server: ServerProcess, model: str, rate: float, steady_s: float) -> Window:
    """Load a model at this rate for so long, and a little before that which is not measured."""
    settling_s = SETTLING * steady_s
    times_s = at_random(rate, settling_s + steady_s)
    run = open_load(server.address, timed.request(model), times_s, PATIENCE_S)
    response_s = run.records.between(settling_s, settling_s + steady_s).response_s
    return Window(len(response_s) / steady_s, quantile(response_s, 0.99), run.generator.problem)


def pick(trials: list[Trial]) -> Trial:
    """The most answers a second within the objective; where none keeps it, the one that comes nearest.

    LoadError when none of them answered anything.
    """
    answering = [trial for trial in trials if trial.answers_per_s]
    if not answering:
        raise LoadError("no static setting answered a single request: this machine is too busy to measure anything")
    keeping = [trial for trial in answering if trial.p99_s <= SLO_S]
    if keeping:
        return max(keeping, key=lambda trial: trial.answers_per_s)
    return min(answering, key=lambda trial: trial.p99_s)


def _static(size: int) -> str:
    return f"static_{size}"
