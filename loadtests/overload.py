"""Three times the load that a model with a latency objective can take: those who are let in must not pay for it.

The baseline is what the same model answers without an objective to as many clients as keep its batches full, measured
right before. How long a refusal takes is read from the server's trace file, from the request's last byte to the answer;
the client's own figure beside it has the client and the loopback in it.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from loadtests import h2load, processes, server_traces, timed
from loadtests.experiment import OURS, Experiment, Figure, Outcome, Place, Promise, at_random, objective, open_load
from loadtests.h2load import Load
from loadtests.peers import METHOD, probe
from loadtests.processes import ServerProcess
from loadtests.procfs import read_rss_bytes
from loadtests.server_traces import Trace
from loadtests.timed import Times
from sluice_client.load.latencies import CODES, Records, quantile

RUN, ROWS, SLO_S = Times(40, 8), 16, 0.6
"""Slow, so that three times its capacity is few requests: the generator needs some 0.8 ms of CPU for each, and where it
shares two cores with the server, what it takes of the model's time would be measured as the server's."""
OVERLOAD = 3
FULL = Load(2, ROWS)
"""One batch runs, another waits."""
PATIENCE_S = 10.0
WARMUP = 0.2
"""For the server to learn how long runs take, over what is measured then."""
TRACED = 4
"""One request in so many."""
REFUSED = CODES.index("RESOURCE_EXHAUSTED")

STATIC = "without an objective, as many clients as fill its batches"
CAPACITY = Figure(STATIC, "requests/s (the capacity)")
IN_TIME = Figure(OURS, "answers within the objective", "/s")
IN_TIME_RATIO = Figure(f"{OURS} over the capacity", "answers within the objective")
P99 = Figure(OURS, "p99 of accepted requests", "ms")
P99_SERVER = Figure(OURS, "p99 of accepted requests, in the server", "ms")
P99_RATIO = Figure(f"{OURS} over the objective", P99.name)
RSS = Figure(OURS, "resident memory added", "MB")
REFUSAL = Figure(OURS, "p99 of the time to a refusal, in the server", "ms")
REFUSAL_CLIENT_P50 = Figure(OURS, "p50 of the time to a refusal, at the client", "ms")
REFUSAL_CLIENT_P99 = Figure(OURS, "p99 of the time to a refusal, at the client", "ms")


class Overload(Experiment):
    """The capacity first, then an open loop of three times as much."""

    case = f"open loop at {OVERLOAD} x capacity, objective {SLO_S * 1e3:.0f} ms"
    promises = (
        Promise(f"{case}: p99 of accepted requests, over the objective", P99_RATIO, 1.3, at_least=False),
        Promise(f"{case}: answers within the objective, over the capacity", IN_TIME_RATIO, 0.95, at_least=True),
        Promise(f"{case}: resident memory added, MB", RSS, 50, at_least=False),
        Promise(f"{case}: p99 of the time to a refusal in the server, ms", REFUSAL, 2, at_least=False),
    )

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        batching = f"max_batch_size: {ROWS}\ndynamic_batching {{ }}"
        place.write("static", RUN, batching)
        place.write("objective", RUN, f"{batching}\n{objective(SLO_S)}")

    def measure(self) -> Outcome:
        """Some three seconds more than the open loop takes."""
        place, traces = self.place, self.place.scratch / "traces.json"
        flags = server_traces.flags(traces, TRACED)
        with processes.sluice(place.repository, place.scratch, place.transport, *flags) as server:
            capacity = self._capacity(server)
            over_s = (1 + WARMUP) * place.measure_s
            times_s = at_random(OVERLOAD * capacity, over_s)
            before_bytes = read_rss_bytes(server.pid)
            run = open_load(server.address, timed.request("objective"), times_s, PATIENCE_S)
            added_bytes = read_rss_bytes(server.pid) - before_bytes
        found = settled(server_traces.read(traces), WARMUP * place.measure_s)
        times_ms = np.array([(trace.ended_ns - trace.received_ns) / 1e6 for trace in found])
        is_accepted = np.array([trace.started_ns is not None for trace in found])
        steady = run.records.between(WARMUP * place.measure_s, over_s)
        in_time_per_s = np.count_nonzero(steady.response_s <= SLO_S) / place.measure_s
        p99_ms = quantile(steady.response_s, 0.99) * 1e3
        seen_ms = refused_ms(steady)
        figures = {
            CAPACITY: capacity,
            IN_TIME: in_time_per_s,
            IN_TIME_RATIO: in_time_per_s / capacity,
            P99: p99_ms,
            P99_SERVER: quantile(times_ms[is_accepted], 0.99),
            P99_RATIO: p99_ms / SLO_S / 1e3,
            RSS: added_bytes / 1e6,
            REFUSAL: quantile(times_ms[~is_accepted], 0.99),
            REFUSAL_CLIENT_P50: quantile(seen_ms, 0.5),
            REFUSAL_CLIENT_P99: quantile(seen_ms, 0.99),
        }
        return Outcome(figures, run.generator.problem)

    def _capacity(self, server: ServerProcess) -> float:
        message = timed.request("static")
        reply = probe(server.address, message)
        call = h2load.grpc_request(METHOD, message, len(reply))
        count = round(RUN.rows_per_s(ROWS) * self.place.measure_s / 2)
        count += -count % FULL.in_flight
        return h2load.run(server.address, call, FULL, count, self.place.scratch).requests_per_s


def settled(traces: Iterable[Trace], after_s: float) -> list[Trace]:
    """Those of the overload that came so long after its first request."""
    found = [trace for trace in traces if trace.model == "objective"]
    from_ns = min(trace.received_ns for trace in found) + after_s * 1e9
    return [trace for trace in found if trace.received_ns >= from_ns]


def refused_ms(records: Records) -> NDArray[np.float64]:
    """How long each refusal took, from the real sending on."""
    refused = records.codes == REFUSED
    found: NDArray[np.float64] = (records.ended_s[refused] - records.sent_s[refused]) * 1e3
    return found
