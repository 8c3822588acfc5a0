"""Makes a model version ready to serve: completes its configuration, opens its sessions, plans threads and instances.

`prepare` does everything that can go wrong and says what it decided; `sluice check` stops there. `ModelLoader` goes on
and puts a queue and instances around it.
"""

from __future__ import annotations

import functools
import logging
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sluice_batching import BatchQueue, QueuePolicy, RateLimiter, RunTimes, SequencePolicy, SequenceQueue, SloTuner
from sluice_proto.model_config_pb2 import ModelInstanceGroup
from sluice_server.execution import batch_curve, curve_cache, runtime
from sluice_server.execution.anticipating import AnticipatingInstance, anticipation_of
from sluice_server.execution.batch_curve import BatchCurve, CurveOptions
from sluice_server.execution.batch_proof import Verdict, proof_options, prove
from sluice_server.execution.bucket_options import read_buckets
from sluice_server.execution.bucket_proof import padding_problem
from sluice_server.execution.buckets import PaddedEncoder, gatherer
from sluice_server.execution.cached import CachedModel, CachingRunner
from sluice_server.execution.curve_cache import CurveCache
from sluice_server.execution.ensemble import EnsembleModel, Part
from sluice_server.execution.gate import Gate
from sluice_server.execution.inlets import Inlet
from sluice_server.execution.instance import BatchRunner, Instance
from sluice_server.execution.merging import merges
from sluice_server.execution.model import ServedModel
from sluice_server.execution.model_cache import ModelCache
from sluice_server.execution.objective import read_slo_ns
from sluice_server.execution.options import plan_options
from sluice_server.execution.ordering import ORDERED, OrderedAnswers, preserves_ordering
from sluice_server.execution.parameters import parameter_values
from sluice_server.execution.priorities import priorities_of
from sluice_server.execution.providers import CUDA, choose_providers, count_gpus
from sluice_server.execution.ragged import RaggedEncoder, RaggedGatherer, is_ragged
from sluice_server.execution.rate_limit import LimitedInstance, claim_of
from sluice_server.execution.sequences import SequenceModel, SequenceRunner, SequenceTensors
from sluice_server.execution.session import Session
from sluice_server.execution.split import PARTS_MAX, SplittingModel, SplittingRunner, read_split
from sluice_server.execution.step import ArraysCall, BytesCall
from sluice_server.execution.threads import available_cpus, plan_threads
from sluice_server.execution.warmup import warm_up
from sluice_server.observability.latencies import Latencies
from sluice_server.observability.statistics import ModelStatistics
from sluice_server.protocol.decode import NS_PER_US
from sluice_server.protocol.encode import Encoder
from sluice_server.protocol.interface import ModelInterface
from sluice_server.repository.autocomplete import complete, normalize
from sluice_server.repository.ensembles import check_parts, graph_of, is_ensemble
from sluice_server.repository.labels import read_labels
from sluice_server.repository.validate import scalar_tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sluice_batching import Anticipation, ExpiryTimer
    from sluice_proto.model_config_pb2 import ModelConfig, ModelRateLimiter
    from sluice_server.execution.batch_proof import BatchProof
    from sluice_server.execution.buckets import Buckets
    from sluice_server.execution.options import OptionPlan
    from sluice_server.execution.providers import ProviderPlan
    from sluice_server.execution.request import InferRequest
    from sluice_server.execution.response_cache import ResponseCache
    from sluice_server.execution.served import Served
    from sluice_server.execution.threads import ThreadPlan
    from sluice_server.observability.latencies import LatencyOptions
    from sluice_server.repository.layout import ModelDirectory
    from sluice_server.settings import ModelSettings
    from sluice_server.status import StatusMapper

logger = logging.getLogger(__name__)

NO_CACHE = (
    "response_cache is enabled for this model, but the server has no response cache, so it is served without one:"
    " start the server with --cache-config=local,size=BYTES"
)
"""What is logged, as Triton logs it; the model is served all the same."""

NS_PER_S = 1_000_000_000

