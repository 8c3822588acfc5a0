"""What became of each request of a load, as arrays, and the exact quantiles of that: nothing here sends or waits.

Response time counts from when a request should have been sent, service time from when it really was. A generator that
waits for a slow answer before it sends the next request sees good service times and hides all the requests that would
have met the slow server meanwhile (coordinated omission); response time counts the wait of each of them.

Quantiles are of raw samples by nearest rank: a latency that really occurred. They are of answers with status OK; what
failed is counted as errors, by code, and never mixed into latencies, as a refusal is fast.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

OK: Final = 0
NOT_SENT: Final = 255
"""In the place of a gRPC status: as many requests were open as the generator allows, so this one was given up."""

CODES: Final = (
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "ALREADY_EXISTS",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "ABORTED",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "DATA_LOSS",
    "UNAUTHENTICATED",
)
"""gRPC's status names by number."""

LAG_P99_LIMIT_S: Final = 0.005
"""A generator that sends later than this does not send the load that was asked for: at 200/s it is a whole request."""

CPU_LIMIT: Final = 0.9
"""Of one core, which is all that one event loop can use: above it, the generator's own queue is what is measured."""


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """Requests in the order of their intended times, all arrays [requests].

    `intended_s`, `sent_s` and `ended_s`: FP64, seconds from the start of the load (NaN in the last two for NOT_SENT).
    `codes`: UINT8, gRPC status numbers, or NOT_SENT.
    """

    intended_s: Floats
    sent_s: Floats
    ended_s: Floats
    codes: npt.NDArray[np.uint8]

    def __post_init__(self) -> None:
        lengths = {len(each) for each in (self.intended_s, self.sent_s, self.ended_s, self.codes)}
        if len(lengths) > 1:
            raise ValueError(f"records of one load are equally long, these have {sorted(lengths)} requests")

    def __len__(self) -> int:
        return len(self.codes)

    @classmethod
    def of(cls, intended_s: npt.ArrayLike, sent_s: npt.ArrayLike, ended_s: npt.ArrayLike, codes: npt.ArrayLike) -> Self:
        """The records of any sequences of numbers, sorted by intended time."""
        intended = np.asarray(intended_s, np.float64)
        order = np.argsort(intended, kind="stable")
        sent, ended = np.asarray(sent_s, np.float64), np.asarray(ended_s, np.float64)
        return cls(intended[order], sent[order], ended[order], np.asarray(codes, np.uint8)[order])

    @classmethod
    def merged(cls, several: Sequence[Records]) -> Self:
        """One load out of those, one or more, that several generators sent from the same start on."""
        return cls.of(
            np.concatenate([each.intended_s for each in several]),
            np.concatenate([each.sent_s for each in several]),
            np.concatenate([each.ended_s for each in several]),
            np.concatenate([each.codes for each in several]),
        )

    def between(self, first_s: float, last_s: float) -> Records:
        """Those that were due from `first_s` on, before `last_s`."""
        part = slice(*np.searchsorted(self.intended_s, [first_s, last_s]))
        return Records(self.intended_s[part], self.sent_s[part], self.ended_s[part], self.codes[part])

    def as_sent(self) -> Records:
        """The same load, as if every request had been meant to be sent when it really was."""
        really_s = np.where(self.codes == NOT_SENT, self.intended_s, self.sent_s)
        return Records.of(really_s, self.sent_s, self.ended_s, self.codes)

    def windows(self, first_s: float, width_s: float, number: int) -> Iterator[Records]:
        """`number` parts of `width_s` seconds each, one after the other, by when requests were due."""
        for index in range(number):
            yield self.between(first_s + index * width_s, first_s + (index + 1) * width_s)

    @property
    def response_s(self) -> Floats:
        """From the intended time to the end, of those that were answered OK."""
        answered = self.codes == OK
        times: Floats = self.ended_s[answered] - self.intended_s[answered]
        return times

    @property
    def service_s(self) -> Floats:
        """From the real sending to the end, of those that were answered OK."""
        answered = self.codes == OK
        times: Floats = self.ended_s[answered] - self.sent_s[answered]
        return times

    @property
    def lag_s(self) -> Floats:
        """How much later than intended the generator sent, of all that were sent."""
        sent = self.codes != NOT_SENT
        times: Floats = self.sent_s[sent] - self.intended_s[sent]
        return times

    @property
    def outcomes(self) -> Mapping[str, int]:
        """How many requests ended with each code, the most frequent first."""
        numbers, counts = np.unique(self.codes, return_counts=True)
        found = zip(numbers.tolist(), counts.tolist(), strict=True)
        return {code_name(number): count for number, count in sorted(found, key=lambda pair: -pair[1])}


def code_name(number: int) -> str:
    """The name of a code of Records."""
    return "NOT_SENT" if number == NOT_SENT else CODES[number]


