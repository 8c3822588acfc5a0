"""Makes a served version of one on disk: prepared, scheduled, with instances, warmed up; or an ensemble of others."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from sluice_batching import RateLimiter
from sluice_server.execution.anticipating import AnticipatingInstance
from sluice_server.execution.ensemble import EnsembleModel, Part
from sluice_server.execution.gate import Gate
from sluice_server.execution.host import Host
from sluice_server.execution.inlets import Inlet
from sluice_server.execution.instance import Instance
from sluice_server.execution.preparation import prepare
from sluice_server.execution.queue_policies import queue_bounds
from sluice_server.execution.rate_limit import LimitedInstance, claim_of
from sluice_server.execution.scheduling import Scheduler
from sluice_server.execution.step import ArraysCall, BytesCall
from sluice_server.execution.warmup import warm_up
from sluice_server.observability.latencies import Latencies
from sluice_server.observability.statistics import ModelStatistics
from sluice_server.protocol.encode import Encoder
from sluice_server.protocol.interface import ModelInterface
from sluice_server.repository.autocomplete import normalize
from sluice_server.repository.ensembles import check_parts, graph_of, is_ensemble
from sluice_server.repository.labels import read_labels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sluice_batching import ExpiryTimer
    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.placement import DeviceGroup
    from sluice_server.execution.response_cache import ResponseCache
    from sluice_server.execution.scheduling import Scheduling
    from sluice_server.execution.served import Served
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
        completed, interface = prepared.config, prepared.interface
        if prepared.notice:
            logger.warning(prepared.notice, extra={"model": completed.name, "version": version})
        cache = self._cache_for(completed, version)
        statistics = self._statistics(caches=cache is not None)
        scheduling = Scheduler(prepared, self._settings, statistics, self._to_status, cache).schedule()
        instances = [
            self._instance(f"{completed.name}-{number}", scheduling, group, number)
            for group in prepared.groups
            for number in range(group.threads.instances)
        ]
        lends = len(prepared.groups) == 1 and not any(isinstance(each, LimitedInstance) for each in instances)
        sessions = [(group.session, group.threads.instances) for group in prepared.groups]
        warm_up(completed, directory.path, interface, scheduling.runner, sessions)
        return scheduling.make_model(
            completed,
            interface,
            scheduling.queue,
            instances,
            runner=scheduling.runner,
            statistics=statistics,
            to_status=self._to_status,
            timer=self._timer,
            properties=prepared.properties,
            notice=prepared.notice,
            curve=prepared.findings.curve,
            is_tuned=scheduling.is_tuned,
            common_session=prepared.groups[0].session if lends else None,
        )

    def _instance(self, name: str, scheduling: Scheduling, group: DeviceGroup, number: int) -> Instance:
        queue, runner = scheduling.queue, scheduling.runner
        if self._limiter is not None:
            claim = claim_of(group.limits[number], group.device, self._limiter, name.rpartition("-")[0])
            if claim is not None:
                return LimitedInstance(name, queue, group.session, runner, self._limiter, claim)
        if scheduling.anticipation is not None:
            return AnticipatingInstance(name, queue, group.session, runner, scheduling.anticipation)
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
        graph = graph_of(config)
        places = config.ensemble_scheduling.max_inflight_requests
        bound = [
            Part(
                model,
                tuple(Inlet(model.interface, name, tensor) for name, tensor in step.takes.items()),
                dict(step.makes),
                ArraysCall if model.answers_in_arrays() else BytesCall,
                Gate(places, queue_bounds(model.interface, self._settings)) if places else None,
            )
            for step, model in zip(graph.steps, parts, strict=True)
        ]
        encoder = Encoder(interface)
        return EnsembleModel(config, interface, graph, bound, encoder, self._statistics(), self._to_status, self._timer)

    def _statistics(self, *, caches: bool = False) -> ModelStatistics:
        latencies = None if self._latencies is None else Latencies(self._latencies)
        return ModelStatistics(latencies=latencies, caches=caches)

    def _cache_for(self, config: ModelConfig, version: int) -> ResponseCache | None:
        if config.response_cache.enable and self._cache is None:
            logger.warning(NO_CACHE, extra={"model": config.name, "version": version})
        return self._cache if config.response_cache.enable else None
