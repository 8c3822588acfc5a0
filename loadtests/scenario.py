"""Scenarios: what load to send, how the server is started, and which objectives the run is held to, as TOML. Pure.

A scenario is valid once it is read: whatever a run would stumble over later is refused here, by file, table and key.
Paths in it are relative to its file.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate, islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from loadtests.slo import BY_KEY, KINDS, Objective
from loadtests.toml_table import Table, read_toml
from sluice_batching.arrivals import Constant, Diurnal, Ramp, Rate, arrivals, even, exponential, grouped
from sluice_client.load.latencies import CPU_LIMIT, LAG_P99_LIMIT_S
from sluice_proto.capture import MAGIC, read_capture
from sluice_proto.errors import CaptureError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

SLUICE, TRITONCLIENT = "sluice", "tritonclient"
CLIENTS: Final = (SLUICE, TRITONCLIENT)
UNARY, STREAM, REST, SHARED_MEMORY = "unary", "stream", "rest", "shared_memory"
PROTOCOLS: Final = (UNARY, STREAM, REST, SHARED_MEMORY)
PROTOCOLS_OF: Final = {SLUICE: (UNARY, STREAM, SHARED_MEMORY), TRITONCLIENT: PROTOCOLS}

REQUESTS_MAX: Final = 2_000_000
"""A worker keeps 26 bytes of each until the end, and sends them to the master in one message."""

WORKERS_MAX: Final = 64
IN_FLIGHT_MAX: Final = 10_000
"""Open requests of one worker: each is a greenlet and a call, some 20 KiB."""

DURATION_MAX_S: Final = 86_400.0
ROWS_MAX: Final = 65_536
DEADLINE_MAX_MS: Final = 600_000.0

Times = tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Server:
    """How our server is started: its model repository, and more flags of `sluice serve`."""

    repository: Path
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class GeneratorLimits:
    """How the load is generated, and when it counts as the bottleneck.

    `workers` processes send; each has at most `max_in_flight` requests in flight, and gives up what is due beyond
    that. A run fails when a process gave up any, when p99 of how late it sent exceeds `lag_p99_ms`, or when it used
    more than `cpu_share` of a core.
    """

    workers: int
    max_in_flight: int
    lag_p99_ms: float
    cpu_share: float


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind of request of the mix; `share` is its weight in it, `rows` are taken with equal chances.

    `deadline_ms` and `priority` are None and 0 where the file has none.
    """

    model: str
    share: float
    rows: tuple[int, ...]
    golden: Path
    protocol: str
    client: str
    deadline_ms: float | None
    priority: int

    @property
    def title(self) -> str:
        """How it is named in reports."""
        return f"{self.model} {self.protocol} ({self.client})"


@dataclass(frozen=True, slots=True)
class Scenario:
    """All of a file. `times_s`: when requests are due, ascending seconds from the start, before `duration_s`."""

    file: Path
    title: str
    duration_s: float
    server: Server
    generator: GeneratorLimits
    arrivals: str
    times_s: Times
    requests: tuple[Kind, ...]
    objectives: tuple[Objective, ...]

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.file.stem

    @property
    def mean_gap_ms(self) -> float:
        """The mean time between requests that are due."""
        return self.duration_s * 1e3 / len(self.times_s)

    def plan(self) -> Iterator[tuple[float, int, int]]:
        """Each request: when it is due, the index of its kind, and a random number to choose its payload by.

        The same in every process, as chances are seeded.
        """
        chance = random.Random(self.name)  # noqa: S311 # reproducible, not secret
        weights = list(accumulate(kind.share for kind in self.requests))
        kinds = range(len(weights))
        for due_s in self.times_s:
            yield due_s, chance.choices(kinds, cum_weights=weights)[0], chance.getrandbits(30)


def read_scenario(path: Path) -> Scenario:
    """The scenario in a file. ScenarioError when it cannot be used."""
    top = read_toml(path)
    folder = path.resolve().parent
    title = top.text("title")
    duration_s = top.number("duration_s", most=DURATION_MAX_S)
    server = _server(top.table("server"), folder)
    generator = _generator(top.table("generator", required=False))
    process, times_s = _arrivals(top.table("arrivals"), duration_s, folder)
    requests = tuple(_request(table, server, folder) for table in top.tables("requests"))
    objectives = _objectives(top.table("slo"), requests)
    top.refuse_unknown()
    return Scenario(path.resolve(), title, duration_s, server, generator, process, times_s, requests, objectives)


def _server(table: Table, folder: Path) -> Server:
    repository = _path(table, "repository", folder)
    if not repository.is_dir():
        raise table.error("repository", f"{repository} is no folder")
    server = Server(repository, table.texts("flags"))
    table.refuse_unknown()
    return server


def _generator(table: Table) -> GeneratorLimits:
    limits = GeneratorLimits(
        workers=table.integer("workers", 1, least=1, most=WORKERS_MAX),
        max_in_flight=table.integer("max_in_flight", 1000, least=1, most=IN_FLIGHT_MAX),
        lag_p99_ms=table.number("lag_p99_ms", LAG_P99_LIMIT_S * 1e3),
        cpu_share=table.number("cpu_share", CPU_LIMIT, most=1.0),
    )
    table.refuse_unknown()
    return limits


