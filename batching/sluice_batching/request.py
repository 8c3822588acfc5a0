"""What a queue knows of a request: its rows, its bytes, whom it may share a batch with, and until when it is of use."""

from collections.abc import Hashable
from typing import Any, Final

NO_DEADLINE: Final = 2**63 - 1
"""The deadline of a request that has none: later than any reading of a nanosecond clock."""

NEVER_QUEUED: Final = -1
"""`queue_order` of a request that no queue has accepted yet."""

SequenceId = int | str
"""What a client calls a sequence; a number and the same digits as text are two."""


class Step:
    """What a request is in its sequence; only requests of models with sequences have one.

    sequence_id: what the client calls the sequence. start, end: whether the request begins it, and ends it.
    sequence: the sequence itself (`LiveSequence`); set by the sequencer, None before.
    state: what the request's run made of the sequence's state, until it is known that the run counts; the owner's.
    """

    __slots__ = ("end", "sequence", "sequence_id", "start", "state")

    def __init__(self, sequence_id: SequenceId, *, start: bool = False, end: bool = False) -> None:
        self.sequence_id = sequence_id
        self.start = start
        self.end = end
        self.sequence: Any = None
        self.state: Any = None


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
    step: its part in a sequence; set for models with sequences alone.
    """

    __slots__ = ("deadline_ns", "enqueued_ns", "key", "queue_order", "rank", "rows", "size_bytes", "step")

    priority: int = 0
    timeout_ns: int = 0
    step: Step

    def __init__(self, rows: int, size_bytes: int, key: Hashable, deadline_ns: int = NO_DEADLINE) -> None:
        self.rows = rows
        self.size_bytes = size_bytes
        self.key = key
        self.deadline_ns = deadline_ns
        self.enqueued_ns = 0
        self.queue_order = NEVER_QUEUED
        self.rank = 0
