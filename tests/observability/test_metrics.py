"""The exposition: read back by prometheus_client's parser and, where it is installed, checked by promtool."""

import shutil
import subprocess
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from sluice_server.observability.host import HostUsage
from sluice_server.observability.latencies import MEASURED, QUANTILE_ERROR, Latencies, LatencyOptions
from sluice_server.observability.metrics import (
    BATCH_ROWS_BUCKETS,
    MetricsOptions,
    ModelMetrics,
    ServerMetrics,
    render,
)
from sluice_server.observability.statistics import FailureReason, ModelStatistics, Outcome
from sluice_server.status import Code

HOST = HostUsage(
    cpu_utilization=0.25,
    memory_total_bytes=8_000_000_000,
    memory_used_bytes=2_000_000_000,
    process_cpu_s=12.5,
    process_resident_bytes=90_000_000,
)
RPCS = {
    (f"/inference.GRPCInferenceService/{name}", Code.OK): count
    for name, count in (("ModelInfer", 7), ("ServerLive", 1))
}
MS = 1_000_000
MODEL_LABELS = (("model", "digits"), ("version", "1"))

SERVER = ServerMetrics(version="1.2.3", rpcs=RPCS, host=HOST)

NV_MODEL_FAMILIES = [
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count",
]


def new_model(name: str = "digits", version: str = "1", statistics: ModelStatistics | None = None) -> ModelMetrics:
    snapshot = (statistics or ModelStatistics()).snapshot()
    return ModelMetrics(name, version, snapshot, pending_requests=3, queue_rows=5, queue_bytes=640)


def used_model() -> ModelMetrics:
    statistics = ModelStatistics()
    for rows, requests in ((1, 1), (4, 3), (4, 4), (2000, 1)):
        statistics.record_batch(
            rows=rows,
            requests=requests,
            total_ns=9_000_000 * requests,
            queue_ns=1_000_999 * requests,
            compute_input_ns=10_000,
            compute_infer_ns=500_000,
            compute_output_ns=20_000,
        )
    statistics.record_failure(FailureReason.BACKEND, total_ns=5)
    statistics.record_refused(Outcome.QUEUE_FULL)
    return new_model(statistics=statistics)


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


def lines_of(text: str, name: str) -> list[str]:
    return [line for line in text.splitlines() if line.split("{")[0].split(" ")[0] == name]


def test_a_loaded_model_shows_every_counter_of_tritons_at_zero() -> None:
    text = render([new_model()], SERVER).decode()
    for name in NV_MODEL_FAMILIES[2:9] + NV_MODEL_FAMILIES[:1]:
        assert lines_of(text, name) == [f'{name}{{model="digits",version="1"}} 0']
    assert lines_of(text, "nv_inference_request_failure") == [
        f'nv_inference_request_failure{{model="digits",reason="{reason}",version="1"}} 0'
        for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER")
    ]


def test_families_come_in_tritons_order_each_with_help_and_type() -> None:
    lines = render([new_model()], SERVER).decode().splitlines()
    types = [line.split(" ")[2:] for line in lines if line.startswith("# TYPE ")]
    helps = [line.split(" ")[2] for line in lines if line.startswith("# HELP ")]
    names = [name for name, _ in types]
    assert helps == names
    assert [name for name in names if name.startswith("nv_")] == [
        *NV_MODEL_FAMILIES,
        "nv_cpu_utilization",
        "nv_cpu_memory_total_bytes",
        "nv_cpu_memory_used_bytes",
    ]
    kinds = dict(types)
    assert {kinds[name] for name in NV_MODEL_FAMILIES[:9]} == {"counter"}
    assert kinds["nv_inference_pending_request_count"] == kinds["nv_cpu_utilization"] == "gauge"


def test_durations_are_whole_microseconds_summed_over_requests() -> None:
    text = render([used_model()], SERVER).decode()
    labels = '{model="digits",version="1"}'
    for name, value in (
        ("nv_inference_request_success", 9),
        ("nv_inference_count", 2009),
        ("nv_inference_exec_count", 4),
        ("nv_inference_request_duration_us", 81_000),
        ("nv_inference_queue_duration_us", 9_008),
        ("nv_inference_compute_input_duration_us", 90),
        ("nv_inference_compute_infer_duration_us", 4_500),
        ("nv_inference_compute_output_duration_us", 180),
        ("nv_inference_pending_request_count", 3),
        ("sluice_queue_rows", 5),
        ("sluice_queue_bytes", 640),
    ):
        assert lines_of(text, name) == [f"{name}{labels} {value}"]


