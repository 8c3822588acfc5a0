"""Compares queue policies in seconds: `python -m sluice_batching.simulate` on a virtual clock, side by side.

Arrivals are synthetic (evenly spaced, at random, or in bursts) or read from a file with lines `arrival_ns,rows,ttl_ns`;
ttl_ns is the time from arrival to deadline, empty for none. A run takes a fixed time and one for each row, or what a
table says for the next larger batch. The policies:

    deadline    the server's: the earliest deadline first, and no work that would end too late
    expiry      order of arrival; what has expired is not run
    fifo        order of arrival, and deadlines are not looked at
    slo         as deadline, and --slo-ms is kept for all that are let in
"""

import argparse
import random
import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Final

from sluice_batching.arrivals import Constant, arrivals, even, exponential, grouped
from sluice_batching.policy import QueuePolicy
from sluice_batching.request import NO_DEADLINE
from sluice_batching.simulation import Arrival, Report, Simulation, Strategy

MS: Final = 1_000_000
S: Final = 1000 * MS

POLICIES: Final = ("deadline", "expiry", "fifo")
SLO: Final = "slo"


def strategy(name: str, policy: QueuePolicy, slo_ns: int = 0) -> Strategy:
    """The strategy of one of the POLICIES, or SLO, for a queue that has these settings otherwise."""
    if name in ("deadline", SLO):
        return Strategy(policy=policy, slo_ns=slo_ns if name == SLO else 0)
    in_order = QueuePolicy(
        max_batch_rows=policy.max_batch_rows,
        batching=policy.batching,
        max_delay_ns=policy.max_delay_ns,
        max_queue_rows=policy.max_queue_rows,
        deadline_first=False,
    )
    return Strategy(policy=in_order, predicts=False, sees_deadlines=name == "expiry")


def arrive(
    pattern: str,
    count: int,
    rate: float,
    ttl_ns: tuple[int, int] | None,
    *,
    rows: int = 1,
    burst: int = 1,
    seed: int = 0,
) -> list[Arrival]:
    """`count` requests at `rate` a second on average, each with a time to live drawn from a range; None: without end.

    `uniform` spaces them evenly, `poisson` at random, `burst` has `burst` of them come at once.
    """
    spacings = {"uniform": even(), "poisson": exponential(seed), "burst": grouped(burst)}
    chance = random.Random(seed)  # noqa: S311 # reproducible, not secret
    requests = []
    for at_s in islice(arrivals(Constant(rate), spacings[pattern]), count):
        arrival_ns = round(at_s * S)
        deadline_ns = NO_DEADLINE if ttl_ns is None else arrival_ns + chance.randint(*ttl_ns)
        requests.append(Arrival(arrival_ns, rows, deadline_ns))
    return requests


def read_arrivals(lines: Sequence[str]) -> list[Arrival]:
    """Recorded arrivals in order of time; ValueError names the line that is none."""
    requests = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            arrival_ns, rows, ttl = text.split(",")
            at_ns, ttl_text = int(arrival_ns), ttl.strip()
            arrival = Arrival(at_ns, int(rows), at_ns + int(ttl_text) if ttl_text else NO_DEADLINE)
        except ValueError:
            raise ValueError(f"line {number} is '{line.strip()}', expected arrival_ns,rows,ttl_ns") from None
        if arrival.rows < 1:
            raise ValueError(f"line {number} has {arrival.rows} rows, expected 1 or more")
        requests.append(arrival)
    return sorted(requests, key=lambda each: each.arrival_ns)


def linear(fixed_ms: float, row_ms: float) -> Callable[[int], int]:
    """Run times that grow with the rows."""
    return lambda rows: round((fixed_ms + row_ms * rows) * MS)


