"""`preserve_ordering`: the answers of a version leave in the order in which its requests came, on any instances.

Made by the loader for models that ask for it, in place of what `model.py` and its kin have, so that others do nothing.

What has a place in the order is what runs, or is answered in place of a run (hits of the response cache, requests that
follow another): its answer, or the failure of its run, waits for all before it. What is refused, expires or is left by
its client is answered at once and gives its place up, so that a deadline is kept to the millisecond and no request
waits for one that never runs; so it is in Triton.

A request takes its place when it comes, before it is looked up or queued. Those of sequences take it when they are put
into a batch: a sequence that waits for a slot would otherwise hold up the ones that have to end before it gets one.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, TypeAlias

from sluice_batching import AnswerOrder
from sluice_server.execution.cached import CachedModel
from sluice_server.execution.model import ServedModel
from sluice_server.execution.sequences import SequenceModel
from sluice_server.execution.split import SplittingModel
from sluice_server.status import Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from typing_extensions import Buffer

    from sluice_batching import QueueFull, QueuePolicy
    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.errors import SluiceError
    from sluice_server.execution.instance import Answers
    from sluice_server.execution.request import InferRequest
    from sluice_server.execution.split import Whole
    from sluice_server.transport.call import Call

End: TypeAlias = "list[Buffer] | Status"
"""The parts of an answer, or why there is none."""


def preserves_ordering(config: ModelConfig) -> bool:
    """Whether a configuration asks for answers in the order of the requests."""
    if config.HasField("sequence_batching"):
        return config.sequence_batching.oldest.preserve_ordering
    return config.dynamic_batching.preserve_ordering


class OrderedAnswers:
    """The answers of one version on their way out, for any thread.

    Whoever brings the answer that all wait for sends it and what is held behind it; only one thread sends at a time,
    and what others bring meanwhile is sent by that one. So answers reach the transport in order, and no lock is held
    then.
    """

    def __init__(self, policy: QueuePolicy) -> None:
        """Of held answers there may be as many as requests in the queue, and as many bytes."""
        self._order: AnswerOrder[Call, End] = AnswerOrder(policy.max_queue_rows, policy.max_queue_bytes)
        self._lock = threading.Lock()
        self._is_sending = False
        self._reply: Callable[[Answers], None] = _nobody

    def __repr__(self) -> str:
        return f"<OrderedAnswers {self._order!r}>"

    def send_with(self, reply: Callable[[Answers], None]) -> None:
        """Have answers sent by this, one at a time; it does not raise."""
        self._reply = reply

    def overflow(self) -> QueueFull | None:
        """Why nothing more should be taken in: so much is held already."""
        with self._lock:
            return self._order.overflow()

    def enter(self, requests: Iterable[InferRequest]) -> None:
        """Give requests the last places, in their order."""
        with self._lock:
            self._order.enter([request.call for request in requests])

    def send(self, answers: Answers) -> None:
        """Send answers when it is their turn, and forget each as it goes; those without a place at once."""
        placeless: Answers = deque()
        with self._lock:
            while answers:
                call, parts = answers.popleft()
                if not self._order.put(call, parts, _size_bytes(parts)):
                    placeless.append((call, parts))
        self._reply(placeless)
        self._send_due()

    def fail(self, requests: Iterable[InferRequest], status: Status) -> None:
        """End requests that have run, when it is their turn."""
        with self._lock:
            placeless = [request.call for request in requests if not self._order.put(request.call, status)]
        for call in placeless:
            call.fail(status)
        self._send_due()

    def leave(self, requests: Iterable[InferRequest]) -> None:
        """Give up the places of requests that have ended otherwise; those who waited for them go on."""
        with self._lock:
            self._order.leave([request.call for request in requests])
        self._send_due()

    def _send_due(self) -> None:
        with self._lock:
            if self._is_sending:
                return
            self._is_sending = True
        while (due := self._next()) is not None:
            self._end(*due)

    def _next(self) -> tuple[Call, End] | None:
        """What is to be sent next; None: nothing, and who asked sends no more."""
        with self._lock:
            due = self._order.pop()
            self._is_sending = due is not None
            return due

    def _end(self, call: Call, end: End) -> None:
        try:
            if isinstance(end, Status):
                call.fail(end)
            else:
                self._reply(deque(((call, end),)))
        except BaseException:
            # A bug; those behind are sent with the next answer.
            with self._lock:
                self._is_sending = False
            raise


def _size_bytes(parts: Sequence[Any]) -> int:
    """Of the parts of an answer, which are buffers, or arrays where it goes to an ensemble."""
    return sum([getattr(part, "nbytes", 0) or len(part) for part in parts])


def _nobody(answers: Answers) -> None:
    raise AssertionError(f"no runner has this order, and {len(answers)} answers are to be sent")


class OrderedModel(ServedModel):
    """A served version whose answers leave in order."""

    def __init__(self, *others: Any, order: OrderedAnswers, on_arrival: bool = True, **named: Any) -> None:
        """`order` is the runner's. `on_arrival`: requests take their places as they come; else somebody else sees to
        that. The other arguments are those of the class that this one is mixed with.
        """
        super().__init__(*others, **named)
        self._order = order
        self._on_arrival = on_arrival

    def submit(self, requests: Sequence[InferRequest]) -> list[InferRequest]:
        """Take requests as the base does, in this order; gives those that came too late."""
        if not self._admits(requests):
            return []
        try:
            late = super().submit(requests)
        except BaseException:
            # A bug, whoever answers these; nobody may wait for them.
            self._order.leave(requests)
            raise
        if late:
            self._order.leave(late)
        return late

    def submit_one(self, request: InferRequest) -> tuple[list[InferRequest], Callable[[], None] | None]:
        """As the base."""
        if not self._admits((request,)):
            return [], None
        late, work = super().submit_one(request)
        if late:
            self._order.leave(late)
        return late, work

    def cancel(self, request: InferRequest) -> bool:
        """Let a request go as the base does; nobody waits for its answer any more, also if it runs."""
        unrun = super().cancel(request)
        self._order.leave((request,))
        return unrun

    def _admits(self, requests: Sequence[InferRequest]) -> bool:
        full = self._order.overflow()
        if full is not None:
            for request in requests:
                self._refuse(request, full)
            return False
        if self._on_arrival:
            self._order.enter(requests)
        return True

    def _turn_away(self, request: InferRequest, error: SluiceError) -> None:
        super()._turn_away(request, error)
        self._order.leave((request,))


class OrderedCachedModel(OrderedModel, CachedModel):
    """The same with a response cache: hits, and those who follow another, are answered in order too."""


class OrderedSequenceModel(OrderedModel, SequenceModel):
    """The same for sequences: requests take their places when they are put into a batch."""


class OrderedSplittingModel(OrderedModel, SplittingModel):
    """The same with large requests, which have one place for all of their parts."""

    def _cancel_whole(self, whole: Whole) -> None:
        super()._cancel_whole(whole)
        self._order.leave((whole.request,))


ORDERED: dict[type[ServedModel], type[OrderedModel]] = {
    ServedModel: OrderedModel,
    CachedModel: OrderedCachedModel,
    SequenceModel: OrderedSequenceModel,
    SplittingModel: OrderedSplittingModel,
}
"""What a version with `preserve_ordering` is made as, by what it would be without."""
