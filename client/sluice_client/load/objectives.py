"""Service level objectives of a load as `--slo` writes them: p99=50ms, p99.9=0.2s, errors=0.1%."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sluice_client.errors import InvalidRequest
from sluice_client.load.latencies import OK, quantile

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sluice_client.load.latencies import Records

DEFAULT_ERRORS: Final = "errors=0.1%"
"""Latencies are of answers alone, so an objective for them without one for errors could be met by refusing."""

LEAST_SAMPLES: Final = 10
"""A window of fewer requests is now and then one without any, as they come by chance."""

_LATENCY: Final = re.compile(r"p(\d{1,2}(?:\.\d{1,3})?)")
_TIME: Final = re.compile(r"(\d+(?:\.\d+)?)(us|ms|s)")
_SHARE: Final = re.compile(r"(\d+(?:\.\d+)?)%")
_UNITS_S: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


@dataclass(frozen=True, slots=True)
class Objective:
    """`text` as it was given. `share` is the quantile of the response time, and `limit` seconds; for errors `share` is
    0, and `limit` the ratio of requests that may fail."""

    text: str
    share: float
    limit: float

    @property
    def name(self) -> str:
        """What is limited: p99, errors, ..."""
        return self.text.partition("=")[0]

    def value(self, records: Records) -> float:
        """What came out, in seconds or as a ratio; NaN when there is nothing to take it of."""
        if self.share:
            return quantile(records.response_s, self.share)
        return float((records.codes != OK).mean()) if len(records) else math.nan

    def is_met(self, records: Records) -> bool:
        """Whether the limit is kept; never by no answer at all."""
        return self.value(records) <= self.limit

    @property
    def samples(self) -> int:
        """How many requests a window needs, so that this quantile is not just the slowest of them."""
        return max(LEAST_SAMPLES, math.ceil(round(1 / (1 - self.share), 6)))


def parse_objectives(texts: Iterable[str]) -> tuple[Objective, ...]:
    """The objectives, with DEFAULT_ERRORS unless errors are limited. InvalidRequest for one that is not understood."""
    objectives = [_parse(text) for text in texts]
    if all(objective.share for objective in objectives):
        objectives.append(_parse(DEFAULT_ERRORS))
    names = [objective.name for objective in objectives]
    for name in names:
        if names.count(name) > 1:
            raise InvalidRequest(f"--slo gives {name!r} twice")
    return tuple(objectives)


def slowest_limit_s(objectives: Iterable[Objective]) -> float:
    """The largest latency that an objective allows, in seconds; 0 when none limits latencies."""
    return max((objective.limit for objective in objectives if objective.share), default=0.0)


def _parse(text: str) -> Objective:
    name, _, value = text.partition("=")
    if name == "errors":
        share = _SHARE.fullmatch(value)
        if share is None or float(share[1]) > 100:
            raise InvalidRequest(f"--slo {text!r}: write the share of requests that may fail, like {DEFAULT_ERRORS}")
        return Objective(text, 0.0, float(share[1]) / 100)
    latency = _LATENCY.fullmatch(name)
    if latency is None or not float(latency[1]):
        raise InvalidRequest(
            f"--slo {text!r}: no such objective; there are pN=TIME for the response time (p50, p99, p99.9, ...) "
            "and errors=N%"
        )
    time = _TIME.fullmatch(value)
    if time is None or not float(time[1]):
        raise InvalidRequest(f"--slo {text!r}: write a time above 0 with its unit (us, ms or s), like {name}=50ms")
    return Objective(text, round(float(latency[1]) / 100, 9), float(time[1]) * _UNITS_S[time[2]])