def tabled(text: str) -> Callable[[int], int]:
    """Run times of `rows=ms,rows=ms`: that of the next larger batch, the last for all beyond."""
    try:
        entries = sorted((int(rows), float(ms)) for rows, ms in (entry.split("=") for entry in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no table of run times, expected rows=ms,rows=ms") from None
    sizes = [rows for rows, _ in entries]
    return lambda rows: round(entries[min(bisect_left(sizes, rows), len(sizes) - 1)][1] * MS)


def span(text: str) -> tuple[int, int]:
    """A time in milliseconds, or a range of them like `100-500`, in nanoseconds."""
    low, _, high = text.partition("-")
    try:
        shortest_ns, longest_ns = round(float(low) * MS), round(float(high or low) * MS)
    except ValueError:
        shortest_ns = longest_ns = 0
    if not 0 < shortest_ns <= longest_ns:
        raise argparse.ArgumentTypeError(f"'{text}' is no time in milliseconds above 0, and no range like 100-500")
    return shortest_ns, longest_ns


def table(reports: dict[str, Report]) -> str:
    """The reports side by side."""
    lines = [
        f"{'policy':10}{'in time':>9}{'late':>8}{'refused':>9}{'expired':>9}{'p50 ms':>9}{'p99 ms':>9}{'batch':>7}"
    ]
    for name, report in reports.items():
        p50_ms, p99_ms = report.quantile_ns(0.5) / MS, report.quantile_ns(0.99) / MS
        lines.append(
            f"{name:10}{report.in_time:9}{report.late:8}{report.refused:9}{report.expired:9}{p50_ms:9.1f}{p99_ms:9.1f}"
            f"{report.mean_batch_rows:7.1f}"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m sluice_batching.simulate", description="Compare queue policies.")
    parser.add_argument("--policy", nargs="+", choices=(*POLICIES, SLO), help="to compare, default all")
    parser.add_argument("--arrivals", choices=("poisson", "uniform", "burst"), default="poisson")
    parser.add_argument("--trace", type=Path, help="a file of recorded arrivals, in place of synthetic ones")
    parser.add_argument("--requests", type=int, default=1000, help="how many come (1000)")
    parser.add_argument("--rate", type=float, default=100.0, help="requests a second on average (100)")
    parser.add_argument("--burst", type=int, default=60, help="how many come at once with --arrivals burst (60)")
    parser.add_argument("--rows", type=int, default=1, help="of each request (1)")
    parser.add_argument("--deadline-ms", type=span, help="after the arrival, or a range like 100-500; default none")
    parser.add_argument("--slo-ms", type=float, default=0.0, help="the objective of policy slo; compares that too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fixed-ms", type=float, default=10.0, help="of each run (10)")
    parser.add_argument("--row-ms", type=float, default=0.0, help="of each row of a run (0)")
    parser.add_argument("--table", type=tabled, help="run times by batch, like 1=10,8=25, in place of these")
    parser.add_argument("--instances", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=1, help="rows of a batch (1)")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="the queue delay (0)")
    parser.add_argument("--queue-rows", type=int, default=0, help="that may wait, default any number")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Simulate, and print the reports; 2 when an argument is wrong."""
    parser = _parser()
    args = parser.parse_args(arguments)
    try:
        requests = _arrivals(args)
        policy = QueuePolicy(
            max_batch_rows=args.max_batch,
            batching=args.max_batch > 1,
            max_delay_ns=round(args.delay_ms * MS),
            max_queue_rows=args.queue_rows,
        )
        run_ns = args.table or linear(args.fixed_ms, args.row_ms)
        slo_ns = round(args.slo_ms * MS)
        names = args.policy or (*POLICIES, *([SLO] if slo_ns else []))
        if SLO in names and slo_ns <= 0:
            raise ValueError(f"--slo-ms must be above 0, got {args.slo_ms}")
        reports = {
            name: Simulation(strategy(name, policy, slo_ns), run_ns, args.instances).run(requests) for name in names
        }
    except (OSError, ValueError) as error:
        parser.error(str(error))
    sys.stdout.write(table(reports) + "\n")
    return 0


def _arrivals(args: argparse.Namespace) -> list[Arrival]:
    if args.trace is not None:
        return read_arrivals(args.trace.read_text().splitlines())
    for name in ("requests", "rate", "burst", "rows", "instances"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name} must be above 0, got {getattr(args, name)}")
    return arrive(
        args.arrivals, args.requests, args.rate, args.deadline_ms, rows=args.rows, burst=args.burst, seed=args.seed
    )


if __name__ == "__main__":
    sys.exit(main())
