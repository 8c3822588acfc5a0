"""Ensembles: versions that run no model of their own, but the steps of a graph, each on the model that it names.

A request goes whole from step to step. A step is submitted to its model's queue as soon as its inputs are there, by the
thread that brought the last of them, and its outputs come back as arrays: nothing is encoded in between. Steps that do
not wait for each other run side by side, and those that no requested output needs do not run.

    EnsembleModel   the version: what it is made of, who is in flight, how it ends
    EnsembleRun     one request in flight: its tensors, its progress, the calls of its steps
    (sending.py)    hands steps to their parts

Invariants of an `EnsembleRun`:

* its request ends once: answered when all steps of its plan are done, failed with the first step that fails, or left
  by its client; no step begins after that, those that wait are taken out of their queues, and what still runs is
  ignored when it ends;
* all steps have the request's own deadline, so that each part keeps it.

The parts of an ensemble are bound at load, each the very version that is served then; the manager makes another
EnsembleModel when one of them is replaced, and lets parts go only when every ensemble on them has ended.

Locks: `EnsembleModel._lock` guards who is in flight, `EnsembleRun._lock` one request's state; nothing is called with
either held.
"""

from __future__ import annotations

import functools
import threading
import time
from typing import TYPE_CHECKING, Any, NamedTuple

from sluice_server.dataflow import Progress
from sluice_server.execution.inlets import Tensor, conform, size_bytes
from sluice_server.execution.instance import check_outputs
from sluice_server.execution.model_cache import read_shared
from sluice_server.execution.request import InferRequest, PrioritizedRequest
from sluice_server.execution.sending import drive, expire, leave, send, submit_lending
from sluice_server.execution.served import Served, Waiting
from sluice_server.execution.step import HandOver
from sluice_server.observability.statistics import FailureReason, Outcome
from sluice_server.status import Code, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    import numpy as np

    from sluice_batching import ExpiryTimer
    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.dataflow import Graph, Plan
    from sluice_server.execution.gate import Gate
    from sluice_server.execution.inlets import Inlet
    from sluice_server.execution.step import StepCall
    from sluice_server.observability.statistics import ModelStatistics
    from sluice_server.protocol.interface import ModelInterface
    from sluice_server.status import StatusMapper

PLANS_MAX = 256
"""Plans that are kept, by the outputs asked for: more than the combinations in use."""

STEP = "step"
"""Begins the keys of steps: their answers are other than a client's, so they share no batch with clients' requests."""

_REASONS = {Code.DEADLINE_EXCEEDED: FailureReason.REJECTED, Code.INTERNAL: FailureReason.BACKEND}


class Part(NamedTuple):
    """A step bound to the version that runs it."""

    model: Served
    inlets: tuple[Inlet, ...]
    """Its inputs that take a tensor."""
    makes: dict[str, str]
    """From the model's outputs to the tensors."""
    call: type[StepCall]
    gate: Gate | None