CPU_DEVICE = -1
"""Where a GPU's number would stand for a session on the CPU."""


@dataclass(frozen=True, slots=True)
class Host:
    """What this machine gives to models: CPUs by quota and affinity, GPUs, and ONNX Runtime's providers."""

    cpus: int
    gpus: int
    providers: tuple[str, ...]
    processors: str = ""
    """The names of its CPUs and GPUs."""
    cache_directory: Path | None = None
    """Where this user's caches are."""

    @property
    def has_cuda(self) -> bool:
        """Whether a model that names no device gets a GPU: there is one, and this ONNX Runtime can use it."""
        return self.gpus > 0 and CUDA in self.providers

    @classmethod
    def of_this_machine(cls, environ: Mapping[str, str]) -> Host:
        """Look at the machine; CUDA_VISIBLE_DEVICES limits the GPUs as it does for CUDA."""
        return cls(
            available_cpus(),
            count_gpus(environ.get("CUDA_VISIBLE_DEVICES")),
            runtime.available_providers(),
            curve_cache.processors(),
            curve_cache.default_directory(environ),
        )


@dataclass(frozen=True, slots=True)
class DeviceGroup:
    """The instances of a model on one device: they share one session."""

    device: int
    session: Session
    threads: ThreadPlan
    options: OptionPlan
    providers: ProviderPlan
    limits: tuple[ModelRateLimiter, ...]
    """The `rate_limiter` of each instance that is asked for; there may be fewer."""


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A version with its sessions open: everything that loading decides."""

    config: ModelConfig
    groups: tuple[DeviceGroup, ...]
    labels: Mapping[str, tuple[bytes, ...]]
    """The names of the classes of the outputs that have a label file, by the outputs' names."""
    buckets: Buckets | None
    slo_ns: int
    """The latency objective; 0: there is none."""
    splits: bool
    """Whether requests of more rows than max_batch_size are taken, and split."""
    sequences: SequenceTensors | None
    """What the server feeds and keeps for a model with sequences."""
    proof: BatchProof | None
    """Whether its rows may share batches; None where they do not, and where a batch is not the rows of its requests."""
    curve: BatchCurve | None
    """Up to which size batches pay; None where that was not measured."""
    padding: str
    """Why its inputs are not padded although it has shape buckets; empty for no reason."""

    @property
    def merges(self) -> bool:
        """Whether requests share batches."""
        return merges(self.config) and (self.proof is None or self.proof.verdict is not Verdict.UNSAFE)

    @property
    def notice(self) -> str:
        """What RepositoryIndex says of the version though it is ready: what it does not do as configured; or ""."""
        if self.padding:
            return f"shape_buckets are off, requests share a batch where their shapes are equal: {self.padding}"
        if self.proof is None or self.merges:
            return ""
        return (
            f"dynamic batching is off, each request is its own execution: {self.proof.reason}"
            " (parameter 'batch_proof' = off has requests merged all the same)"
        )

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """A sentence for each provider that was asked for and is not used."""
        return tuple(text for group in self.groups for text in (*group.providers.warnings, *group.session.fallbacks))


