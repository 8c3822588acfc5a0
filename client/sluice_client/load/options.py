"""The options of `sluice load`, and what they mean together: nothing that is given is ignored."""

from __future__ import annotations

import argparse
import itertools
import math
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sluice_batching.arrivals import Constant, Diurnal, Ramp, arrivals, even, exponential, grouped
from sluice_client.errors import InvalidRequest
from sluice_client.load.capacity import windows_needed
from sluice_client.load.objectives import Objective, parse_objectives, slowest_limit_s
from sluice_client.load.open_loop import MAX_IN_FLIGHT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sluice_batching.arrivals import Rate

DEADLINE_S: Final = 5.0
"""Of a request: a load above the capacity ends so long after its last request. Nobody waits for longer, either."""

MAX_REQUESTS: Final = 10_000_000
"""Of one load: their records take half a gigabyte."""

MAX_WINDOWS: Final = 100
"""More would only tell apart rates that are closer than any precision asks for."""

ARRIVALS: Final = ("constant", "poisson", "bursts", "ramp", "diurnal")

_NEEDS: Final = {
    "burst_size": ("bursts",),
    "from_rate": ("ramp", "diurnal"),
}
"""Options that only these arrivals look at."""

_OF_CAPACITY: Final = (
    "start_rate",
    "max_rate",
    "precision",
    "window",
    "windows",
    "confidence",
    "target_rate",
    "headroom",
)
_OF_RATE: Final = ("rate", "duration", "from_rate")

_DEFAULTS: Final = {
    "duration": 10.0,
    "from_rate": 0.0,
    "burst_size": 10,
    "max_rate": 100_000.0,
    "precision": 0.05,
    "window": 2.0,
    "windows": 5,
    "confidence": 0.95,
    "headroom": 0.3,
}
"""Of options that are looked at only with some others; they are None until those have been checked."""


