"""OpenTelemetry traces of sampled requests: a span for the request, and in it one for the queue and one for compute.

Off costs nothing: unless the environment asks for traces, `create_tracer` gives None and OpenTelemetry is not even
imported. When it is on, a request that is not sampled costs the reading of its `traceparent` and the sampler's
decision; spans of the others are made from timestamps that the server takes anyway, when the request ends.

    OTEL_TRACES_EXPORTER          `otlp`, `console`, both, or `none`; `otlp` when only an endpoint is set
    OTEL_EXPORTER_OTLP_[TRACES_]ENDPOINT, _PROTOCOL (`grpc`), _HEADERS, _TIMEOUT, _CERTIFICATE, ...
    OTEL_TRACES_SAMPLER[_ARG]     as in the specification; parentbased_always_on when not set
    OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_*, OTEL_SDK_DISABLED

`create_tracer` decides by the environment that it is given; the OpenTelemetry SDK, though, reads its settings from
`os.environ` itself, so outside of tests both are the same. What this server does not have is refused by name.
The parent comes from W3C `traceparent` and `tracestate` in the request's metadata; baggage is not read.
"""

from __future__ import annotations

import logging
import sys
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice_server.status import Code

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter
    from opentelemetry.trace import Span, SpanKind

SERVICE = "inference.GRPCInferenceService"

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
_PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
_SAMPLERS = frozenset(
    f"{prefix}{name}" for prefix in ("", "parentbased_") for name in ("always_on", "always_off", "traceidratio")
)
_MAX_TRACEPARENT_CHARS = 512
"""Version 00 has 55; later ones may be longer, but none is this long, and what a client sends is bounded here."""

# Codes that mean a fault of the server, by OpenTelemetry's conventions for gRPC server spans.
_SERVER_FAULTS = frozenset((Code.UNKNOWN, Code.DEADLINE_EXCEEDED, Code.UNIMPLEMENTED, Code.INTERNAL, Code.UNAVAILABLE))


class TracingError(Exception):
    """The environment asks for tracing that this server does not have; the text names the variable and the value."""


@dataclass(frozen=True, slots=True)
class OtlpOptions:
    """What `--trace-config opentelemetry,...` says beyond the environment; None and () leave that to it.

    `url` is the collector's gRPC address; the others are the batch span processor's.
    """

    url: str | None = None
    resource: tuple[tuple[str, str], ...] = ()
    max_queue_size: int | None = None
    schedule_delay_ms: int | None = None
    max_export_batch_size: int | None = None


def create_tracer(
    environ: Mapping[str, str],
    version: str,
    *,
    otlp: OtlpOptions | None = None,
    wall_minus_monotonic_ns: int | None = None,
) -> Tracer | None:
    """Give the tracer that the environment asks for, or None when it asks for none.

    With `otlp` there is one whatever the environment says, with these options before its own. `version` becomes the
    resource's `service.version`. `wall_minus_monotonic_ns` turns monotonic into wall-clock time; None takes it from
    the clocks now, once. TracingError when something asked for is not there.
    """
    names = _exporters(environ) or ([] if otlp is None else ["otlp"])
    if not names:
        return None
    _check(environ, names)
    if wall_minus_monotonic_ns is None:
        wall_minus_monotonic_ns = time.time_ns() - time.monotonic_ns()
    return Tracer(_provider(names, version, otlp or OtlpOptions()), wall_minus_monotonic_ns)


class _Spans:
    """Makes OpenTelemetry's spans from moments on the monotonic clock."""

    __slots__ = ("_fault", "_offset_ns", "_set_span", "_tracer")

    def __init__(self, provider: TracerProvider, wall_minus_monotonic_ns: int) -> None:
        from opentelemetry import trace

        self._offset_ns = wall_minus_monotonic_ns
        self._tracer = provider.get_tracer("sluice_server")
        self._set_span = trace.set_span_in_context
        self._fault = trace.Status(trace.StatusCode.ERROR)

    def start(self, name: str, context: Context, kind: SpanKind, attributes: dict[str, str], started_ns: int) -> Span:
        return self._tracer.start_span(name, context, kind, attributes, start_time=started_ns + self._offset_ns)

    def child(
        self, parent: Span, name: str, started_ns: int, ended_ns: int, attributes: dict[str, int] | None = None
    ) -> None:
        context = self._set_span(parent)
        span = self._tracer.start_span(name, context, attributes=attributes, start_time=started_ns + self._offset_ns)
        span.end(ended_ns + self._offset_ns)

    def end(self, span: Span, code: Code, ended_ns: int) -> None:
        span.set_attribute("rpc.grpc.status_code", int(code))
        if code in _SERVER_FAULTS:
            span.set_status(self._fault)
        span.end(ended_ns + self._offset_ns)