def prepare(
    directory: ModelDirectory, version: int, written: ModelConfig | None, settings: ModelSettings, host: Host
) -> PreparedModel:
    """Open one version. Raises ConfigError for what is written, ModelLoadError, BackendError or InvalidArgument
    (providers, options) for what does not fit the model file or the machine.
    """
    config = normalize(written, name=directory.name, auto_complete=settings.auto_complete, gpu_available=host.has_cuda)
    wanted_proof, wanted_curve = proof_options(config), batch_curve.curve_options(written)
    path = directory.model_file(version, config.default_model_filename)
    groups = [
        _open_group(path, config, device, members, settings, host) for device, members in _placements(config).items()
    ]
    completed = complete(
        config,
        groups[0].session.signature,
        auto_complete=settings.auto_complete,
        default_max_batch_size=settings.default_max_batch_size,
    )
    sequences = None
    if completed.HasField("sequence_batching"):
        sequences = SequenceTensors.of(completed, groups[0].session.signature, directory.path)
    # What one session shows of the model holds for the others.
    first = groups[0].session
    proof = curve = None
    if merges(completed) and not is_ragged(completed):
        proof = prove(first, first.signature, completed, wanted_proof, first.providers)
        if proof.verdict is not Verdict.UNSAFE and proof.rows and wanted_curve.wanted:
            curve = _curve(path, groups[0], completed, proof, wanted_curve, _curve_cache(settings, host), host)
    labels, buckets, padding = read_labels(completed, directory.path), read_buckets(completed), ""
    if buckets is not None and proof is not None:
        interface = ModelInterface.of(completed, version, buckets=buckets)
        padding = padding_problem(first, interface, buckets, proof, wanted_proof)
    return PreparedModel(
        completed,
        tuple(groups),
        labels,
        None if padding else buckets,
        read_slo_ns(completed),
        read_split(completed),
        sequences,
        proof,
        curve,
        padding,
    )


def _open_group(
    path: Path,
    config: ModelConfig,
    device: int,
    members: Sequence[ModelInstanceGroup],
    settings: ModelSettings,
    host: Host,
) -> DeviceGroup:
    """Open the session of the groups that are on a device."""
    providers = choose_providers(
        config,
        members[0].kind,
        max(device, 0),
        host.providers,
        host.gpus,
        group=members[0].name,
        allow_fallback=settings.allow_provider_fallback,
    )
    limits = tuple(group.rate_limiter for group in members for _ in range(group.count))
    threads = plan_threads(len(limits), parameter_values(config), host.cpus, model=config.name, on_gpu=providers.on_gpu)
    options = plan_options(config, threads)
    session = Session(path, options, providers.choices, allow_fallback=settings.allow_provider_fallback)
    return DeviceGroup(device, session, threads, options, providers, limits)


def _curve_cache(settings: ModelSettings, host: Host) -> CurveCache:
    return CurveCache(host.cache_directory if settings.curve_directory is None else settings.curve_directory)


def _curve(
    path: Path,
    group: DeviceGroup,
    config: ModelConfig,
    proof: BatchProof,
    wanted: CurveOptions,
    cache: CurveCache,
    host: Host,
) -> BatchCurve:
    """The curve of a model on its first device: the one that is kept, or measured now."""
    facts: curve_cache.Facts = {}
    if cache.keeps:
        facts = {
            "model": curve_cache.file_digest(path),
            "max_batch_rows": config.max_batch_size,
            "outputs": [tensor.name for tensor in config.output],
            "inputs": {name: [str(array.dtype), *array.shape] for name, array in proof.rows[0].items()},
            "runtime": runtime.runtime_version(),
            "providers": [[choice.name, dict(choice.options)] for choice in group.providers.choices],
            "running": list(group.session.providers),
            "session": dict(group.options.session),
            "session_entries": dict(group.options.session_entries),
            "processors": host.processors,
        }
    points = cache.get(facts)
    if points is None:
        names = [tensor.name for tensor in config.output]
        run_clock = batch_curve.run_clock_for(group.session.providers, group.threads)
        points = batch_curve.measure(group.session, names, proof.rows, config.max_batch_size, run_clock=run_clock)
        # Else there was no time for all sizes, and there may be at another load.
        if points and points[-1].rows == config.max_batch_size:
            cache.put(facts, points)
    return BatchCurve(points, batch_curve.choose_cap(points, config.max_batch_size) if wanted.caps else 0)


def _placements(config: ModelConfig) -> dict[int, list[ModelInstanceGroup]]:
    """The groups that are on each device, in order: they share one session."""
    placements: dict[int, list[ModelInstanceGroup]] = {}
    for group in config.instance_group:
        on_cpu = group.kind == ModelInstanceGroup.KIND_CPU
        for device in (CPU_DEVICE,) if on_cpu else tuple(group.gpus) or (0,):
            placements.setdefault(device, []).append(group)
    return placements


