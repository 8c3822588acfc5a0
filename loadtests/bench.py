"""The benchmark: `python -m loadtests.bench` measures our server and its peers side by side and prints one table.

Peers: a bare grpcio asyncio echo of the same bytes, and a bare ONNX Runtime loop with the same threads and its best
batch size. Each server runs in a process of its own; what it costs is the CPU time of that process. All measurements
take turns in several rounds, and the table shows medians. Exit codes: 0 measured, 1 not measured (or, with --strict, a
goal is missed), 2 wrong command line.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from loadtests import h2load, machine, processes, table
from loadtests.h2load import Load, LoadError
from loadtests.models import GENERATORS, BenchModel, generate
from loadtests.peers import EchoMeasurement, LoopMeasurement, Measurement, Sample, SluiceMeasurement
from loadtests.processes import ServerFailed
from loadtests.procfs import read_rss_bytes
from loadtests.results import Goal, Memory, Row, goals

LOADS = {
    "identity": (Load(2, 16),),
    "digits_mlp": (Load(2, 16),),
    "large_mlp": (Load(4, 16), Load(4, 25)),
}
"""For each model, how many connections with how many streams each."""

RESULTS = Path(__file__).with_name("results") / "latest.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured."""

    models: tuple[str, ...]
    rounds: int = 5
    round_s: float = 2.5
    trial_s: float = 0.5
    """Each trial before the rounds: the request rate of a server, a batch size of the bare loop."""
    soak_warmup_requests: int = 10_000
    soak_requests: int = 100_000


FULL = Plan(tuple(GENERATORS))

QUICK = Plan(("identity",), rounds=1, round_s=0.3, trial_s=0.05, soak_warmup_requests=200, soak_requests=500)
"""Enough to see that everything works; its figures mean nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and give the exit code."""
    args = _parser().parse_args(argv)
    plan = QUICK if args.quick else Plan(tuple(args.models), args.rounds, args.seconds)
    try:
        h2load.find()
        facts = machine.describe()
        if not machine.is_quiet():
            _say(f"this machine is busy (load: {facts['load']}); the figures will be worse than they should be")
        with tempfile.TemporaryDirectory(prefix="sluice-bench-") as scratch:
            rows = measure_table(plan, Path(scratch))
            memory = measure_memory(plan, Path(scratch))
    except (LoadError, ServerFailed) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    found = goals(rows, memory)
    for text in (table.render_rows(rows), table.render_memory(memory), table.render_goals(found)):
        print(f"{text}\n")
    print(table.render_machine(facts))
    if args.json:
        write_json(args.json, facts, plan, rows, memory, found)
    return int(args.strict and not all(goal.is_met for goal in found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--models", nargs="+", choices=FULL.models, default=FULL.models, metavar="NAME",
        help=", ".join(FULL.models))  # fmt: skip
    parser.add_argument("--rounds", type=int, default=FULL.rounds, help="(%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=FULL.round_s, help="of each measurement in a round (%(default)s)"
    )
    parser.add_argument("--quick", action="store_true", help="a second's run that only shows that all works")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a goal is missed")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS, metavar="FILE",
        help="write the results there too (loadtests/results/latest.json)")  # fmt: skip
    return parser


def measure_table(plan: Plan, scratch: Path) -> list[Row]:
    """Measure each model with each peer, in turns."""
    _say(f"generating {', '.join(plan.models)}")
    repository = scratch / "models"
    models = [generate(name, repository) for name in plan.models]
    with ExitStack() as stack:
        ours = stack.enter_context(processes.sluice(repository, scratch))
        echo = stack.enter_context(processes.echo(scratch))
        measurements: list[Measurement] = []
        for model in models:
            for load in LOADS[model.name]:
                measurements.append(SluiceMeasurement(model, ours, load, scratch))
                measurements.append(EchoMeasurement(model, echo, load, scratch))
            measurements.append(LoopMeasurement(model))
        return take_turns(measurements, plan)


def take_turns(measurements: Sequence[Measurement], plan: Plan) -> list[Row]:
    """A B C A B C ...: what disturbs the machine for a while disturbs all of them."""
    for measurement in measurements:
        _say(f"warming up: {measurement.model.title}, {measurement.who}")
        measurement.prepare(plan.trial_s)
    samples: list[list[Sample]] = [[] for _ in measurements]
    for number in range(1, plan.rounds + 1):
        for measurement, own in zip(measurements, samples, strict=True):
            own.append(measurement.measure(plan.round_s))
            _say(
                f"round {number} of {plan.rounds}: {measurement.model.title}, {measurement.who}, {measurement.load}:"
                f" {own[-1].requests_per_s:,.0f}/s, {own[-1].cpu_us_per_request:,.0f} us"
            )
    return [
        Row(of.model.name, of.model.title, of.who, of.in_flight, of.load, tuple(own))
        for of, own in zip(measurements, samples, strict=True)
    ]


def measure_memory(plan: Plan, scratch: Path) -> Memory:
    """Send many requests in a row to a server of its own, whose memory is not hidden behind large weights."""
    repository = scratch / "soak"
    model: BenchModel = generate("identity", repository)
    with processes.sluice(repository, scratch) as server:
        measurement = SluiceMeasurement(model, server, LOADS["identity"][0], scratch)
        _say(f"memory: {plan.soak_warmup_requests:,} requests to warm up, then {plan.soak_requests:,}")
        measurement.send(plan.soak_warmup_requests)
        before_bytes = read_rss_bytes(server.pid)
        measurement.send(plan.soak_requests)
        return Memory(plan.soak_requests, before_bytes, read_rss_bytes(server.pid))


def write_json(
    path: Path, facts: dict[str, str], plan: Plan, rows: Sequence[Row], memory: Memory, found: Sequence[Goal]
) -> None:
    """Write everything that was measured."""
    content = {
        "machine": facts,
        "plan": asdict(plan),
        "rows": [asdict(row) | {"samples": [_json_sample(sample) for sample in row.samples]} for row in rows],
        "memory": asdict(memory) | {"growth": memory.growth},
        "goals": [asdict(goal) | {"is_met": goal.is_met} for goal in found],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")
    _say(f"written to {path}")


def _json_sample(sample: Sample) -> dict[str, float | None]:
    """JSON has no NaN."""
    return {name: None if math.isnan(value) else value for name, value in asdict(sample).items()}


def _say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