def _request(table: Table, server: Server, folder: Path) -> Kind:
    model = table.text("model")
    protocol = table.choice("protocol", PROTOCOLS, UNARY)
    client = table.choice("client", CLIENTS, SLUICE if protocol in PROTOCOLS_OF[SLUICE] else TRITONCLIENT)
    if protocol not in PROTOCOLS_OF[client]:
        spoken = ", ".join(PROTOCOLS_OF[client])
        raise table.error("client", f'"{client}" speaks gRPC only ({spoken}); "{protocol}" goes with "{TRITONCLIENT}"')
    golden = _path(table, "golden", folder) if table.has("golden") else server.repository / model / "golden.npz"
    if not golden.is_file():
        raise table.error(
            "golden", f"{golden} is no file: expected one of numpy.savez, with arrays [rows, ...] by input"
        )
    kind = Kind(
        model=model,
        share=table.number("share", 1.0),
        rows=table.integers("rows", 1, least=1, most=ROWS_MAX),
        golden=golden,
        protocol=protocol,
        client=client,
        deadline_ms=table.number("deadline_ms", most=DEADLINE_MAX_MS) if table.has("deadline_ms") else None,
        priority=table.integer("priority", 0, least=0, most=2**32 - 1),
    )
    table.refuse_unknown()
    return kind


def _objectives(table: Table, requests: Sequence[Kind]) -> tuple[Objective, ...]:
    found = []
    for kind in KINDS:
        if table.has(kind.key):
            # No objective that cannot be missed: at least 0 always holds, and so does an error ratio of at most 1.
            limit = table.number(kind.key, above=kind.key != "error_ratio", most=kind.most)
            if kind.needs_deadlines and any(request.deadline_ms is None for request in requests):
                raise table.error(kind.key, "every one of [[requests]] needs a deadline_ms for it")
            found.append(Objective(kind, limit))
    table.refuse_unknown()
    if BY_KEY["error_ratio"] not in [each.kind for each in found]:
        raise table.error(
            "error_ratio", "missing; latencies are those of answers, so say what share of requests may go without (0)"
        )
    return tuple(found)


def _arrivals(table: Table, duration_s: float, folder: Path) -> tuple[str, Times]:
    process = table.choice("process", tuple(_PROCESSES))
    try:
        times = _PROCESSES[process](table, folder)
    except ValueError as error:
        raise table.error("", str(error)) from None
    table.refuse_unknown()
    until = takewhile(lambda time_s: time_s < duration_s, times)
    times_s = tuple(islice(until, REQUESTS_MAX + 1))
    if not times_s:
        raise table.error("", f"no request is due within duration_s = {duration_s:g}")
    if len(times_s) > REQUESTS_MAX:
        raise table.error("", f"more than {REQUESTS_MAX:,} requests are due within duration_s = {duration_s:g}")
    return process, times_s


def _constant(table: Table, _: Path) -> Iterator[float]:
    return arrivals(Constant(table.number("per_s")), even())


def _poisson(table: Table, _: Path) -> Iterator[float]:
    return arrivals(Constant(table.number("per_s")), exponential(_seed(table)))


def _bursts(table: Table, _: Path) -> Iterator[float]:
    size = table.integer("size", least=1, most=REQUESTS_MAX)
    return arrivals(Constant(table.number("per_s")), grouped(size))


def _ramp(table: Table, _: Path) -> Iterator[float]:
    first_per_s = table.number("first_per_s", above=False)
    rate = Ramp(first_per_s, table.number("last_per_s"), table.number("over_s"))
    return arrivals(rate, _spacing(table))


def _diurnal(table: Table, _: Path) -> Iterator[float]:
    lowest_per_s = table.number("lowest_per_s", above=False)
    rate: Rate = Diurnal(lowest_per_s, table.number("highest_per_s"), table.number("period_s"))
    return arrivals(rate, _spacing(table))


def _replay(table: Table, folder: Path) -> Iterator[float]:
    """Recorded times: a capture, or one number of seconds a line; from the first on, twice as fast with speed = 2."""
    path = _path(table, "times", folder)
    speed = table.number("speed", 1.0)
    try:
        with path.open("rb") as file:
            is_capture = file.read(len(MAGIC)) == MAGIC
        times = read_capture(path).offsets_s() if is_capture else _lines_of_seconds(table, path)
    except (OSError, UnicodeDecodeError, CaptureError) as error:
        raise table.error("times", f"{path} cannot be read: {error}") from None
    return iter([(time_s - times[0]) / speed for time_s in times])


def _lines_of_seconds(table: Table, path: Path) -> list[float]:
    times: list[float] = []
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines, 1):
        try:
            times.append(float(line))
        except ValueError:
            raise table.error("times", f"{path}:{number}: expected a number of seconds, got {line!r}") from None
        if not abs(times[-1]) < float("inf") or times[-1] < times[max(number - 2, 0)]:
            raise table.error("times", f"{path}:{number}: {line} is not finite, or earlier than the line before")
    return times


def _spacing(table: Table) -> Iterator[float]:
    spacing = table.choice("spacing", ("exponential", "even"), "exponential")
    return even() if spacing == "even" else exponential(_seed(table))


def _seed(table: Table) -> int:
    return table.integer("seed", 0, least=0, most=2**32 - 1)


def _path(table: Table, key: str, folder: Path) -> Path:
    return (folder / table.text(key)).resolve()


_PROCESSES: Final[dict[str, Callable[[Table, Path], Iterator[float]]]] = {
    "constant": _constant,
    "poisson": _poisson,
    "bursts": _bursts,
    "ramp": _ramp,
    "diurnal": _diurnal,
    "replay": _replay,
}
