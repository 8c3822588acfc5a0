"""What a queue knows of a request: its rows, its bytes, whom it may share a batch with, and until when it is of use."""

from collections.abc import Hashable
from typing import Final

NO_DEADLINE: Final = 2**63 - 1
"""The deadline of a request that has none: later than any reading of a nanosecond clock."""

NEVER_QUEUED: Final = -1
"""`queue_order` of a request that no queue has accepted yet."""


class Request:
    """One request as the queue sees it; the server derives its own from it and adds what the answer needs.

    rows: size of the batch dimension, at least 1.
    size_bytes: what the request holds in memory while it waits.
    key: only requests of equal keys share a batch. Hashable; it must not change while the request waits.
    deadline_ns: on the queue's clock; from this instant on the request is not put into a batch any more.
    enqueued_ns: when the queue accepted it; set by the queue.
    queue_order, rank: its place in the order of arrival, and in the order of service; the queue's own bookkeeping.
    priority, timeout_ns: what it asks of a queue with priorities, 0 = nothing. Every request of a class may have the
        same, so they are the class's; one whose requests differ has slots of these names.
    """

    __slots__ = ("deadline_ns", "enqueued_ns", "key", "queue_order", "rank", "rows", "size_bytes")

    priority: int = 0
    timeout_ns: int = 0

    def __init__(self, rows: int, size_bytes: int, key: Hashable, deadline_ns: int = NO_DEADLINE) -> None:
        self.rows = rows
        self.size_bytes = size_bytes
        self.key = key
        self.deadline_ns = deadline_ns
        self.enqueued_ns = 0
        self.queue_order = NEVER_QUEUED
        self.rank = 0
