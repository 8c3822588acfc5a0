"""Dynamic batching: bounded queues that turn requests into batches, honour deadlines, and know nothing of tensors."""

from sluice_batching.coalescer import Coalescer
from sluice_batching.errors import (
    BatchingError,
    DeadlineExpired,
    Draining,
    QueueFull,
    RequestTooLarge,
    SequenceNotStarted,
)
from sluice_batching.expiry import ExpiryTimer
from sluice_batching.lru import LruTable
from sluice_batching.policy import QueuePolicy
from sluice_batching.queue import Queue, Taken
from sluice_batching.request import NEVER_QUEUED, NO_DEADLINE, Request, Step
from sluice_batching.sequence_shell import SequenceQueue
from sluice_batching.sequences import LiveSequence, SequencePolicy, Sequencer
from sluice_batching.shell import BatchQueue

__all__ = [
    "NEVER_QUEUED",
    "NO_DEADLINE",
    "BatchQueue",
    "BatchingError",
    "Coalescer",
    "DeadlineExpired",
    "Draining",
    "ExpiryTimer",
    "LiveSequence",
    "LruTable",
    "Queue",
    "QueueFull",
    "QueuePolicy",
    "Request",
    "RequestTooLarge",
    "SequenceNotStarted",
    "SequencePolicy",
    "SequenceQueue",
    "Sequencer",
    "Step",
    "Taken",
]
