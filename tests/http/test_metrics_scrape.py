"""What Prometheus reads of a server: every counter grows by exactly what was asked of the server, and adds up."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.observability.latencies import MEASURED, LatencyOptions
from sluice_server.observability.metrics import MetricsOptions
from sluice_server.repository.manager import ControlMode
from support import models
from support.fakes import eventually, held
from support.requests import infer_request

COUNTERS = {
    "nv_inference_request_success",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
}
REASONS = {"REJECTED", "CANCELED", "BACKEND", "OTHER"}
OUTCOMES = {"ok", "backend_error", "queue_timeout", "cancelled", "queue_full", "invalid", "unavailable", "other"}


@pytest.fixture
def server(start_server, repository):
    """`picky` fails on an index that is out of range; `other` is never called; both in explicit mode."""
    for name in ("picky", "other"):
        models.write_model(repository, name, models.gather(), max_batch_size=8)
    explicit = {"control_mode": ControlMode.EXPLICIT, "load_models": ("picky", "other"), "queue_rows": 4}
    return start_server(repository, models=explicit, http=None)


class Counters:
    """One model's samples, by short names."""

    def __init__(self, samples, model="picky", version="1"):
        self._samples = samples
        self._labels = {"model": model, "version": version}

    def __getitem__(self, name: str) -> float:
        return self._samples[name, frozenset(self._labels.items())]

    def by(self, name: str, label: str) -> dict[str, float]:
        """All samples of a name that have one more label, by its value; those that are not zero."""
        found = {}
        for (sample, labels), value in self._samples.items():
            of_sample = dict(labels)
            if sample == name and value and self._labels.items() <= of_sample.items():
                found[of_sample[label]] = value
        return found


def ask(server, index: int, rows: int = 1):
    return infer_request("picky", {"INDEX": np.full((rows, 1), index, np.int64)})


def test_every_series_of_a_model_is_there_with_zero_from_its_load_on(server, scrape):
    samples = scrape(server)
    for model in ("picky", "other"):
        labels = {"model": model, "version": "1"}.items()
        for name in COUNTERS | {"nv_inference_pending_request_count"}:
            assert samples[name, frozenset(labels)] == 0
        for reason in REASONS:
            assert samples["nv_inference_request_failure", frozenset({*labels, ("reason", reason)})] == 0
        for outcome in OUTCOMES:
            assert samples["sluice_requests_total", frozenset({*labels, ("outcome", outcome)})] == 0
    names = {name for name, _ in samples}
    assert {"nv_cpu_utilization", "nv_cpu_memory_total_bytes", "nv_cpu_memory_used_bytes"} <= names
    assert 0 <= samples["nv_cpu_utilization", frozenset()] <= 1


def test_the_labels_are_tritons_in_its_order(server):
    text = server.server.render_metrics().decode()
    assert 'nv_inference_request_success{model="picky",version="1"} 0\n' in text
    assert 'nv_inference_request_failure{model="picky",reason="REJECTED",version="1"} 0\n' in text


def test_answers_are_counted_in_requests_rows_and_executions(server, scrape):
    for rows in (1, 3, 4):
        server.infer(ask(server, 1, rows))
    samples = scrape(server)
    counters = Counters(samples)
    assert counters["nv_inference_request_success"] == 3
    assert counters["nv_inference_count"] == 8
    assert counters["nv_inference_exec_count"] == 3
    assert counters["nv_inference_request_duration_us"] > counters["nv_inference_compute_infer_duration_us"]
    assert counters.by("nv_inference_request_failure", "reason") == {}
    assert counters.by("sluice_requests_total", "outcome") == {"ok": 3}
    assert all(Counters(samples, "other")[name] == 0 for name in COUNTERS)
    before = counters["nv_inference_request_duration_us"]
    server.infer(ask(server, 1))
    assert Counters(scrape(server))["nv_inference_request_duration_us"] > before


def test_a_batch_of_several_requests_is_one_execution(server, scrape):
    with held(server.model("picky")) as session:
        calls = [server.begin("ModelInfer", ask(server, 0))]
        session.wait_for_runs(1)
        calls += [server.begin("ModelInfer", ask(server, 1)) for _ in range(3)]
        eventually(lambda: Counters(scrape(server))["nv_inference_pending_request_count"] == 3, "three wait")
        session.release()
        for call in calls:
            call.result()
    counters = Counters(scrape(server))
    assert counters["nv_inference_pending_request_count"] == 0
    assert counters["nv_inference_request_success"] == counters["nv_inference_count"] == 4
    assert counters["nv_inference_exec_count"] == 2
    assert counters.by("sluice_batch_rows_bucket", "le")["1"] == 1
    assert counters.by("sluice_batch_rows_bucket", "le")["4"] == 2
    assert counters["sluice_batch_rows_sum"] == 4


def test_what_fails_is_counted_by_its_reason_and_what_is_refused_is_not_tritons_affair(server, scrape):
    statuses = [server.refusal("ModelInfer", ask(server, 77))[0]]
    spoiled = ask(server, 1)
    spoiled.inputs[0].shape[0] = 7
    statuses.append(server.refusal("ModelInfer", spoiled)[0])
    statuses.append(server.refusal("ModelInfer", infer_request("nope", {}))[0])
    assert statuses == [
        grpc.StatusCode.INTERNAL,
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.NOT_FOUND,
    ]
    counters = Counters(scrape(server))
    assert counters.by("nv_inference_request_failure", "reason") == {"BACKEND": 1}
    assert counters.by("sluice_requests_total", "outcome") == {"backend_error": 1, "invalid": 1}
    assert counters["nv_inference_request_success"] == counters["nv_inference_count"] == 0