class EnsembleModel(Served):
    """A loaded ensemble, for any thread. Made by the loader, started once."""

    def __init__(
        self,
        config: ModelConfig,
        interface: ModelInterface,
        graph: Graph,
        parts: Sequence[Part],
        encode: Callable[[Sequence[InferRequest], Sequence[np.ndarray]], list[list[Any]]],
        statistics: ModelStatistics,
        to_status: StatusMapper,
        timer: ExpiryTimer,
    ) -> None:
        """`parts` are those of the graph's steps, in their order; `encode` makes the answers, as of a batch of one."""
        self.config = config
        self.interface = interface
        self.statistics = statistics
        self.properties = {"steps": ", ".join(f"{_name_of(part.model)}" for part in parts)}
        self.parts = tuple(dict.fromkeys(part.model for part in parts))
        self.to_status = to_status
        self.bound = tuple(parts)
        self._graph = graph
        self._encode = encode
        self._timer = timer
        self._gates = tuple(part.gate for part in parts if part.gate is not None)
        self._plans: dict[tuple[str, ...], Plan] = {}
        self._lock = threading.Lock()
        self._ended = threading.Condition(self._lock)
        self._runs: dict[InferRequest, EnsembleRun] = {}
        self._draining = False

    def __repr__(self) -> str:
        return f"<EnsembleModel {_name_of(self)} {len(self._runs)} in flight>"

    def start(self) -> None:
        """Have steps that wait for a place answered at their deadline."""
        for gate in self._gates:
            self._timer.register(gate.queue, expire)

    def submit(self, requests: Sequence[InferRequest]) -> list[InferRequest]:
        """Begin requests; gives those that came too late, as the version is being unloaded."""
        late, ready = self._begin(requests)
        send(ready)
        return late

    def submit_one(self, request: InferRequest) -> tuple[list[InferRequest], Callable[[], None] | None]:
        """As `submit` for one request, or give its first step to be run by the caller, and the others after it."""
        late, ready = self._begin((request,))
        if len(ready) != 1:
            send(ready)
            return late, None
        work = submit_lending(ready[0])
        return late, None if work is None else functools.partial(drive, work)

    def cancel(self, request: InferRequest) -> bool:
        """Let a request go whose client has left, with the steps of it that wait."""
        run = self._runs.get(request)
        return run is not None and run.abandon()

    def answers_in_arrays(self) -> bool:
        """An ensemble in an ensemble hands its outputs over as they are."""
        if not isinstance(self._encode, HandOver):
            self._encode = HandOver(self._encode, self.interface)
        return True

    def waiting(self) -> Waiting:
        """The steps that wait for a place of `max_inflight_requests`; all others are in the queues of the parts."""
        queues = [gate.queue for gate in self._gates]
        return Waiting(
            sum(map(len, queues)), sum(queue.rows for queue in queues), sum(queue.size_bytes for queue in queues)
        )

    def drain(self) -> None:
        """Refuse new requests; those in flight go on to their end."""
        with self._lock:
            self._draining = True

    def join(self, timeout_s: float | None) -> bool:
        """Wait until every request in flight has ended; False when time ran out first."""
        with self._lock:
            if not self._ended.wait_for(lambda: not self._runs, timeout_s):
                return False
        for gate in self._gates:
            self._timer.unregister(gate.queue)
        return True

    def plan_for(self, output_names: tuple[str, ...]) -> Plan:
        """What is to be done for these outputs."""
        plan = self._plans.get(output_names)
        if plan is None:
            if len(self._plans) >= PLANS_MAX:
                self._plans.clear()
            plan = self._plans[output_names] = self._graph.plan(output_names)
        return plan

    def _begin(self, requests: Sequence[InferRequest]) -> tuple[list[InferRequest], list[StepCall]]:
        """Take requests in: gives those that came too late, and the steps of the others that can begin."""
        late: list[InferRequest] = []
        ready: list[StepCall] = []
        for request in requests:
            request.model = self
            run = EnsembleRun(self, request)
            with self._lock:
                if self._draining:
                    late.append(request)
                    continue
                self._runs[request] = run
            request.call.on_cancel = request.cancel
            ready += run.begin()
        return late, ready

    def finish(self, run: EnsembleRun, tensors: dict[str, Tensor]) -> None:
        """Answer a request all of whose steps are done; raises what encoding it raises."""
        request, began_ns = run.request, time.monotonic_ns()
        arrays = [self._output(name, tensors[name]) for name in request.output_names]
        if self.interface.max_batch_rows:
            check_outputs([request], arrays)
        answer = self._encode((request,), arrays)[0]
        self._record(run, time.monotonic_ns() - began_ns)
        request.call.reply(answer)

    def _output(self, name: str, tensor: Tensor) -> np.ndarray:
        interface = self.interface.outputs[name]
        # The ensemble's own tensors are those behind a reshape.
        dims = interface.dims if interface.graph_dims is None else interface.graph_dims
        return conform(tensor, dims, batches=self.interface.max_batch_rows > 0)

    def _record(self, run: EnsembleRun, encode_ns: int) -> None:
        """Count an answered request: one execution of its rows, with the compute times of its steps summed up."""
        request, ended_ns = run.request, time.monotonic_ns()
        input_ns, infer_ns, output_ns = run.compute_ns
        output_ns += encode_ns
        started_ns = run.began_ns if run.started_ns is None else run.started_ns
        queue_ns, total_ns = started_ns - run.began_ns, ended_ns - request.call.received_ns
        self.statistics.record_batch(
            rows=request.rows,
            requests=1,
            total_ns=total_ns,
            queue_ns=queue_ns,
            compute_input_ns=input_ns,
            compute_infer_ns=infer_ns,
            compute_output_ns=output_ns,
        )
        if self.statistics.latencies is not None:
            self.statistics.latencies.record([total_ns], [queue_ns], input_ns, infer_ns, output_ns)
        if request.call.sampled:
            request.call.describe(
                batch_rows=request.rows,
                enqueued_ns=run.began_ns,
                started_ns=started_ns,
                compute_input_ns=input_ns,
                compute_infer_ns=infer_ns,
                compute_output_ns=output_ns,
            )

    def fail(self, run: EnsembleRun, status: Status) -> None:
        """Fail a request with the status of a step."""
        total_ns = time.monotonic_ns() - run.request.call.received_ns
        if status.code is Code.RESOURCE_EXHAUSTED:
            self.statistics.record_refused(Outcome.QUEUE_FULL)
        else:
            self.statistics.record_failure(_REASONS.get(status.code, FailureReason.OTHER), total_ns=total_ns)
        text = f"in ensemble '{self.interface.name}', {status.message}"
        run.request.call.fail(Status(status.code, text, status.trailers))

    def left(self, run: EnsembleRun) -> None:
        """Count a request whose client has left."""
        total_ns = time.monotonic_ns() - run.request.call.received_ns
        self.statistics.record_failure(FailureReason.CANCELED, total_ns=total_ns)

    def forget(self, run: EnsembleRun) -> None:
        """A request has ended."""
        with self._lock:
            del self._runs[run.request]
            if self._draining and not self._runs:
                self._ended.notify_all()


