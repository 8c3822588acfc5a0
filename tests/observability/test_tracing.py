"""Traces as a collector receives them over OTLP, what the environment switches, and that off imports nothing."""

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from sluice_server.observability.tracing import RequestTrace, Tracer, TracingError, create_tracer
from sluice_server.status import Code
from support.otlp import TIMEOUT_S, Collector, attributes_of, collecting

OFFSET_NS = 1_700_000_000_000_000_000
TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT_ID = "00f067aa0ba902b7"
SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-01"
NOT_SAMPLED = f"00-{TRACE_ID}-{PARENT_ID}-00"


@pytest.fixture
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def collector(clean_environment: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector at the endpoint that the environment names."""
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        yield collector


def new_tracer() -> Tracer:
    tracer = create_tracer(os.environ, "1.2.3", wall_minus_monotonic_ns=OFFSET_NS)
    assert tracer is not None
    return tracer


def start(tracer: Tracer, *metadata: tuple[str, str | bytes]) -> RequestTrace:
    trace = tracer.start_request("ModelInfer", metadata, 1_000)
    assert trace is not None
    return trace


def finish_ok(trace: RequestTrace) -> None:
    trace.finish(
        Code.OK,
        ended_ns=9_000,
        model="digits",
        version="2",
        batch_rows=8,
        enqueued_ns=2_000,
        started_ns=5_000,
        compute_input_ns=100,
        compute_infer_ns=2_000,
        compute_output_ns=300,
    )


def times(span: Span) -> tuple[int, int]:
    return span.start_time_unix_nano - OFFSET_NS, span.end_time_unix_nano - OFFSET_NS


def test_a_request_is_a_server_span_with_its_queue_and_compute_inside(collector: Collector) -> None:
    tracer = new_tracer()
    finish_ok(start(tracer, ("content-type", "application/grpc"), ("traceparent", SAMPLED), ("tracestate", "a=1")))
    assert tracer.shutdown(TIMEOUT_S)
    spans = collector.spans
    assert set(spans) == {"inference.GRPCInferenceService/ModelInfer", "queue", "compute"}
    request = spans["inference.GRPCInferenceService/ModelInfer"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE_ID}
    assert request.parent_span_id.hex() == PARENT_ID
    assert spans["queue"].parent_span_id == spans["compute"].parent_span_id == request.span_id
    assert request.kind == Span.SPAN_KIND_SERVER
    assert request.trace_state == "a=1"
    assert times(request) == (1_000, 9_000)
    assert times(spans["queue"]) == (2_000, 5_000)
    assert times(spans["compute"]) == (5_000, 7_400)


def test_the_spans_tell_the_call_the_model_and_the_batch(collector: Collector) -> None:
    tracer = new_tracer()
    finish_ok(start(tracer))
    tracer.shutdown(TIMEOUT_S)
    spans = collector.spans
    assert attributes_of(spans["inference.GRPCInferenceService/ModelInfer"].attributes) == {
        "rpc.system": "grpc",
        "rpc.service": "inference.GRPCInferenceService",
        "rpc.method": "ModelInfer",
        "rpc.grpc.status_code": 0,
        "sluice.model.name": "digits",
        "sluice.model.version": "2",
    }
    assert attributes_of(spans["compute"].attributes) == {
        "sluice.batch.rows": 8,
        "sluice.compute_input_ns": 100,
        "sluice.compute_infer_ns": 2_000,
        "sluice.compute_output_ns": 300,
    }
    assert {"service.name": "sluice", "service.version": "1.2.3"}.items() <= collector.resource.items()


def test_the_environment_names_the_service(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_SERVICE_NAME", "fraud")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    tracer = new_tracer()
    start(tracer).finish(Code.OK, ended_ns=2_000)
    tracer.shutdown(TIMEOUT_S)
    resource = collector.resource
    assert resource["service.name"] == "fraud"
    assert resource["deployment.environment.name"] == "test"


def test_a_request_that_expired_in_the_queue_has_no_compute(collector: Collector) -> None:
    tracer = new_tracer()
    start(tracer).finish(Code.DEADLINE_EXCEEDED, ended_ns=4_000, model="digits", version="1", enqueued_ns=2_000)
    tracer.shutdown(TIMEOUT_S)
    spans = collector.spans
    assert set(spans) == {"inference.GRPCInferenceService/ModelInfer", "queue"}
    assert times(spans["queue"]) == (2_000, 4_000)
    assert spans["inference.GRPCInferenceService/ModelInfer"].status.code == Status.STATUS_CODE_ERROR


@pytest.mark.parametrize(
    ("code", "status"),
    [
        (Code.INTERNAL, Status.STATUS_CODE_ERROR),
        (Code.INVALID_ARGUMENT, Status.STATUS_CODE_UNSET),
        (Code.RESOURCE_EXHAUSTED, Status.STATUS_CODE_UNSET),
    ],
)
def test_only_a_fault_of_the_server_marks_the_span(collector: Collector, code: Code, status: int) -> None:
    tracer = new_tracer()
    start(tracer).finish(code, ended_ns=2_000)
    tracer.shutdown(TIMEOUT_S)
    (span,) = collector.spans.values()
    assert span.status.code == status
    assert attributes_of(span.attributes)["rpc.grpc.status_code"] == code


@pytest.mark.parametrize(
    "metadata",
    [
        [("traceparent", "")],
        [("traceparent", "garbage")],
        [("traceparent", SAMPLED.upper())],
        [("traceparent", f"ff-{TRACE_ID}-{PARENT_ID}-01")],
        [("traceparent", f"00-{'0' * 32}-{PARENT_ID}-01")],
        [("traceparent", f"00-{TRACE_ID}-{'0' * 16}-01")],
        [("traceparent", SAMPLED + "-more")],
        [("traceparent", f"01-{TRACE_ID}-{PARENT_ID}-01-" + "x" * 600)],
        [("traceparent", b"\xff\x00")],
        [("traceparent", SAMPLED), ("traceparent", SAMPLED)],
        [("tracestate", "a=1")],
    ],
)
def test_a_parent_that_is_not_valid_counts_as_none(
    collector: Collector, caplog: pytest.LogCaptureFixture, metadata: list[tuple[str, str | bytes]]
) -> None:
    tracer = new_tracer()
    start(tracer, *metadata).finish(Code.OK, ended_ns=2_000)
    tracer.shutdown(TIMEOUT_S)
    (span,) = collector.spans.values()
    assert span.parent_span_id == b""
    assert span.trace_id.hex() != TRACE_ID
    assert caplog.records == []


@pytest.mark.parametrize("state", ["=", "a=1,a=2", ",".join(f"k{i}=1" for i in range(40)), "x" * 5000, b"\xff"])
def test_a_bad_tracestate_does_not_cost_the_parent_nor_a_log_line(
    collector: Collector, caplog: pytest.LogCaptureFixture, state: str | bytes
) -> None:
    caplog.set_level(logging.WARNING)
    tracer = new_tracer()
    start(tracer, ("traceparent", SAMPLED), ("tracestate", state)).finish(Code.OK, ended_ns=2_000)
    tracer.shutdown(TIMEOUT_S)
    (span,) = collector.spans.values()
    assert span.parent_span_id.hex() == PARENT_ID
    assert caplog.records == []


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(values=st.lists(st.one_of(st.text(), st.binary()), max_size=3), states=st.lists(st.text(), max_size=3))
def test_no_metadata_breaks_a_request(
    quiet_tracer: Tracer, values: list[str | bytes], states: list[str | bytes]
) -> None:
    metadata = [*(("traceparent", value) for value in values), *(("tracestate", state) for state in states)]
    quiet_tracer.start_request("ModelInfer", metadata, 1_000)


@pytest.fixture
def quiet_tracer(collector: Collector) -> Iterator[Tracer]:
    tracer = new_tracer()
    yield tracer
    tracer.shutdown(TIMEOUT_S)


def test_a_parent_that_is_not_sampled_gives_no_trace(collector: Collector) -> None:
    tracer = new_tracer()
    assert tracer.start_request("ModelInfer", [("traceparent", NOT_SAMPLED)], 1_000) is None
    tracer.shutdown(TIMEOUT_S)
    assert collector.requests == []


def test_the_sampler_comes_from_the_environment(collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "parentbased_traceidratio")
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0")
    tracer = new_tracer()
    assert tracer.start_request("ModelInfer", [], 1_000) is None
    start(tracer, ("traceparent", SAMPLED)).finish(Code.OK, ended_ns=2_000)
    tracer.shutdown(TIMEOUT_S)
    assert len(collector.spans) == 1


def test_wall_clock_time_comes_from_the_clocks_when_it_is_not_given(collector: Collector) -> None:
    earliest_ns = time.time_ns()
    tracer = create_tracer(os.environ, "1.2.3")
    assert tracer is not None
    trace = tracer.start_request("ModelInfer", [], time.monotonic_ns())
    assert trace is not None
    trace.finish(Code.OK, ended_ns=time.monotonic_ns())
    latest_ns = time.time_ns()
    tracer.shutdown(TIMEOUT_S)
    (span,) = collector.spans.values()
    slack_ns = 1_000_000  # two clocks are not read at the same moment
    assert earliest_ns - slack_ns <= span.start_time_unix_nano <= span.end_time_unix_nano <= latest_ns + slack_ns


def test_the_console_exporter_writes_to_standard_output(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    tracer = new_tracer()
    finish_ok(start(tracer))
    tracer.shutdown(TIMEOUT_S)
    assert '"name": "compute"' in capsys.readouterr().out


def test_shutdown_gives_up_on_a_collector_that_does_not_answer(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.3")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracer = new_tracer()
        finish_ok(start(tracer))
        assert not tracer.shutdown(0.0)
        for thread in threading.enumerate():
            if thread.name == "trace-shutdown":
                thread.join(TIMEOUT_S)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_TRACES_EXPORTER": ""},
        {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"},
        {"OTEL_SERVICE_NAME": "fraud", "OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:4317"},
    ],
)
def test_tracing_is_off_unless_it_is_asked_for(environ: dict[str, str]) -> None:
    assert create_tracer(environ, "1.2.3") is None


def test_off_imports_nothing_of_opentelemetry() -> None:
    program = (
        "import sys; from sluice_server.observability.tracing import create_tracer; "
        "assert create_tracer({}, '1') is None; "
        "print([name for name in sys.modules if name.startswith(('opentelemetry', 'grpc'))])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


@pytest.mark.parametrize(
    ("environ", "facts"),
    [
        ({"OTEL_TRACES_EXPORTER": "zipkin"}, ["OTEL_TRACES_EXPORTER", "'zipkin'"]),
        ({"OTEL_TRACES_EXPORTER": "otlp,jaeger"}, ["OTEL_TRACES_EXPORTER", "'jaeger'"]),
        ({"OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}, ["OTEL_EXPORTER_OTLP_PROTOCOL", "'http/protobuf'"]),
        (
            {"OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/json", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
            ["OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "'http/json'"],
        ),
        ({"OTEL_TRACES_SAMPLER": "jaeger_remote"}, ["OTEL_TRACES_SAMPLER", "'jaeger_remote'"]),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "7"}, ["OTEL_TRACES_SAMPLER_ARG", "'7'"]),
        ({"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "x"}, ["OTEL_TRACES_SAMPLER_ARG", "'x'"]),
        ({"OTEL_PROPAGATORS": "tracecontext,b3"}, ["OTEL_PROPAGATORS", "'b3'"]),
    ],
)
def test_what_is_not_there_is_refused_by_name(environ: dict[str, str], facts: list[str]) -> None:
    with pytest.raises(TracingError) as caught:
        create_tracer({"OTEL_TRACES_EXPORTER": "otlp", **environ}, "1.2.3")
    assert [fact for fact in facts if fact not in str(caught.value)] == []


def test_a_variable_that_the_exporter_cannot_read_is_refused(
    clean_environment: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "soon")
    with pytest.raises(TracingError, match="soon"):
        create_tracer({"OTEL_TRACES_EXPORTER": "otlp"}, "1.2.3")


@pytest.mark.parametrize("module", ["opentelemetry.sdk.trace", "opentelemetry.exporter.otlp.proto.grpc.trace_exporter"])
def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TracingError, match=module):
        create_tracer({"OTEL_TRACES_EXPORTER": "otlp"}, "1.2.3")
