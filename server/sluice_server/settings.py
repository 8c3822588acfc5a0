"""The server's settings: frozen, valid once built, and the only thing that the parts are configured from.

Triton's flag names where Triton has the flag. A Triton flag that is not there yet is in `REFUSED` and is refused by
name, with what to do instead where there is something.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from sluice_server.observability.logs import LogOptions
from sluice_server.repository.manager import ControlMode
from sluice_server.transport.options import (
    CONNECTIONS_MAX,
    HEADER_BYTES_MAX,
    MESSAGE_BYTES_MAX,
    STREAMS_MAX,
    UNIX_PREFIX,
    Compression,
    TlsFiles,
    TransportOptions,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

QUEUE_ROWS_DEFAULT = 65_536
"""Rows that may wait per model: at the slowest useful model (some 100 rows/s) already minutes of work."""

QUEUE_BYTES_DEFAULT = 1 << 30
"""Bytes of requests that may wait per model: 1 GiB, a third of the memory of a small pod."""

MAX_BATCH_DEFAULT = 4
"""Triton's default-max-batch-size for models whose configuration is completed from the file."""

NUMBER_MAX = 2**31 - 1
"""What gRPC's C core takes for a number or for milliseconds; as a time, it stands for ever there."""


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
    load_threads: int = 4
    auto_complete: bool = True
    default_max_batch_size: int = MAX_BATCH_DEFAULT
    allow_provider_fallback: bool = False
    queue_rows: int = QUEUE_ROWS_DEFAULT
    queue_bytes: int = QUEUE_BYTES_DEFAULT


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Everything that `sluice serve` was told."""

    models: ModelSettings
    grpc: TransportOptions
    http: HttpSettings | None
    metrics: HttpSettings | None
    log: LogOptions
    server_id: str = "triton"
    exit_on_error: bool = True
    strict_readiness: bool = True
    exit_timeout_s: float = 30.0
    triton_status_codes: bool = False
    allow_any_control: bool = False


class SettingsError(Exception):
    """A flag or a value that cannot be used; the text names it and says what to do."""


REFUSED: dict[str, str] = {
    "--allow-client-shm": "shared memory is not there yet",
    "--allow-cpu-metrics": "the CPU metrics are always there",
    "--allow-gpu-metrics": "GPU metrics are not there yet",
    "--allow-sagemaker": "the SageMaker front end is not there",
    "--allow-vertex-ai": "the Vertex AI front end is not there",
    "--backend-directory": "there is one backend, ONNX Runtime, and it is built in",
    "--buffer-management-thread-count": "tensors are views over the received message and are not copied by threads",
    "--cache-config": "the response cache is not there yet",
    "--cache-directory": "the response cache is not there yet",
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
    "--http-max-input-size": "REST inference is not there yet",
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
    "--repository-poll-secs": "the control mode 'poll' is not there yet",
    "--response-cache-byte-size": "the response cache is not there yet",
    "--reuse-http-port": "HTTP ports are not shared",
    "--sagemaker-port": "the SageMaker front end is not there",
    "--sagemaker-safe-port-range": "the SageMaker front end is not there",
    "--sagemaker-thread-count": "the SageMaker front end is not there",
    "--strict-model-config": "it is deprecated in Triton: use --disable-auto-complete-config",
    "--trace-config": "Triton's trace modes are not there yet: set OTEL_EXPORTER_OTLP_ENDPOINT for OpenTelemetry",
    "--trace-count": "it is deprecated in Triton, and its trace modes are not there yet: see --trace-config",
    "--trace-file": "it is deprecated in Triton, and its trace modes are not there yet: see --trace-config",
    "--trace-level": "it is deprecated in Triton, and its trace modes are not there yet: see --trace-config",
    "--trace-log-frequency": "it is deprecated in Triton, and its trace modes are not there yet: see --trace-config",
    "--trace-rate": "it is deprecated in Triton, and its trace modes are not there yet: see --trace-config",
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


def _flag_bool(text: str) -> bool:
    values = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}") from None


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text!r}")
    return value


def _port(text: str) -> int:
    value = _whole(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 (any that is free) to 65535, got {text!r}")
    return value


def _positive(text: str) -> int:
    value = _whole(text)
    if not 0 < value <= NUMBER_MAX:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 to {NUMBER_MAX}, got {text!r}")
    return value


def _compression(text: str) -> Compression:
    try:
        return Compression(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {', '.join(Compression)}, got {text!r}") from None


def _message_bytes(text: str) -> int:
    value = _positive(text)
    if value > MESSAGE_BYTES_MAX:
        raise argparse.ArgumentTypeError(f"expected at most {MESSAGE_BYTES_MAX}, got {text!r}")
    return value


def _time_s(text: str) -> float:
    """Milliseconds, as all of Triton's gRPC flags have them."""
    return _positive(text) / 1e3


