"""Whether a failed attempt is repeated, and when. Pure: time and randomness are arguments.

Safe to repeat is (gRFC A6 for the terms):
- a connection that never came up, for all but control calls: the server cannot have seen the request;
- UNAVAILABLE, for calls that change nothing (inference without a sequence among them);
- RESOURCE_EXHAUSTED only when the server said when to come back: it refused the call before running it, and without
  that word a repeat would add to the overload;
- nothing else, and never past the deadline.

A server that says "do not come back" (a negative or unreadable push-back) is obeyed for every code.
"""

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from sluice_client.settings import RetryPolicy

_NS_PER_S: Final = 1_000_000_000


class Safety(enum.Enum):
    """What may be repeated."""

    REPEATABLE = enum.auto()  # reads, and inference without a sequence
    UNSENT = enum.auto()  # a step of a sequence: only when the server cannot have seen it
    NEVER = enum.auto()  # load and unload


class Origin(enum.Enum):
    """How far the attempt came."""

    CONNECT = enum.auto()  # no connection: nothing was sent
    CALL = enum.auto()  # it may have reached the server


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that ended with a status other than OK. `code` is the gRPC status name.

    `pushback_ns` is the wait that the server asked for, None when it asked for none; `forbidden` when it said not to
    come back.
    """

    code: str
    message: str
    origin: Origin = Origin.CALL
    pushback_ns: int | None = None
    forbidden: bool = False


class Budget:
    """The tokens that all calls of a client share, so that retries never multiply an outage."""

    __slots__ = ("_max", "_ratio", "_tokens")

    def __init__(self, policy: RetryPolicy) -> None:
        self._max = float(policy.budget_tokens)
        self._ratio = policy.budget_ratio
        self._tokens = self._max

    def __repr__(self) -> str:
        return f"<Budget {self._tokens:g} of {self._max:g}>"

    def succeeded(self) -> None:
        """A call was answered."""
        self._tokens = min(self._max, self._tokens + self._ratio)

    def spend(self) -> bool:
        """An attempt failed in a way that could be retried; returns whether it may be."""
        self._tokens = max(0.0, self._tokens - 1)
        return self._tokens > self._max / 2


def is_safe(failure: Failure, safety: Safety) -> bool:
    """Whether the attempt may be repeated at all, whatever budget and deadline say."""
    if safety is Safety.NEVER or failure.forbidden:
        return False
    if failure.origin is Origin.CONNECT:
        return True
    if safety is Safety.UNSENT:
        return False
    return failure.code == "UNAVAILABLE" or (failure.code == "RESOURCE_EXHAUSTED" and failure.pushback_ns is not None)


def backoff_ns(policy: RetryPolicy, retry: int, random: Callable[[], float]) -> int:
    """The wait before retry number `retry` (from 0): exponential, with full jitter."""
    # The exponent is bounded because a float overflows, not because anybody waits that long.
    ceiling_s = min(policy.max_backoff_s, policy.initial_backoff_s * policy.multiplier ** min(retry, 64))
    return int(random() * ceiling_s * _NS_PER_S)
