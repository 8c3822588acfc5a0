"""What a queue would make of given arrivals: the real queue and policy, on a virtual clock, with a model of run times.

A simulation has no threads: it goes from one instant at which something happens to the next, in order. What happens is
that a request arrives, that a run ends, or that the queue has something due; then free instances take, as threads
would. Requests that expire leave at their deadlines, as with `ExpiryTimer`.
"""

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from sluice_batching.errors import BatchingError
from sluice_batching.policy import QueuePolicy
from sluice_batching.priority_queue import PriorityQueue
from sluice_batching.queue import Queue
from sluice_batching.request import NO_DEADLINE, Request
from sluice_batching.run_times import RunTimes
from sluice_batching.tuner import SloTuner


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request of so many rows that comes at this time and is of use until its deadline; one clock for all."""

    arrival_ns: int
    rows: int = 1
    deadline_ns: int = NO_DEADLINE


@dataclass(frozen=True, slots=True, kw_only=True)
class Strategy:
    """What a queue is told: its policy, whether it learns how long runs take, and whether it sees deadlines at all.

    With `slo_ns` a tuner keeps that objective.
    """

    policy: QueuePolicy
    predicts: bool = True
    sees_deadlines: bool = True
    slo_ns: int = 0


@dataclass(slots=True)
class Report:
    """What became of the arrivals; each is in exactly one of the first four, which are counts.

    in_time, late: answered before and after its deadline. refused: not accepted by the queue. expired: taken out of it.
    started_late: of those answered, how many were started when their deadline had passed.
    latencies_ns: of the answered ones, from arrival to the end of the run; arrivals_ns: when each of them came.
    batch_rows: of each run. ended_ns: when the last run ended.
    """

    in_time: int = 0
    late: int = 0
    refused: int = 0
    expired: int = 0
    started_late: int = 0
    latencies_ns: list[int] = field(default_factory=list)
    arrivals_ns: list[int] = field(default_factory=list)
    batch_rows: list[int] = field(default_factory=list)
    ended_ns: int = 0

    def quantile_ns(self, share: float) -> int:
        """The latency that this share of the answers does not exceed; 0 without answers."""
        if not self.latencies_ns:
            return 0
        place = -(-len(self.latencies_ns) * share // 1)
        return sorted(self.latencies_ns)[max(0, int(place) - 1)]

    @property
    def mean_batch_rows(self) -> float:
        """The rows of a run, on average; 0 without runs."""
        return sum(self.batch_rows) / len(self.batch_rows) if self.batch_rows else 0.0


class _Simulated(Request):
    """A request with the deadline that its client has, whatever the queue sees."""

    __slots__ = ("arrival",)

    def __init__(self, arrival: Arrival, *, sees_deadlines: bool) -> None:
        super().__init__(arrival.rows, 0, None, arrival.deadline_ns if sees_deadlines else NO_DEADLINE)
        self.arrival = arrival


class Simulation:
    """One queue with its instances; `run_ns(rows)` is how long a run takes. Runs once."""

    __slots__ = (
        "_again",
        "_asked",
        "_coming",
        "_free",
        "_queue",
        "_run_ns",
        "_run_times",
        "_runs",
        "_strategy",
        "report",
    )

    def __init__(self, strategy: Strategy, run_ns: Callable[[int], int], instances: int = 1) -> None:
        policy = strategy.policy
        self._strategy = strategy
        tuner = SloTuner(strategy.slo_ns, policy.max_batch_rows, instances) if strategy.slo_ns else None
        self._run_times = RunTimes(instances) if tuner is None else tuner
        make_queue: type[Queue[_Simulated]] = Queue if policy.priorities is None else PriorityQueue
        self._queue = make_queue(policy, self._run_times if strategy.predicts else None)
        if tuner is not None:
            tuner.steer(self._queue.tune)
        self._run_ns = run_ns
        self._free = instances
        # (when it ends, when it began, its place among the runs, its batch) of what runs now.
        self._runs: list[tuple[int, int, int, list[_Simulated]]] = []
        # (when, a number of its own, which arrival) of what has not come yet; and how clients go on.
        self._coming: list[tuple[int, int, Arrival]] = []
        self._again: Callable[[int], int | None] | None = None
        self._asked = 0
        self.report = Report()

    def run(self, arrivals: Sequence[Arrival], again: Callable[[int], int | None] | None = None) -> Report:
        """Let everything arrive, and run until nothing is left; the arrivals are in order of time.

        With `again` each is the first request of a client who waits for the answer, or the refusal, before it asks
        again for as many rows: it gives when that is, after now; None for never.
        """
        self._again = again
        self._asked = len(arrivals)
        self._coming = [(arrival.arrival_ns, number, arrival) for number, arrival in enumerate(arrivals)]
        coming, now_ns = self._coming, 0
        while True:
            next_ns = self._next_ns(now_ns)
            if coming and (next_ns is None or coming[0][0] <= next_ns):
                now_ns, _, arrival = heapq.heappop(coming)
                self._arrive(arrival, now_ns)
                # What comes at the same instant comes in one list, before anybody takes.
                if coming and coming[0][0] == now_ns:
                    continue
            elif next_ns is None:
                return self.report
            else:
                now_ns = next_ns
                self._end_runs(now_ns)
            self.report.expired += len(self._queue.expire(now_ns))
            self._take(now_ns)

    def _next_ns(self, now_ns: int) -> int | None:
        """When something happens next if nothing more arrives, from now on; None = never."""
        instants_ns = [self._runs[0][0]] if self._runs else []
        deadline_ns = self._queue.next_deadline_ns()
        wakeup_ns = self._queue.next_wakeup_ns() if self._free else None
        instants_ns += [instant_ns for instant_ns in (deadline_ns, wakeup_ns) if instant_ns is not None]
        # What is due already has its instant in the past.
        return max(now_ns, min(instants_ns)) if instants_ns else None

    def _arrive(self, arrival: Arrival, now_ns: int) -> None:
        request = _Simulated(arrival, sees_deadlines=self._strategy.sees_deadlines)
        error: BatchingError | None = self._queue.try_offer(request, now_ns)
        if error is not None:
            self.report.refused += 1
            self._ask_again(arrival, now_ns)

    def _ask_again(self, arrival: Arrival, now_ns: int) -> None:
        """A client has its answer."""
        if self._again is not None and (again_ns := self._again(now_ns)) is not None:
            self._asked += 1
            heapq.heappush(self._coming, (again_ns, self._asked, Arrival(again_ns, arrival.rows)))

    def _end_runs(self, now_ns: int) -> None:
        report = self.report
        while self._runs and self._runs[0][0] <= now_ns:
            _, began_ns, _, batch = heapq.heappop(self._runs)
            self._free += 1
            self._run_times.record(sum(request.rows for request in batch), now_ns - began_ns, now_ns)
            report.ended_ns = now_ns
            for request in batch:
                arrival = request.arrival
                in_time = now_ns <= arrival.deadline_ns
                report.in_time += in_time
                report.late += not in_time
                report.started_late += began_ns >= arrival.deadline_ns
                report.latencies_ns.append(now_ns - arrival.arrival_ns)
                report.arrivals_ns.append(arrival.arrival_ns)
                self._ask_again(arrival, now_ns)

    def _take(self, now_ns: int) -> None:
        while self._free:
            batch, expired = self._queue.take(now_ns)
            self.report.expired += len(expired)
            if not batch:
                return
            rows = sum(request.rows for request in batch)
            self._free -= 1
            heapq.heappush(self._runs, (now_ns + self._run_ns(rows), now_ns, len(self.report.batch_rows), batch))
            self.report.batch_rows.append(rows)
