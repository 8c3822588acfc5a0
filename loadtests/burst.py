"""Many requests with short deadlines at a slow model: whether runs are spent on those who still wait.

First come, first served is the same server with deadlines that it cannot see: the client alone knows that an answer is
late. When a run began is read from the server's trace file.
"""

from collections import Counter
from collections.abc import Iterable
from itertools import islice

import numpy as np

from loadtests import processes, server_traces, timed
from loadtests.experiment import OURS, Experiment, Figure, Outcome, Place, Promise, open_load
from loadtests.processes import ServerProcess
from loadtests.server_traces import Trace
from loadtests.timed import Times
from sluice_batching.arrivals import Constant, arrivals, even
from sluice_client.load.open_loop import Run

REQUESTS = 60
RUN = Times(100)
DEADLINE_S = 0.3
RATE = 40
"""Four times what the model can do."""
PATIENCE_S = 60.0
"""The deadline of requests whose deadline the server is not to see: all of them are answered by then."""

FIFO = "first come, first served"
LATE_AT_ONCE = Figure(OURS, "runs started after their deadline, all at once", "runs")
LATE_IN_TURN = Figure(OURS, f"runs started after their deadline, at {RATE}/s", "runs")
FIFO_LATE = Figure(FIFO, LATE_IN_TURN.name, "runs")
AT_ONCE = Figure(OURS, "answers in time, all at once")
IN_TURN = Figure(OURS, f"answers in time, at {RATE}/s")
FIFO_IN_TURN = Figure(FIFO, IN_TURN.name)
RATIO = Figure(f"{OURS} over {FIFO}", IN_TURN.name)

_MODELS = {"at_once": DEADLINE_S, "in_turn": DEADLINE_S, "fifo": PATIENCE_S}


class Burst(Experiment):
    """60 requests at once, then 60 at four times the capacity, with deadlines that the server sees and without."""

    case = f"{REQUESTS} requests with {DEADLINE_S * 1e3:.0f} ms deadlines, model of {RUN.fixed_ms:g} ms"
    promises = (
        Promise(f"{case}, at once: runs started after their deadline", LATE_AT_ONCE, 0, at_least=False),
        Promise(f"{case}, at {RATE}/s: runs started after their deadline", LATE_IN_TURN, 0, at_least=False),
        Promise(f"{case}, at {RATE}/s: answers in time, over {FIFO}", RATIO, 1.5, at_least=True),
    )

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        for name in _MODELS:
            place.write(name, RUN, "max_batch_size: 1")

    def measure(self) -> Outcome:
        """About nine seconds, most of them for those that nobody waits for any more."""
        place, traces = self.place, self.place.scratch / "traces.json"
        flags = server_traces.flags(traces)
        times = {"at_once": [0.0] * REQUESTS}
        times["in_turn"] = times["fifo"] = list(islice(arrivals(Constant(RATE), even()), REQUESTS))
        with processes.sluice(place.repository, place.scratch, place.transport, *flags) as server:
            runs = {name: self._load(server, name, times[name], deadline_s) for name, deadline_s in _MODELS.items()}
        late = started_late(server_traces.read(traces))
        in_time = {name: int(np.count_nonzero(run.records.response_s <= DEADLINE_S)) for name, run in runs.items()}
        figures = {
            LATE_AT_ONCE: late["at_once"],
            LATE_IN_TURN: late["in_turn"],
            FIFO_LATE: late["fifo"],
            AT_ONCE: in_time["at_once"],
            IN_TURN: in_time["in_turn"],
            FIFO_IN_TURN: in_time["fifo"],
            RATIO: in_time["in_turn"] / max(1, in_time["fifo"]),
        }
        # Nobody can send so many at the same moment; of those all that counts is what the server did.
        return Outcome(figures, runs["in_turn"].generator.problem or runs["fifo"].generator.problem)

    @staticmethod
    def _load(server: ServerProcess, model: str, times_s: list[float], deadline_s: float) -> Run:
        return open_load(server.address, timed.request(model), times_s, deadline_s)


def started_late(traces: Iterable[Trace]) -> Counter[str]:
    """How many runs began after their deadline, by model; the server may know of no deadline."""
    return Counter(
        trace.model
        for trace in traces
        if trace.started_ns is not None and trace.started_ns > trace.received_ns + DEADLINE_S * 1e9
    )