class ModelLoader:
    """The manager's loader: a served model from a version on disk."""

    def __init__(
        self,
        settings: ModelSettings,
        to_status: StatusMapper,
        timer: ExpiryTimer,
        environ: Mapping[str, str],
        latencies: LatencyOptions | None = None,
        cache: ResponseCache | None = None,
    ) -> None:
        """With `latencies` every version keeps those distributions too; `cache` is the server's response cache, for
        models that ask for it.
        """
        self._latencies = latencies
        self._settings = settings
        self._to_status = to_status
        self._timer = timer
        self._host = Host.of_this_machine(environ)
        self._cache = cache
        self._limiter = None if settings.rate_limit is None else RateLimiter(settings.rate_limit)

    def __call__(
        self, directory: ModelDirectory, version: int, config: ModelConfig | None, parts: Sequence[Served] = ()
    ) -> Served:
        """Load one version and warm it up; it takes requests once it is started.

        `parts` are what runs the steps of an ensemble, one for each.
        """
        if config is not None and is_ensemble(config):
            return self._load_ensemble(directory, version, config, parts)
        prepared = prepare(directory, version, config, self._settings, self._host)
        completed = prepared.config
        scalars = scalar_tensors(completed, prepared.groups[0].session.signature)
        interface = ModelInterface.of(completed, version, scalars, prepared.labels, prepared.buckets)
        if prepared.splits:
            interface = replace(interface, max_request_rows=interface.max_batch_rows * PARTS_MAX)
        if prepared.notice:
            logger.warning(prepared.notice, extra={"model": completed.name, "version": version})
        cache = self._cache_for(completed, version)
        latencies = None if self._latencies is None else Latencies(self._latencies)
        statistics = ModelStatistics(latencies=latencies, caches=cache is not None)
        run_times = _run_times(prepared)
        make_model, queue, runner = self._scheduling(prepared, interface, statistics, run_times, cache)
        if isinstance(run_times, SloTuner):
            run_times.steer(queue.tune)
        is_alone = sum(group.threads.instances for group in prepared.groups) == 1
        waits = is_alone and prepared.merges and not isinstance(run_times, SloTuner)
        anticipation = anticipation_of(prepared.curve, queue.policy) if waits else None
        instances = [
            self._instance(f"{completed.name}-{number}", queue, group, number, runner, anticipation)
            for group in prepared.groups
            for number in range(group.threads.instances)
        ]
        lends = len(prepared.groups) == 1 and not any(isinstance(each, LimitedInstance) for each in instances)
        sessions = [(group.session, group.threads.instances) for group in prepared.groups]
        warm_up(completed, directory.path, interface, runner, sessions)
        return make_model(
            completed,
            interface,
            queue,
            instances,
            runner=runner,
            statistics=statistics,
            to_status=self._to_status,
            timer=self._timer,
            properties=_properties(prepared, len(instances)),
            notice=prepared.notice,
            curve=prepared.curve,
            is_tuned=isinstance(run_times, SloTuner),
            common_session=prepared.groups[0].session if lends else None,
        )

    def _scheduling(
        self,
        prepared: PreparedModel,
        interface: ModelInterface,
        statistics: ModelStatistics,
        run_times: RunTimes,
        cache: ResponseCache | None,
    ) -> tuple[Callable[..., ServedModel], BatchQueue[InferRequest], BatchRunner]:
        """What a version is made as, its queue, and what runs its batches."""
        policy = self._queue_policy(prepared, interface)
        if not preserves_ordering(prepared.config):
            return self._queue_and_runner(prepared, policy, interface, statistics, run_times, cache)
        # Answers leave in the order of arrival, so that to overtake in the queue gains nothing.
        policy = replace(policy, deadline_first=False)
        order = OrderedAnswers(policy)
        make_model, queue, runner = self._queue_and_runner(
            prepared, policy, interface, statistics, run_times, cache, order.enter
        )
        runner.keep_order(order)
        ordered = ORDERED[make_model]
        return functools.partial(ordered, order=order, on_arrival=prepared.sequences is None), queue, runner

    def _queue_and_runner(
        self,
        prepared: PreparedModel,
        policy: QueuePolicy,
        interface: ModelInterface,
        statistics: ModelStatistics,
        run_times: RunTimes,
        cache: ResponseCache | None,
        on_taken: Callable[[list[InferRequest]], None] | None = None,
    ) -> tuple[type[ServedModel], BatchQueue[InferRequest], BatchRunner]:
        """The same but for an order; of sequences `on_taken` is told what is taken."""
        config = prepared.config
        encoder, seams = _seams(config, interface, prepared.buckets)
        seams["run_times"] = run_times
        if prepared.sequences is not None:
            sequences: SequenceQueue[InferRequest] = SequenceQueue(
                _sequence_policy(config, policy), run_times=run_times, on_taken=on_taken
            )
            runner = SequenceRunner(encoder, statistics, self._to_status, prepared.sequences, sequences.finish, **seams)
            return SequenceModel, sequences, runner
        queue: BatchQueue[InferRequest] = BatchQueue(policy, run_times=run_times)
        if cache is not None:
            following: BatchQueue[InferRequest] = BatchQueue(self._bounds(interface))
            model_cache = ModelCache(cache, interface, queue, following, statistics)
            return CachedModel, queue, CachingRunner(encoder, statistics, self._to_status, model_cache, **seams)
        if prepared.splits:
            return SplittingModel, queue, SplittingRunner(encoder, statistics, self._to_status, **seams)
        return ServedModel, queue, BatchRunner(encoder, statistics, self._to_status, **seams)

    def _instance(
        self,
        name: str,
        queue: BatchQueue[InferRequest],
        group: DeviceGroup,
        number: int,
        runner: BatchRunner,
        anticipation: Anticipation | None,
    ) -> Instance:
        if self._limiter is not None:
            claim = claim_of(group.limits[number], group.device, self._limiter, name.rpartition("-")[0])
            if claim is not None:
                return LimitedInstance(name, queue, group.session, runner, self._limiter, claim)
        if anticipation is not None:
            return AnticipatingInstance(name, queue, group.session, runner, anticipation)
        return Instance(name, queue, group.session, runner)

    def _load_ensemble(
        self, directory: ModelDirectory, version: int, written: ModelConfig, parts: Sequence[Served]
    ) -> EnsembleModel:
        """Bind an ensemble to versions that are served; ModelLoadError when they do not fit."""
        config = normalize(written, name=directory.name)
        check_parts(config, [model.config for model in parts])
        interface = replace(
            ModelInterface.of(config, version, labels=read_labels(config, directory.path)),
            prioritizes=any(part.interface.prioritizes for part in parts),
        )
        statistics = ModelStatistics(latencies=None if self._latencies is None else Latencies(self._latencies))
        graph = graph_of(config)
        places = config.ensemble_scheduling.max_inflight_requests
        bound = [
            Part(
                model,
                tuple(Inlet(model.interface, name, tensor) for name, tensor in step.takes.items()),
                dict(step.makes),
                ArraysCall if model.answers_in_arrays() else BytesCall,
                Gate(places, self._bounds(model.interface)) if places else None,
            )
            for step, model in zip(graph.steps, parts, strict=True)
        ]
        encoder = Encoder(interface)
        return EnsembleModel(config, interface, graph, bound, encoder, statistics, self._to_status, self._timer)

    def _bounds(self, interface: ModelInterface) -> QueuePolicy:
        """How many may wait: in a queue of a model, and for something else than a run, where it merges nothing."""
        return QueuePolicy(
            max_batch_rows=max(1, interface.max_batch_rows),
            max_queue_rows=self._settings.queue_rows,
            max_queue_bytes=self._settings.queue_bytes,
        )

    def _cache_for(self, config: ModelConfig, version: int) -> ResponseCache | None:
        if config.response_cache.enable and self._cache is None:
            logger.warning(NO_CACHE, extra={"model": config.name, "version": version})
        return self._cache if config.response_cache.enable else None

    def _queue_policy(self, prepared: PreparedModel, interface: ModelInterface) -> QueuePolicy:
        config, batching = prepared.config, prepared.merges
        scheduler = config.dynamic_batching
        # The largest size alone is where a batch is cut anyway, so that preferring it says nothing.
        preferred = set(scheduler.preferred_batch_size) - {0}
        if preferred == {config.max_batch_size}:
            preferred = set()
        return replace(
            self._bounds(interface),
            merge_rows=prepared.curve.cap if prepared.curve is not None else 0,
            batching=batching,
            max_delay_ns=scheduler.max_queue_delay_microseconds * NS_PER_US if batching else 0,
            preferred_batch_rows=tuple(sorted(preferred)) if batching else (),
            priorities=priorities_of(config),
        )


