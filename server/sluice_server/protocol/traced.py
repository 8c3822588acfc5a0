"""A call whose request is sampled for tracing: the same call, that also ends its spans when it ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from sluice_server.status import Code
from sluice_server.transport.call import Call

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from typing_extensions import Buffer

    from sluice_server.observability.trace_control import FileTrace
    from sluice_server.observability.tracing import RequestTrace
    from sluice_server.status import Status
    from sluice_server.transport.call import Metadata


class TracedCall(Call):
    """Wraps a call from the transport; only sampled requests pay for it."""

    __slots__ = ("_call", "_facts", "_traces")

    sampled = True

    def __init__(self, call: Call, trace: RequestTrace | FileTrace) -> None:
        self._call = call
        self._traces: list[RequestTrace | FileTrace] = [trace]
        self._facts: dict[str, Any] = {}
        self.method = call.method
        self.message = call.message
        self.received_ns = call.received_ns
        self.deadline_ns = call.deadline_ns
        self.on_cancel = None
        call.on_cancel = self._client_left

    @property
    def metadata(self) -> Metadata:
        """The request's headers."""
        return self._call.metadata

    @property
    def peer(self) -> str:
        """The client's address."""
        return self._call.peer

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The names in the client's certificate."""
        return self._call.peer_names

    def add(self, trace: RequestTrace | FileTrace) -> None:
        """End one more trace with this call."""
        self._traces.append(trace)

    def describe(self, **facts: Any) -> None:
        """Add what the spans tell: the keyword arguments of `RequestTrace.finish`, as they become known."""
        self._facts.update(facts)

    def show(self, activity: str, tensors: Iterable[tuple[str, np.ndarray]]) -> None:
        """Add tensors as they are now to the traces that have any."""
        tracing = [trace for trace in self._traces if trace.wants_tensors]
        if tracing:
            for name, array in tensors:
                for trace in tracing:
                    trace.add_tensor(activity, name, array)

    def reply(self, parts: Sequence[Buffer]) -> None:
        """End the call and its spans."""
        ended_ns = time.monotonic_ns()
        self._call.reply(parts)
        self._end(Code.OK, ended_ns)

    def fail(self, status: Status) -> None:
        """End the call with an error, and its spans."""
        ended_ns = time.monotonic_ns()
        self._call.fail(status)
        self._end(status.code, ended_ns)

    def _client_left(self) -> None:
        if self.on_cancel is not None:
            self.on_cancel()
        ended_ns = time.monotonic_ns()
        self._end(self.code_of_leaving(ended_ns), ended_ns)

    def _end(self, code: Code, ended_ns: int) -> None:
        # A running batch may still answer a call whose client left: the first end counts, as it does on the wire.
        traces, self._traces = self._traces, []
        for trace in traces:
            trace.finish(code, ended_ns=ended_ns, **self._facts)
