"""The benchmark: `python -m loadtests.bench` measures our server and its peers side by side, and what goals are met.

Our server runs on each of its transports. Peers: a bare grpcio asyncio echo of the same bytes, and a bare ONNX Runtime
loop with the same threads and its best batch size. Each server runs in a process of its own; what it costs is the CPU
time of that process. All measurements take turns in several rounds, and the tables show medians. Exit codes: 0
measured, 1 not measured (or, with --strict, a goal is missed), 2 wrong command line.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

from loadtests import h2load, machine, processes, table
from loadtests.h2load import LoadError
from loadtests.lengths import LengthsMeasurement
from loadtests.models import OCR_PACKAGE, BenchModel, find_ocr, generate
from loadtests.peers import (
    CACHED,
    CACHED_UNIQUE,
    ECHO,
    GRPCIO,
    NATIVE,
    REST,
    SHARED,
    STREAM,
    UNIQUE,
    EchoMeasurement,
    LoopMeasurement,
    Measurement,
    Sample,
    SluiceMeasurement,
)
from loadtests.plan import BASE, MEMORY, OCR, PARTS, QUICK, Case, Plan
from loadtests.processes import ServerFailed, ServerProcess
from loadtests.procfs import read_rss_bytes
from loadtests.rest import RestMeasurement
from loadtests.results import Goal, Memory, Row, goals
from loadtests.shared_memory import SharedMeasurement, registered
from loadtests.streams import StreamMeasurement
from loadtests.unique import UniqueMeasurement
from sluice_server.open_files import raise_limit
from sluice_server.transport.choice import TransportChoice, native_problem

CACHE_BYTES = 64 << 20
"""Many small answers, and more than the machine's own caches hold."""

FLAGS = {
    GRPCIO: (TransportChoice.GRPCIO,),
    NATIVE: (TransportChoice.NATIVE,),
    SHARED: (TransportChoice.NATIVE, "--allow-client-shm"),
    REST: (TransportChoice.NATIVE,),
    UNIQUE: (TransportChoice.NATIVE,),
    STREAM: (TransportChoice.NATIVE,),
    CACHED: (TransportChoice.NATIVE, f"--cache-config=local,size={CACHE_BYTES}"),
    CACHED_UNIQUE: (TransportChoice.NATIVE, f"--cache-config=local,size={CACHE_BYTES}"),
}
"""What --transport is for each of ours, and what other flags it has."""

RESULTS = Path(__file__).with_name("results") / "latest.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and give the exit code."""
    args = _parser().parse_args(argv)
    plan = _plan(args)
    problem = native_problem(version("sluice"))
    is_whole = not problem
    if problem:
        _say(f"the native transport is not measured: {problem}")
    if OCR in plan.parts and find_ocr() is None:
        _say(f"text detection is not measured: {OCR_PACKAGE} is not installed")
        is_whole = False
        plan = replace(plan, parts=tuple(part for part in plan.parts if part != OCR))
    transports = [GRPCIO] if problem else [GRPCIO, NATIVE]
    try:
        h2load.find()
        raise_limit()  # for the connections of h2load, a child
        facts = machine.describe()
        if not machine.is_quiet():
            _say(f"this machine is busy (load: {facts['load']}); the figures will be worse than they should be")
        with tempfile.TemporaryDirectory(prefix="sluice-bench-") as scratch:
            rows = measure_table(plan.cases(transports), plan, Path(scratch))
            memories = measure_memory(transports, plan, Path(scratch)) if MEMORY in plan.parts else []
    except (LoadError, ServerFailed) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    found = goals(rows, memories)
    print(table.render_report(rows, memories, found, facts))
    if args.json:
        write_json(args.json, facts, plan, rows, memories, found)
    return int(args.strict and (not is_whole or not all(goal.is_met for goal in found)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, help="(5)")
    parser.add_argument("--seconds", type=float, help="of each measurement in a round (2.5)")
    parser.add_argument("--quick", action="store_true", help="one short round and less memory: about two minutes")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a goal is missed or not measured")
    parser.add_argument("--json", type=Path, nargs="?", const=RESULTS, metavar="FILE",
        help="write the results there too (loadtests/results/latest.json)")  # fmt: skip
    return parser


def _plan(args: argparse.Namespace) -> Plan:
    given = {"parts": args.parts and tuple(args.parts), "rounds": args.rounds, "round_s": args.seconds}
    changes = {name: value for name, value in given.items() if value is not None}
    return replace(QUICK if args.quick else Plan(), **changes)


def measure_table(cases: Sequence[Case], plan: Plan, scratch: Path) -> list[Row]:
    """Measure each case, in turns."""
    if not cases:
        return []
    names = list(dict.fromkeys(case.model for case in cases))
    _say(f"generating {', '.join(names)}")
    repository = scratch / "models"
    models = {name: generate(name, repository) for name in names}
    with ExitStack() as stack:
        servers = {
            who: stack.enter_context(processes.sluice(repository, scratch, *flags))
            for who, flags in FLAGS.items()
            if any(case.who == who for case in cases)
        }
        servers[ECHO] = stack.enter_context(processes.echo(scratch))
        return take_turns([_measurement(case, models[case.model], servers, scratch, stack) for case in cases], plan)


def _measurement(
    case: Case, model: BenchModel, servers: Mapping[str, ServerProcess], scratch: Path, stack: ExitStack
) -> Measurement:
    if case.load is None:
        return LoopMeasurement(model)
    server = servers[case.who]
    if model.variants:
        return LengthsMeasurement(model, server, case.load, scratch)
    if case.who == ECHO:
        return EchoMeasurement(model, server, case.load, scratch)
    if case.who == SHARED:
        shared = stack.enter_context(registered(model, server))
        return SharedMeasurement(model, server, case.load, scratch, shared)
    if case.who == REST:
        return RestMeasurement(model, server, case.load, scratch)
    if case.who == STREAM:
        return StreamMeasurement(model, server, case.load, scratch)
    if case.who in (UNIQUE, CACHED_UNIQUE):
        return UniqueMeasurement(case.who, model, server, case.load, scratch)
    return SluiceMeasurement(case.who, model, server, case.load, scratch)


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


def measure_memory(transports: Sequence[str], plan: Plan, scratch: Path) -> list[Memory]:
    """Send many requests in a row to servers of their own, whose memory is not hidden behind large weights."""
    repository = scratch / "soak"
    model = generate("identity", repository)
    found = []
    for who, requests in plan.soak_requests:
        if who not in transports:
            continue
        with processes.sluice(repository, scratch, *FLAGS[who]) as server:
            measurement = SluiceMeasurement(who, model, server, BASE, scratch)
            _say(f"memory, {who}: {plan.soak_warmup_requests:,} requests to warm up, then {requests:,}")
            measurement.send(plan.soak_warmup_requests)
            before_bytes = read_rss_bytes(server.pid)
            measurement.send(requests)
            found.append(Memory(who, requests, before_bytes, read_rss_bytes(server.pid)))
    return found


def write_json(
    path: Path,
    facts: dict[str, str],
    plan: Plan,
    rows: Sequence[Row],
    memories: Sequence[Memory],
    found: Sequence[Goal],
) -> None:
    """Write everything that was measured."""
    content = {
        "machine": facts,
        "plan": asdict(plan),
        "rows": [asdict(row) | {"samples": [_json_sample(sample) for sample in row.samples]} for row in rows],
        "memory": [asdict(memory) | {"ratio": memory.ratio} for memory in memories],
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
