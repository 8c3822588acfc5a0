"""One thread that answers requests at their deadline, for all queues, whatever the instances are doing.

Instances notice expired requests when they take the next batch; that may be a whole run too late. This thread sleeps
until the earliest deadline of all queues. An offer wakes it only with a deadline that is earlier than the one it sleeps
for, so a queue whose requests all have the same time to live wakes it no more than twice in that time.

Locks
-----
`ExpiryTimer._lock` guards the registered queues and the alarm. It is never held while a callback runs or a queue's lock
is taken, and a queue reports to the timer with its own lock free: no two locks are ever nested.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Final, Generic

from sluice_batching.queue import R
from sluice_batching.shell import NEVER_NS, BatchQueue, Clock, wait_until

logger = logging.getLogger(__name__)

NOT_ASLEEP_NS: Final = -1
"""The alarm of a timer that will look at all queues before it sleeps: no deadline is earlier."""


class _Watch(Generic[R]):
    """A registered queue and who answers its expired requests."""

    __slots__ = ("on_expired", "queue")

    def __init__(self, queue: BatchQueue[R], on_expired: Callable[[list[R]], None]) -> None:
        self.queue = queue
        self.on_expired = on_expired

    def expire(self) -> None:
        """Answer what has expired. A callback that fails is a bug; it is logged and must not end the timer."""
        expired = self.queue.expire()
        try:
            if expired:
                self.on_expired(expired)
        except Exception:
            logger.exception("the callback for %d expired requests of %r failed", len(expired), self.queue)


class ExpiryTimer:
    """Calls back with the requests of all registered queues as their deadlines pass. Runs until `stop`.

    `clock` must be the clock of the queues.
    """

    __slots__ = ("_alarm_ns", "_changed", "_clock", "_lock", "_stopping", "_thread", "_watches")

    def __init__(self, clock: Clock = time.monotonic_ns) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._watches: dict[BatchQueue[Any], _Watch[Any]] = {}
        self._stopping = False
        # When the thread wakes by itself; NOT_ASLEEP_NS means that it will look at all queues before it sleeps.
        self._alarm_ns = NOT_ASLEEP_NS
        self._thread = threading.Thread(target=self._run, name="sluice-expiry", daemon=True)
        self._thread.start()

    def register(self, queue: BatchQueue[R], on_expired: Callable[[list[R]], None]) -> None:
        """Have `on_expired` called, in the timer's thread, with requests of the queue that have just expired.

        They have left the queue, and the callback answers them. It should be quick: all queues wait for it.
        """
        queue.watch_deadlines(self._on_earlier_deadline)
        with self._lock:
            self._watches[queue] = _Watch(queue, on_expired)
            self._changed.notify()

    def unregister(self, queue: BatchQueue[R]) -> None:
        """Forget a queue; one last callback may be under way. A queue that is not registered is no error."""
        with self._lock:
            self._watches.pop(queue, None)
        queue.watch_deadlines(None)

    def stop(self) -> None:
        """End the thread and wait for it; the callback that is under way is finished."""
        with self._lock:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    def _on_earlier_deadline(self, deadline_ns: int) -> None:
        with self._lock:
            if deadline_ns < self._alarm_ns:
                self._changed.notify()

    def _run(self) -> None:
        while due := self._wait_for_due():
            for watch in due:
                watch.expire()

    def _wait_for_due(self) -> list[_Watch[Any]]:
        """The queues that have a deadline in the past; none = the timer is to stop."""
        with self._lock:
            while not self._stopping:
                now_ns = self._clock()
                due = [watch for watch in self._watches.values() if watch.queue.watched_deadline_ns <= now_ns]
                if due:
                    return due
                alarms_ns = (queue.watched_deadline_ns for queue in self._watches)
                self._alarm_ns = min(alarms_ns, default=NEVER_NS)
                wait_until(self._changed, self._alarm_ns, now_ns)
                self._alarm_ns = NOT_ASLEEP_NS
            return []