def test_what_ends_while_it_waits_is_counted_by_why(server, scrape):
    with held(server.model("picky")) as session:
        running = server.begin("ModelInfer", ask(server, 0))
        session.wait_for_runs(1)
        expired = server.begin("ModelInfer", ask(server, 1), timeout_s=0.05)
        cancelled = server.begin("ModelInfer", ask(server, 1))
        eventually(lambda: Counters(scrape(server))["nv_inference_pending_request_count"] >= 1, "it waits")
        assert expired.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        eventually(lambda: server.model("picky").queue.rows == 1, "only the other one waits")
        cancelled.cancel()
        eventually(lambda: server.model("picky").queue.rows == 0, "nothing waits")
        fitting = server.begin("ModelInfer", ask(server, 1, rows=4))
        eventually(lambda: server.model("picky").queue.rows == 4, "the queue is full")
        assert server.refusal("ModelInfer", ask(server, 1))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        session.release()
        running.result()
        fitting.result()
    counters = Counters(scrape(server))
    outcomes = counters.by("sluice_requests_total", "outcome")
    assert outcomes.pop("queue_full") == 1
    assert outcomes.pop("ok") == 2
    assert sum(outcomes.values()) == 2
    failures = counters.by("nv_inference_request_failure", "reason")
    assert set(failures) <= {"REJECTED", "CANCELED"}
    assert sum(failures.values()) == 2
    assert counters["nv_inference_request_success"] == 2
    assert counters["nv_inference_count"] == 5


def test_every_call_is_counted_once_by_method_and_code(server, scrape):
    for _ in range(5):
        server.infer(ask(server, 1))
    for _ in range(2):
        server.refusal("ModelInfer", b"\xff")
    server.call("ServerLive", b"")
    server.refusal("SystemSharedMemoryStatus", b"")
    server.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="other"))
    rpcs = {
        (dict(labels)["method"], dict(labels)["code"]): value
        for (name, labels), value in scrape(server).items()
        if name == "sluice_rpcs_total"
    }
    assert rpcs == {
        ("ModelInfer", "OK"): 5,
        ("ModelInfer", "INVALID_ARGUMENT"): 2,
        ("ServerLive", "OK"): 1,
        ("SystemSharedMemoryStatus", "UNIMPLEMENTED"): 1,
        ("RepositoryModelUnload", "OK"): 1,
    }


def test_a_model_that_was_unloaded_has_no_series_and_one_that_is_loaded_again_starts_at_zero(server, scrape):
    server.infer(ask(server, 1))
    server.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="picky"))
    assert not [labels for _, labels in scrape(server) if ("model", "picky") in labels]
    server.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="picky"))
    assert Counters(scrape(server))["nv_inference_request_success"] == 0


def test_statistics_and_metrics_tell_the_same(server, scrape):
    for rows in (1, 2, 2):
        server.infer(ask(server, 1, rows))
    server.refusal("ModelInfer", ask(server, -77))
    counters = Counters(scrape(server))
    request = pb.ModelStatisticsRequest(name="picky")
    (statistics,) = server.call("ModelStatistics", request).model_stats
    durations = statistics.inference_stats
    assert counters["nv_inference_request_success"] == durations.success.count == 3
    assert counters["nv_inference_count"] == statistics.inference_count == 5
    assert counters["nv_inference_exec_count"] == statistics.execution_count == 3
    assert sum(counters.by("nv_inference_request_failure", "reason").values()) == durations.fail.count == 1
    for name, duration in (
        ("request", durations.success),
        ("queue", durations.queue),
        ("compute_input", durations.compute_input),
        ("compute_infer", durations.compute_infer),
        ("compute_output", durations.compute_output),
    ):
        assert counters[f"nv_inference_{name}_duration_us"] == duration.ns // 1000


def test_distributions_of_latencies_agree_with_the_counters(start_server, repository, scrape):
    models.write_model(repository, "picky", models.gather(), max_batch_size=8)
    options = MetricsOptions(latencies=LatencyOptions((0.5, 0.999), histogram=True))
    server = start_server(repository, metrics_options=options, http=None)
    for call in [server.begin("ModelInfer", ask(server, 1)) for _ in range(9)]:
        call.result()
    server.refusal("ModelInfer", ask(server, 77))
    counters = Counters(scrape(server))
    for what in MEASURED:
        name = f"nv_inference_{what}_summary_us"
        assert counters[f"{name}_count"] == counters["nv_inference_request_success"] == 9
        assert counters[f"{name}_sum"] == counters[f"nv_inference_{what}_duration_us"]
        quantiles = counters.by(name, "quantile")
        assert 0 < quantiles["0.5"] <= quantiles["0.999"]
    buckets = counters.by("nv_inference_first_response_histogram_ms_bucket", "le")
    assert buckets["+Inf"] == counters["nv_inference_first_response_histogram_ms_count"] == 9
    assert list(buckets) == ["100", "500", "2000", "5000", "+Inf"][-len(buckets) :]


def test_a_server_that_was_not_asked_for_distributions_keeps_and_shows_none(server, scrape):
    server.infer(ask(server, 1))
    assert server.model("picky").statistics.latencies is None
    assert not [name for name, _ in scrape(server) if "summary" in name or "histogram" in name]
