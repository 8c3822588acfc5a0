"""Traces of real calls, from the client's `traceparent` to the spans that a collector receives when the server ends."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from sluice_proto import grpc_service_pb2 as pb
from support import models
from support.conversation import Conversation
from support.fakes import PATIENCE_S, eventually, held
from support.otlp import Collector, attributes_of, collecting
from support.requests import infer_request
from support.server import SERVICE, RunningServer, running, server_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REQUEST = f"{SERVICE.full_name}/ModelInfer"

pytestmark = pytest.mark.usefixtures("no_errors_logged")


def parent(number: int, *, sampled: bool = True) -> tuple[str, str]:
    """A caller's trace and span, both of this number."""
    return "traceparent", f"00-{number:032x}-{number:016x}-{sampled:02x}"


@pytest.fixture
def traced(transport, repository, monkeypatch) -> Iterator[Callable[[], tuple[RunningServer, Collector]]]:
    """A context: a server that sends its traces to a collector; the collector has all of them once it is left."""
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    models.write_model(repository, "picky", models.gather(), max_batch_size=8)
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
        monkeypatch.setenv("OTEL_SERVICE_NAME", "tested")

        @contextmanager
        def start():
            settings = server_settings(repository, http=None, metrics=None)
            with running(settings, transport, dict(os.environ)) as server:
                yield server, collector

        yield start


def begin(server: RunningServer, index: int, *metadata: tuple[str, str]) -> grpc.Future:
    message = infer_request("picky", {"INDEX": np.array([[index]], np.int64)}).SerializeToString()
    call = server.channel.unary_unary(f"/{REQUEST}", response_deserializer=pb.ModelInferResponse.FromString)
    return call.future(message, metadata=metadata, timeout=PATIENCE_S)


def of_trace(collector: Collector, number: int) -> dict[str, Span]:
    """The spans of one caller's trace by their names."""
    spans = [span for span in collector.all_spans if span.trace_id == number.to_bytes(16)]
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


def test_a_call_becomes_a_request_span_below_the_callers_with_its_queue_and_compute(traced):
    with traced() as (server, collector):
        begin(server, 1, parent(7)).result()
    spans = of_trace(collector, 7)
    assert set(spans) == {REQUEST, "queue", "compute"}
    request, queue, compute = spans[REQUEST], spans["queue"], spans["compute"]
    assert request.parent_span_id == (7).to_bytes(8)
    assert request.kind == Span.SPAN_KIND_SERVER
    assert queue.parent_span_id == compute.parent_span_id == request.span_id
    times = [
        request.start_time_unix_nano,
        queue.start_time_unix_nano,
        queue.end_time_unix_nano,
        compute.start_time_unix_nano,
        compute.end_time_unix_nano,
        request.end_time_unix_nano,
    ]
    assert times == sorted(times)
    attributes = attributes_of(request.attributes)
    assert attributes["sluice.model.name"] == "picky"
    assert attributes["rpc.grpc.status_code"] == 0
    assert attributes_of(compute.attributes)["sluice.batch.rows"] == 1
    assert collector.resource["service.name"] == "tested"


def test_requests_of_one_batch_keep_their_own_traces(traced):
    with traced() as (server, collector), held(server.model("picky")) as session:
        calls = [begin(server, 0, parent(1))]
        session.wait_for_runs(1)
        calls += [begin(server, 1, parent(number)) for number in (2, 3)]
        eventually(lambda: len(server.model("picky").queue) == 2, "two requests wait")
        session.release()
        for call in calls:
            call.result()
    for number, rows in ((1, 1), (2, 2), (3, 2)):
        spans = of_trace(collector, number)
        assert spans[REQUEST].parent_span_id == number.to_bytes(8)
        assert attributes_of(spans["compute"].attributes)["sluice.batch.rows"] == rows


def test_a_call_that_the_caller_does_not_sample_leaves_no_span(traced):
    with traced() as (server, collector):
        begin(server, 1, parent(7, sampled=False)).result()
        begin(server, 1, parent(8)).result()
    assert {span.trace_id for span in collector.all_spans} == {(8).to_bytes(16)}


def test_a_call_without_a_parent_begins_a_trace(traced):
    with traced() as (server, collector):
        begin(server, 1).result()
        begin(server, 1, ("traceparent", "nonsense")).result()
    assert len(collector.all_spans) == 6
    assert len({span.trace_id for span in collector.all_spans}) == 2


def test_a_call_that_fails_has_the_spans_of_as_far_as_it_came(traced):
    with traced() as (server, collector), held(server.model("picky")) as session:
        running_call = begin(server, 0)
        session.wait_for_runs(1)
        cancelled = begin(server, 1, parent(1))
        eventually(lambda: len(server.model("picky").queue) == 1, "it waits")
        cancelled.cancel()
        eventually(lambda: len(server.model("picky").queue) == 0, "it has left")
        session.release()
        running_call.result()
        assert begin(server, 77, parent(2)).code() is grpc.StatusCode.INTERNAL
        unknown = server.channel.unary_unary(f"/{REQUEST}")
        spoiled = unknown.future(b"\xff", metadata=(parent(3),), timeout=PATIENCE_S)
        assert spoiled.code() is grpc.StatusCode.INVALID_ARGUMENT
    expected = (grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL, grpc.StatusCode.INVALID_ARGUMENT)
    codes = {
        number: attributes_of(of_trace(collector, number)[REQUEST].attributes)["rpc.grpc.status_code"]
        for number in (1, 2, 3)
    }
    assert codes == {number: code.value[0] for number, code in enumerate(expected, 1)}
    assert set(of_trace(collector, 3)) == {REQUEST}
    assert "compute" not in of_trace(collector, 1)


def test_only_inference_is_traced(traced):
    with traced() as (server, collector):
        for method in ("ServerLive", "RepositoryIndex", "ModelStatistics"):
            server.call(method, b"")
        begin(server, 1, parent(7)).result()
    assert {span.trace_id for span in collector.all_spans} == {(7).to_bytes(16)}


def test_each_request_of_a_stream_has_a_span_of_its_own_below_the_callers(traced):
    with traced() as (server, collector):
        stream = Conversation(server, metadata=[parent(7)])
        for index in (1, 2):
            stream.say(infer_request("picky", {"INDEX": np.array([[index]], np.int64)}))
        stream.say(infer_request("nope", {}))
        assert [bool(stream.hear().error_message) for _ in range(3)] == [False, False, True]
        assert stream.end() is grpc.StatusCode.OK
    spans = [span for span in collector.all_spans if span.trace_id == (7).to_bytes(16)]
    requests = [span for span in spans if span.parent_span_id == (7).to_bytes(8)]
    assert {span.name for span in requests} == {f"{SERVICE.full_name}/ModelStreamInfer"}
    codes = sorted(attributes_of(span.attributes)["rpc.grpc.status_code"] for span in requests)
    assert codes == [0, 0, grpc.StatusCode.NOT_FOUND.value[0]]
    assert sorted(span.name for span in spans if span not in requests) == ["compute", "compute", "queue", "queue"]
