"""Service level objectives: what a run measured, held against the limits of its scenario. Pure.

A value that was not measured (None or NaN) meets no objective. Latencies are those of answers with status OK, so every
scenario says how many requests may fail: an objective that refused requests could meet is none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

Value = float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What a run came to; None where nothing could be measured.

    Response time counts from when a request was due, service time from when it was sent. `arrival_error_p99_ms`: how
    much later than due requests were sent. `mean_gap_ms`: the mean time between requests that are due. `goodput_ratio`:
    the share of all requests that were answered OK within their deadline, counted from when they were due.
    `throughput_per_s`: answers with status OK over the time until the last one. `lone_p50_ms`: of requests one by one.
    `generator_cpu_us_per_request`: of the workers' processes while they sent.
    `server_*`: of the server's process; the CPU while the load went on, in cores and per request, and the most RSS.
    `envoy_cpu_us_per_request`: of the Envoy on the way to it.
    """

    p50_ms: Value
    p95_ms: Value
    p99_ms: Value
    p999_ms: Value
    error_ratio: Value
    throughput_per_s: Value
    goodput_ratio: Value
    lone_p50_ms: Value
    arrival_error_p99_ms: Value
    mean_gap_ms: Value
    generator_cpu_us_per_request: Value
    server_cpu_us_per_request: Value
    server_cpu_cores: Value
    server_rss_mib: Value
    envoy_cpu_us_per_request: Value


def _ratio(over: Value, under: Value) -> Value:
    return None if over is None or under is None or not under > 0 else over / under


@dataclass(frozen=True, slots=True)
class Kind:
    """What an objective is about: its key in [slo], the words for it, how it is measured, and which way it is kept."""

    key: str
    title: str
    value: Callable[[Measured], Value]
    at_least: bool = False
    most: float = math.inf
    """The largest limit that could be missed, where there is one."""
    needs_process: bool = False
    """Whether it can be measured only where the server's process is at hand."""
    needs_deadlines: bool = False
    """Whether every request needs a deadline."""


KINDS: Final = (
    Kind("p50_ms", "response time p50, ms", lambda run: run.p50_ms),
    Kind("p95_ms", "response time p95, ms", lambda run: run.p95_ms),
    Kind("p99_ms", "response time p99, ms", lambda run: run.p99_ms),
    Kind("p999_ms", "response time p99.9, ms", lambda run: run.p999_ms),
    Kind("error_ratio", "requests not answered OK, share", lambda run: run.error_ratio, most=0.999),
    Kind("min_throughput_per_s", "answers OK, per second", lambda run: run.throughput_per_s, at_least=True),
    Kind("min_goodput_ratio", "answered OK within the deadline, share", lambda run: run.goodput_ratio, at_least=True,
         most=1.0, needs_deadlines=True),
    Kind("p99_over_lone_p50", "response time p99, over a lone request's p50",
         lambda run: _ratio(run.p99_ms, run.lone_p50_ms)),
    Kind("arrival_error_p99_ms", "sent later than due, p99, ms", lambda run: run.arrival_error_p99_ms),
    Kind("arrival_error_over_gap", "sent later than due, p99, over the mean gap",
         lambda run: _ratio(run.arrival_error_p99_ms, run.mean_gap_ms)),
    Kind("generator_cpu_us_per_request", "the generator's CPU per request, us",
         lambda run: run.generator_cpu_us_per_request),
    Kind("server_cpu_us_per_request", "server CPU per request, us", lambda run: run.server_cpu_us_per_request,
         needs_process=True),
    Kind("server_cpu_cores", "server CPU, cores", lambda run: run.server_cpu_cores, needs_process=True),
    Kind("server_rss_mib", "server RSS at most, MiB", lambda run: run.server_rss_mib, needs_process=True),
)  # fmt: skip
"""Every kind of objective that a scenario may have."""

BY_KEY: Final[Mapping[str, Kind]] = {kind.key: kind for kind in KINDS}


@dataclass(frozen=True, slots=True)
class Objective:
    """A kind with its limit."""

    kind: Kind
    limit: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """An objective, and what was measured of it."""

    objective: Objective
    value: Value

    @property
    def passed(self) -> bool:
        """Whether the limit is kept; not so where nothing was measured."""
        if self.value is None or math.isnan(self.value):
            return False
        limit = self.objective.limit
        return self.value >= limit if self.objective.kind.at_least else self.value <= limit


def judge(objectives: Sequence[Objective], run: Measured) -> tuple[Verdict, ...]:
    """The verdict on each objective, in their order."""
    return tuple(Verdict(each, each.kind.value(run)) for each in objectives)