def test_latencies_that_are_switched_off_are_not_there() -> None:
    text = render([used_model()], SERVER, MetricsOptions(counter_latencies=False)).decode()
    gone = {f"nv_inference_{what}_duration_us" for what in MEASURED}
    assert not [line for line in text.splitlines() if any(name in line for name in gone)]
    assert all(lines_of(render([used_model()], SERVER).decode(), name) for name in gone)
    assert lines_of(text, "nv_inference_request_success")


def test_the_machine_is_not_shown_when_that_is_switched_off_and_the_process_is() -> None:
    found = {name for name, _ in samples(render([], SERVER, MetricsOptions(cpu=False)).decode())}
    assert not [name for name in found if name.startswith("nv_cpu_")]
    assert "process_resident_memory_bytes" in found


def test_summaries_have_tritons_samples_and_nan_without_a_request_in_the_window() -> None:
    latencies = Latencies(LatencyOptions((0.5, 0.99)))
    before = render([replace(new_model(), latencies=latencies.snapshot())], SERVER).decode()
    latencies.record([2_000, 100_000], [5, 1_000], 3_000, 4_000, 5_000)
    text = render([replace(new_model(), latencies=latencies.snapshot())], SERVER).decode()
    labels = 'model="digits",version="1"'
    assert "# TYPE nv_inference_request_summary_us summary" in text
    assert lines_of(text, "nv_inference_request_summary_us_count") == [
        f"nv_inference_request_summary_us_count{{{labels}}} 2"
    ]
    assert lines_of(text, "nv_inference_queue_summary_us_sum") == [f"nv_inference_queue_summary_us_sum{{{labels}}} 1"]
    assert lines_of(text, "nv_inference_compute_infer_summary_us_sum") == [
        f"nv_inference_compute_infer_summary_us_sum{{{labels}}} 8"
    ]
    found = samples(text)
    for what, quantile, value_us in (
        ("request", "0.5", 2),
        ("request", "0.99", 100),
        ("queue", "0.5", 0.005),
        ("compute_input", "0.99", 3),
        ("compute_output", "0.5", 5),
    ):
        key = (f"nv_inference_{what}_summary_us", frozenset({*MODEL_LABELS, ("quantile", quantile)}))
        assert found[key] == pytest.approx(value_us, rel=QUANTILE_ERROR)
    assert f'nv_inference_request_summary_us{{{labels},quantile="0.5"}} NaN\n' in before


def test_the_histogram_counts_up_to_tritons_bounds() -> None:
    latencies = Latencies(LatencyOptions(histogram=True))
    latencies.record([1, 100 * MS, 100 * MS + 1, 2000 * MS, 9000 * MS], [0] * 5, 0, 0, 0)
    text = render([replace(new_model(), latencies=latencies.snapshot())], SERVER).decode()
    name, labels = "nv_inference_first_response_histogram_ms", 'model="digits",version="1"'
    assert lines_of(text, f"{name}_bucket") == [
        f'{name}_bucket{{{labels},le="{bound}"}} {count}'
        for bound, count in (("100", 2), ("500", 3), ("2000", 4), ("5000", 4), ("+Inf", 5))
    ]
    assert lines_of(text, f"{name}_count") == [f"{name}_count{{{labels}}} 5"]
    assert lines_of(text, f"{name}_sum") == [f"{name}_sum{{{labels}}} {11200 + 2e-6}"]
    assert "summary" not in text


def test_every_request_is_in_exactly_one_outcome() -> None:
    found = samples(render([used_model()], SERVER).decode())
    outcomes = {
        dict(labels)["outcome"]: value for (name, labels), value in found.items() if name == "sluice_requests_total"
    }
    assert outcomes == {**dict.fromkeys(Outcome, 0.0), "ok": 9.0, "backend_error": 1.0, "queue_full": 1.0}


