"""Looks at a server while a load goes on: its CPU and memory in /proc, its batches and its queue at /metrics.

And at the CPU of an Envoy in front of it.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

import numpy as np

from loadtests.procfs import read_cpu_s, read_rss_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    import numpy.typing as npt

    Floats = npt.NDArray[np.float64]

INTERVAL_S: Final = 0.25
"""One look takes a millisecond of the server; a plot needs no more points."""

METRICS_TIMEOUT_S: Final = 5.0

ROWS, BATCHES, PENDING = "nv_inference_count", "nv_inference_exec_count", "nv_inference_pending_request_count"


@dataclass(frozen=True, slots=True)
class Sample:
    """One look, NaN for what could not be seen.

    `at_s`: seconds since 1970. `cpu_s`: CPU seconds of the server's process so far. `rss_bytes`: its resident memory.
    `rows` and `batches`: executed so far, of all models. `pending`: requests that wait. `envoy_cpu_s`: CPU seconds of
    Envoy's process so far.
    """

    at_s: float
    cpu_s: float
    rss_bytes: float
    rows: float
    batches: float
    pending: float
    envoy_cpu_s: float = np.nan


def metric_sums(text: str, names: Sequence[str]) -> Mapping[str, float]:
    """The sum over all labels of each of these metrics, in Prometheus' text format; NaN for one that is not there."""
    sums: dict[str, float] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in names:
            sums[name] = sums.get(name, 0.0) + float(line.rpartition(" ")[2])
    return {name: sums.get(name, np.nan) for name in names}


class ServerWatch:
    """Takes samples in a thread of its own, from entering to leaving; then `samples` has them.

    `pid` is the server's process on this machine, `metrics_url` its metrics, and `envoy_pid` Envoy's process, None for
    what is not at hand. OSError or ValueError of a look that fails is raised on leaving: a server that is not there has
    no series.
    """

    def __init__(self, pid: int | None, metrics_url: str | None, envoy_pid: int | None = None) -> None:
        self._pid = pid
        self._metrics_url = metrics_url
        self._envoy_pid = envoy_pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look_until_done, name="server-watch", daemon=True)
        self._problem: Exception | None = None
        self.samples: list[Sample] = []

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        if self._problem is not None and error is None:
            raise self._problem

    def _look_until_done(self) -> None:
        try:
            self.samples.append(self._look())
            while not self._done.wait(INTERVAL_S):
                self.samples.append(self._look())
            self.samples.append(self._look())
        except (OSError, ValueError) as problem:
            self._problem = problem

    def _look(self) -> Sample:
        cpu_s = rss_bytes = envoy_cpu_s = np.nan
        if self._pid is not None:
            cpu_s, rss_bytes = read_cpu_s(self._pid), float(read_rss_bytes(self._pid))
        if self._envoy_pid is not None:
            envoy_cpu_s = read_cpu_s(self._envoy_pid)
        sums = dict.fromkeys((ROWS, BATCHES, PENDING), np.nan)
        at_s = time.time()
        if self._metrics_url is not None:
            with urllib.request.urlopen(self._metrics_url, timeout=METRICS_TIMEOUT_S) as response:  # noqa: S310
                sums = dict(metric_sums(response.read().decode(), tuple(sums)))
        return Sample(at_s, cpu_s, rss_bytes, sums[ROWS], sums[BATCHES], sums[PENDING], envoy_cpu_s)


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """Samples as arrays, `at_s` in seconds from the start of the load."""

    at_s: Floats
    cpu_s: Floats
    rss_bytes: Floats
    rows: Floats
    batches: Floats
    pending: Floats
    envoy_cpu_s: Floats

    @classmethod
    def of(cls, samples: Sequence[Sample], started_at_s: float) -> Self:
        """The samples of a load that started at this time, in seconds since 1970."""

        def column(value: Callable[[Sample], float]) -> Floats:
            return np.array([value(sample) for sample in samples], np.float64)

        return cls(
            column(lambda sample: sample.at_s) - started_at_s,
            column(lambda sample: sample.cpu_s),
            column(lambda sample: sample.rss_bytes),
            column(lambda sample: sample.rows),
            column(lambda sample: sample.batches),
            column(lambda sample: sample.pending),
            column(lambda sample: sample.envoy_cpu_s),
        )

    def cpu_between(self, first_s: float, last_s: float) -> float | None:
        """The server's CPU seconds from one time to the other; None where nothing is known."""
        return self._between(self.cpu_s, first_s, last_s)

    def envoy_cpu_between(self, first_s: float, last_s: float) -> float | None:
        """The same of Envoy."""
        return self._between(self.envoy_cpu_s, first_s, last_s)

    def _between(self, cpu_s: Floats, first_s: float, last_s: float) -> float | None:
        """What was used from one time to the other, between samples in a straight line."""
        if not len(self.at_s) or np.isnan(cpu_s).any():
            return None
        first, last = np.interp([first_s, last_s], self.at_s, cpu_s)
        return float(last - first)

    def most_rss_bytes(self, first_s: float, last_s: float) -> float | None:
        """The most resident memory that was seen from one time to the other, and right before and after them."""
        if not len(self.at_s) or np.isnan(self.rss_bytes).any():
            return None
        first = max(int(np.searchsorted(self.at_s, first_s, "right")) - 1, 0)
        last = int(np.searchsorted(self.at_s, last_s)) + 1
        return float(self.rss_bytes[first:last].max())
