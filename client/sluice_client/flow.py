"""The life of a call as a pure program: it says what to do next and is told how that went.

A flow is a generator. It yields an `Attempt` (send this there) or a `Pause` (wait) and is sent the outcome: the
answer's bytes or a `Failure` for an attempt, None for a pause. It returns the call's result or raises from errors.py.
The drivers (client.py, aio.py) do the I/O and decide nothing.

Invariants:
- No attempt starts at or after the call's deadline, and no pause reaches it.
- At most `max_attempts` attempts are made, plus one for each endpoint that could not be connected to.
- An attempt goes to an endpoint that this call has not tried, if there is a healthy one.
"""

import threading
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from sluice_client.balancer import Balancer
from sluice_client.endpoints import Endpoint
from sluice_client.errors import (
    BY_CODE,
    ClientError,
    DeadlineExceeded,
    InvalidRequest,
    NotReady,
    ServerError,
    Unavailable,
    Unknown,
)
from sluice_client.retries import Budget, Failure, Origin, Safety, backoff_ns, is_safe
from sluice_client.settings import MAX_DEADLINE_S, NO_RETRIES, RetryPolicy

T = TypeVar("T")
Metadata = tuple[tuple[str, str | bytes], ...]

_NS_PER_S: Final = 1_000_000_000
POLL_DEADLINE_S: Final = 2.0  # a poll that hangs must not use up the whole wait
FIRST_POLL_PAUSE_NS: Final = 20_000_000  # a server that is nearly up is noticed at once
MAX_POLL_PAUSE_NS: Final = 500_000_000  # one that takes minutes is not bothered more than twice a second


@dataclass(frozen=True, slots=True)
class Timing:
    """How a call went: the whole time with retries and pauses, the attempts made, the endpoint that answered."""

    total_ns: int
    attempts: int
    endpoint: str

    @property
    def total_s(self) -> float:
        """The whole time in seconds."""
        return self.total_ns / _NS_PER_S


@dataclass(frozen=True, slots=True)
class Operation(Generic[T]):
    """One call, ready to send: the RPC, its request's bytes, what to make of the answer, and what may be repeated."""

    rpc: str
    request: bytes
    parse: Callable[[bytes, Timing], T]
    safety: Safety = Safety.REPEATABLE
    model: str = ""


