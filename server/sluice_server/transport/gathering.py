"""Decides when calls that have arrived go up: at once, or a moment later together with the ones behind them. Pure.

Each list that goes up costs a fixed amount (waking an instance, running the model, waking the event loop), and under
load a list of one costs the server as much as all the rest of its request. So, in the spirit of Nagle's algorithm for
small packets: while calls come fast, and several are in the server at a time, the first one of a list waits for company
for `HOLD_NS`. A lone client, or slow traffic, is never held.
"""

from __future__ import annotations

HOLD_NS = 1_000_000
"""The longest hold: 1 ms, the event loop's own timer resolution and well below a loaded server's latency."""

CALLS_MAX = 64
"""As many calls go up without further waiting: by then the fixed cost is spread thinly enough."""

SMOOTHING = 16
"""Weight of the past in both means: load is recognised, and forgotten, within some 16 calls."""

FAST_GAP_NS = HOLD_NS
"""Calls closer together than this bring at least one other within a hold. Not less: without holds a slow machine is
saturated at 2,000 small calls a second, and would never come to know how much more it can do with them."""

COMPANY_MIN = 2.5
"""Mean calls in the server, the new one included, from which on holding pays: two clients never make more than 2."""

_SLOWEST_GAP_NS = SMOOTHING * HOLD_NS


class Gathering:
    """Tracks arrivals. `now_ns` is an argument and never goes backwards."""

    __slots__ = ("_last_ns", "_mean_company", "_mean_gap_ns")

    def __init__(self) -> None:
        self._last_ns = 0
        self._mean_company = 0.0
        self._mean_gap_ns = float(_SLOWEST_GAP_NS)

    def arrived(self, now_ns: int, company: int) -> None:
        """Note one arrival; `company` is how many calls are in the server with it, itself included.

        A long silence counts as one gap of a bounded length, so that it is soon forgotten when calls are fast.
        """
        gap_ns = min(now_ns - self._last_ns, _SLOWEST_GAP_NS)
        self._last_ns = now_ns
        self._mean_gap_ns += (gap_ns - self._mean_gap_ns) / SMOOTHING
        self._mean_company += (company - self._mean_company) / SMOOTHING

    def holds(self, waiting: int) -> bool:
        """Whether `waiting` calls should stay for company."""
        return waiting < CALLS_MAX and self._mean_gap_ns < FAST_GAP_NS and self._mean_company > COMPANY_MIN