def quantile(values: Floats, share: float) -> float:
    """The smallest value that at least this share of the values does not exceed (nearest rank); NaN when there is none.

    ValueError for a share that is not above 0 and at most 1.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share is above 0 and at most 1, got {share}")
    if not len(values):
        return math.nan
    # Rounded first: 0.07 * 100 is a little more than 7 and would give the eighth value.
    rank = math.ceil(round(share * len(values), 9)) - 1
    return float(np.partition(values, rank)[rank])


@dataclass(frozen=True, slots=True)
class Quantiles:
    """What is told of many times, in seconds; NaN where there was none."""

    p50_s: float
    p95_s: float
    p99_s: float
    p999_s: float
    max_s: float

    @classmethod
    def of(cls, values_s: Floats) -> Self:
        """Those of these values."""
        ordered = np.sort(values_s)
        return cls(*(quantile(ordered, share) for share in (0.5, 0.95, 0.99, 0.999, 1.0)))


@dataclass(frozen=True, slots=True)
class Summary:
    """What is told of a load over `span_s` seconds.

    `sent_per_s`: requests that were sent. `answered_per_s`: those of them that were answered OK, before or after the
    end of the span. `goodput_per_s`: those that were answered OK within the deadline, counted from the intended time.
    `error_ratio`: the share of requests that were not answered OK, those that could not be sent among them.
    """

    span_s: float
    requests: int
    sent_per_s: float
    answered_per_s: float
    goodput_per_s: float
    error_ratio: float
    outcomes: Mapping[str, int]
    response: Quantiles
    service: Quantiles
    lag: Quantiles


def summarize(records: Records, span_s: float, deadline_s: float = math.inf) -> Summary:
    """The summary of requests that were due in `span_s` seconds. ValueError for a span that is not above 0."""
    if not span_s > 0:
        raise ValueError(f"a span is above 0 seconds, got {span_s}")
    response_s = records.response_s
    answered, requests = len(response_s), len(records)
    return Summary(
        span_s=span_s,
        requests=requests,
        sent_per_s=int(np.count_nonzero(records.codes != NOT_SENT)) / span_s,
        answered_per_s=answered / span_s,
        goodput_per_s=int(np.count_nonzero(response_s <= deadline_s)) / span_s,
        error_ratio=1 - answered / requests if requests else math.nan,
        outcomes=records.outcomes,
        response=Quantiles.of(response_s),
        service=Quantiles.of(records.service_s),
        lag=Quantiles.of(records.lag_s),
    )


@dataclass(frozen=True, slots=True)
class Generator:
    """How the sender of a load itself did: whether what was measured is the server at all.

    `cpu_share`: CPU time of its process over the time that passed, 1 for one core. `most_in_flight`: the most requests
    that were open at once. `not_sent`: how many were given up since that was all that it may have open.
    `lag_limit_s`: the p99 of its lag above which it is too late.
    """

    lag_p99_s: float
    cpu_share: float
    most_in_flight: int
    not_sent: int
    lag_limit_s: float = LAG_P99_LIMIT_S

    @property
    def is_late(self) -> bool:
        """Whether it did not send when it should have."""
        return self.lag_p99_s > self.lag_limit_s

    @property
    def is_busy(self) -> bool:
        """Whether it had no time left."""
        return self.cpu_share >= CPU_LIMIT

    @property
    def problem(self) -> str:
        """Why the load is the generator's limit and says nothing of the server; "" when it is not."""
        if self.is_busy:
            return f"the generator was the bottleneck: it used {self.cpu_share:.2f} of a core (limit {CPU_LIMIT:g})"
        if self.is_late:
            return (
                f"the generator was the bottleneck: p99 of its lag is {self.lag_p99_s * 1e3:.1f} ms "
                f"(limit {self.lag_limit_s * 1e3:g} ms)"
            )
        return ""


class Log:
    """Records while they are made: 25 bytes a request, and the number of those that are in flight.

    Requests are numbered from 0 in the order in which they begin, which is that of their intended times.
    """

    def __init__(self, clock_s: Callable[[], float], started_s: float | None = None) -> None:
        """`started_s` is when the load starts on the clock, by default now."""
        self._clock_s = clock_s
        self._started_s = clock_s() if started_s is None else started_s
        self._intended_s, self._sent_s, self._ended_s = array("d"), array("d"), array("d")
        self._codes = array("B")
        self._in_flight = self._not_sent = 0
        self.most_in_flight = 0

    def now_s(self) -> float:
        """Seconds from the start of the load."""
        return self._clock_s() - self._started_s

    def begin(self, due_s: float, max_in_flight: int) -> bool:
        """Note the next request; whether it may be sent, which it is to be then."""
        self._intended_s.append(due_s)
        self._sent_s.append(math.nan)
        self._ended_s.append(math.nan)
        self._codes.append(NOT_SENT)
        if self._in_flight >= max_in_flight:
            self._not_sent += 1
            return False
        self._in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self._in_flight)
        return True

    def note_sent(self, number: int) -> None:
        """A request is sent now."""
        self._sent_s[number] = self.now_s()

    def note_ended(self, number: int, code: int) -> float:
        """A request has ended now, with this code: its response time in seconds."""
        self._ended_s[number] = ended_s = self.now_s()
        self._codes[number] = code
        self._in_flight -= 1
        return ended_s - self._intended_s[number]

    def records(self) -> Records:
        """All of it as arrays."""
        return Records(
            np.array(self._intended_s), np.array(self._sent_s), np.array(self._ended_s), np.array(self._codes)
        )

    def generator(self, cpu_share: float) -> Generator:
        """How the sender did that used so much CPU."""
        return Generator(quantile(self.records().lag_s, 0.99), cpu_share, self.most_in_flight, self._not_sent)