@dataclass(frozen=True, slots=True)
class Attempt:
    """Send `request` to endpoint number `endpoint`, with this time left."""

    endpoint: int
    rpc: str
    request: bytes
    timeout_s: float
    metadata: Metadata


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait this long."""

    delay_s: float


Outcome = bytes | Failure | None
Flow = Generator[Attempt | Pause, Outcome, T]


@dataclass(frozen=True, slots=True)
class CallOptions:
    """What holds for a single call; `endpoint` is the number of the only one it may go to, None for any."""

    deadline_s: float
    metadata: Metadata = ()
    endpoint: int | None = None


class Flows:
    """Makes the flows of one client and keeps what they share. `_lock` guards `_balancer` and `_budget`."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        policy: RetryPolicy,
        clock_ns: Callable[[], int],
        random: Callable[[], float],
    ) -> None:
        self._endpoints = endpoints
        self._policy = policy
        self.clock_ns = clock_ns
        self._random = random
        self._lock = threading.Lock()
        self._balancer = Balancer(len(endpoints), random)
        self._budget = Budget(policy)

    def healthy(self) -> int:
        """How many endpoints are not known to be down."""
        with self._lock:
            return sum(self._balancer.is_healthy(index) for index in range(len(self._endpoints)))

    def call(self, operation: Operation[T], options: CallOptions, policy: RetryPolicy | None = None) -> Flow[T]:
        """The flow of one call. Raises ServerError, or InvalidResponse when the answer cannot be read."""
        check_deadline(options.deadline_s)
        policy = policy or self._policy
        started_ns = now_ns = self.clock_ns()
        deadline_ns = started_ns + int(options.deadline_s * _NS_PER_S)
        tried: set[int] = set()
        attempts = retries = 0
        while True:
            index = self.pick(options.endpoint, now_ns, tried)
            attempts += 1
            timeout_s = (deadline_ns - now_ns) / _NS_PER_S
            outcome = yield Attempt(index, operation.rpc, operation.request, timeout_s, options.metadata)
            attempt_ns, now_ns = now_ns, self.clock_ns()
            self.learn(index, outcome, now_ns, attempt_ns)
            if isinstance(outcome, bytes):
                timing = Timing(now_ns - started_ns, attempts, self._endpoints[index].text)
                return operation.parse(outcome, timing)
            assert isinstance(outcome, Failure)
            first_try_there = index not in tried
            tried.add(index)
            if first_try_there and self._fails_over(outcome, operation.safety, options.endpoint, now_ns, tried):
                delay_ns: int | None = 0
            else:
                delay_ns = self._retry_delay_ns(outcome, operation.safety, policy, retries)
                retries += 1
            if delay_ns is None or now_ns + delay_ns >= deadline_ns:
                raise self.error(outcome, operation.model, index, attempts)
            if delay_ns:
                yield Pause(delay_ns / _NS_PER_S)
                now_ns = self.clock_ns()
            if now_ns >= deadline_ns:
                raise self.error(outcome, operation.model, index, attempts)

    def wait_until_ready(
        self, what: str, operation: Operation[bool], timeout_s: float, metadata: Metadata, endpoint: int | None
    ) -> Flow[None]:
        """Ask until the answer is yes. Raises NotReady when the time is up, other errors at once.

        Not yet reachable, not answering and "no" are what waiting is for; every other status would not change by it.
        """
        check_deadline(timeout_s)
        started_ns = self.clock_ns()
        end_ns = started_ns + int(timeout_s * _NS_PER_S)
        pause_ns = FIRST_POLL_PAUSE_NS
        while True:
            last: ClientError | None = None
            left_s = (end_ns - self.clock_ns()) / _NS_PER_S
            try:
                options = CallOptions(min(max(left_s, 1e-3), POLL_DEADLINE_S), metadata, endpoint)
                if (yield from self.call(operation, options, NO_RETRIES)):
                    return
            except (Unavailable, DeadlineExceeded) as error:
                last = error
            left_ns = end_ns - self.clock_ns()
            if left_ns <= pause_ns:
                raise NotReady(what, timeout_s, last) from last
            yield Pause(pause_ns / _NS_PER_S)
            pause_ns = min(pause_ns * 2, MAX_POLL_PAUSE_NS)

    def pick(self, pinned: int | None, now_ns: int, tried: Collection[int] = ()) -> int:
        """The endpoint for the next attempt: `pinned`, or one that was not tried, if there is a healthy one."""
        if pinned is not None:
            return pinned
        with self._lock:
            return self._balancer.pick(now_ns, tried)

    def learn(self, index: int, outcome: Outcome, now_ns: int, attempt_ns: int) -> None:
        """Keep what the outcome of an attempt, begun at `attempt_ns`, says about the endpoint's health."""
        code = outcome.code if isinstance(outcome, Failure) else "OK"
        with self._lock:
            if code == "OK":
                self._budget.succeeded()
            if code == "UNAVAILABLE":
                self._balancer.failed(index, now_ns, attempt_ns)
            elif code not in ("DEADLINE_EXCEEDED", "CANCELLED"):
                # Those two are often made on this side and say nothing about the server.
                self._balancer.answered(index)

    def text_of(self, index: int) -> str:
        """An endpoint as it was given."""
        return self._endpoints[index].text

    def _fails_over(self, failure: Failure, safety: Safety, pinned: int | None, now_ns: int, tried: set[int]) -> bool:
        """Whether to go to another endpoint at once: nothing was sent, so it costs no server anything."""
        if pinned is not None or failure.origin is not Origin.CONNECT or not is_safe(failure, safety):
            return False
        with self._lock:
            return self._balancer.has_other(now_ns, tried)

    def _retry_delay_ns(self, failure: Failure, safety: Safety, policy: RetryPolicy, retries: int) -> int | None:
        """The wait before the next attempt, None when there is none."""
        if not is_safe(failure, safety) or retries + 1 >= policy.max_attempts:
            return None
        with self._lock:
            affordable = self._budget.spend()
        if not affordable:
            return None
        return failure.pushback_ns if failure.pushback_ns is not None else backoff_ns(policy, retries, self._random)

    def error(self, failure: Failure, model: str, index: int, attempts: int = 1) -> ServerError:
        """The exception for a failed attempt, which was the last one, at this endpoint."""
        cls = BY_CODE.get(failure.code, Unknown)
        retry_after_s = None if failure.pushback_ns is None else failure.pushback_ns / _NS_PER_S
        return cls(failure.message, model, self._endpoints[index].text, attempts, retry_after_s)


def check_deadline(deadline_s: float) -> None:
    """InvalidRequest unless this is a usable number of seconds."""
    if isinstance(deadline_s, bool) or not isinstance(deadline_s, (int, float)):
        raise InvalidRequest(f"a deadline is a number of seconds, got {deadline_s!r}")
    if not 0 < deadline_s <= MAX_DEADLINE_S:
        raise InvalidRequest(f"a deadline must be above 0 and at most {MAX_DEADLINE_S:g} seconds, got {deadline_s!r}")
