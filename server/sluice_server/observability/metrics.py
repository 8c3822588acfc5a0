"""Every metric there is, written from snapshots when it is scraped; nothing is kept between scrapes.

The `nv_*` names, labels and meanings are Triton's, so that its dashboards and alerts go on working. `sluice_*` is what
Triton does not tell.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from sluice_server.observability.capture import CaptureUsage
from sluice_server.observability.exposition import Family, Sample, write_family
from sluice_server.observability.host import HostUsage
from sluice_server.observability.latencies import HISTOGRAM_MS, MEASURED, LatencyOptions, LatencySnapshot
from sluice_server.observability.statistics import CacheCounts, Duration, ModelSnapshot
from sluice_server.status import Code

CONTENT_TYPE = "text/plain; charset=utf-8"
"""What the endpoint says of its body, as Triton does."""

BATCH_ROWS_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Upper bounds of `sluice_batch_rows`: powers of two, as batch sizes double in effect; few, as each is a series."""

_NS_PER_US = 1000
_NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True)
class MetricsOptions:
    """Which metrics there are. `interval_ns` is how old what is read of the machine may be; 0: read at each scrape."""

    counter_latencies: bool = True
    latencies: LatencyOptions = field(default_factory=LatencyOptions)
    cpu: bool = True
    interval_ns: int = 0


@dataclass(frozen=True, slots=True)
class CacheUsage:
    """What the response cache holds at the moment, and how many answers have left it for want of room."""

    max_bytes: int
    size_bytes: int
    entries: int
    evictions: int


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """What /metrics shows of one model version: its counters, and its queue at the moment of the scrape."""

    name: str
    version: str
    snapshot: ModelSnapshot
    pending_requests: int
    queue_rows: int
    queue_bytes: int
    latencies: LatencySnapshot = field(default_factory=LatencySnapshot)
    merge_rows: int = 0
    """The most rows that requests are merged to; 0 where no batch sizes were measured."""
    batch_rates: tuple[tuple[int, float], ...] = ()
    """The batch sizes that were measured at load, with their rows per second."""


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """What /metrics shows of the whole server.

    `rpcs` counts ended calls by code and method (`/service/method`). The methods must be the server's own, never text
    that a client sent, as each becomes a series. `host` is None where there is no /proc, `cache` where the server has
    no response cache, `capture` where it captures no requests.
    """

    version: str
    rpcs: Mapping[tuple[str, Code], int]
    host: HostUsage | None
    cache: CacheUsage | None = None
    capture: CaptureUsage | None = None


@dataclass(frozen=True, slots=True)
class _ModelFamily(Family):
    samples: Callable[[ModelMetrics], Iterable[Sample]]


@dataclass(frozen=True, slots=True)
class _ServerFamily(Family):
    samples: Callable[[ServerMetrics], Iterable[Sample]]


def render(models: Iterable[ModelMetrics], server: ServerMetrics, options: MetricsOptions | None = None) -> bytes:
    """Give the body of GET /metrics.

    `models` has each loaded model version once; their order is the order of the samples. A metric without any
    sample is left out.
    """
    models = tuple(models)
    lines: list[str] = []
    options = options or MetricsOptions()
    for family in _MODEL_FAMILIES:
        if options.counter_latencies or family.name not in COUNTER_LATENCIES:
            write_family(lines, family, (sample for model in models for sample in family.samples(model)))
    for server_family in _SERVER_FAMILIES:
        if options.cpu or not server_family.name.startswith("nv_cpu_"):
            write_family(lines, server_family, server_family.samples(server))
    return "".join(lines).encode()


def _labels(model: ModelMetrics) -> tuple[tuple[str, str], ...]:
    return ("model", model.name), ("version", model.version)


def _value(read: Callable[[ModelMetrics], int]) -> Callable[[ModelMetrics], Iterator[Sample]]:
    def samples(model: ModelMetrics) -> Iterator[Sample]:
        yield Sample(read(model), _labels(model))

    return samples