class Tracer:
    """Starts traces of requests and exports them in the background; methods may be called from any thread."""

    __slots__ = ("_extract", "_no_parent", "_provider", "_server", "_spans")

    def __init__(self, provider: TracerProvider, wall_minus_monotonic_ns: int) -> None:
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # What is wrong with a client's tracestate is no news for the log, least of all once per request.
        logging.getLogger("opentelemetry.trace").setLevel(logging.ERROR)
        self._provider = provider
        self._spans = _Spans(provider, wall_minus_monotonic_ns)
        self._extract = TraceContextTextMapPropagator().extract
        self._no_parent = Context()
        self._server = SpanKind.SERVER

    def start_request(
        self, method: str, metadata: Iterable[tuple[str, str | bytes]], received_ns: int
    ) -> RequestTrace | None:
        """Begin the trace of a call of `method` (such as `ModelInfer`), or give None when it is not sampled.

        `received_ns` is on the monotonic clock. Metadata that is not valid W3C trace context counts as none.
        """
        attributes = {"rpc.system": "grpc", "rpc.service": SERVICE, "rpc.method": method}
        name = f"{SERVICE}/{method}"
        span = self._spans.start(name, self._parent(metadata), self._server, attributes, received_ns)
        return RequestTrace(self._spans, span) if span.is_recording() else None

    def continues_sampled(self, metadata: Iterable[tuple[str, str | bytes]]) -> bool:
        """Whether the caller is tracing this call already, and says so."""
        from opentelemetry.trace import get_current_span

        return get_current_span(self._parent(metadata)).get_span_context().trace_flags.sampled

    def shutdown(self, timeout_s: float) -> bool:
        """Export what is left, for up to `timeout_s` seconds, and stop; whether that was in time.

        The SDK's own way to stop may wait for an unreachable collector longer than a server may take to exit,
        so it runs in a thread that ends with the process.
        """
        stopper = threading.Thread(target=self._provider.shutdown, name="trace-shutdown", daemon=True)
        stopper.start()
        stopper.join(timeout_s)
        return not stopper.is_alive()

    def _parent(self, metadata: Iterable[tuple[str, str | bytes]]) -> Context:
        parents: list[str] = []
        states: list[str] = []
        for key, value in metadata:
            if key == "traceparent":
                parents.append(_text(value))
            elif key == "tracestate":
                states.append(_text(value))
        if len(parents) != 1 or len(parents[0]) > _MAX_TRACEPARENT_CHARS:
            return self._no_parent
        return self._extract({"traceparent": parents, "tracestate": states}, self._no_parent)


class RequestTrace:
    """The trace of one sampled request; whoever ends the request calls `finish`, once."""

    __slots__ = ("_span", "_spans")

    wants_tensors = False

    def __init__(self, spans: _Spans, span: Span) -> None:
        self._spans = spans
        self._span = span

    def add_tensor(self, activity: str, name: str, array: object) -> None:
        """Spans have no tensors."""

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
        """End the request's span with what became of it; all moments are on the monotonic clock.

        `enqueued_ns` is None for a request that never was in the queue, `started_ns` (the start of its batch's
        execution) for one that never ran. The `queue` span lasts from the one to the other, or to the end; the
        `compute` span begins at `started_ns` and lasts as long as the batch's three compute times together. Of
        `parameters`, headers that were forwarded, each is an attribute.
        """
        span, spans = self._span, self._spans
        if model:
            span.set_attribute("sluice.model.name", model)
            span.set_attribute("sluice.model.version", version)
        if request_id:
            span.set_attribute("sluice.request.id", request_id)
        for name, value in (parameters or {}).items():
            span.set_attribute(f"sluice.request.parameter.{name}", value)
        if enqueued_ns is not None:
            spans.child(span, "queue", enqueued_ns, ended_ns if started_ns is None else started_ns)
        if started_ns is not None:
            attributes = {
                "sluice.batch.rows": batch_rows,
                "sluice.compute_input_ns": compute_input_ns,
                "sluice.compute_infer_ns": compute_infer_ns,
                "sluice.compute_output_ns": compute_output_ns,
            }
            compute_ended_ns = started_ns + compute_input_ns + compute_infer_ns + compute_output_ns
            spans.child(span, "compute", started_ns, compute_ended_ns, attributes)
        spans.end(span, code, ended_ns)


