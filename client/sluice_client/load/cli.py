"""The command `sluice load`: a load at one rate, or the search for the highest rate that keeps the objectives."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Final, TextIO

from sluice_client import operations
from sluice_client.cli import (
    DONE,
    FAILED,
    add_request_options,
    command_parser,
    read_inputs,
    read_tls,
    run_command,
    write,
)
from sluice_client.errors import InvalidRequest
from sluice_client.load import options, report
from sluice_client.load.capacity import LAG_SHARE, End, Plan, Windows, find_capacity, observe
from sluice_client.load.latencies import LAG_P99_LIMIT_S
from sluice_client.load.options import Arrivals
from sluice_client.load.target import Target

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from sluice_client.client import Client
    from sluice_client.load.capacity import Step, Verdict
    from sluice_client.load.counters import Counters
    from sluice_client.load.objectives import Objective
    from sluice_client.results import Array

ALONE_REQUESTS: Final = 20
"""One after the other, to learn how long a request takes alone: it settles within a few."""

LEAST_SHARE: Final = 1 / 64
"""Of the rate at which a search begins: what is not met there has another reason than load."""


def load(argv: list[str]) -> int:
    """Load a model at a rate, whatever it answers, or find the highest rate that keeps objectives."""
    parser = command_parser("load", load)
    add_request_options(parser)
    options.add_options(parser)
    return run_command(parser, argv, _load, options.DEADLINE_S)


def _load(client: Client, arguments: argparse.Namespace) -> int:
    objectives = options.check(arguments)
    arrivals = Arrivals(arguments.arrivals, arguments.burst_size, arguments.from_rate, arguments.seed)
    target = _target(client, arguments, objectives)
    progress = sys.stderr if arguments.json else sys.stdout
    if arguments.find_capacity:
        return _Search(target, arrivals, objectives, arguments, progress).run()
    end_s = arguments.warmup + arguments.duration
    times_s = arrivals.times_s(arguments.rate, end_s)
    write(progress, f"{_title(target)}, {arguments.rate:g} requests/s ({arrivals.kind}) for {end_s:g} s")
    run, counted = target.load(times_s)
    found = report.Report(
        requested_per_s=arrivals.mean_per_s(arguments.rate, arguments.warmup, end_s),
        first_s=arguments.warmup,
        span_s=arguments.duration,
        deadline_s=arguments.deadline,
        records=run.records.between(arguments.warmup, end_s),
        generator=run.generator,
        counted=counted,
        objectives=objectives,
    )
    write(sys.stdout, json.dumps(found.json()) if arguments.json else found.text())
    return DONE if found.is_good else FAILED


def _target(client: Client, arguments: argparse.Namespace, objectives: tuple[Objective, ...]) -> Target:
    """What to send and where; the first request is tried, so that a load of wrong ones is refused with the reason."""
    inputs = read_inputs(client, arguments)
    requests = [inputs] if arguments.rows is None else cut_rows(inputs, arguments.rows)
    version, priority = arguments.model_version, arguments.priority
    client.infer(arguments.model, requests[0], outputs=arguments.output, version=version, priority=priority)

    def message(request: Mapping[str, Array]) -> bytes:
        return operations.infer(
            arguments.model,
            request,
            outputs=arguments.output,
            version=version,
            request_id="",
            priority=priority,
            timeout_us=0,
            parameters=None,
        ).request

    return Target(
        client=client,
        model=arguments.model,
        version=version,
        requests=tuple(map(message, requests)),
        deadline_s=arguments.deadline,
        tls=read_tls(arguments),
        connections=arguments.connections,
        max_in_flight=arguments.max_in_flight,
        lag_limit_s=lag_limit_s(objectives, arguments.deadline),
    )


def lag_limit_s(objectives: Iterable[Objective], deadline_s: float) -> float:
    """How late the generator may be: a tenth of the shortest time that is judged, where that is above the usual limit.

    An objective for errors judges by the deadline.
    """
    limits_s = [objective.limit if objective.share else deadline_s for objective in objectives]
    return max(LAG_P99_LIMIT_S, LAG_SHARE * min(limits_s, default=0.0))


def cut_rows(inputs: Mapping[str, Array], rows: int) -> list[dict[str, Array]]:
    """The inputs of each request of `rows` rows; what is left over is not sent.

    InvalidRequest unless all inputs have the same number of rows, and at least as many as that.
    """
    numbers = {name: array.shape[0] if array.ndim else 0 for name, array in inputs.items()}
    if len(set(numbers.values())) != 1:
        found = ", ".join(f"{name} {number}" for name, number in sorted(numbers.items()))
        raise InvalidRequest(f"--rows cuts inputs that have equally many rows; these have {found or 'none'}")
    (whole,) = set(numbers.values())
    if whole < rows:
        raise InvalidRequest(f"--rows {rows}: the inputs have {whole} rows")
    return [
        {name: array[first : first + rows] for name, array in inputs.items()}
        for first in range(0, whole - rows + 1, rows)
    ]


def _title(target: Target) -> str:
    return f"{target.model} at {', '.join(target.client.endpoints)}, deadline {target.deadline_s:g} s"


class _Search:
    """A search for the capacity, which shows each measurement when it is made."""

    def __init__(
        self,
        target: Target,
        arrivals: Arrivals,
        objectives: tuple[Objective, ...],
        arguments: argparse.Namespace,
        progress: TextIO,
    ) -> None:
        self._target = target
        self._arrivals = arrivals
        self._objectives = objectives
        self._arguments = arguments
        self._progress = progress
        self._samples = max(objective.samples for objective in objectives)
        self._counted: Counters | None = None
        self._curve: list[tuple[Step, Verdict, Counters | None]] = []

    def run(self) -> int:
        """Search, print what was found, and give the exit status."""
        arguments = self._arguments
        start_per_s = arguments.start_rate or min(0.5 / self._alone_s(), arguments.max_rate)
        plan = Plan(
            start_per_s, start_per_s * LEAST_SHARE, arguments.max_rate, arguments.precision, arguments.confidence
        )
        write(
            self._progress,
            f"{_title(self._target)}, {self._arrivals.kind} arrivals: {arguments.windows} windows at each rate, "
            f"of {arguments.window:g} s or {self._samples} requests\n{report.curve_head()}",
        )
        capacity = find_capacity(self._measure, plan, self._tell)
        is_known = capacity.end in (End.FOUND, End.ALWAYS)
        wanted_per_s = arguments.target_rate if is_known else None
        if arguments.json:
            found = report.capacity_json(capacity, self._objectives, self._curve)
            if wanted_per_s:
                found["replicas"] = report.replicas_json(wanted_per_s, capacity, arguments.headroom)
            write(sys.stdout, json.dumps(found))
        else:
            write(sys.stdout, "\n" + report.capacity_text(capacity, plan, arguments.windows, self._objectives))
            if wanted_per_s:
                write(sys.stdout, report.replicas_text(wanted_per_s, capacity, arguments.headroom))
        return DONE if is_known else FAILED

    def _alone_s(self) -> float:
        """How long a request takes while there is no other."""
        return statistics.median(self._target.alone_s(ALONE_REQUESTS))

    def _measure(self, rate_per_s: float) -> Step:
        arguments = self._arguments
        width_s = max(arguments.window, self._samples / rate_per_s)
        windows = Windows(arguments.warmup, width_s, arguments.windows)
        # Chance of its own, or a rate that is measured again would meet the same arrivals.
        arrivals = replace(self._arrivals, seed=self._arrivals.seed + len(self._curve))
        run, self._counted = self._target.load(arrivals.times_s(rate_per_s, windows.end_s))
        return observe(rate_per_s, run.records, windows, self._objectives, run.generator)

    def _tell(self, step: Step, verdict: Verdict) -> None:
        self._curve.append((step, verdict, self._counted))
        write(self._progress, report.curve_row(step, verdict, self._counted))