def _microseconds(read: Callable[[ModelSnapshot], Duration]) -> Callable[[ModelMetrics], Iterator[Sample]]:
    return _value(lambda model: read(model.snapshot).ns // _NS_PER_US)


def _cached(read: Callable[[CacheCounts], int]) -> Callable[[ModelMetrics], Iterator[Sample]]:
    def samples(model: ModelMetrics) -> Iterator[Sample]:
        if model.snapshot.cache is not None:
            yield Sample(read(model.snapshot.cache), _labels(model))

    return samples


def _cache_usage(read: Callable[[CacheUsage], int]) -> Callable[[ServerMetrics], Iterator[Sample]]:
    def samples(server: ServerMetrics) -> Iterator[Sample]:
        if server.cache is not None:
            yield Sample(read(server.cache))

    return samples


def _capture_usage(read: Callable[[CaptureUsage], int]) -> Callable[[ServerMetrics], Iterator[Sample]]:
    def samples(server: ServerMetrics) -> Iterator[Sample]:
        if server.capture is not None:
            yield Sample(read(server.capture))

    return samples


def _left_out(server: ServerMetrics) -> Iterator[Sample]:
    if server.capture is not None:
        for reason, count in server.capture.left_out.items():
            yield Sample(count, (("reason", reason),))


def _summary(what: str) -> Callable[[ModelMetrics], Iterator[Sample]]:
    def samples(model: ModelMetrics) -> Iterator[Sample]:
        summary, labels = model.latencies.summaries.get(what), _labels(model)
        if summary is None:
            return
        yield Sample(summary.count, labels, "_count")
        yield Sample(summary.sum_ns // _NS_PER_US, labels, "_sum")
        for quantile, value_ns in summary.quantiles:
            yield Sample(round(value_ns / _NS_PER_US, 3), (*labels, ("quantile", f"{quantile:g}")))

    return samples


def _first_response(model: ModelMetrics) -> Iterator[Sample]:
    histogram, labels = model.latencies.first_response, _labels(model)
    if histogram is None:
        return
    for bound, count in zip(HISTOGRAM_MS, histogram.at_most, strict=True):
        yield Sample(count, (*labels, ("le", str(bound))), "_bucket")
    yield Sample(histogram.count, (*labels, ("le", "+Inf")), "_bucket")
    yield Sample(histogram.sum_ns / _NS_PER_MS, labels, "_sum")
    yield Sample(histogram.count, labels, "_count")


def _failures(model: ModelMetrics) -> Iterator[Sample]:
    for reason, count in model.snapshot.failures.items():
        yield Sample(count, (("model", model.name), ("reason", reason.value), ("version", model.version)))


def _outcomes(model: ModelMetrics) -> Iterator[Sample]:
    for outcome, count in model.snapshot.outcomes.items():
        yield Sample(count, (*_labels(model), ("outcome", outcome.value)))


def _batch_rows(model: ModelMetrics) -> Iterator[Sample]:
    labels, snapshot = _labels(model), model.snapshot
    for bound in BATCH_ROWS_BUCKETS:
        count = sum(batch.count for batch in snapshot.batches if batch.rows <= bound)
        yield Sample(count, (*labels, ("le", str(bound))), "_bucket")
    yield Sample(snapshot.execution_count, (*labels, ("le", "+Inf")), "_bucket")
    yield Sample(snapshot.inference_count, labels, "_sum")
    yield Sample(snapshot.execution_count, labels, "_count")


def _merge_rows(model: ModelMetrics) -> Iterator[Sample]:
    if model.merge_rows:
        yield Sample(model.merge_rows, _labels(model))


def _batch_rates(model: ModelMetrics) -> Iterator[Sample]:
    for rows, rows_per_s in model.batch_rates:
        yield Sample(round(rows_per_s, 3), (*_labels(model), ("rows", str(rows))))


def _rpcs(server: ServerMetrics) -> Iterator[Sample]:
    for (path, code), count in sorted(server.rpcs.items()):
        _, service, method = path.split("/")
        yield Sample(count, (("service", service), ("method", method), ("code", code.name)))


def _build_info(server: ServerMetrics) -> Iterator[Sample]:
    yield Sample(1, (("version", server.version),))


def _host(read: Callable[[HostUsage], float]) -> Callable[[ServerMetrics], Iterator[Sample]]:
    def samples(server: ServerMetrics) -> Iterator[Sample]:
        if server.host is not None:
            yield Sample(read(server.host))

    return samples


COUNTER_LATENCIES = frozenset(f"nv_inference_{what}_duration_us" for what in MEASURED)
"""What `--metrics-config counter_latencies=false` switches off."""

_MODEL_FAMILIES = (
    _ModelFamily(
        "nv_inference_request_success",
        "counter",
        "Requests that were answered",
        _value(lambda model: model.snapshot.success.count),
    ),
    _ModelFamily(
        "nv_inference_request_failure",
        "counter",
        "Requests that failed after they were accepted, by reason",
        _failures,
    ),
    _ModelFamily(
        "nv_inference_count",
        "counter",
        "Inferences in rows: the sum of the batch sizes that were executed",
        _value(lambda model: model.snapshot.inference_count),
    ),
    _ModelFamily(
        "nv_inference_exec_count",
        "counter",
        "Executions of the model: each batch counts once",
        _value(lambda model: model.snapshot.execution_count),
    ),
    _ModelFamily(
        "nv_inference_request_duration_us",
        "counter",
        "Time that answered requests spent in the server, in microseconds, summed over requests",
        _microseconds(lambda snapshot: snapshot.success),
    ),
    _ModelFamily(
        "nv_inference_queue_duration_us",
        "counter",
        "Time from enqueueing to the start of execution, in microseconds, summed over requests",
        _microseconds(lambda snapshot: snapshot.queue),
    ),
    _ModelFamily(
        "nv_inference_compute_input_duration_us",
        "counter",
        "Time that preparing inputs took, in microseconds, summed over requests",
        _microseconds(lambda snapshot: snapshot.compute_input),
    ),
    _ModelFamily(
        "nv_inference_compute_infer_duration_us",
        "counter",
        "Time that the model ran, in microseconds, summed over requests",
        _microseconds(lambda snapshot: snapshot.compute_infer),
    ),
    _ModelFamily(
        "nv_inference_compute_output_duration_us",
        "counter",
        "Time that extracting outputs took, in microseconds, summed over requests",
        _microseconds(lambda snapshot: snapshot.compute_output),
    ),
    _ModelFamily(
        "nv_inference_pending_request_count",
        "gauge",
        "Requests that are accepted and not yet executing",
        _value(lambda model: model.pending_requests),
    ),
    *(
        _ModelFamily(
            f"nv_inference_{what}_summary_us",
            "summary",
            f"Quantiles over the last minute, count and sum of what nv_inference_{what}_duration_us counts",
            _summary(what),
        )
        for what in MEASURED
    ),
    _ModelFamily(
        "nv_inference_first_response_histogram_ms",
        "histogram",
        "Time from a request to its answer, in milliseconds",
        _first_response,
    ),
    _ModelFamily(
        "nv_cache_num_hits_per_model",
        "counter",
        "Requests that were answered from the response cache, or by the run of an equal request",
        _cached(lambda cache: cache.hit.count),
    ),
    _ModelFamily(
        "nv_cache_num_misses_per_model",
        "counter",
        "Requests whose answer was not in the response cache",
        _cached(lambda cache: cache.miss.count),
    ),
    _ModelFamily(
        "nv_cache_hit_duration_per_model",
        "counter",
        "Time that looking up took for hits, in microseconds, summed over requests",
        _cached(lambda cache: cache.hit.ns // _NS_PER_US),
    ),
    _ModelFamily(
        "nv_cache_miss_duration_per_model",
        "counter",
        "Time that looking up and keeping the answer took for misses, in microseconds, summed over requests",
        _cached(lambda cache: cache.miss.ns // _NS_PER_US),
    ),
    _ModelFamily(
        "sluice_cache_coalesced_total",
        "counter",
        "Hits that waited for the run of an equal request in flight",
        _cached(lambda cache: cache.coalesced),
    ),
    _ModelFamily(
        "sluice_cache_skipped_total",
        "counter",
        "Misses that were not looked up, as next to nothing was found under load",
        _cached(lambda cache: cache.skipped),
    ),
    _ModelFamily("sluice_requests_total", "counter", "Requests to the model by how they ended", _outcomes),
    _ModelFamily("sluice_batch_rows", "histogram", "Rows of the batches that were executed", _batch_rows),
    _ModelFamily(
        "sluice_batch_cap_rows",
        "gauge",
        "Rows that requests are merged to at most, as larger batches were slower when measured at load",
        _merge_rows,
    ),
    _ModelFamily(
        "sluice_batch_curve_rows_per_second",
        "gauge",
        "Rows per second of the model alone in batches of so many rows, as measured at load",
        _batch_rates,
    ),
    _ModelFamily("sluice_queue_rows", "gauge", "Rows that wait in the queue", _value(lambda model: model.queue_rows)),
    _ModelFamily(
        "sluice_queue_bytes",
        "gauge",
        "Bytes of the requests that wait in the queue",
        _value(lambda model: model.queue_bytes),
    ),
)

_SERVER_FAMILIES = (
    _ServerFamily(
        "nv_cpu_utilization",
        "gauge",
        "Share of the machine's CPU time that was used since the last scrape, from 0 to 1",
        _host(lambda host: host.cpu_utilization),
    ),
    _ServerFamily(
        "nv_cpu_memory_total_bytes",
        "gauge",
        "Memory of the machine, in bytes",
        _host(lambda host: host.memory_total_bytes),
    ),
    _ServerFamily(
        "nv_cpu_memory_used_bytes",
        "gauge",
        "Memory of the machine that is not available, in bytes",
        _host(lambda host: host.memory_used_bytes),
    ),
    _ServerFamily(
        "sluice_cache_max_bytes",
        "gauge",
        "Bytes that the response cache may hold",
        _cache_usage(lambda cache: cache.max_bytes),
    ),
    _ServerFamily(
        "sluice_cache_bytes",
        "gauge",
        "Bytes that the response cache holds",
        _cache_usage(lambda cache: cache.size_bytes),
    ),
    _ServerFamily(
        "sluice_cache_entries",
        "gauge",
        "Answers that the response cache holds",
        _cache_usage(lambda cache: cache.entries),
    ),
    _ServerFamily(
        "sluice_cache_evictions_total",
        "counter",
        "Answers that left the response cache for want of room",
        _cache_usage(lambda cache: cache.evictions),
    ),
    _ServerFamily(
        "sluice_capture_requests_total",
        "counter",
        "Requests in the capture file",
        _capture_usage(lambda capture: capture.requests),
    ),
    _ServerFamily(
        "sluice_capture_left_out_total",
        "counter",
        "Requests that were chosen for the capture file and are not in it, by reason",
        _left_out,
    ),
    _ServerFamily(
        "sluice_capture_bytes",
        "gauge",
        "Bytes of the capture file",
        _capture_usage(lambda capture: capture.size_bytes),
    ),
    _ServerFamily(
        "sluice_capture_stopped",
        "gauge",
        "1 once capturing has ended: the file is full, or the disk fails",
        _capture_usage(lambda capture: int(capture.stopped)),
    ),
    _ServerFamily("sluice_rpcs_total", "counter", "Calls and streams that ended, by method and gRPC code", _rpcs),
    _ServerFamily("sluice_build_info", "gauge", "Always 1; the labels tell what runs", _build_info),
    _ServerFamily(
        "process_cpu_seconds_total",
        "counter",
        "User and system CPU time of the server process, in seconds",
        _host(lambda host: host.process_cpu_s),
    ),
    _ServerFamily(
        "process_resident_memory_bytes",
        "gauge",
        "Resident memory of the server process, in bytes",
        _host(lambda host: host.process_resident_bytes),
    ),
)
