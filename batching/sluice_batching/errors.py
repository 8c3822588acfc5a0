"""The exception tree of the batching core: why a queue refuses a request.

    BatchingError
    ├── QueueFull           too much is waiting now; the same request may be accepted later
    ├── RequestTooLarge     the request alone is over the queue's bound; it can never be accepted
    ├── DeadlineExpired     the request's deadline had passed before it was offered
    ├── TooLate             by how long runs take, the request would end after its deadline
    ├── SequenceNotStarted  the request goes on with a sequence that is not there
    └── Draining            the queue takes nothing more; what it has already will still be served

All of them are expected, and carry their facts as attributes. A request that could never be part of any batch (no rows,
more rows than a batch may have, offered while it waits already) is a bug of the caller: ValueError.
"""

from typing import Literal

from sluice_batching.request import SequenceId

Bound = Literal["rows", "bytes", "requests", "answers", "bytes of answers"]
"""What a queue's bound counts."""


class BatchingError(Exception):
    """A queue refused a request."""


class QueueFull(BatchingError):
    """The request would take the queue over a bound.

    `what` is the bound ("rows", "bytes", or "requests" of one priority; "answers" or their bytes, where those are held
    until their turn), `limit` its value, `waiting` how much of it is taken, `requested` how much the request needs.
    """

    def __init__(self, what: Bound, limit: int, waiting: int, requested: int) -> None:
        needs = f", and the request has {requested}" if what in ("rows", "bytes") else ""
        super().__init__(f"the queue is full: {waiting} of {limit} {what} are waiting{needs}")
        self.what = what
        self.limit = limit
        self.waiting = waiting
        self.requested = requested


class RequestTooLarge(BatchingError):
    """The request is over a bound even when nothing else waits, so trying again cannot help.

    `what` is the bound ("rows" or "bytes"), `limit` its value, `requested` how much the request needs.
    """

    def __init__(self, what: Bound, limit: int, requested: int) -> None:
        super().__init__(f"the request has {requested} {what}, and the queue holds at most {limit}")
        self.what = what
        self.limit = limit
        self.requested = requested


class DeadlineExpired(BatchingError):
    """The request came when its deadline had passed: `deadline_ns` was not after `now_ns`, on the queue's clock."""

    def __init__(self, deadline_ns: int, now_ns: int) -> None:
        super().__init__(
            f"the deadline passed {(now_ns - deadline_ns) / 1e6:.3f} ms before the request reached the queue"
        )
        self.deadline_ns = deadline_ns
        self.now_ns = now_ns


class TooLate(BatchingError):
    """The request would end after its deadline even if it ran at once.

    `left_ns` is the time that it has left, `run_ns` how long runs of its size take.
    """

    def __init__(self, left_ns: int, run_ns: int) -> None:
        super().__init__(
            f"it would have finished too late: {left_ns / 1e6:.3f} ms are left, and a run takes {run_ns / 1e6:.3f} ms"
        )
        self.left_ns = left_ns
        self.run_ns = run_ns


class Draining(BatchingError):
    """The queue is draining and accepts no more requests."""

    def __init__(self) -> None:
        super().__init__("the queue is draining and accepts no more requests")


class SequenceNotStarted(BatchingError):
    """The request has no start flag, and no sequence of its `sequence_id` has begun, or it has ended since."""

    def __init__(self, sequence_id: SequenceId) -> None:
        super().__init__(f"sequence {sequence_id} has not begun, or has ended")
        self.sequence_id = sequence_id