def test_batch_sizes_are_a_cumulative_histogram() -> None:
    found = samples(render([used_model()], SERVER).decode())
    model = {("model", "digits"), ("version", "1")}
    buckets = [
        found["sluice_batch_rows_bucket", frozenset({*model, ("le", str(le))})] for le in (*BATCH_ROWS_BUCKETS, "+Inf")
    ]
    assert buckets == [1, 1, *[3] * (len(BATCH_ROWS_BUCKETS) - 2), 4]
    assert found["sluice_batch_rows_sum", frozenset(model)] == 2009
    assert found["sluice_batch_rows_count", frozenset(model)] == 4


def test_the_server_shows_its_calls_its_build_and_its_machine() -> None:
    text = render([], SERVER).decode()
    assert lines_of(text, "sluice_rpcs_total") == [
        'sluice_rpcs_total{service="inference.GRPCInferenceService",method="ModelInfer",code="OK"} 7',
        'sluice_rpcs_total{service="inference.GRPCInferenceService",method="ServerLive",code="OK"} 1',
    ]
    assert lines_of(text, "sluice_build_info") == ['sluice_build_info{version="1.2.3"} 1']
    assert lines_of(text, "nv_cpu_utilization") == ["nv_cpu_utilization 0.25"]
    assert lines_of(text, "nv_cpu_memory_total_bytes") == ["nv_cpu_memory_total_bytes 8000000000"]
    assert lines_of(text, "nv_cpu_memory_used_bytes") == ["nv_cpu_memory_used_bytes 2000000000"]
    assert lines_of(text, "process_cpu_seconds_total") == ["process_cpu_seconds_total 12.5"]
    assert lines_of(text, "process_resident_memory_bytes") == ["process_resident_memory_bytes 90000000"]


def test_a_metric_without_samples_is_left_out() -> None:
    text = render([], ServerMetrics(version="1", rpcs={}, host=None)).decode()
    assert [line for line in text.splitlines() if not line.startswith("#")] == ['sluice_build_info{version="1"} 1']
    assert text.count("# TYPE") == 1


def test_versions_of_a_model_share_one_header() -> None:
    text = render([new_model(version="1"), new_model(version="2")], SERVER).decode()
    assert text.count("# TYPE nv_inference_count counter\n") == 1
    assert [line.split(" ")[0] for line in lines_of(text, "nv_inference_count")] == [
        'nv_inference_count{model="digits",version="1"}',
        'nv_inference_count{model="digits",version="2"}',
    ]


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_any_model_name_survives_as_a_label(name: str) -> None:
    text = render([new_model(name)], SERVER).decode()
    assert ("sluice_queue_rows", frozenset({("model", name), ("version", "1")})) in samples(text)


def test_a_name_that_has_no_utf8_form_does_not_break_the_scrape() -> None:
    text = render([new_model("caf\udce9")], SERVER).decode()
    assert lines_of(text, "nv_inference_count") == ['nv_inference_count{model="caf\\\\udce9",version="1"} 0']


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_reads_it_and_objects_only_to_names_that_triton_chose() -> None:
    text = render([used_model(), new_model('odd "name"\\\n', "2")], SERVER)
    result = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
    complaints = result.stderr.decode().splitlines()
    assert [line for line in complaints if not line.startswith("nv_")] == []
    # 3 stands for complaints about style; anything else that is not 0 means that the text could not be read
    assert result.returncode == (3 if complaints else 0)


def test_measured_batch_sizes_are_shown_with_their_cap_and_others_are_not() -> None:
    model = replace(new_model(), merge_rows=2, batch_rates=((1, 50.0), (2, 54.25), (4, 40.123456)))
    text = render([new_model("other"), model], SERVER).decode()
    labels = 'model="digits",version="1"'
    assert lines_of(text, "sluice_batch_cap_rows") == [f"sluice_batch_cap_rows{{{labels}}} 2"]
    assert lines_of(text, "sluice_batch_curve_rows_per_second") == [
        f'sluice_batch_curve_rows_per_second{{{labels},rows="1"}} 50.0',
        f'sluice_batch_curve_rows_per_second{{{labels},rows="2"}} 54.25',
        f'sluice_batch_curve_rows_per_second{{{labels},rows="4"}} 40.123',
    ]
