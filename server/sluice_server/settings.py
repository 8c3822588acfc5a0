"""The server's settings: frozen, valid once built, and the only thing that the parts are configured from.

Triton's flag names where Triton has the flag. A Triton flag that is not there yet is in `REFUSED` and is refused by
name, with what to do instead where there is something.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from sluice_server.cache_flags import cache_bytes
from sluice_server.flag_values import SettingsError, port, positive, switch, whole
from sluice_server.observability.logs import LogOptions
from sluice_server.observability.trace_control import TraceConfig
from sluice_server.repository.manager import ControlMode
from sluice_server.trace_flags import trace_config
from sluice_server.transport.choice import TransportChoice
from sluice_server.transport_flags import add_transport_flags, native_flags, transport_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_server.transport.options import TransportOptions

QUEUE_ROWS_DEFAULT = 65_536
"""Rows that may wait per model: at the slowest useful model (some 100 rows/s) already minutes of work."""

QUEUE_BYTES_DEFAULT = 1 << 30
"""Bytes of requests that may wait per model: 1 GiB, a third of the memory of a small pod."""

MAX_BATCH_DEFAULT = 4
"""Triton's default-max-batch-size for models whose configuration is completed from the file."""

POLL_INTERVAL_S = 15.0
"""Triton's repository-poll-secs."""

HTTP_INPUT_BYTES_DEFAULT = 64 << 20
"""Triton's default of --http-max-input-size."""


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """One HTTP listener; None instead of it switches it off."""

    address: str = "0.0.0.0"  # noqa: S104 - as in Triton
    port: int = 8000


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How models are found, completed and run."""

    repositories: tuple[Path, ...]
    control_mode: ControlMode = ControlMode.NONE
    load_models: tuple[str, ...] = ()
    poll_interval_s: float = POLL_INTERVAL_S
    load_threads: int = 4
    auto_complete: bool = True
    default_max_batch_size: int = MAX_BATCH_DEFAULT
    allow_provider_fallback: bool = False
    queue_rows: int = QUEUE_ROWS_DEFAULT
    queue_bytes: int = QUEUE_BYTES_DEFAULT
    cache_bytes: int = 0
    """What the response cache may hold; 0: there is none."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Everything that `sluice serve` was told."""

    models: ModelSettings
    grpc: TransportOptions
    http: HttpSettings | None
    metrics: HttpSettings | None
    log: LogOptions
    http_max_input_bytes: int = HTTP_INPUT_BYTES_DEFAULT
    transport: TransportChoice = TransportChoice.AUTO
    native_flags: tuple[str, ...] = ()
    """The flags that were given and that only the native transport can keep."""
    server_id: str = "triton"
    exit_on_error: bool = True
    strict_readiness: bool = True
    exit_timeout_s: float = 30.0
    triton_status_codes: bool = False
    allow_any_control: bool = False
    allow_client_shm: bool = False
    trace: TraceConfig = field(default_factory=TraceConfig)


REFUSED: dict[str, str] = {
    "--allow-cpu-metrics": "the CPU metrics are always there",
    "--allow-gpu-metrics": "GPU metrics are not there yet",
    "--allow-sagemaker": "the SageMaker front end is not there",
    "--allow-vertex-ai": "the Vertex AI front end is not there",
    "--backend-directory": "there is one backend, ONNX Runtime, and it is built in",
    "--buffer-management-thread-count": "tensors are views over the received message and are not copied by threads",
    "--cache-directory": "there is one response cache, local, and it is built in",
    "--cuda-memory-pool-byte-size": "ONNX Runtime's own allocator is used: pass gpu_mem_limit to the CUDA provider",
    "--cuda-virtual-address-size": "ONNX Runtime's own allocator is used",
    "--enable-peer-access": "peer access is ONNX Runtime's affair",
    "--grpc-header-forward-pattern": "headers are not forwarded to models",
    "--grpc-infer-allocation-pool-size": "there is no pool of request objects",
    "--grpc-infer-thread-count": "one event loop takes all requests",
    "--grpc-max-response-pool-size": "there is no pool of response objects",
    "--grpc-restricted-protocol": "restricting protocols by header is not there yet",
    "--host-policy": "host policies are not there",
    "--http-header-forward-pattern": "headers are not forwarded to models",
    "--http-restricted-api": "restricting protocols by header is not there yet",
    "--http-thread-count": "one event loop takes all HTTP requests",
    "--metrics-config": "the metrics are fixed",
    "--metrics-interval-ms": "metrics are read at the moment of the scrape",
    "--min-supported-compute-capability": "ONNX Runtime decides which GPUs it can use",
    "--model-config-name": "custom configuration names are not there",
    "--model-load-gpu-limit": "there is no limit on a GPU's memory at load",
    "--model-load-retry-count": "a load that failed is not tried again",
    "--model-namespacing": "model names are unique over all repositories",
    "--pinned-memory-pool-byte-size": "there is no pinned memory pool",
    "--rate-limit": "the rate limiter is not there yet",
    "--rate-limit-resource": "the rate limiter is not there yet",
    "--repoagent-directory": "repository agents are not there",
    "--reuse-http-port": "HTTP ports are not shared",
    "--sagemaker-port": "the SageMaker front end is not there",
    "--sagemaker-safe-port-range": "the SageMaker front end is not there",
    "--sagemaker-thread-count": "the SageMaker front end is not there",
    "--strict-model-config": "it is deprecated in Triton: use --disable-auto-complete-config",
    "--trace-count": "it is deprecated in Triton: use --trace-config count=N",
    "--trace-file": "it is deprecated in Triton: use --trace-config triton,file=FILE",
    "--trace-level": "it is deprecated in Triton: use --trace-config level=TIMESTAMPS",
    "--trace-log-frequency": "it is deprecated in Triton: use --trace-config triton,log-frequency=N",
    "--trace-rate": "it is deprecated in Triton: use --trace-config rate=N",
    "--vertex-ai-default-model": "the Vertex AI front end is not there",
    "--vertex-ai-port": "the Vertex AI front end is not there",
    "--vertex-ai-thread-count": "the Vertex AI front end is not there",
}
"""Triton's flags that this version does not have, with the reason."""


