"""Equal requests that come at the same time: with a response cache one of them runs, without one all of them do."""

from itertools import count

from loadtests import processes, timed
from loadtests.experiment import OURS, Experiment, Figure, Outcome, Place, Promise, open_load
from loadtests.h2load import LoadError
from loadtests.processes import ServerProcess
from loadtests.timed import Times
from sluice_client import Client

REQUESTS = 100
RUN = Times(20)
CACHE_BYTES = 1 << 20
PATIENCE_S = 60.0
CONNECTING = 1
"""The request that is sent before, another one."""

PLAIN = "without a cache"
EXECUTIONS, PLAIN_EXECUTIONS = Figure(OURS, "executions"), Figure(PLAIN, "executions")
LAST, PLAIN_LAST = Figure(OURS, "the last answer after", "ms"), Figure(PLAIN, "the last answer after", "ms")


class Coalesce(Experiment):
    """100 equal calls at once, to a model with `response_cache` and to one without."""

    case = f"{REQUESTS} equal calls at once, model of {RUN.fixed_ms:g} ms"
    promises = (Promise(f"{case}, response cache: executions", EXECUTIONS, 1, at_least=False),)

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        place.write("plain", RUN, "max_batch_size: 1")
        place.write("cached", RUN, "max_batch_size: 1\nresponse_cache { enable: true }")
        self._numbers = count(1)

    def measure(self) -> Outcome:
        """Two seconds and more for those without a cache."""
        place, cache = self.place, f"--cache-config=local,size={CACHE_BYTES}"
        with processes.sluice(place.repository, place.scratch, place.transport, cache) as server:
            executions, last_s = self._load(server, "cached")
            plain_executions, plain_last_s = self._load(server, "plain")
        figures = {EXECUTIONS: executions, PLAIN_EXECUTIONS: plain_executions}
        return Outcome({**figures, LAST: last_s * 1e3, PLAIN_LAST: plain_last_s * 1e3})

    def _load(self, server: ServerProcess, model: str) -> tuple[int, float]:
        """How often the model ran, and when the last answer had come."""
        message = timed.request(model, next(self._numbers))
        with Client(server.address) as client:
            (before,) = client.statistics(model)
            run = open_load(server.address, message, [0.0] * REQUESTS, PATIENCE_S, timed.request(model))
            (after,) = client.statistics(model)
        answered = len(run.records.response_s)
        if answered < REQUESTS:
            raise LoadError(f"{answered} of {REQUESTS} equal calls to {model} were answered: {run.records.outcomes}")
        return after.execution_count - before.execution_count - CONNECTING, float(run.records.ended_s.max())