def _run_times(prepared: PreparedModel) -> RunTimes:
    """What the runs are recorded in: with an objective, what learns from them."""
    instances = sum(group.threads.instances for group in prepared.groups)
    if not prepared.slo_ns:
        return RunTimes(instances)
    curve, limit = prepared.curve, max(1, prepared.config.max_batch_size)
    tuner = SloTuner(prepared.slo_ns, curve.cap or limit if curve is not None else limit, instances)
    for at in curve.points if curve is not None else ():
        tuner.learn(at.rows, round(at.rows / at.rows_per_s * NS_PER_S), time.monotonic_ns())
    return tuner


def _seams(config: ModelConfig, interface: ModelInterface, buckets: Buckets | None) -> tuple[Encoder, dict[str, Any]]:
    """What encodes a model's answers, and the named arguments of its runner: how its batches are made and cut."""
    seams: dict[str, Any] = {"has_batch_dimension": interface.max_batch_rows > 0}
    if buckets is not None:
        padded = PaddedEncoder(interface, buckets)
        return padded, seams | {"gather": gatherer(buckets, interface), "cut": padded.apart}
    if is_ragged(config):
        ragged = RaggedEncoder(interface, config)
        return ragged, seams | {"gather": RaggedGatherer(config), "cut": ragged.apart}
    return Encoder(interface), seams


