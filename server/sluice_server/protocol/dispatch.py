"""Takes lists of calls from a transport, answers the cheap ones in place and sends inference to the models' queues.

Requests of a stream go the same way as those that come alone. Runs on the transport's
intake thread. What can take long (loading a model) goes to a small pool of threads. Whatever goes wrong with one call
ends that call, with a status from the one table, and never the list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError, Message

from sluice_server.errors import InvalidArgument, Unavailable, Unimplemented
from sluice_server.observability.statistics import Outcome
from sluice_server.observability.trace_control import TraceConfig, TraceControl
from sluice_server.protocol import shared_memory
from sluice_server.protocol.decode_cache import DecodeCache
from sluice_server.protocol.forwarding import forwarded
from sluice_server.protocol.rpcs import SERVICE, name_of, path_of
from sluice_server.protocol.streams import InferStreams
from sluice_server.protocol.traced import TracedCall

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping, Sequence
    from concurrent.futures import Executor

    from sluice_server.execution.request import InferRequest
    from sluice_server.execution.served import Served
    from sluice_server.observability.tracing import Tracer
    from sluice_server.protocol.rpcs import Rpc
    from sluice_server.protocol.shared_memory import SharedMemory
    from sluice_server.repository.manager import ModelManager
    from sluice_server.status import StatusMapper
    from sluice_server.transport.call import Call

RELOADS_FOLLOWED_MAX = 4
"""How often one request is passed on to the version that replaced the one it was meant for."""

INFER, STREAM_INFER = path_of("ModelInfer"), path_of("ModelStreamInfer")


class Dispatcher:
    """The handler that a transport is given; it never raises."""

    def __init__(
        self,
        manager: ModelManager,
        rpcs: Mapping[str, Rpc],
        to_status: StatusMapper,
        slow_pool: Executor,
        tracer: Tracer | None = None,
        *,
        streams: Mapping[str, Callable[[Call], None]] | None = None,
        regions: SharedMemory = shared_memory.OFF,
        traces: TraceControl | None = None,
        forward: re.Pattern[str] | None = None,
    ) -> None:
        """`rpcs` and `streams` are by the paths of their methods; the latter are given each message of a stream.

        `regions` is the shared memory that requests may name. `tracer` traces every request that it samples itself,
        `traces` those that the trace settings choose. Headers that match `forward` are told in both.
        """
        self._forward = forward
        self._manager = manager
        self._rpcs = rpcs
        self._to_status = to_status
        self._slow_pool = slow_pool
        self._tracer = tracer
        self._traces = traces or TraceControl(TraceConfig())
        self._sampler = self._traces.sampler
        self._streams = streams or {}
        self._infer_streams = InferStreams()
        self._decode_cache = DecodeCache(regions=regions)

    @property
    def methods(self) -> dict[str, bool]:
        """The path of every RPC, and whether it streams: what a transport is to accept."""
        inference = {path_of(method.name): bool(method.client_streaming) for method in SERVICE.methods}
        return inference | dict.fromkeys(self._rpcs, False) | dict.fromkeys(self._streams, True)

    def stop(self) -> None:
        """Take no more requests from the streams of inference, and end each when its answers are sent."""
        self._infer_streams.stop()

    def __call__(self, calls: Sequence[Call], /, *, lend: bool = False) -> Callable[[], None] | None:
        """Take every call of the list over. With `lend`, give what the caller's thread is to run, if anything."""
        queued: dict[Served, list[InferRequest]] = {}
        for call in calls:
            if call.method == INFER:
                self._decode_into(queued, call)
            elif call.method == STREAM_INFER:
                if self._infer_streams.take(call):
                    self._decode_into(queued, call)
            elif call.stream is not None:
                self._pass_on(call)
            else:
                self._answer(call)
        if lend and len(calls) == 1:
            for model, (lone,) in queued.items():
                return self._submit_one(model, lone)
        for model, requests in queued.items():
            self._submit(model, requests, RELOADS_FOLLOWED_MAX)
        return None

    def _decode_into(self, queued: dict[Served, list[InferRequest]], call: Call, *, passed_on: bool = False) -> None:
        """Decode a request for the version that is to run it; one that is `passed_on` was meant for another before."""
        model = None
        if self._tracer is not None and not passed_on:
            call = self._sampled(self._tracer, call)
        try:
            parsed = self._decode_cache.parse(call.message)
            model = self._manager.find(parsed.model_name, parsed.model_version)
            if self._sampler.armed and not passed_on:
                call = self._chosen(call, model.interface.name)
            if call.sampled:
                call.describe(model=model.interface.name, version=model.interface.version)
                if self._forward is not None:
                    call.describe(parameters=forwarded(self._forward, call.metadata))
            request = self._decode_cache.decode(parsed, model.interface, call)
            if call.sampled:
                call.describe(request_id=request.id)
        except Exception as error:
            if model is not None:
                model.statistics.record_refused(Outcome.INVALID)
            call.fail(self._to_status(error))
            return
        queued.setdefault(model, []).append(request)

    @staticmethod
    def _sampled(tracer: Tracer, call: Call) -> Call:
        trace = tracer.start_request(name_of(call.method), call.metadata, call.received_ns)
        return call if trace is None else TracedCall(call, trace)

    def _chosen(self, call: Call, model: str) -> Call:
        """The call, with a trace when the trace settings choose it."""
        trace = self._traces.begin(call, model)
        if trace is None:
            return call
        if isinstance(call, TracedCall):
            call.add(trace)
            return call
        return TracedCall(call, trace)

    def _submit_one(self, model: Served, request: InferRequest) -> Callable[[], None] | None:
        late, work = model.submit_one(request)
        if late:
            self._follow_reload(model, late, RELOADS_FOLLOWED_MAX)
        return work

    def _submit(self, model: Served, requests: list[InferRequest], reloads_left: int) -> None:
        late = model.submit(requests)
        if late:
            self._follow_reload(model, late, reloads_left)

    def _follow_reload(self, model: Served, late: list[InferRequest], reloads_left: int) -> None:
        # The version began to drain after it was looked up. Its successor is in place by now, with its own checks.
        queued: dict[Served, list[InferRequest]] = {}
        for request in late:
            if reloads_left:
                self._decode_into(queued, request.call, passed_on=True)
            else:
                model.statistics.record_refused(Outcome.UNAVAILABLE)
                request.call.fail(
                    self._to_status(Unavailable(f"model '{model.interface.name}' is not ready: it is being replaced"))
                )
        for successor, again in queued.items():
            self._submit(successor, again, reloads_left - 1)

    def _pass_on(self, message: Call) -> None:
        try:
            self._streams[message.method](message)
        except Exception as error:
            message.fail(self._to_status(error))

    def _answer(self, call: Call) -> None:
        rpc = self._rpcs.get(call.method)
        if rpc is None:
            call.fail(self._to_status(Unimplemented(f"{name_of(call.method)} is not implemented in this version")))
        elif rpc.slow:
            try:
                self._slow_pool.submit(self._run, rpc, call)
            except RuntimeError:  # the pool is shut down: the server is ending
                call.fail(self._to_status(Unavailable("the server is shutting down")))
        else:
            self._run(rpc, call)

    def _run(self, rpc: Rpc, call: Call) -> None:
        try:
            response = rpc.answer(_parse(rpc.request, call), call)
            call.reply((response.SerializeToString(),))
        except Exception as error:
            call.fail(self._to_status(error))


def _parse(message_class: type[Message], call: Call) -> Message:
    try:
        # A large message may be another buffer than `bytes`, which is all that protobuf parses.
        return message_class.FromString(bytes(call.message))
    except DecodeError as error:
        name = message_class.DESCRIPTOR.name
        raise InvalidArgument(f"the {len(call.message)} bytes of the request are not a {name} message") from error
