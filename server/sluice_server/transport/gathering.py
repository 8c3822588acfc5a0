"""Decides when calls that have arrived go up: at once, or a moment later together with the ones behind them. Pure.

Each list that goes up costs a fixed amount (waking an instance, running the model, waking the event loop), and under
load a list of one costs the server as much as all the rest of its request. So, in the spirit of Nagle's algorithm for
small packets: while the event loop is what limits the server, and several calls are in the server at a time, the first
call of a list waits for company. It waits until as many have come as were lately in the server at once, for then
nobody is left to come, and for `HOLD_NS` at most. A lone client is never held, nor is anybody while the loop has time.
"""

from __future__ import annotations

HOLD_NS = 2_000_000
"""The longest hold: 2 ms, a fraction of the latency that a saturated event loop has anyway."""

CALLS_MAX = 64
"""As many calls go up without further waiting: by then the fixed cost is spread thinly enough."""

COMPANY_MIN = 2.5
"""Mean calls in the server, the new one included, from which on holding pays: two clients never make more than 2."""

PAUSES_MAX = 0.75
"""Times per call that the loop's thread lets go of its core to wait, below which the loop is the limit. Measured: 0.35
with 8 calls in the server and more, 1 with 4, 2.4 with 2, 3.4 for a lone one, also on a machine that is busy with other
things. (The share of the time that the thread computes says less there, as it often waits for a core then.)"""

SAMPLE_CALLS = 32
"""Calls between two looks at the thread: cheap, and load is recognised, and forgotten, within some 64 calls."""

_SMOOTHING = 16
_PEAK_DECAY = 1 / 64  # per call: the peak of the past is forgotten about as soon as the rest


class Gathering:
    """Tracks arrivals and the loop's load; what the thread did is an argument."""

    __slots__ = ("_busy", "_calls", "_mean_company", "_pauses", "_peak_company")

    def __init__(self) -> None:
        self._calls = self._pauses = 0
        self._busy = False
        self._mean_company = self._peak_company = 0.0

    def arrived(self, company: int) -> bool:
        """Note one arrival; `company` is how many calls are in the server with it, itself included.

        True means that a look at the thread is due: call `sampled`.
        """
        self._mean_company += (company - self._mean_company) / _SMOOTHING
        self._peak_company = max(company, self._peak_company - self._peak_company * _PEAK_DECAY)
        self._calls += 1
        return self._calls % SAMPLE_CALLS == 0

    def sampled(self, pauses: int) -> None:
        """Take how often the loop's thread has let go of its core to wait, since whenever."""
        self._busy = pauses - self._pauses < PAUSES_MAX * SAMPLE_CALLS
        self._pauses = pauses

    def holds(self, waiting: int) -> bool:
        """Whether `waiting` calls should stay for company."""
        return self._busy and self._mean_company > COMPANY_MIN and waiting < min(self._peak_company, CALLS_MAX)
