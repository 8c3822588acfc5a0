"""A queue with levels of priority, and a policy for each: how many requests may wait, how long, and what then.

What `queue.py` says holds here too, but for this:

* A request of a higher level (a lower number) goes before any of a lower one. Levels share batches, so that what a
  batch has room for is filled with requests of the next level.
* A request that has waited for its timeout expires, or, where its level delays, goes behind all others of its level: as
  if it came anew, but that its waiting is counted from its enqueueing on. That happens once.
* No more requests of a level wait than its policy allows, delayed ones included.
* A draining queue delays nothing: what is left is served in the order in which it stands.

These are Triton's rules for `priority_levels` and `ModelQueuePolicy`.
"""

from typing import Final

from sluice_batching import deadlines
from sluice_batching.errors import BatchingError, QueueFull
from sluice_batching.policy import Priorities, QueuePolicy
from sluice_batching.queue import HORIZON_NS, Group, Queue, R
from sluice_batching.request import NO_DEADLINE
from sluice_batching.run_times import RunTimes

DELAYED_RANK: Final = 1 << 64
"""What a rank is higher by for a request that is delayed: above any time of a nanosecond clock."""

LEVEL_RANK: Final = 2 * DELAYED_RANK
"""What a rank is higher by for each level."""


class PriorityQueue(Queue[R]):
    """A bounded queue that hands out batches, those of the first levels first; see `Queue` for its methods."""

    __slots__ = ("_counts", "_horizon_ns", "_priorities")

    def __init__(self, policy: QueuePolicy, run_times: RunTimes | None = None) -> None:
        """`policy` has priorities."""
        super().__init__(policy, run_times)
        assert policy.priorities is not None
        self._priorities: Priorities = policy.priorities
        self._horizon_ns = HORIZON_NS if policy.deadline_first else 0
        # How many requests of each level wait; levels of which none do are not there.
        self._counts: dict[int, int] = {}

    def try_offer(self, request: R, now_ns: int) -> BatchingError | None:
        """As `Queue.try_offer`; QueueFull, next to Draining, also when as many of its level wait as may.

        A timeout after which the request expires becomes its deadline, if that is later.
        """
        level = self._priorities.level_of(request.priority)
        policy = self._priorities.policy_of(level)
        count = self._counts.get(level, 0)
        if policy.max_requests and count >= policy.max_requests and not self._draining:
            return QueueFull("requests", policy.max_requests, count, 1)
        timeout_ns = policy.timeout_of(request.timeout_ns)
        if timeout_ns and not policy.delays:
            request.deadline_ns = min(request.deadline_ns, now_ns + timeout_ns)
        self._rank_from(level * LEVEL_RANK)
        error = super().try_offer(request, now_ns)
        if error is not None:
            return error
        self._counts[level] = count + 1
        if timeout_ns and policy.delays:
            # Among the deadlines; what tells it from one is that the request's own is later.
            deadlines.add(self._deadlines, now_ns + timeout_ns, request.queue_order)
        return None

    def expire(self, now_ns: int) -> list[R]:
        """As `Queue.expire`; requests that have waited for a timeout which delays go behind the others."""
        expired: list[R] = []
        for instant_ns, request in deadlines.pop_due(self._deadlines, self._waiting, now_ns):
            if instant_ns >= request.deadline_ns:
                self._remove(request)
                expired.append(request)
            elif request.deadline_ns > now_ns and not self._draining and not self._delay(request, now_ns):
                expired.append(request)
        deadlines.drop_stale(self._deadlines, self._waiting)
        return expired

    def _delay(self, request: R, now_ns: int) -> bool:
        """Put a request behind all others of its level; False: it has left, as it would end too late."""
        is_late = request.deadline_ns != NO_DEADLINE and self._lateness(request, now_ns) is not None
        level = self._priorities.level_of(request.priority)
        enqueued_ns = request.enqueued_ns
        self._remove(request)
        if is_late:
            return False
        # Not offered anew: it was let in, and stays so whatever the queue has been tuned to since.
        self._rank_from(level * LEVEL_RANK + DELAYED_RANK)
        self._let_in(request, now_ns)
        request.enqueued_ns = enqueued_ns
        self._counts[level] = self._counts.get(level, 0) + 1
        return True

    def _rank_from(self, level_rank: int) -> None:
        """Have what is let in next stand in a level, or behind those of one."""
        self._level_rank = level_rank
        self._due_after = self._horizon_ns + level_rank

    def _remove_first(self, group: Group[R], length: int) -> list[R]:
        batch = super()._remove_first(group, length)
        for request in batch:
            self._uncount(request)
        return batch

    def _remove(self, request: R) -> None:
        super()._remove(request)
        self._uncount(request)

    def _uncount(self, request: R) -> None:
        level = self._priorities.level_of(request.priority)
        self._counts[level] -= 1
        if not self._counts[level]:
            del self._counts[level]
