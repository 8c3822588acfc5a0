"""A call whose request is sampled for tracing: the same call, that also ends its spans when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sluice_server.protocol.watched import WatchedCall

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import numpy as np
    from typing_extensions import Buffer

    from sluice_server.observability.trace_control import FileTrace
    from sluice_server.observability.tracing import RequestTrace
    from sluice_server.status import Code
    from sluice_server.transport.call import Call


class TracedCall(WatchedCall):
    """A sampled request's."""

    __slots__ = ("_facts", "_traces")

    sampled = True

    def __init__(self, call: Call, trace: RequestTrace | FileTrace) -> None:
        super().__init__(call)
        self._traces: list[RequestTrace | FileTrace] = [trace]
        self._facts: dict[str, Any] = {}

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

    def _end(self, code: Code, ended_ns: int, answer: Sequence[Buffer]) -> None:
        del answer
        traces, self._traces = self._traces, []
        for trace in traces:
            trace.finish(code, ended_ns=ended_ns, **self._facts)
