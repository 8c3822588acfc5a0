"""Hands the steps of ensembles to their parts, on whatever thread has made them ready.

A part may answer at once (a hit in its response cache, a refusal), which makes further steps ready on the same thread.
These are kept until the part's call has returned, and sent by the loop that is under way further up: the stack does not
grow with the steps, and steps for one part go to its queue as one list.
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from sluice_server.errors import DeadlineExceeded, Unavailable
from sluice_server.execution.refusals import refusal_of

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from sluice_server.execution.request import InferRequest
    from sluice_server.execution.served import Served
    from sluice_server.execution.step import StepCall

T = TypeVar("T")

Work: TypeAlias = "Callable[[], None]"
"""A batch to be run on this thread, in place of an instance that is idle."""


class _Thread(threading.local):
    """What this thread has to send, while it is at it."""

    outgoing: deque[StepCall] | None = None


_thread = _Thread()


def send(calls: Collection[StepCall]) -> None:
    """Submit steps that are ready; each is answered later, or here."""
    if not calls:
        return
    if _thread.outgoing is not None:
        _thread.outgoing.extend(calls)
        return
    _thread.outgoing = outgoing = deque(calls)
    try:
        while outgoing:
            for model, requests in _by_model(outgoing).items():
                _submit(model, requests)
    finally:
        _thread.outgoing = None


def collected(answer: Callable[[T], None], answers: T) -> None:
    """Answer calls, and send what they make ready when all are answered: as lists, and not one by one."""
    if _thread.outgoing is not None:
        answer(answers)
        return
    outgoing: deque[StepCall] = deque()
    _thread.outgoing = outgoing
    try:
        answer(answers)
    finally:
        _thread.outgoing = None
        send(outgoing)


def submit_lending(call: StepCall) -> Work | None:
    """Submit a lone step, or give what this thread is to do for it, by `drive`."""
    if not _enter(call):
        return None
    late, work = call.request.model.submit_one(call.request)
    _refuse_late(late)
    return work


def drive(work: Work | None) -> None:
    """Run a lone step, and what it makes ready, on this thread as far as the parts lend it a place."""
    if _thread.outgoing is not None:
        # A step of an ensemble in an ensemble: who drives the outer one goes on with what this makes ready.
        assert work is not None, "only a loop that ends has none"
        work()
        return
    outgoing: deque[StepCall] = deque()
    _thread.outgoing = outgoing
    try:
        while work is not None or outgoing:
            if work is not None:
                work()
                work = None
            if len(outgoing) == 1:
                work = submit_lending(outgoing.popleft())
            else:
                for model, requests in _by_model(outgoing).items():
                    _submit(model, requests)
    finally:
        _thread.outgoing = None


def leave(call: StepCall) -> None:
    """A step has ended, and its place, if it has one, goes to the next who waits for it."""
    gate = call.gate
    if gate is None or not call.has_place:
        return
    call.has_place = False
    successors, expired = gate.leave()
    expire(expired)
    calls = [_call_of(request) for request in successors]
    for successor in calls:
        successor.has_place = True
    send(calls)


def expire(requests: Iterable[InferRequest]) -> None:
    """Answer steps whose time was up while they waited for a place."""
    for request in requests:
        _call_of(request).refuse(DeadlineExceeded("Request timeout expired"))


def _by_model(outgoing: deque[StepCall]) -> dict[Served, list[InferRequest]]:
    """The steps that may go, by the models that run them."""
    requests: dict[Served, list[InferRequest]] = {}
    while outgoing:
        call = outgoing.popleft()
        if _enter(call):
            requests.setdefault(call.request.model, []).append(call.request)
    return requests


def _enter(call: StepCall) -> bool:
    """Whether a step may go: it needs no place, or has one. Else it waits for one, or is refused."""
    gate = call.gate
    if gate is None or call.has_place:
        return True
    call.has_place, error = gate.enter(call.request)
    if error is not None:
        _, refusal = refusal_of(error, f"the step of model '{call.request.model.interface.name}'")
        call.refuse(refusal)
    return call.has_place


def _submit(model: Served, requests: list[InferRequest]) -> None:
    try:
        late = model.submit(requests)
    except Exception as error:
        # A bug; no request may be left without an end by it.
        for request in requests:
            _call_of(request).refuse(error)
    else:
        _refuse_late(late)


def _refuse_late(late: Iterable[InferRequest]) -> None:
    """Parts outlive the ensembles on them, unless the server ends with requests that take too long."""
    for request in late:
        name = request.model.interface.name
        _call_of(request).refuse(Unavailable(f"model '{name}' is not ready: it is being unloaded"))


def _call_of(request: InferRequest) -> StepCall:
    call: StepCall = request.call  # type: ignore[assignment] # all requests here are steps
    return call
