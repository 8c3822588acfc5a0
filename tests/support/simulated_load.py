"""Loads of a simulated server with one worker and a queue (M/D/1), as records, without any time passing."""

from __future__ import annotations

import numpy as np

from sluice_client.load.latencies import CODES, Records


def single_server(
    rate_per_s: float, service_s: float, end_s: float, seed: int, deadline_s: float = float("inf")
) -> Records:
    """Poisson arrivals until `end_s`, each served `service_s` seconds in its order.

    Who is not answered within the deadline gets DEADLINE_EXCEEDED then, and is served all the same.
    """
    chance = np.random.default_rng(seed)
    number = int(rate_per_s * end_s + 10 * np.sqrt(rate_per_s * end_s) + 10)
    due_s = np.cumsum(chance.exponential(1 / rate_per_s, number))
    due_s = due_s[due_s < end_s]
    index = np.arange(len(due_s))
    # A request begins when it is due or when the one before has ended (Lindley's recursion), as a running maximum.
    ended_s = service_s * (index + 1) + np.maximum.accumulate(due_s - service_s * index)
    late = ended_s - due_s > deadline_s
    codes = np.where(late, CODES.index("DEADLINE_EXCEEDED"), 0)
    return Records.of(due_s, due_s, np.where(late, due_s + deadline_s, ended_s), codes)
