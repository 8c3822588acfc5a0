"""Traces by Triton's trace settings: who is traced, in which mode, and where the traces go.

mode triton          JSON trace files (`trace_file.py`); without a file, which only the command line names, nothing
mode opentelemetry   spans through the tracer (`tracing.py`); a caller's sampled trace is always followed
"""

from __future__ import annotations

import enum
import itertools
import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol

from sluice_server.observability.trace_file import TensorRecord, TraceFile, TraceRecord
from sluice_server.observability.trace_sampling import TraceOptions, TraceSampler
from sluice_server.observability.tracing import OtlpOptions, TracingError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import numpy as np

    from sluice_server.observability.trace_sampling import Sample
    from sluice_server.observability.tracing import RequestTrace, Tracer
    from sluice_server.status import Code

logger = logging.getLogger(__name__)

FLUSH_S = 5.0
"""How long the end of the process waits for the disk."""


class TraceMode(enum.StrEnum):
    """`--trace-config mode=`; it stays what it was at start."""

    TRITON = "triton"
    OPENTELEMETRY = "opentelemetry"


@dataclass(frozen=True, slots=True)
class TraceConfig:
    """What `--trace-config` says."""

    mode: TraceMode = TraceMode.TRITON
    options: TraceOptions = field(default_factory=TraceOptions)
    file: Path | None = None
    otlp: OtlpOptions = field(default_factory=OtlpOptions)


class TracedRequest(Protocol):
    """What tracing needs to know of a call."""

    received_ns: int
    method: str

    @property
    def metadata(self) -> Iterable[tuple[str, str | bytes]]:
        """The request's headers."""


class TraceControl:
    """The trace settings and what they have an effect on; for any thread."""

    def __init__(self, config: TraceConfig, tracer: Tracer | None = None) -> None:
        """`tracer` is for the mode opentelemetry. TracingError when no trace file can be made."""
        self.mode = config.mode
        self.file = config.file
        self.sampler = TraceSampler(config.options)
        self._tracer = tracer if config.mode is TraceMode.OPENTELEMETRY else None
        self._ids = itertools.count(1)
        self._writer: TraceFile | None = None
        if config.mode is TraceMode.TRITON and config.file is not None:
            try:
                self._writer = TraceFile(config.file)
            except OSError as error:
                raise TracingError(f"--trace-config triton,file: {error}") from error
        if self.sampler.armed and not self.traces:
            logger.warning("nothing is traced: mode triton needs --trace-config triton,file=FILE")

    @property
    def traces(self) -> bool:
        """Whether traces have somewhere to go."""
        return self._writer is not None or self._tracer is not None

    def begin(self, call: TracedRequest, model: str) -> RequestTrace | FileTrace | None:
        """The trace of a request to this model, or None when it is not chosen."""
        if self._writer is not None:
            sample = self.sampler.sample(model)
            return None if sample is None else FileTrace(self._writer, sample, next(self._ids), call)
        if self._tracer is None:
            return None
        forced = self._tracer.continues_sampled(call.metadata)
        if self.sampler.sample(model, forced=forced) is None:
            return None
        return self._tracer.start_request(call.method.rpartition("/")[2], call.metadata, call.received_ns)

    def close(self) -> None:
        """Write what is left."""
        if self._writer is not None:
            self._writer.close(FLUSH_S)


class FileTrace:
    """The trace of one request for the trace file; whoever ends the request calls `finish`, once.

    The transport tells when a message is complete and when it was handed its answer, so that reading is one moment.
    """

    __slots__ = ("_front", "_id", "_received_ns", "_sample", "_started_ns", "_tensors", "_writer")

    _WAITED: ClassVar[dict[str, str]] = {"GRPC": "GRPC_WAITREAD", "HTTP": "HTTP_RECV"}

    def __init__(self, writer: TraceFile, sample: Sample, number: int, call: TracedRequest) -> None:
        self._writer = writer
        self._sample = sample
        self._id = number
        # Only calls that came otherwise than over gRPC say so.
        self._front = getattr(call, "front", "GRPC")
        self._received_ns = call.received_ns
        self._started_ns = time.monotonic_ns()
        self._tensors: list[TensorRecord] = []

    @property
    def wants_tensors(self) -> bool:
        """Whether `add_tensor` has anything to do."""
        return "TENSORS" in self._sample.levels

    def add_tensor(self, activity: str, name: str, array: np.ndarray) -> None:
        """Note a tensor as it is now."""
        self._tensors.append(TensorRecord(activity, name, array.copy()))

    def finish(
        self,
        code: Code,
        *,
        ended_ns: int,
        model: str = "",
        version: str = "",
        request_id: str = "",
        batch_rows: int = 0,
        enqueued_ns: int | None = None,
        started_ns: int | None = None,
        compute_input_ns: int = 0,
        compute_infer_ns: int = 0,
        compute_output_ns: int = 0,
        parameters: Mapping[str, str] | None = None,
    ) -> None:
        """End the trace and have it written; the arguments are those of `RequestTrace.finish`."""
        del code, batch_rows  # Triton's files have no place for them
        waited = self._WAITED[self._front]
        moments = [(f"{waited}_START", self._received_ns), (f"{waited}_END", self._received_ns)]
        moments.append(("REQUEST_START", self._started_ns))
        if enqueued_ns is not None:
            moments.append(("QUEUE_START", enqueued_ns))
        if started_ns is not None:
            computed_ns = started_ns + compute_input_ns + compute_infer_ns
            moments += [
                ("COMPUTE_START", started_ns),
                ("COMPUTE_INPUT_END", started_ns + compute_input_ns),
                ("COMPUTE_OUTPUT_START", computed_ns),
                ("COMPUTE_END", computed_ns + compute_output_ns),
            ]
        moments.append(("REQUEST_END", ended_ns))
        moments += [(f"{self._front}_SEND_START", ended_ns), (f"{self._front}_SEND_END", time.monotonic_ns())]
        timed = "TIMESTAMPS" in self._sample.levels
        record = TraceRecord(
            self._id, model, int(version or -1), request_id, moments if timed else [], self._tensors, parameters or {}
        )
        self._writer.put(record, scope=self._sample.scope, log_frequency=self._sample.log_frequency)
