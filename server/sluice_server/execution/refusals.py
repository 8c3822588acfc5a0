"""What a client is told when a queue does not take its request: a model's, or the one before an ensemble's step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_batching import QueueFull, RequestTooLarge, TooLate
from sluice_server.errors import DeadlineExceeded, InvalidArgument, ResourceExhausted
from sluice_server.observability.statistics import Outcome

if TYPE_CHECKING:
    from sluice_batching import BatchingError
    from sluice_server.errors import SluiceError


def refusal_of(error: BatchingError, what: str, retry_after_ns: int | None = None) -> tuple[Outcome, SluiceError]:
    """How a refusal counts, and its text; `what` is whose queue it is, `retry_after_ns` what waits there will take."""
    if isinstance(error, RequestTooLarge):
        return Outcome.INVALID, InvalidArgument(f"{what} never takes this: {error}")
    if isinstance(error, QueueFull):
        text = f"Exceeds maximum queue size of {what}: {error}"
        return Outcome.QUEUE_FULL, ResourceExhausted(text, retry_after_ns=retry_after_ns)
    if isinstance(error, TooLate):
        return Outcome.QUEUE_TIMEOUT, DeadlineExceeded(f"Request timeout expired: it was not run, as {error}")
    return Outcome.QUEUE_TIMEOUT, DeadlineExceeded("Request timeout expired before it was queued")