@dataclass(frozen=True, slots=True)
class Arrivals:
    """How requests come: the kind, requests in a burst, the rate at which a ramp or a day begins, and chance's seed."""

    kind: str
    burst_size: int
    from_per_s: float
    seed: int

    def times_s(self, per_s: float, end_s: float) -> array[float]:
        """When requests of this rate are due before `end_s`, in ascending seconds. InvalidRequest for too many."""
        if per_s * end_s > MAX_REQUESTS:
            raise InvalidRequest(
                f"{per_s:g} requests/s for {end_s:g} s are {per_s * end_s:,.0f} requests, at most {MAX_REQUESTS:,} "
                "can be recorded"
            )
        times_s = array("d")
        for at_s in arrivals(self._rate(per_s, end_s), self._spacing()):
            if at_s >= end_s:
                break
            times_s.append(at_s)
        return times_s

    def mean_per_s(self, per_s: float, first_s: float, end_s: float) -> float:
        """How many requests a second are expected from `first_s` until the end."""
        rate = self._rate(per_s, end_s)
        return (rate.until(end_s) - rate.until(first_s)) / (end_s - first_s)

    def _rate(self, per_s: float, end_s: float) -> Rate:
        if self.kind == "ramp":
            return Ramp(self.from_per_s, per_s, end_s)
        if self.kind == "diurnal":
            return Diurnal(self.from_per_s, per_s, end_s)
        return Constant(per_s)

    def _spacing(self) -> Iterator[float]:
        if self.kind == "constant":
            return even()
        return grouped(self.burst_size) if self.kind == "bursts" else exponential(self.seed)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `sluice load` besides those of every command and the inputs."""
    _add_load_options(parser)
    _add_capacity_options(parser)


def _add_load_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the load").add_argument
    add("--rate", type=positive, metavar="N", help="requests/s; of a ramp or a day, the highest")
    add("--duration", type=positive, metavar="SECONDS", help="how long, after the warm-up (default 10)")
    add("--warmup", type=not_negative, default=1.0, metavar="SECONDS", help="sent before that, not counted (default 1)")
    add("--arrivals", choices=ARRIVALS, default="poisson", help="how requests come (default poisson)")
    add("--burst-size", type=count, metavar="N", help="requests that come at once with --arrivals bursts (default 10)")
    add("--from-rate", type=not_negative, metavar="N", help="requests/s at the begin of a ramp or a day (default 0)")
    add("--seed", type=int, default=0, metavar="N", help="of the arrivals: the same one gives the same (default 0)")
    add("--rows", type=count, metavar="N", help="cut the inputs into requests of N rows, which are sent in turns")
    add("--priority", type=count, default=0, metavar="N", help="the priority of the requests, 1 is the highest")
    add("--connections", type=count, default=1, metavar="N", help="connections to each endpoint (default 1)")
    add(
        "--max-in-flight",
        type=count,
        default=MAX_IN_FLIGHT,
        metavar="N",
        help=f"requests open at once; what is due beyond is not sent and an error (default {MAX_IN_FLIGHT})",
    )
    add(
        "--slo",
        action="append",
        default=[],
        metavar="WHAT=LIMIT",
        help="an objective: p50, p99, p99.9 ... of the response time, or errors (p99=50ms errors=0.1%%; repeatable)",
    )
    add("--json", action="store_true", help="print one JSON object")


def _add_capacity_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--find-capacity", action="store_true", help="find the highest rate that keeps the objectives")
    add = parser.add_argument_group("with --find-capacity").add_argument
    add("--start-rate", type=positive, metavar="N", help="where to begin (default: half of what one client gets alone)")
    add("--max-rate", type=positive, metavar="N", help="the highest rate to try (default 100000)")
    add("--precision", type=positive_share, metavar="SHARE", help="how closely to find it (default 0.05: within 5 %%)")
    add("--window", type=positive, metavar="SECONDS", help="length of a window (default 2, or what its quantile needs)")
    add("--windows", type=count, metavar="N", help="windows measured at each rate (default 5)")
    add(
        "--confidence",
        type=positive_share,
        metavar="SHARE",
        help="that more than half of all windows would do (default 0.95)",
    )
    add("--target-rate", type=positive, metavar="N", help="say how many replicas this rate takes")
    add("--headroom", type=share, metavar="SHARE", help="what each replica keeps free for peaks (default 0.3)")


def check(arguments: argparse.Namespace) -> tuple[Objective, ...]:
    """Fill in the defaults, and give the objectives. InvalidRequest for options that do not go together."""
    for name, kinds in _NEEDS.items():
        if getattr(arguments, name) is not None and arguments.arrivals not in kinds:
            raise InvalidRequest(f"{_option(name)} is for --arrivals {' and '.join(kinds)}, not {arguments.arrivals}")
    for name in _OF_RATE if arguments.find_capacity else _OF_CAPACITY:
        if getattr(arguments, name) is not None:
            how = "does not go with" if arguments.find_capacity else "is for"
            raise InvalidRequest(f"{_option(name)} {how} --find-capacity")
    if arguments.find_capacity and arguments.arrivals in _NEEDS["from_rate"]:
        raise InvalidRequest(f"--arrivals {arguments.arrivals} has no one rate, so it has no capacity to find")
    if arguments.find_capacity and not arguments.slo:
        raise InvalidRequest("--find-capacity needs an objective, like --slo p99=50ms")
    if not arguments.find_capacity and arguments.rate is None:
        raise InvalidRequest("say how many requests/s to send with --rate, or --find-capacity with an --slo")
    if arguments.headroom is not None and arguments.target_rate is None:
        raise InvalidRequest("--headroom is for --target-rate")
    for name, default in _DEFAULTS.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, default)
    objectives = parse_objectives(arguments.slo) if arguments.slo else ()
    _check_values(arguments, objectives)
    return objectives


def _check_values(arguments: argparse.Namespace, objectives: tuple[Objective, ...]) -> None:
    if arguments.arrivals == "diurnal" and arguments.from_rate > arguments.rate:
        raise InvalidRequest(
            f"--from-rate {arguments.from_rate:g} is above --rate {arguments.rate:g}, the highest of the day"
        )
    if slowest_limit_s(objectives) >= arguments.deadline:
        raise InvalidRequest(
            f"an objective of {slowest_limit_s(objectives):g} s says nothing with a deadline of "
            f"{arguments.deadline:g} s, after which requests are errors: raise --deadline"
        )
    if arguments.windows > MAX_WINDOWS:
        raise InvalidRequest(f"--windows {arguments.windows}: at most {MAX_WINDOWS}; make them longer with --window")
    if windows_needed(arguments.windows, arguments.confidence) is None:
        least = next(n for n in itertools.count(1) if windows_needed(n, arguments.confidence) is not None)
        raise InvalidRequest(
            f"--windows {arguments.windows}: not even all of them give a confidence of {arguments.confidence:g}, "
            f"at least {least} are needed"
        )
    if arguments.start_rate is not None and arguments.start_rate > arguments.max_rate:
        raise InvalidRequest(f"--start-rate {arguments.start_rate:g} is above --max-rate {arguments.max_rate:g}")


def positive(text: str) -> float:
    """A number above 0."""
    return _number(text, lambda value: value > 0, "a number above 0")


def not_negative(text: str) -> float:
    """A number, 0 or more."""
    return _number(text, lambda value: value >= 0, "a number, 0 or more")


def share(text: str) -> float:
    """A share that leaves something."""
    return _number(text, lambda value: 0 <= value < 1, "a share, 0 or more and below 1")


def positive_share(text: str) -> float:
    """A share of something, not none and not all."""
    return _number(text, lambda value: 0 < value < 1, "a share above 0 and below 1")


def count(text: str) -> int:
    """A whole number from 1 on."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _number(text: str, is_good: Callable[[float], bool], wanted: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or not is_good(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {wanted}")
    return value


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
