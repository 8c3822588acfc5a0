"""What the servers themselves count while a load runs: the difference of their statistics before and after."""

from __future__ import annotations

import operator
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from sluice_client.errors import ServerError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sluice_client.client import Client
    from sluice_client.results import Duration, ModelStatistics


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums over all endpoints, of everybody's requests: rows and runs, requests and where their time went."""

    rows: int
    runs: int
    requests: int
    queue_ns: int
    compute_ns: int

    @property
    def mean_batch_rows(self) -> float:
        """Rows in a run, 0 without runs."""
        return self.rows / self.runs if self.runs else 0.0

    @property
    def queue_ms(self) -> float:
        """Of a request in the queue, in the mean; 0 without requests."""
        return self.queue_ns / self.requests / 1e6 if self.requests else 0.0

    @property
    def compute_ms(self) -> float:
        """Of a request in the run that it was part of, in the mean; 0 without requests."""
        return self.compute_ns / self.requests / 1e6 if self.requests else 0.0

    def since(self, earlier: Counters) -> Counters | None:
        """What was counted in between; None when the counters began anew, as after a reload."""
        differences = tuple(map(operator.sub, astuple(self), astuple(earlier)))
        return Counters(*differences) if min(differences) >= 0 else None


def add_up(models: Iterable[ModelStatistics]) -> Counters:
    """The counters of several versions and endpoints as one."""

    def whole_ns(*durations: Duration) -> int:
        return sum(duration.ns for duration in durations)

    found = tuple(models)
    return Counters(
        rows=sum(model.inference_count for model in found),
        runs=sum(model.execution_count for model in found),
        requests=sum(model.success.count for model in found),
        queue_ns=sum(model.queue.ns for model in found),
        compute_ns=sum(whole_ns(model.compute_input, model.compute_infer, model.compute_output) for model in found),
    )


def read_counters(client: Client, model: str, version: str) -> Counters | None:
    """The counters now; None when a server does not tell them, which spoils no load."""
    try:
        return add_up(
            each for endpoint in client.endpoints for each in client.statistics(model, version, endpoint=endpoint)
        )
    except ServerError:
        return None
