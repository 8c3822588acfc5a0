"""From what became of a load to what its objectives are about, and whether the load was what was asked for. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from loadtests.slo import Measured
from sluice_client.load.latencies import Quantiles, quantile

if TYPE_CHECKING:
    from loadtests.outcome import Outcome
    from loadtests.scenario import GeneratorLimits, Scenario
    from loadtests.server_watch import Series


@dataclass(frozen=True, slots=True, eq=False)
class Run:
    """One load on one way to the server; `way` says which."""

    way: str
    outcome: Outcome
    series: Series
    measured: Measured
    problems: tuple[str, ...]
    """Why the load was not what was asked for; empty when it was."""


def make_run(way: str, scenario: Scenario, outcome: Outcome, series: Series) -> Run:
    """All that is told of a load."""
    return Run(way, outcome, series, measure(scenario, outcome, series), problems(scenario.generator, outcome))


def end_s(scenario: Scenario, outcome: Outcome) -> float:
    """When the load was over: its last answer, but not before the end that the scenario has."""
    ended_s = outcome.records.ended_s
    return max(scenario.duration_s, float(np.nanmax(ended_s)) if not np.isnan(ended_s).all() else 0.0)


def measure(scenario: Scenario, outcome: Outcome, series: Series) -> Measured:
    """What the objectives are about."""
    records = outcome.records
    over_s = end_s(scenario, outcome)
    response, answered, requests = Quantiles.of(records.response_s), len(records.response_s), len(records)
    sent = len(records.lag_s)
    cpu_s, rss_bytes = series.cpu_between(0.0, over_s), series.most_rss_bytes(0.0, over_s)

    def us_per_request(used_s: float | None) -> float | None:
        return used_s * 1e6 / sent if used_s is not None and sent else None

    return Measured(
        p50_ms=_ms(response.p50_s),
        p95_ms=_ms(response.p95_s),
        p99_ms=_ms(response.p99_s),
        p999_ms=_ms(response.p999_s),
        error_ratio=1 - answered / requests,
        throughput_per_s=answered / over_s,
        goodput_ratio=_good(scenario, outcome) / requests,
        lone_p50_ms=_ms(quantile(outcome.lone_s, 0.5)),
        arrival_error_p99_ms=_ms(quantile(records.lag_s, 0.99)),
        mean_gap_ms=scenario.mean_gap_ms,
        generator_cpu_us_per_request=us_per_request(outcome.cpu_s),
        server_cpu_us_per_request=us_per_request(cpu_s),
        server_cpu_cores=None if cpu_s is None else cpu_s / over_s,
        server_rss_mib=None if rss_bytes is None else rss_bytes / 2**20,
        envoy_cpu_us_per_request=us_per_request(series.envoy_cpu_between(0.0, over_s)),
    )


def problems(limits: GeneratorLimits, outcome: Outcome) -> tuple[str, ...]:
    """Why the generator was the bottleneck, by worker; empty when it was not."""
    found = []
    for number, generator in enumerate(outcome.generators, 1):
        who = f"the generator was the bottleneck: worker {number}"
        if generator.not_sent:
            full = f"as {limits.max_in_flight} were in flight (max_in_flight)"
            found.append(f"{who} did not send {generator.not_sent} requests, {full}")
        if generator.lag_p99_s * 1e3 > limits.lag_p99_ms:
            lag_ms = generator.lag_p99_s * 1e3
            found.append(f"{who} sent late, p99 of it is {lag_ms:.1f} ms (lag_p99_ms = {limits.lag_p99_ms:g})")
        if generator.cpu_share > limits.cpu_share:
            found.append(f"{who} used {generator.cpu_share:.2f} of a core (cpu_share = {limits.cpu_share:g})")
    return tuple(found)


def _good(scenario: Scenario, outcome: Outcome) -> int:
    """How many were answered OK within their deadline, counted from when they were due."""
    good = 0
    for number, kind in enumerate(scenario.requests):
        within_s = math.inf if kind.deadline_ms is None else kind.deadline_ms / 1e3
        good += int(np.count_nonzero(outcome.of_kind(number).response_s <= within_s))
    return good


def _ms(value_s: float) -> float | None:
    return None if math.isnan(value_s) else value_s * 1e3
