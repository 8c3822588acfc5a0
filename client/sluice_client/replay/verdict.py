"""What a replay shows: which answers differ from what was expected, how latencies moved, and the exit status.

Answers that differ count whatever the generator did. Where none does and the generator was the bottleneck, the load was
not the one that was captured: then there is no verdict. Nor is there one where no answer could be compared.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from sluice_client.errors import InvalidRequest
from sluice_client.load.latencies import OK, quantile
from sluice_client.replay.differences import DEFAULT_TOLERANCES, Answer, Tolerance, compare, incomparable
from sluice_proto.capture import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from sluice_client.load.latencies import Floats
    from sluice_client.replay.differences import Difference
    from sluice_client.replay.sending import Replayed
    from sluice_proto.capture import Capture, CapturedRequest

SAME, DIFFERENT, UNDECIDED = 0, 1, 3

SHOWN_SHARES: Final = (50.0, 95.0, 99.0)
"""Quantiles that are always told, in percent."""

_RATIO: Final = re.compile(r"p(\d{1,2}(?:\.\d{1,3})?)=(\d+(?:\.\d+)?)")
_TOLERANCE: Final = re.compile(r"([0-9.eE+-]+)/([0-9.eE+-]+)")


@dataclass(frozen=True, slots=True)
class Differing:
    """A request, by its place in the order of arrival, whose end is not as expected."""

    number: int
    model: str
    differences: Sequence[Difference]


@dataclass(frozen=True, slots=True)
class Quantile:
    """One quantile of the latencies then and now, in seconds; `limit` is of their ratio, None: there is none."""

    percent: float
    expected_s: float
    actual_s: float
    limit: float | None = None

    @property
    def ratio(self) -> float:
        """How many times as long it takes now; NaN where one of both is not there."""
        return self.actual_s / self.expected_s if self.expected_s else math.nan

    @property
    def is_met(self) -> bool:
        """Whether the limit is kept; never by no answer at all."""
        return self.limit is None or self.ratio <= self.limit


@dataclass(frozen=True, slots=True)
class Expectation:
    """What the ends of a capture's requests are compared with: `answers` in the order of arrival, and the latencies of
    those that were OK, in seconds, whoever measured them. `problem`: why these say nothing of the server, or ""."""

    source: str
    answers: Sequence[Answer]
    latencies_s: Floats
    problem: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """All that a replay shows. `incomparable` counts requests by why they were not compared; `problem` is why there
    is no verdict unless an answer differs, or ""."""

    replayed: Replayed
    source: str
    problem: str
    compared: int
    incomparable: Mapping[str, int]
    differing: Sequence[Differing]
    quantiles: Sequence[Quantile]

    @property
    def exit_status(self) -> int:
        """0: the same; 1: answers differ, or latencies do by more than was allowed; 3: there is no verdict."""
        if self.differing:
            return DIFFERENT
        if self.problem:
            return UNDECIDED
        return SAME if all(each.is_met for each in self.quantiles) else DIFFERENT


def recorded(capture: Capture) -> Expectation:
    """What the server that made the capture did; its latencies have no network and no client in them."""
    answers = [Answer(request.code, request.response) for request in capture.requests]
    times = [request.service_ns / NS_PER_S for request in capture.requests if request.code == OK]
    return Expectation("recorded", answers, np.array(times))


def measured(source: str, replayed: Replayed) -> Expectation:
    """What another server did with the same replay."""
    return Expectation(source, replayed.answers, replayed.run.records.response_s, replayed.run.generator.problem)


def judge(
    requests: Sequence[CapturedRequest],
    expected: Expectation,
    replayed: Replayed,
    *,
    tolerances: Mapping[str, Tolerance] = DEFAULT_TOLERANCES,
    limits: Mapping[float, float] | None = None,
) -> Verdict:
    """Compare a replay with what was expected of it; `limits` are of the ratios of latencies, by percent."""
    skipped: Counter[str] = Counter()
    differing = []
    for number, (request, before, after) in enumerate(zip(requests, expected.answers, replayed.answers, strict=True)):
        reason = incomparable(before, after)
        if reason:
            skipped[reason] += 1
        elif found := compare(before, after, tolerances):
            differing.append(Differing(number, request.model, found))
    limits = limits or {}
    now_s = replayed.run.records.response_s
    quantiles = [
        Quantile(
            percent,
            quantile(expected.latencies_s, percent / 100),
            quantile(now_s, percent / 100),
            limits.get(percent),
        )
        for percent in sorted({*SHOWN_SHARES, *limits})
    ]
    compared = len(requests) - skipped.total()
    nothing = "" if compared else "no answer could be compared"
    problem = nothing or replayed.run.generator.problem or expected.problem
    return Verdict(replayed, expected.source, problem, compared, dict(skipped), differing, quantiles)


def parse_ratios(texts: Iterable[str]) -> dict[float, float]:
    """Limits of ratios by percent, of texts like p99=1.5. InvalidRequest for one that is not understood."""
    limits: dict[float, float] = {}
    for text in texts:
        found = _RATIO.fullmatch(text)
        if found is None or not float(found[1]) or not float(found[2]):
            raise InvalidRequest(
                f"--latency-ratio {text!r}: write a quantile and how many times as long it may take, like p99=1.5"
            )
        percent = float(found[1])
        if percent in limits:
            raise InvalidRequest(f"--latency-ratio gives p{percent:g} twice")
        limits[percent] = float(found[2])
    return limits


def parse_tolerance(text: str) -> dict[str, Tolerance]:
    """The tolerance of all floats, of a text like 1e-4/1e-6. InvalidRequest for anything else."""
    found = _TOLERANCE.fullmatch(text)
    try:
        rtol, atol = (float(found[1]), float(found[2])) if found else (-1.0, -1.0)
    except ValueError:
        rtol = atol = -1.0
    if not (0 <= rtol < math.inf and 0 <= atol < math.inf):
        raise InvalidRequest(
            f"--tolerance {text!r}: write RTOL/ATOL, the relative and the absolute part, like 1e-4/1e-6"
        )
    return dict.fromkeys(DEFAULT_TOLERANCES, Tolerance(rtol, atol))
