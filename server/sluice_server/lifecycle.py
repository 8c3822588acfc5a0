"""The server as a whole: what is built from the settings, and in which order it starts and stops.

build    models' loader and manager, RPCs, transport, HTTP listeners; nothing is opened yet
start    HTTP (live, not ready, metrics), models, gRPC, ready
stop     not ready, no new calls, accepted calls are finished, queues run dry, HTTP last
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import logging
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from sluice_batching import ExpiryTimer
from sluice_server.execution import runtime
from sluice_server.execution.cuda_driver import find_driver
from sluice_server.execution.loader import ModelLoader
from sluice_server.execution.providers import check_distributions
from sluice_server.execution.response_cache import ResponseCache
from sluice_server.execution.shared_memory import RegionTable
from sluice_server.http.app import HttpFront, Metrics
from sluice_server.http.server import HttpListener, HttpServer
from sluice_server.observability import metrics
from sluice_server.observability.capture import Capture
from sluice_server.observability.host import HostReader
from sluice_server.observability.latencies import LatencyOptions, LatencySnapshot
from sluice_server.observability.logs import LogControl
from sluice_server.observability.trace_control import TraceControl, TraceMode
from sluice_server.observability.tracing import create_tracer
from sluice_server.protocol import health, reflection
from sluice_server.protocol.capturable import Preparation
from sluice_server.protocol.captured import CapturingDispatcher
from sluice_server.protocol.dispatch import Dispatcher
from sluice_server.protocol.log_settings import LogSettings
from sluice_server.protocol.rest import Rest
from sluice_server.protocol.restricted import RestrictedHandler
from sluice_server.protocol.rpcs import EXTENSIONS, SERVICE, ServerIdentity, rpc_table, settings_table
from sluice_server.protocol.shared_memory import SharedMemory
from sluice_server.protocol.trace_settings import TraceSettings
from sluice_server.repository.layout import Repositories
from sluice_server.repository.manager import ControlMode, ModelManager
from sluice_server.repository.poller import Poller
from sluice_server.security.control import ControlPolicy
from sluice_server.status import StatusMapper
from sluice_server.transport.certificates import check_tls
from sluice_server.transport.choice import TransportChoice, TransportUnavailable, choose, native_problem
from sluice_server.transport.grpcio import GrpcioTransport
from sluice_server.transport.native import NativeTransport
from sluice_server.transport.none import NoTransport

if TYPE_CHECKING:
    import re
    from collections.abc import Callable, Mapping

    from sluice_server.execution.cuda_driver import CudaDriver
    from sluice_server.observability.capture import CaptureOptions
    from sluice_server.protocol.rpcs import Rpc
    from sluice_server.settings import HttpSettings, ServerSettings
    from sluice_server.status import Code
    from sluice_server.transport import Transport
    from sluice_server.transport.call import Call, LendingHandler

logger = logging.getLogger(__name__)

SLOW_CALLS_MAX = 4
"""Threads for load, unload and index calls: one model may take minutes and must not hold up the others."""

TRACE_FLUSH_S = 5.0
"""How long the end of the process waits for a trace collector."""

LAST_LOOK_S = 0.5
"""What threads that have nothing to do get to see that they are to end, also when the calls took all the time."""


class StartError(Exception):
    """The server cannot start; the text says why."""


def check_runtime() -> None:
    """Raise StartError unless exactly one distribution of ONNX Runtime is installed."""
    problem = check_distributions()
    if problem is not None:
        raise StartError(problem)


class Server:
    """One server in this process. `start`, then `stop`; both from the same thread."""

    def __init__(
        self,
        settings: ServerSettings,
        environ: Mapping[str, str],
        find_cuda: Callable[[], tuple[CudaDriver | None, str]] = find_driver,
    ) -> None:
        """Build every part; `start` opens the ports. `find_cuda` is asked where clients may share memory."""
        runtime.configure_runtime()
        self._settings = settings
        self._version = importlib.metadata.version("sluice")
        self._timer = ExpiryTimer()
        self._slow_pool = ThreadPoolExecutor(SLOW_CALLS_MAX, thread_name_prefix="slow-call")
        by_settings = settings.trace.mode is TraceMode.OPENTELEMETRY
        self._tracer = create_tracer(environ, self._version, otlp=settings.trace.otlp if by_settings else None)
        self._traces = TraceControl(settings.trace, self._tracer)
        self._capture = _capture(settings.capture)
        self._host = HostReader(interval_ns=settings.metrics_options.interval_ns)
        to_status = StatusMapper(triton_codes=settings.triton_status_codes)
        self._cache = ResponseCache(settings.models.cache_bytes) if settings.models.cache_bytes else None
        self._health = health.Health()
        self._reflection = reflection.Reflection((SERVICE.full_name, health.SERVICE.full_name))
        self.manager = self._create_manager(to_status, environ)
        self._poller = Poller(self.manager.poll, settings.models.poll_interval_s)
        control = ControlPolicy(allow_any=settings.allow_any_control)
        regions = SharedMemory(RegionTable(), control, *find_cuda()) if settings.allow_client_shm else SharedMemory()
        rpcs = self._create_rpcs(control, regions)
        self._dispatcher = self._create_dispatcher(
            {**rpcs, health.CHECK: self._health.check},
            to_status,
            regions,
            settings.grpc_header_pattern,
            {health.WATCH: self._health.watch, reflection.INFO: self._reflection.answer},
        )
        self.transport = self._create_transport()
        # REST has a dispatcher of its own, as each is for one thread.
        self._rest = Rest(
            self._create_dispatcher(rpcs, to_status, regions, settings.http_header_pattern),
            self.manager,
            to_status,
            self._version,
            settings.http_restricted,
        )
        self._listeners = {
            "http": _listener(HttpFront(self._rest, to_status, settings.http_max_input_bytes), settings.http),
            "metrics": _listener(HttpFront(Metrics(self.render_metrics), to_status), settings.metrics),
        }
        listeners = [listener for listener in self._listeners.values() if listener is not None]
        self._http = HttpServer(listeners, settings.http_workers)

    def _create_manager(self, to_status: StatusMapper, environ: Mapping[str, str]) -> ModelManager:
        models, latencies = self._settings.models, self._settings.metrics_options.latencies
        kept = latencies if latencies != LatencyOptions() else None
        return ModelManager(
            Repositories(models.repositories, models.config_name),
            ModelLoader(models, to_status, self._timer, environ, kept, self._cache),
            mode=models.control_mode,
            strict_readiness=self._settings.strict_readiness,
            load_threads=models.load_threads,
            load_retries=models.load_retries,
            on_readiness=self._set_serving,
        )

    def _create_dispatcher(
        self,
        rpcs: Mapping[str, Rpc],
        to_status: StatusMapper,
        regions: SharedMemory,
        forward: re.Pattern[str] | None,
        streams: Mapping[str, Callable[[Call], None]] | None = None,
    ) -> Dispatcher:
        if forward is not None and self._tracer is None and not self._traces.traces:
            logger.warning("headers are forwarded to traces only, and nothing is traced (--trace-config)")
        # Where the settings choose whom to trace, the environment's sampler is not asked.
        tracer = None if self._settings.trace.mode is TraceMode.OPENTELEMETRY else self._tracer
        dispatcher = Dispatcher if self._capture is None else functools.partial(CapturingDispatcher, self._capture)
        return dispatcher(
            self.manager,
            rpcs,
            to_status,
            self._slow_pool,
            tracer,
            streams=streams,
            regions=regions,
            traces=self._traces,
            forward=forward,
        )

    def _create_rpcs(self, control: ControlPolicy, regions: SharedMemory) -> Mapping[str, Rpc]:
        identity = ServerIdentity(self._settings.server_id, self._version, EXTENSIONS + regions.extensions)
        trace_settings = TraceSettings(self._traces, self.manager, control)
        log_settings = LogSettings(LogControl(self._settings.log), control)
        return {
            **rpc_table(self.manager, identity, control, regions),
            **settings_table(trace_settings, log_settings),
        }

    def _create_transport(self) -> Transport:
        settings = self._settings
        if settings.grpc is None:
            return NoTransport()
        problem = "" if settings.transport is TransportChoice.GRPCIO else native_problem(self._version)
        try:
            chosen = choose(settings.transport, problem, settings.native_flags)
        except TransportUnavailable as error:
            raise StartError(str(error)) from error
        if chosen.notice:
            logger.warning(chosen.notice)
        if settings.grpc.tls is not None:
            check_tls(settings.grpc.tls)
        handler: LendingHandler = self._dispatcher
        methods = self._dispatcher.methods
        if settings.grpc_restricted:
            handler = RestrictedHandler(handler, methods, settings.grpc_restricted)
        if chosen.name == TransportChoice.NATIVE:
            return NativeTransport(handler, methods, settings.grpc, lends=True)
        return GrpcioTransport(handler, methods, settings.grpc)

    @property
    def http_port(self) -> int:
        """Where REST and the probes are answered, known after `start`; 0 when they are switched off."""
        return self._port("http")

    @property
    def metrics_port(self) -> int:
        """Where metrics are scraped, known after `start`; 0 when that is switched off."""
        return self._port("metrics")

    def _port(self, name: str) -> int:
        listener = self._listeners[name]
        return 0 if listener is None else listener.port

    def start(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Load the models and open the doors; `StartError` when a model failed and errors end the server.

        When `should_stop` says so, the loads under way are the last ones, and the doors stay shut.
        """
        self._http.start()
        failed = self.manager.start(self._settings.models.load_models, should_stop)
        if should_stop():
            return
        if failed and self._settings.exit_on_error:
            raise StartError(
                f"{', '.join(failed)} failed to load (the reasons are above);"
                " start with --exit-on-error=false to serve the other models"
            )
        if self._capture is not None:
            try:
                self._capture.open()
            except OSError as error:
                raise StartError(f"--capture-file: {error}") from error
        self.transport.start()
        if self._settings.models.control_mode is ControlMode.POLL:
            self._poller.start()
        # What is loaded by now lives as long as the process: the collector need not look at it again.
        gc.collect()
        gc.freeze()
        logger.info(
            "server is serving",
            extra={
                "version": self._version,
                "transport": self.transport.name,
                "grpc": ",".join(self.transport.endpoints) or "off",
                "http": self.http_port or "off",
                "metrics": self.metrics_port or "off",
                "ready": self.manager.server_ready,
            },
        )

    def stop(self) -> bool:
        """Finish what was accepted and end; False when time ran out before everything was answered."""
        until = time.monotonic() + self._settings.exit_timeout_s
        self._poller.stop()
        # A stream on which nothing is due must not hold the end of the server.
        self._dispatcher.stop()
        self._rest.stop()
        self.manager.drain()
        self._health.stop()
        self._reflection.stop()
        self.transport.stop(self._settings.exit_timeout_s)
        # One that took all the time has ended calls without an answer; their runs may be over soon, or ended with them.
        in_time = time.monotonic() < until or not self._settings.exit_timeout_s
        finished = self._poller.join(max(LAST_LOOK_S, until - time.monotonic()))
        finished &= self.manager.stop(max(LAST_LOOK_S, until - time.monotonic()))
        finished &= self._end_slow_calls(max(LAST_LOOK_S, until - time.monotonic()))
        self._timer.stop()
        self._http.stop()
        self._traces.close()
        if self._capture is not None:
            self._capture.close()
        if self._tracer is not None:
            self._tracer.shutdown(TRACE_FLUSH_S)
        logger.info("server has stopped", extra={"all_answered": finished and in_time})
        return finished

    def _end_slow_calls(self, timeout_s: float) -> bool:
        """Wait for a load that is under way; False when it takes longer, and would hold the interpreter's end too."""
        waiting = threading.Thread(target=self._slow_pool.shutdown, kwargs={"cancel_futures": True}, daemon=True)
        waiting.start()
        waiting.join(timeout_s)
        return not waiting.is_alive()

    def render_metrics(self) -> bytes:
        """The body of GET /metrics, read from the counters as they are now."""
        models = [
            metrics.ModelMetrics(
                name=model.interface.name,
                version=model.interface.version,
                snapshot=model.statistics.snapshot(),
                pending_requests=waiting.requests,
                queue_rows=waiting.rows,
                queue_bytes=waiting.size_bytes,
                merge_rows=model.merge_rows,
                batch_rates=model.batch_rates,
                latencies=model.statistics.latencies.snapshot() if model.statistics.latencies else LatencySnapshot(),
            )
            for model in self.manager.served()
            for waiting in (model.waiting(),)
        ]
        host = self._host.read()
        usage = None if self._cache is None else self._cache.usage()
        captured = None if self._capture is None else self._capture.usage()
        return metrics.render(
            models,
            metrics.ServerMetrics(self._version, self.rpc_outcomes(), host, usage, captured),
            self._settings.metrics_options,
        )

    def rpc_outcomes(self) -> Mapping[tuple[str, Code], int]:
        """How many calls of each RPC, by its path, have ended with each code, whether over gRPC or REST."""
        outcomes = Counter(self.transport.outcomes())
        outcomes.update(self._rest.outcomes())
        return outcomes

    def _set_serving(self, name: str, ready: bool) -> None:
        self._health.set_serving(name, serving=ready)
        if not name:
            self._health.set_serving(SERVICE.full_name, serving=ready)


def _capture(options: CaptureOptions | None) -> Capture | None:
    if options is None:
        return None
    try:
        return Capture(options, Preparation(options.redact, every_request=options.rate == 1))
    except OSError as error:
        raise StartError(f"--capture-file: {error}") from error


def _listener(app: HttpFront, settings: HttpSettings | None) -> HttpListener | None:
    if settings is None:
        return None
    return HttpListener(app, settings.address, settings.port, reuse_port=settings.reuse_port)