class _Parser(argparse.ArgumentParser):
    """argparse, except that a wrong command line raises."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def parse_serve(argv: Sequence[str]) -> ServerSettings:
    """Build the settings from `sluice serve`'s arguments; `SettingsError` names the flag that is wrong."""
    refuse_unimplemented(argv)
    return _settings(_serve_parser().parse_args(argv))


def refuse_unimplemented(argv: Sequence[str]) -> None:
    """Raise for the first of Triton's flags that this version does not have."""
    for argument in argv:
        flag = argument.partition("=")[0]
        if flag in REFUSED:
            raise SettingsError(f"{flag} is a flag of Triton that is not implemented here: {REFUSED[flag]}")


def _serve_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="sluice serve",
        description="Serve the ONNX models of a Triton model repository over gRPC.",
        allow_abbrev=False,
    )
    _add_model_flags(parser)
    _add_listener_flags(parser)
    _add_life_flags(parser)
    _add_log_flags(parser)
    return parser


def _add_model_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    add = group.add_argument
    add("--model-repository", "--model-store", action="append", type=Path, required=True, metavar="DIR",
        help="a folder of models in Triton's layout; may be given several times")  # fmt: skip
    add("--model-control-mode", choices=[*ControlMode], default=ControlMode.NONE,
        help="none: load everything at start; poll: and follow changes; explicit: load --load-model and what load"
        " calls ask for")  # fmt: skip
    add("--repository-poll-secs", type=positive, metavar="S",
        help=f"in mode poll: how often to look for changes ({POLL_INTERVAL_S:g})")  # fmt: skip
    add("--load-model", action="append", default=[], metavar="NAME",
        help="in explicit mode: load this model at start, * for all; may be given several times")  # fmt: skip
    add("--model-load-thread-count", type=whole, default=4, metavar="N", help="models loaded at the same time")
    add("--disable-auto-complete-config", action="store_true", help="take configurations as they are written only")
    add("--backend-config", action="append", default=[], metavar="onnxruntime,KEY=VALUE",
        help="the one key is default-max-batch-size: for models that name no batch size (4)")  # fmt: skip
    add("--allow-provider-fallback", action="store_true",
        help="run on the CPU, with a warning, when an execution provider that a model asks for is missing")  # fmt: skip
    add("--default-queue-rows", type=whole, default=QUEUE_ROWS_DEFAULT, metavar="N",
        help="rows that may wait per model (%(default)s); 0: no limit, as in Triton")  # fmt: skip
    add("--default-queue-bytes", type=whole, default=QUEUE_BYTES_DEFAULT, metavar="N",
        help="bytes of requests that may wait per model (%(default)s); 0: no limit")  # fmt: skip
    add("--cache-config", action="append", default=[], metavar="local,size=BYTES",
        help="for models with response_cache: keep answers, up to so many bytes in all (no cache)")  # fmt: skip
    add("--response-cache-byte-size", type=whole, metavar="BYTES",
        help="deprecated in Triton: the same as --cache-config=local,size=BYTES; 0: no cache")  # fmt: skip


def _add_listener_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("listeners").add_argument
    for name, default in (("grpc", 8001), ("http", 8000), ("metrics", 8002)):
        add(f"--{name}-port", type=port, default=default, metavar="PORT", help="(%(default)s; 0: any that is free)")
        add(f"--{name}-address", metavar="HOST", help="the address to listen on (0.0.0.0)")
        add(f"--allow-{name}", type=switch, default=True, metavar="true|false", help="listen at all (true)")
    add("--http-max-input-size", type=whole, default=HTTP_INPUT_BYTES_DEFAULT, metavar="BYTES",
        help="the largest body that a REST request may have, compressed or not (%(default)s)")  # fmt: skip
    add_transport_flags(add)