def _text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode("latin-1")


def _exporters(environ: Mapping[str, str]) -> list[str]:
    """Give the names of the exporters that are asked for; none means that tracing is off."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    names = [name.strip() for name in environ.get("OTEL_TRACES_EXPORTER", "").split(",") if name.strip()]
    if not names and any(environ.get(variable) for variable in _ENDPOINTS):
        return ["otlp"]
    return [] if names == ["none"] else names


def _check(environ: Mapping[str, str], names: list[str]) -> None:
    """Refuse what the SDK would pass over with a line in the log, or this server does not have."""
    for name in names:
        if name not in ("otlp", "console"):
            raise TracingError(f"OTEL_TRACES_EXPORTER: no exporter {name!r} here; there are otlp, console and none")
    protocol = next((variable for variable in _PROTOCOLS if environ.get(variable)), None)
    if protocol and "otlp" in names and environ[protocol] != "grpc":
        raise TracingError(f"{protocol}: traces are exported by grpc only, not by {environ[protocol]!r}")
    sampler = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower()
    if sampler and sampler not in _SAMPLERS:
        raise TracingError(
            f"OTEL_TRACES_SAMPLER: no sampler {sampler!r} here; there are {', '.join(sorted(_SAMPLERS))}"
        )
    _check_sampler_argument(sampler, environ.get("OTEL_TRACES_SAMPLER_ARG", "").strip())
    for propagator in environ.get("OTEL_PROPAGATORS", "").split(","):
        if propagator.strip() not in ("", "tracecontext", "baggage"):
            raise TracingError(f"OTEL_PROPAGATORS: only W3C tracecontext is read here, not {propagator.strip()!r}")


def _check_sampler_argument(sampler: str, argument: str) -> None:
    if not sampler.endswith("traceidratio") or not argument:
        return
    try:
        fits = 0.0 <= float(argument) <= 1.0
    except ValueError:
        fits = False
    if not fits:
        raise TracingError(f"OTEL_TRACES_SAMPLER_ARG: {sampler} needs a share from 0 to 1, not {argument!r}")


def _provider(names: list[str], version: str, otlp: OtlpOptions) -> TracerProvider:
    try:
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise TracingError(f"traces are asked for, but the OpenTelemetry SDK is not installed: {error}") from error
    exporters = [_exporter(name, otlp.url) for name in names]
    provider = TracerProvider(resource=_resource(version, otlp.resource), shutdown_on_exit=False)
    for exporter in exporters:
        try:
            processor = BatchSpanProcessor(
                exporter, otlp.max_queue_size, otlp.schedule_delay_ms, otlp.max_export_batch_size
            )
        except ValueError as error:
            raise TracingError(f"the options of the batch span processor do not fit: {error}") from error
        provider.add_span_processor(processor)
    return provider


def _resource(version: str, said: tuple[tuple[str, str], ...]) -> Resource:
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource

    ours = Resource({"service.name": "sluice", "service.version": version})
    # later ones win: the SDK's defaults, ours, what the environment says, what the command line says
    return Resource.create().merge(ours).merge(OTELResourceDetector().detect()).merge(Resource(dict(said)))


def _exporter(name: str, url: str | None) -> SpanExporter:
    if name == "console":
        from opentelemetry.sdk.trace.export import ConsoleSpanExporter

        # said here, as its own default is what standard output was when it was imported
        return ConsoleSpanExporter(out=sys.stdout)
    try:
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracingError(f"traces by otlp are asked for, but the exporter is not installed: {error}") from error
    try:
        return OTLPSpanExporter(endpoint=url)
    except Exception as error:  # it has no common type for what it finds wrong with its variables
        raise TracingError(f"the OTEL_EXPORTER_OTLP_* variables give no exporter: {error}") from error
