"""The benchmark: `python -m loadtests.bench` measures our server and its peers side by side, and what goals are met.

Our server runs on each of its transports. Peers: a bare grpcio asyncio echo of the same bytes, and a bare ONNX Runtime
loop with the same threads and its best batch size. Each server runs in a process of its own; what it costs is the CPU
time of that process. All measurements take turns in several rounds, and the tables show medians. Exit codes: 0
measured, 1 not measured (or, with --strict, a goal is missed), 2 wrong command line.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

from deploy.processes import ServerFailed
from loadtests import h2load, machine, neighbours, oip, perf_generator, processes, scheduling, table
from loadtests import record as records
from loadtests.h2load import LoadError
from loadtests.lengths import LengthsMeasurement
from loadtests.models import GENERATORS as MODELS
from loadtests.models import OCR_PACKAGE, BenchModel, find_ocr, generate
from loadtests.peers import (
    CACHED,
    ECHO,
    FEATURES,
    GRPCIO,
    LOOP,
    NATIVE,
    REST,
    SHARED,
    STREAM,
    UNIQUE,
    EchoMeasurement,
    Generator,
    LoopMeasurement,
    Measurement,
    Sample,
    SluiceMeasurement,
)
from loadtests.plan import BASE, MEMORY, OCR, PARTS, QUICK, Case, Plan
from loadtests.processes import ServerProcess
from loadtests.procfs import read_rss_bytes
from loadtests.record import Record
from loadtests.rest import RestMeasurement
from loadtests.results import Memory, Row, goals
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
    STREAM: (TransportChoice.NATIVE,),
    CACHED: (TransportChoice.NATIVE, f"--cache-config=local,size={CACHE_BYTES}"),
    UNIQUE: (TransportChoice.NATIVE, f"--cache-config=local,size={CACHE_BYTES}"),
    FEATURES: (TransportChoice.NATIVE, *neighbours.FLAGS),
}
"""What --transport is for each of ours, and what other flags it has."""

H2LOAD = "h2load"
GENERATORS: dict[str, Generator | None] = {H2LOAD: None, perf_generator.NAME: perf_generator.GENERATOR}
"""What can make the load of unary calls that are all the same."""

DESCRIBES = {H2LOAD: h2load.told_version, perf_generator.NAME: perf_generator.describe}
"""What is said of a generator next to its machine."""

AUTO = TransportChoice.AUTO

WHOS = (*FLAGS, ECHO, LOOP)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write the result file, and give the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.write_models:
        print(write_models(args.write_models))
        return 0
    names = [peer.name for peer in args.peer]
    if len({*names, *WHOS}) < len(names) + len(WHOS):
        parser.error(f"--peer: each needs a name of its own, that is none of {', '.join(WHOS)}")
    setup = Setup(_plan(args), tuple(args.peer), args.generator)
    try:
        h2load.find()
        for peer in setup.peers:
            oip.check(peer)
        raise_limit()  # for the connections of h2load, a child
        facts = machine.host() | {"generator": DESCRIBES[args.generator]()}
        if not machine.is_quiet():
            _say(f"this machine is busy (load: {facts['load']}); the figures will be worse than they should be")
        measured = measure(setup)
    except (LoadError, ServerFailed) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    record = replace(
        measured,
        measured_at=records.now(),
        commit=records.commit(),
        flags=tuple(argv if argv is not None else sys.argv[1:]),
        machine=facts,
        versions=machine.versions(),
        plan=asdict(setup.plan),
    )
    print(table.render_report(record))
    records.write(args.json, record)
    _say(f"written to {args.json}")
    is_met = all(goal.is_met is not False for goal in record.goals)
    return int(args.strict and (bool(record.skipped) or not is_met))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=__doc__, allow_abbrev=False)
    parser.add_argument("--parts", nargs="+", choices=PARTS, metavar="NAME", help=", ".join(PARTS))
    parser.add_argument("--rounds", type=int, help="(5; of the parts with an open loop 3 at most)")
    parser.add_argument("--seconds", type=float, help="of each measurement in a round (2.5)")
    parser.add_argument("--quick", action="store_true", help="one short round and less memory: some three minutes")
    parser.add_argument("--strict", action="store_true", help="exit code 1 when a goal is missed or not measured")
    parser.add_argument("--json", type=Path, default=records.LATEST, metavar="FILE",
        help="the result file (loadtests/results/latest.json)")  # fmt: skip
    parser.add_argument("--peer", type=_peer, action="append", default=[], metavar="NAME=HOST:PORT",
        help="a server of the Open Inference Protocol that runs there, as a column; several times")  # fmt: skip
    parser.add_argument("--write-models", type=Path, metavar="DIR",
        help="write the models for a peer to serve, and measure nothing")  # fmt: skip
    parser.add_argument("--generator", choices=GENERATORS, default=H2LOAD,
        help="makes the load of plain unary calls (h2load); perf_analyzer can make no other")  # fmt: skip
    return parser


def _peer(text: str) -> oip.Peer:
    try:
        return oip.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _plan(args: argparse.Namespace) -> Plan:
    given = {"parts": args.parts and tuple(args.parts), "rounds": args.rounds, "round_s": args.seconds}
    changes = {name: value for name, value in given.items() if value is not None}
    plan = replace(QUICK if args.quick else Plan(), **changes)
    return replace(plan, open_rounds=min(plan.rounds, plan.open_rounds))


def write_models(repository: Path) -> str:
    """Write every model of the table that can be written here; their names."""
    names = [name for name in MODELS if find_ocr() is not None or not name.startswith(OCR)]
    for name in names:
        generate(name, repository)
    return f"written to {repository}: {', '.join(names)}"


@dataclass(frozen=True, slots=True)
class Setup:
    """What is to be measured, with whom, and what makes the load."""

    plan: Plan
    peers: tuple[oip.Peer, ...] = ()
    generator: str = H2LOAD


def measure(setup: Setup) -> Record:
    """All parts of the plan; the record has only what was measured, and what was not."""
    plan, skipped = setup.plan, []
    problem = native_problem(version("sluice"))
    if problem:
        skipped.append(f"the native transport: {problem}")
    if OCR in plan.parts and find_ocr() is None:
        skipped.append(f"text detection: {OCR_PACKAGE} is not installed")
        plan = replace(plan, parts=tuple(part for part in plan.parts if part != OCR))
    transports = [GRPCIO] if problem else [GRPCIO, NATIVE]
    cases = plan.cases(transports)
    theirs, missing = oip.cases(setup.peers, cases)
    kept, unloaded = _loadable([*cases, *theirs], setup)
    skipped += [*missing, *unloaded]
    for text in skipped:
        _say(f"not measured: {text}")
    with tempfile.TemporaryDirectory(prefix="sluice-bench-") as folder:
        scratch = Path(folder)
        rows = measure_table(kept, replace(setup, plan=plan), scratch)
        memories = measure_memory(transports, plan, scratch) if MEMORY in plan.parts else []
        findings, promised = scheduling.measure(plan, AUTO, scratch, _say)
    more = oip.targets(setup.peers, kept, {row.model: row.title for row in rows})
    found = [*goals(rows, memories, more), *promised]
    return Record(
        skipped=tuple(skipped), rows=tuple(rows), findings=tuple(findings), memories=tuple(memories), goals=tuple(found)
    )


def _loadable(cases: Sequence[Case], setup: Setup) -> tuple[list[Case], list[str]]:
    """The cases that the generator can load, and in words which it cannot."""
    if setup.generator == H2LOAD:
        return list(cases), []
    able = {GRPCIO, NATIVE, LOOP, *(peer.name for peer in setup.peers)}
    kept = [case for case in cases if case.who in able and not case.model.startswith("lengths")]
    left = dict.fromkeys(f"{case.model} on {case.who}" for case in cases if case not in kept)
    return kept, [f"{what}: {setup.generator} cannot send this load" for what in left]


def measure_table(cases: Sequence[Case], setup: Setup, scratch: Path) -> list[Row]:
    """Measure each case, in turns."""
    if not cases:
        return []
    names = list(dict.fromkeys(case.model for case in cases))
    _say(f"generating {', '.join(names)}")
    repository = scratch / "models"
    models = {name: generate(name, repository) for name in names}
    repositories = {}
    if any(case.who == FEATURES for case in cases):
        repositories[FEATURES] = neighbours.write(scratch / "neighbours", repository)
    with ExitStack() as stack:
        started = {}
        servers = {}
        for who, flags in FLAGS.items():
            if any(case.who == who for case in cases):
                # Equal processes differ by some percent for as long as they live, so equal flags share one.
                served = (repositories.get(who, repository), *flags)
                if served not in started:
                    started[served] = stack.enter_context(processes.sluice(served[0], scratch, *flags))
                servers[who] = started[served]
        servers[ECHO] = stack.enter_context(processes.echo(scratch))
        bench = Bench(setup, models, servers, scratch, stack)
        return take_turns([bench.measurement(case) for case in cases], setup.plan)


@dataclass(frozen=True, slots=True)
class Bench:
    """Everything that runs while the table is measured."""

    setup: Setup
    models: Mapping[str, BenchModel]
    servers: Mapping[str, ServerProcess]
    scratch: Path
    stack: ExitStack

    def measurement(self, case: Case) -> Measurement:
        """How a case is measured."""
        model, scratch, generator = self.models[case.model], self.scratch, GENERATORS[self.setup.generator]
        if case.load is None:
            return LoopMeasurement(model)
        for peer in self.setup.peers:
            if peer.name == case.who:
                return oip.PeerMeasurement(peer, model, case.load, scratch, generator)
        server = self.servers[case.who]
        if model.variants:
            return LengthsMeasurement(model, server, case.load, scratch)
        if case.who == ECHO:
            return EchoMeasurement(model, server, case.load, scratch)
        if case.who == SHARED:
            shared = self.stack.enter_context(registered(model, server))
            return SharedMeasurement(model, server, case.load, scratch, shared)
        if case.who == REST:
            return RestMeasurement(model, server, case.load, scratch)
        if case.who == STREAM:
            return StreamMeasurement(model, server, case.load, scratch)
        if case.who == UNIQUE:
            return UniqueMeasurement(model, server, case.load, scratch)
        return SluiceMeasurement(case.who, model, server, case.load, scratch, generator)


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
        Row(of.model.name, of.model.title, of.who, of.in_flight, of.load, tuple(own), of.generator)
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


def _say(text: str) -> None:
    """Progress, apart from the results."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