class EnsembleRun:
    """One request in flight."""

    __slots__ = (
        "_calls",
        "_is_over",
        "_lock",
        "_model",
        "_plan",
        "_progress",
        "_tensors",
        "began_ns",
        "compute_ns",
        "request",
        "started_ns",
    )

    def __init__(self, model: EnsembleModel, request: InferRequest) -> None:
        self.request = request
        self.began_ns = time.monotonic_ns()
        self.started_ns: int | None = None
        """When the first of the steps that ran did so."""
        self.compute_ns = (0, 0, 0)
        self._model = model
        self._plan = model.plan_for(request.output_names)
        self._progress = Progress(self._plan)
        self._tensors: dict[str, Tensor] = {}
        self._calls: set[StepCall] = set()
        self._lock = threading.Lock()
        self._is_over = False

    def begin(self) -> list[StepCall]:
        """The steps that can begin; none when the request fails, or needs none."""
        request = self.request
        try:
            if request.shared is not None:
                read_shared(request)
            rows = request.rows if self._model.interface.max_batch_rows else 0
            self._tensors = {name: Tensor(array, rows) for name, array in request.arrays.items()}
            if not self._plan.first:
                self._finish()
                return []
            return self._calls_of(self._plan.first)
        except Exception as error:
            self._fail(self._model.to_status(error))
            return []

    def status_of(self, error: Exception) -> Status:
        """By the server's table."""
        return self._model.to_status(error)

    def succeeded(self, call: StepCall, request: InferRequest, arrays: Sequence[np.ndarray]) -> None:
        """A step is done; those that waited for it alone begin."""
        part = self._model.bound[call.number]
        rows = request.rows if part.model.interface.max_batch_rows else 0
        ready: list[int] = []
        is_last = False
        with self._lock:
            self._calls.discard(call)
            if not self._is_over:
                for name, array in zip(request.output_names, arrays, strict=True):
                    self._tensors[part.makes[name]] = Tensor(array, rows)
                self._add_times(call)
                ready = self._progress.done(call.number)
                is_last = self._progress.is_over
        if call.has_place:
            leave(call)
        try:
            if is_last:
                self._finish()
            elif ready:
                send(self._calls_of(ready))
        except Exception as error:
            self._fail(self._model.to_status(error))

    def failed(self, call: StepCall, status: Status) -> None:
        """A step has failed, and the request with it."""
        with self._lock:
            self._calls.discard(call)
        leave(call)
        self._fail(status)

    def abandon(self) -> bool:
        """The client has left; False when the request has ended before."""
        if not self._end():
            return False
        try:
            self._model.left(self)
            self._cancel_steps()
        finally:
            self._model.forget(self)
        return True

    def _end(self) -> bool:
        """Be over: True for the one who is to end the request."""
        with self._lock:
            is_first, self._is_over = not self._is_over, True
            return is_first

    def _finish(self) -> None:
        if not self._end():
            return
        try:
            self._model.finish(self, self._tensors)
        except Exception as error:
            self._model.fail(self, self._model.to_status(error))
        finally:
            self._tensors = {}
            self._model.forget(self)

    def _fail(self, status: Status) -> None:
        if not self._end():
            return
        try:
            self._model.fail(self, status)
            self._cancel_steps()
        finally:
            self._tensors = {}
            self._model.forget(self)

    def _cancel_steps(self) -> None:
        """Take the steps that wait out of their queues; those that run are ignored when they end."""
        with self._lock:
            calls, self._calls = self._calls, set()
        for call in calls:
            request = call.pending
            if request is None:  # it has just ended
                continue
            if call.gate is not None and call.gate.cancel(request):
                call.close()
            elif request.model.cancel(request):
                call.close()
                leave(call)

    def _add_times(self, call: StepCall) -> None:
        if call.started_ns is None:
            return
        if self.started_ns is None or call.started_ns < self.started_ns:
            self.started_ns = call.started_ns
        mine, its = self.compute_ns, call.compute_ns
        self.compute_ns = (mine[0] + its[0], mine[1] + its[1], mine[2] + its[2])

    def _calls_of(self, numbers: Sequence[int]) -> list[StepCall]:
        """Calls for steps that are ready, in flight from now on; raises for inputs that do not fit a part."""
        calls = [self._call_of(number) for number in numbers]
        with self._lock:
            if self._is_over:
                return []
            self._calls.update(calls)
        return calls

    def _call_of(self, number: int) -> StepCall:
        part, request, tensors = self._model.bound[number], self.request, self._tensors
        interface = part.model.interface
        arrays: dict[str, np.ndarray] = {}
        held_bytes = rows = 0
        for inlet in part.inlets:
            tensor = tensors.get(inlet.tensor)
            if tensor is None:  # an optional input that the request has left out
                continue
            arrays[inlet.name] = array = inlet.fit(tensor)
            held_bytes += size_bytes(array, is_text=inlet.is_text)
            if interface.max_batch_rows:
                inlet.check_rows(len(array), rows)
                rows = len(array)
        output_names = self._plan.outputs[number]
        key: Hashable = (STEP, output_names)
        if interface.variable:
            key = (STEP, output_names, *interface.shape_key(arrays))
        call = part.call(self, number, request.deadline_ns, part.gate)
        make = PrioritizedRequest if interface.prioritizes else InferRequest
        step = make(call, request.id, arrays, output_names, rows or 1, key, request.deadline_ns)
        if isinstance(step, PrioritizedRequest):
            # An ensemble with such a part has such requests.
            assert isinstance(request, PrioritizedRequest)
            step.ask(request.priority, request.timeout_ns)
        call.pending = step
        step.size_bytes = held_bytes
        step.model = part.model
        return call


def _name_of(model: Served) -> str:
    return f"{model.interface.name}/{model.interface.version}"