def _sequence_policy(config: ModelConfig, policy: QueuePolicy) -> SequencePolicy:
    """How the sequences of a model are batched; `policy` has the bounds of its queue.

    There are as many groups of slots as instances were asked for, also when fewer run because there are fewer CPUs.
    """
    batching = config.sequence_batching
    strategy = batching.oldest if batching.HasField("oldest") else batching.direct
    queue = replace(
        policy,
        batching=True,
        max_delay_ns=strategy.max_queue_delay_microseconds * NS_PER_US,
        preferred_batch_rows=tuple(sorted(set(batching.oldest.preferred_batch_size))),
    )
    max_idle_ns = batching.max_sequence_idle_microseconds * NS_PER_US
    if batching.HasField("oldest"):
        return SequencePolicy(
            queue=queue, max_idle_ns=max_idle_ns, max_candidates=batching.oldest.max_candidate_sequences
        )
    return SequencePolicy(
        queue=queue,
        max_idle_ns=max_idle_ns,
        groups=sum(group.count for members in _placements(config).values() for group in members),
        min_utilization=batching.direct.minimum_slot_utilization,
    )


def _properties(prepared: PreparedModel, instances: int) -> dict[str, str]:
    """What ModelMetadata tells of how the model really runs, read back from its sessions."""
    first = prepared.groups[0]
    properties = {
        "execution_providers": ",".join(
            dict.fromkeys(name for group in prepared.groups for name in group.session.providers)
        ),
        "instances": str(instances),
        "intra_op_threads": str(first.threads.intra_op_threads),
    }
    if prepared.proof is not None:
        properties["batch_proof"] = str(prepared.proof)
    if prepared.curve is not None:
        properties["batch_curve"] = str(prepared.curve)
    if prepared.fallbacks:
        properties["provider_fallback"] = "; ".join(prepared.fallbacks)
    return properties