def _time_or_0_s(text: str) -> float:
    return _whole(text) / 1e3


def _age_s(text: str) -> float | None:
    """0 is Triton's default and means no limit."""
    return _whole(text) / 1e3 or None


def _mode(text: str) -> int:
    try:
        value = int(text, 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 0o777:
        raise argparse.ArgumentTypeError(f"expected permissions in octal digits, e.g. 660, got {text!r}")
    return value


_MS, _N, _SWITCH = "MS", "N", "true|false"

# flag -> (the field of TransportOptions, its parser, its metavar, its help)
_TRANSPORT_FLAGS: dict[str, tuple[str, Callable[[str], Any], str, str]] = {
    "--grpc-keepalive-time": ("keepalive_time_s", _time_s, _MS, "silence before a keepalive ping (7200000)"),
    "--grpc-keepalive-timeout": ("keepalive_timeout_s", _time_s, _MS, "to wait for the answer to a ping (20000)"),
    "--grpc-keepalive-permit-without-calls": (
        "keepalive_permit_without_calls", _flag_bool, _SWITCH, "ping idle connections too (false)",
    ),
    "--grpc-http2-max-pings-without-data": (
        "http2_max_pings_without_data", _whole, _N, "our pings without data in between (2); 0: any number",
    ),
    "--grpc-http2-min-recv-ping-interval-without-data": (
        "http2_min_recv_ping_interval_without_data_s", _time_or_0_s, _MS,
        "that must lie between a client's pings (300000)",
    ),
    "--grpc-http2-max-ping-strikes": (
        "http2_max_ping_strikes", _whole, _N, "bad pings before a connection is closed (2); 0: any number",
    ),
    "--grpc-max-connection-age": ("max_connection_age_s", _age_s, _MS, "a connection may live (0: for ever)"),
    "--grpc-max-connection-age-grace": (
        "max_connection_age_grace_s", _age_s, _MS, "for its calls to end after that (0: for ever)",
    ),
    "--grpc-infer-response-compression-level": (
        "compression", _compression, "|".join(Compression), "of responses, for clients that take them so (none)",
    ),
    "--grpc-max-concurrent-streams": (
        "max_concurrent_streams", _positive, _N, f"calls in flight per connection ({STREAMS_MAX})",
    ),
    "--grpc-max-message-bytes": ("max_message_bytes", _message_bytes, _N, f"of one message ({MESSAGE_BYTES_MAX})"),
    "--grpc-max-header-bytes": ("max_header_bytes", _positive, _N, f"of a request's headers ({HEADER_BYTES_MAX})"),
    "--grpc-handshake-timeout": ("handshake_timeout_s", _time_s, _MS, "for the handshakes of TLS and HTTP/2 (20000)"),
    "--grpc-stall-timeout": (
        "stall_timeout_s", _time_s, _MS, "a peer that owes or is owed bytes may make no progress (60000); native only",
    ),
    "--grpc-max-connections": ("max_connections", _positive, _N, f"at the same time ({CONNECTIONS_MAX}); native only"),
}  # fmt: skip


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
    add("--model-control-mode", choices=[*ControlMode, "poll"], default=ControlMode.NONE,
        help="none: load everything at start; explicit: load --load-model and what load calls ask for")  # fmt: skip
    add("--load-model", action="append", default=[], metavar="NAME",
        help="in explicit mode: load this model at start, * for all; may be given several times")  # fmt: skip
    add("--model-load-thread-count", type=_whole, default=4, metavar="N", help="models loaded at the same time")
    add("--disable-auto-complete-config", action="store_true", help="take configurations as they are written only")
    add("--backend-config", action="append", default=[], metavar="onnxruntime,KEY=VALUE",
        help="the one key is default-max-batch-size: for models that name no batch size (4)")  # fmt: skip
    add("--allow-provider-fallback", action="store_true",
        help="run on the CPU, with a warning, when an execution provider that a model asks for is missing")  # fmt: skip
    add("--default-queue-rows", type=_whole, default=QUEUE_ROWS_DEFAULT, metavar="N",
        help="rows that may wait per model (%(default)s); 0: no limit, as in Triton")  # fmt: skip
    add("--default-queue-bytes", type=_whole, default=QUEUE_BYTES_DEFAULT, metavar="N",
        help="bytes of requests that may wait per model (%(default)s); 0: no limit")  # fmt: skip


def _add_listener_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("listeners").add_argument
    for name, port in (("grpc", 8001), ("http", 8000), ("metrics", 8002)):
        add(f"--{name}-port", type=_port, default=port, metavar="PORT", help="(%(default)s; 0: any that is free)")
        add(f"--{name}-address", metavar="HOST", help="the address to listen on (0.0.0.0)")
        add(f"--allow-{name}", type=_flag_bool, default=True, metavar="true|false", help="listen at all (true)")
    add("--reuse-grpc-port", type=_flag_bool, default=False, metavar="true|false",
        help="let several servers share the gRPC port (false)")  # fmt: skip
    add("--grpc-use-ssl", type=_flag_bool, default=False, metavar="true|false", help="TLS on the gRPC port (false)")
    add("--grpc-use-ssl-mutual", type=_flag_bool, default=False, metavar="true|false",
        help="TLS, and clients show certificates too (false)")  # fmt: skip
    add("--grpc-server-cert", type=Path, metavar="FILE", help="the server's certificate, PEM")
    add("--grpc-server-key", type=Path, metavar="FILE", help="the server's key, PEM")
    add("--grpc-root-cert", type=Path, metavar="FILE", help="whom clients' certificates must be signed by, PEM")
    add("--grpc-unix-mode", type=_mode, metavar="OCTAL",
        help="the permissions of the socket's file when --grpc-address is unix:PATH (as the umask has it)")  # fmt: skip
    for flag, (_, parse, metavar, what) in _TRANSPORT_FLAGS.items():
        add(flag, type=parse, metavar=metavar, help=what)


def _add_life_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("life").add_argument
    add("--id", default="triton", metavar="NAME", help="the server's name in its metadata (%(default)s)")
    add("--exit-on-error", type=_flag_bool, default=True, metavar="true|false",
        help="end when a model fails to load at start (true); false: serve the others")  # fmt: skip
    add("--strict-readiness", type=_flag_bool, default=True, metavar="true|false",
        help="ready only when every model that was to be loaded is (true)")  # fmt: skip
    add("--exit-timeout-secs", type=_whole, default=30, metavar="S",
        help="how long accepted requests may take after SIGTERM (%(default)s)")  # fmt: skip
    add("--status-codes", choices=["exact", "triton"], default="exact",
        help="triton: a full queue and a queue timeout are UNAVAILABLE, as there (exact)")  # fmt: skip
    add("--allow-control", choices=["local", "any"], default="local",
        help="whose load and unload calls are taken: only this machine's (local), or anybody's")  # fmt: skip


def _add_log_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("log").add_argument
    for level in ("info", "warning", "error"):
        add(f"--log-{level}", type=_flag_bool, default=True, metavar="true|false", help=f"log at level {level} (true)")
    add("--log-verbose", type=_whole, default=0, metavar="LEVEL", help="1 and more: log details (0)")
    add("--log-format", choices=["default", "ISO8601", "json"], default="default", help="(%(default)s)")
    add("--log-file", type=Path, metavar="FILE", help="log there and not to standard error")


def _settings(args: argparse.Namespace) -> ServerSettings:
    if args.model_control_mode == "poll":
        raise SettingsError("--model-control-mode=poll is not implemented here yet: use none or explicit")
    if args.load_model and args.model_control_mode != ControlMode.EXPLICIT:
        raise SettingsError("--load-model needs --model-control-mode=explicit: mode none loads every model")
    if not args.allow_grpc:
        raise SettingsError(
            "--allow-grpc=false would leave nothing to serve: REST inference is not implemented here yet"
        )
    return ServerSettings(
        models=ModelSettings(
            repositories=tuple(args.model_repository),
            control_mode=ControlMode(args.model_control_mode),
            load_models=tuple(args.load_model),
            load_threads=max(1, args.model_load_thread_count),
            auto_complete=not args.disable_auto_complete_config,
            default_max_batch_size=_default_max_batch_size(args.backend_config),
            allow_provider_fallback=args.allow_provider_fallback,
            queue_rows=args.default_queue_rows,
            queue_bytes=args.default_queue_bytes,
        ),
        grpc=_transport_options(args),
        http=HttpSettings(_address(args.http_address), args.http_port) if args.allow_http else None,
        metrics=_metrics_settings(args),
        log=LogOptions(
            info=args.log_info,
            warning=args.log_warning,
            error=args.log_error,
            verbose_level=args.log_verbose,
            format=args.log_format,
            file=args.log_file,
        ),
        server_id=args.id,
        exit_on_error=args.exit_on_error,
        strict_readiness=args.strict_readiness,
        exit_timeout_s=float(args.exit_timeout_secs),
        triton_status_codes=args.status_codes == "triton",
        allow_any_control=args.allow_control == "any",
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


def _transport_options(args: argparse.Namespace) -> TransportOptions:
    address = _address(args.grpc_address)
    is_unix = address.startswith(UNIX_PREFIX)
    if args.grpc_unix_mode is not None and not is_unix:
        raise SettingsError("--grpc-unix-mode needs --grpc-address=unix:PATH: only a file has permissions")
    host = f"[{address}]" if ":" in address else address
    given = {
        field: value
        for flag, (field, *_) in _TRANSPORT_FLAGS.items()
        if (value := getattr(args, flag.removeprefix("--").replace("-", "_"))) is not None
    }
    return TransportOptions(
        address=address if is_unix else f"{host}:{args.grpc_port}",
        reuse_port=args.reuse_grpc_port,
        unix_mode=args.grpc_unix_mode,
        tls=_tls_files(args),
        **given,
    )


def _tls_files(args: argparse.Namespace) -> TlsFiles | None:
    if not (args.grpc_use_ssl or args.grpc_use_ssl_mutual):
        return None
    needed = {"--grpc-server-cert": args.grpc_server_cert, "--grpc-server-key": args.grpc_server_key}
    if args.grpc_use_ssl_mutual:
        needed["--grpc-root-cert"] = args.grpc_root_cert
    for flag, value in needed.items():
        if value is None:
            raise SettingsError(f"TLS on the gRPC port needs {flag}")
    roots = args.grpc_root_cert if args.grpc_use_ssl_mutual else None
    return TlsFiles(args.grpc_server_cert, args.grpc_server_key, roots)


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
