"""`--trace-config`: what its values become together, and which are refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from sluice_server.flag_values import SettingsError
from sluice_server.observability.trace_control import TraceConfig, TraceMode
from sluice_server.observability.trace_sampling import TraceOptions
from sluice_server.observability.tracing import OtlpOptions
from sluice_server.settings import parse_serve


def parsed(*entries: str) -> TraceConfig:
    return parse_serve(["--model-repository=/models", *(f"--trace-config={entry}" for entry in entries)]).trace


def test_without_the_flag_nothing_is_traced():
    assert parsed() == TraceConfig()


def test_the_values_of_mode_triton():
    assert parsed(
        "level=TENSORS", "level=TIMESTAMPS", "rate=5", ",count=100", "triton,file=/tmp/t.json",
        "triton,log-frequency=50", "mode=triton",
    ) == TraceConfig(
        TraceMode.TRITON, TraceOptions(("TIMESTAMPS", "TENSORS"), 5, 100, 50), Path("/tmp/t.json")
    )  # fmt: skip


def test_the_values_of_mode_opentelemetry():
    assert parsed(
        "mode=opentelemetry", "level=TIMESTAMPS", "opentelemetry,url=collector:4317",
        "opentelemetry,resource=service.name=x=y", "opentelemetry,resource=team=a",
        "opentelemetry,bsp_max_queue_size=10", "opentelemetry,bsp_schedule_delay=20",
        "opentelemetry,bsp_max_export_batch_size=5",
    ) == TraceConfig(
        TraceMode.OPENTELEMETRY,
        TraceOptions(("TIMESTAMPS",)),
        otlp=OtlpOptions("http://collector:4317", (("service.name", "x=y"), ("team", "a")), 10, 20, 5),
    )  # fmt: skip


@pytest.mark.parametrize(("entries", "facts"), [
    (["rate"], ["--trace-config=rate", "SETTING=VALUE"]),
    (["rate="], ["SETTING=VALUE"]),
    (["rate=x"], ["--trace-config=rate=x"]),
    (["rate=-1"], [">= 0"]),
    (["count=-2"], [">= -1"]),
    (["level=MAX"], ["level=MAX", "OFF, TIMESTAMPS, TENSORS"]),
    (["mode=zipkin"], ["mode=zipkin", "zipkin"]),
    (["nonsense=1"], ["nonsense=1"]),
    (["triton,nonsense=1"], ["triton,nonsense=1"]),
    (["zipkin,url=x"], ["zipkin,url=x"]),
    (["opentelemetry,url=http://localhost:4318/v1/traces"], ["OTLP over gRPC", "http://localhost:4317"]),
    (["opentelemetry,resource=x"], ["resource=NAME=VALUE"]),
    (["opentelemetry,bsp_nonsense=1"], ["bsp_nonsense"]),
    (["level=TIMESTAMPS"], ["triton,file=FILE"]),
    (["mode=opentelemetry", "level=TENSORS"], ["TENSORS", "mode triton only"]),
])  # fmt: skip
def test_what_cannot_be_used_is_refused_by_name(entries, facts):
    with pytest.raises(SettingsError) as caught:
        parsed(*entries)
    assert [fact for fact in facts if fact not in str(caught.value)] == []


@pytest.mark.parametrize("flag", ["count", "file", "level", "log-frequency", "rate"])
def test_tritons_older_flags_name_the_new_one(flag):
    with pytest.raises(SettingsError, match=r"--trace-config"):
        parse_serve(["--model-repository=/models", f"--trace-{flag}=1"])
