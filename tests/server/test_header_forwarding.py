"""Headers that become parameters of their requests: which ones, and where they are seen."""

from __future__ import annotations

import json
import os
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from hypothesis import given
from hypothesis import strategies as st

from sluice_server.front_flags import grpc_header_pattern, http_header_pattern
from sluice_server.observability.trace_control import TraceConfig, TraceMode
from sluice_server.observability.trace_sampling import TraceOptions
from sluice_server.observability.tracing import OtlpOptions
from sluice_server.protocol.forwarding import forwarded
from support import models
from support.fakes import eventually
from support.otlp import attributes_of, collecting
from support.server import LOOPBACK

if TYPE_CHECKING:
    from pathlib import Path

ROWS = np.array([[1, 2, 3, 4]], np.float32)
HEADERS = {"x-team": "vision", "x-run-id": "4711", "other": "unseen"}
SEEN = {"x-team": "vision", "x-run-id": "4711"}
ALL_TRACED = TraceOptions(("TIMESTAMPS",), rate=1)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("^x-", {"x-team", "x-run-id"}),
        ("X-TEAM", {"x-team"}),
        ("(?-i)X-TEAM", set()),
        ("(?-i)x-t", {"x-team"}),
        ("r", {"x-run-id", "other"}),
        ("^r", set()),
        (".*", set(HEADERS)),
    ],
)
def test_a_pattern_is_found_anywhere_in_a_name_in_any_case_unless_told_otherwise(pattern, names):
    compiled = grpc_header_pattern(pattern)
    assert compiled is not None
    assert set(forwarded(compiled, HEADERS.items())) == names
    if not pattern.startswith("(?-i)"):
        assert http_header_pattern(pattern) == compiled


@given(st.lists(st.tuples(st.text(), st.one_of(st.text(), st.binary()))))
def test_every_value_becomes_text(metadata):
    found = forwarded(re.compile(""), metadata)
    assert found.keys() == dict(metadata).keys()
    json.dumps(found)


@pytest.fixture
def traced(start_server, repository, tmp_path):
    """A server that writes every trace to a file, and forwards; gives it, and the file."""
    models.write_model(repository, "echo", models.identity(), max_batch_size=8)
    file = tmp_path / "trace.json"
    pattern = re.compile("^x-")
    return start_server(
        repository,
        trace=TraceConfig(options=ALL_TRACED, file=file),
        grpc_header_pattern=pattern,
        http_header_pattern=pattern,
    ), file


def heads(file: Path) -> list[dict[str, Any]]:
    return [entry for entry in json.loads(file.read_text()) if "model_name" in entry]


def grpc_input() -> list[triton_grpc.InferInput]:
    return [triton_grpc.InferInput("X", list(ROWS.shape), "FP32").set_data_from_numpy(ROWS)]


@pytest.mark.usefixtures("no_errors_logged")
def test_metadata_is_in_the_trace_of_its_request_alone_and_in_streams(traced):
    server, file = traced
    with triton_grpc.InferenceServerClient(server.target) as client:
        client.infer("echo", grpc_input(), request_id="one", headers=HEADERS)
        client.infer("echo", grpc_input(), request_id="two")
        client.infer("echo", grpc_input(), request_id="three", headers={"x-team": "speech"})
        ends: list[Any] = []
        client.start_stream(lambda result, error: ends.append((result, error)), headers=HEADERS)
        client.async_stream_infer("echo", grpc_input(), request_id="streamed")
        eventually(lambda: ends, "the request of the stream is answered")
        client.stop_stream()
    server.close()
    found = {head["request_id"]: head.get("parameters") for head in heads(file)}
    assert found == {"one": SEEN, "two": None, "three": {"x-team": "speech"}, "streamed": SEEN}


@pytest.mark.usefixtures("no_errors_logged")
def test_headers_of_rest_are_in_the_trace_under_their_names_in_lower_case(traced):
    server, file = traced
    with triton_http.InferenceServerClient(f"{LOOPBACK}:{server.server.http_port}") as client:
        tensor = triton_http.InferInput("X", list(ROWS.shape), "FP32").set_data_from_numpy(ROWS)
        client.infer("echo", [tensor], headers={"X-Team": "vision", "x-run-id": "4711", "Other": "unseen"})
    server.close()
    assert [head.get("parameters") for head in heads(file)] == [SEEN]


def test_spans_have_forwarded_headers_as_attributes(start_server, repository, monkeypatch):
    for name in [name for name in os.environ if name.startswith("OTEL_")]:
        monkeypatch.delenv(name)
    models.write_model(repository, "echo", models.identity(), max_batch_size=8)
    with collecting() as collector:
        config = TraceConfig(TraceMode.OPENTELEMETRY, ALL_TRACED, otlp=OtlpOptions(url=collector.endpoint))
        server = start_server(repository, trace=config, http=None, grpc_header_pattern=re.compile("^x-"))
        with triton_grpc.InferenceServerClient(server.target) as client:
            client.infer("echo", grpc_input(), headers=HEADERS)
        server.close()
    (request,) = [span for span in collector.all_spans if span.name.endswith("/ModelInfer")]
    attributes = attributes_of(request.attributes)
    parameters = {name: value for name, value in attributes.items() if ".parameter." in name}
    assert parameters == {f"sluice.request.parameter.{name}": value for name, value in SEEN.items()}


def test_a_server_that_traces_nothing_says_that_nobody_will_see_the_headers(start_server, repository, caplog):
    start_server(repository, http=None, grpc_header_pattern=re.compile("^x-"))
    said = [record.getMessage() for record in caplog.records if "forwarded" in record.getMessage()]
    assert said == ["headers are forwarded to traces only, and nothing is traced (--trace-config)"]
