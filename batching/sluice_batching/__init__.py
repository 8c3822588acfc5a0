"""Dynamic batching: bounded queues that turn requests into batches, honour deadlines, and know nothing of tensors."""

from sluice_batching.answer_order import AnswerOrder
from sluice_batching.anticipation import Anticipation, Company
from sluice_batching.arrivals import Constant, Diurnal, Ramp, Rate
from sluice_batching.coalescer import Coalescer
from sluice_batching.delay_trials import DelayTrials, Wait
from sluice_batching.errors import (
    BatchingError,
    DeadlineExpired,
    Draining,
    QueueFull,
    RequestTooLarge,
    SequenceNotStarted,
    TooLate,
)
from sluice_batching.expiry import ExpiryTimer
from sluice_batching.lru import LruTable
from sluice_batching.policy import LevelPolicy, Priorities, QueuePolicy
from sluice_batching.priority_queue import PriorityQueue
from sluice_batching.queue import Group, Queue, Taken
from sluice_batching.rate_limiter import Claim, RateLimiter, Resource, ResourcePools, TooFewCopies
from sluice_batching.request import NEVER_QUEUED, NO_DEADLINE, Request, Step
from sluice_batching.run_times import RunTimes
from sluice_batching.sequence_shell import SequenceQueue
from sluice_batching.sequences import LiveSequence, SequencePolicy, Sequencer
from sluice_batching.shell import BatchQueue
from sluice_batching.simulation import Arrival, Report, Simulation, Strategy
from sluice_batching.tuner import SloTuner

__all__ = [
    "NEVER_QUEUED",
    "NO_DEADLINE",
    "AnswerOrder",
    "Anticipation",
    "Arrival",
    "BatchQueue",
    "BatchingError",
    "Claim",
    "Coalescer",
    "Company",
    "Constant",
    "DeadlineExpired",
    "DelayTrials",
    "Diurnal",
    "Draining",
    "ExpiryTimer",
    "Group",
    "LevelPolicy",
    "LiveSequence",
    "LruTable",
    "Priorities",
    "PriorityQueue",
    "Queue",
    "QueueFull",
    "QueuePolicy",
    "Ramp",
    "Rate",
    "RateLimiter",
    "Report",
    "Request",
    "RequestTooLarge",
    "Resource",
    "ResourcePools",
    "RunTimes",
    "SequenceNotStarted",
    "SequencePolicy",
    "SequenceQueue",
    "Sequencer",
    "Simulation",
    "SloTuner",
    "Step",
    "Strategy",
    "Taken",
    "TooFewCopies",
    "TooLate",
    "Wait",
]
