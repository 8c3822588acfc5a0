"""The server's settings: frozen, valid once built, and the only thing that the parts are configured from.

`server_flags.py` has the flags themselves, `refused_flags.py` those of Triton that are not there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sluice_server.cache_flags import cache_bytes
from sluice_server.capture_flags import capture_options
from sluice_server.flag_values import SettingsError
from sluice_server.front_flags import grpc_restrictions, http_restrictions
from sluice_server.metrics_flags import metrics_options
from sluice_server.observability.logs import LogOptions
from sluice_server.observability.metrics import MetricsOptions
from sluice_server.observability.trace_control import TraceConfig
from sluice_server.rate_limit_flags import rate_limit
from sluice_server.refused_flags import refuse_unimplemented
from sluice_server.repository.manager import ControlMode
from sluice_server.server_flags import (
    HTTP_INPUT_BYTES_DEFAULT,
    HTTP_WORKERS_DEFAULT,
    MAX_BATCH_DEFAULT,
    POLL_INTERVAL_S,
    QUEUE_BYTES_DEFAULT,
    QUEUE_ROWS_DEFAULT,
    serve_parser,
)
from sluice_server.trace_flags import trace_config
from sluice_server.transport.choice import TransportChoice
from sluice_server.transport_flags import native_flags, transport_options

if TYPE_CHECKING:
    import argparse
    import re
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from sluice_batching import Resource
    from sluice_server.observability.capture import CaptureOptions
    from sluice_server.security.restrictions import Restriction
    from sluice_server.transport.options import TransportOptions


@dataclass(frozen=True, slots=True)
class HttpSettings:
    """One HTTP listener; None instead of it switches it off."""

    address: str = "0.0.0.0"  # noqa: S104 - as in Triton
    port: int = 8000
    reuse_port: bool = False


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """How models are found, completed and run."""

    repositories: tuple[Path, ...]
    control_mode: ControlMode = ControlMode.NONE
    load_models: tuple[str, ...] = ()
    poll_interval_s: float = POLL_INTERVAL_S
    load_threads: int = 4
    load_retries: int = 0
    auto_complete: bool = True
    default_max_batch_size: int = MAX_BATCH_DEFAULT
    allow_provider_fallback: bool = False
    queue_rows: int = QUEUE_ROWS_DEFAULT
    queue_bytes: int = QUEUE_BYTES_DEFAULT
    config_name: str = ""
    cache_bytes: int = 0
    """What the response cache may hold; 0: there is none."""
    rate_limit: Mapping[Resource, int] | None = None
    """How many copies there are of the resources of rate limiters, where that was said; None: there is no limiter."""
    curve_directory: Path | None = None
    """Where measured batch curves are kept; None: in the user's cache."""


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Everything that `sluice serve` was told."""

    models: ModelSettings
    grpc: TransportOptions | None
    http: HttpSettings | None
    metrics: HttpSettings | None
    log: LogOptions
    metrics_options: MetricsOptions = field(default_factory=MetricsOptions)
    grpc_restricted: Mapping[str, Restriction] = field(default_factory=dict)
    """By the names of RPCs."""
    http_restricted: Mapping[str, Restriction] = field(default_factory=dict)
    grpc_header_pattern: re.Pattern[str] | None = None
    http_header_pattern: re.Pattern[str] | None = None
    """Names of headers that become parameters of their requests."""
    http_workers: int = HTTP_WORKERS_DEFAULT
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
    capture: CaptureOptions | None = None
    """None: no requests are captured."""


def parse_serve(argv: Sequence[str]) -> ServerSettings:
    """Build the settings from `sluice serve`'s arguments; `SettingsError` names the flag that is wrong."""
    refuse_unimplemented(argv)
    return _settings(serve_parser().parse_args(argv))


def _settings(args: argparse.Namespace) -> ServerSettings:
    if args.load_model and args.model_control_mode != ControlMode.EXPLICIT:
        raise SettingsError("--load-model needs --model-control-mode=explicit: the other modes load every model")
    if args.repository_poll_secs is not None and args.model_control_mode != ControlMode.POLL:
        raise SettingsError("--repository-poll-secs needs --model-control-mode=poll: the other modes do not look")
    if not (args.allow_grpc or args.allow_http):
        raise SettingsError("--allow-grpc=false and --allow-http=false leave nothing to serve with: allow one")
    return ServerSettings(
        models=_model_settings(args),
        grpc=transport_options(args, _address(args.grpc_address)) if args.allow_grpc else None,
        http=_http_settings(args),
        metrics=_metrics_settings(args),
        metrics_options=metrics_options(args),
        grpc_restricted=grpc_restrictions(args),
        http_restricted=http_restrictions(args),
        grpc_header_pattern=args.grpc_header_forward_pattern,
        http_header_pattern=args.http_header_forward_pattern,
        http_workers=args.http_thread_count,
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
        capture=capture_options(args),
    )


def _model_settings(args: argparse.Namespace) -> ModelSettings:
    return ModelSettings(
        repositories=tuple(args.model_repository),
        control_mode=ControlMode(args.model_control_mode),
        load_models=tuple(args.load_model),
        poll_interval_s=float(args.repository_poll_secs or POLL_INTERVAL_S),
        load_threads=max(1, args.model_load_thread_count),
        load_retries=args.model_load_retry_count,
        auto_complete=not (args.disable_auto_complete_config or args.strict_model_config),
        default_max_batch_size=_default_max_batch_size(args.backend_config),
        allow_provider_fallback=args.allow_provider_fallback,
        queue_rows=args.default_queue_rows,
        queue_bytes=args.default_queue_bytes,
        config_name=args.model_config_name,
        cache_bytes=cache_bytes(args.cache_config, args.response_cache_byte_size),
        rate_limit=rate_limit(args.rate_limit, args.rate_limit_resource),
        curve_directory=args.batch_curve_cache,
    )


def _address(given: str | None) -> str:
    if not given:
        return "0.0.0.0"  # noqa: S104 - as in Triton: clients are on other hosts
    return given[1:-1] if given.startswith("[") and given.endswith("]") else given


def _http_settings(args: argparse.Namespace) -> HttpSettings | None:
    if not args.allow_http:
        return None
    return HttpSettings(_address(args.http_address), args.http_port, args.reuse_http_port)


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