def _add_life_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("life").add_argument
    add("--id", default="triton", metavar="NAME", help="the server's name in its metadata (%(default)s)")
    add("--exit-on-error", type=switch, default=True, metavar="true|false",
        help="end when a model fails to load at start (true); false: serve the others")  # fmt: skip
    add("--strict-readiness", type=switch, default=True, metavar="true|false",
        help="ready only when every model that was to be loaded is (true)")  # fmt: skip
    add("--exit-timeout-secs", type=whole, default=30, metavar="S",
        help="how long accepted requests may take after SIGTERM (%(default)s)")  # fmt: skip
    add("--status-codes", choices=["exact", "triton"], default="exact",
        help="triton: a full queue and a queue timeout are UNAVAILABLE, as there (exact)")  # fmt: skip
    add("--allow-control", choices=["local", "any"], default="local",
        help="who may load and unload models and share memory: clients on this machine, or any (local)")  # fmt: skip
    add("--allow-client-shm", type=switch, nargs="?", const=True, default=False, metavar="true|false",
        help="let clients pass tensors in shared memory (false)")  # fmt: skip


def _add_log_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("log").add_argument
    for level in ("info", "warning", "error"):
        add(f"--log-{level}", type=switch, default=True, metavar="true|false", help=f"log at level {level} (true)")
    add("--log-verbose", type=whole, default=0, metavar="LEVEL", help="1 and more: log details (0)")
    add("--log-format", choices=["default", "ISO8601", "json"], default="default", help="(%(default)s)")
    add("--log-file", type=Path, metavar="FILE", help="log there and not to standard error")
    add("--trace-config", action="append", default=[], metavar="[MODE,]SETTING=VALUE",
        help="level=TIMESTAMPS|TENSORS|OFF, rate=N, count=N, mode=triton|opentelemetry; triton,file=FILE;"
        " triton,log-frequency=N; opentelemetry,url=URL or resource=NAME=VALUE; several allowed")  # fmt: skip


def _settings(args: argparse.Namespace) -> ServerSettings:
    if args.load_model and args.model_control_mode != ControlMode.EXPLICIT:
        raise SettingsError("--load-model needs --model-control-mode=explicit: the other modes load every model")
    if args.repository_poll_secs is not None and args.model_control_mode != ControlMode.POLL:
        raise SettingsError("--repository-poll-secs needs --model-control-mode=poll: the other modes do not look")
    if not args.allow_grpc:
        raise SettingsError(
            "--allow-grpc=false is not implemented here: gRPC is always served; --grpc-address=127.0.0.1 hides it"
        )
    return ServerSettings(
        models=ModelSettings(
            repositories=tuple(args.model_repository),
            control_mode=ControlMode(args.model_control_mode),
            load_models=tuple(args.load_model),
            poll_interval_s=float(args.repository_poll_secs or POLL_INTERVAL_S),
            load_threads=max(1, args.model_load_thread_count),
            auto_complete=not args.disable_auto_complete_config,
            default_max_batch_size=_default_max_batch_size(args.backend_config),
            allow_provider_fallback=args.allow_provider_fallback,
            queue_rows=args.default_queue_rows,
            queue_bytes=args.default_queue_bytes,
            cache_bytes=cache_bytes(args.cache_config, args.response_cache_byte_size),
        ),
        grpc=transport_options(args, _address(args.grpc_address)),
        http=HttpSettings(_address(args.http_address), args.http_port) if args.allow_http else None,
        metrics=_metrics_settings(args),
        http_max_input_bytes=args.http_max_input_size,
        log=LogOptions(
            info=args.log_info,
            warning=args.log_warning,
            error=args.log_error,
            verbose_level=args.log_verbose,
            format=args.log_format,
            file=args.log_file,
        ),
        transport=TransportChoice(args.transport),
        native_flags=native_flags(args),
        server_id=args.id,
        exit_on_error=args.exit_on_error,
        strict_readiness=args.strict_readiness,
        exit_timeout_s=float(args.exit_timeout_secs),
        triton_status_codes=args.status_codes == "triton",
        allow_any_control=args.allow_control == "any",
        allow_client_shm=args.allow_client_shm,
        trace=trace_config(args.trace_config),
    )


def _address(given: str | None) -> str:
    if not given:
        return "0.0.0.0"  # noqa: S104 - as in Triton: clients are on other hosts
    return given[1:-1] if given.startswith("[") and given.endswith("]") else given


def _metrics_settings(args: argparse.Namespace) -> HttpSettings | None:
    """As in Triton, metrics listen where HTTP does unless told otherwise."""
    return (
        HttpSettings(_address(args.metrics_address or args.http_address), args.metrics_port)
        if args.allow_metrics
        else None
    )


def _default_max_batch_size(entries: Sequence[str]) -> int:
    """The one setting of `--backend-config=BACKEND,KEY=VALUE` that there is here."""
    value = str(MAX_BATCH_DEFAULT)
    for entry in entries:
        backend, _, setting = entry.partition(",")
        key, _, text = setting.partition("=")
        if backend not in ("", "onnxruntime") or key != "default-max-batch-size":
            raise SettingsError(
                f"--backend-config={entry} is not implemented here: only onnxruntime,default-max-batch-size=N is"
            )
        value = text
    if not value.isdecimal():
        raise SettingsError(f"--backend-config: default-max-batch-size must be a whole number >= 0, got {value!r}")
    return int(value)
