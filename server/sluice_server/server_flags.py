"""The flags of `sluice serve`, by topic: Triton's names where Triton has the flag, what they take, their help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from sluice_server.capture_flags import add_capture_flags
from sluice_server.flag_values import SettingsError, count, file_stem, port, positive, switch, whole
from sluice_server.front_flags import grpc_header_pattern, http_header_pattern
from sluice_server.metrics_flags import add_metrics_flags
from sluice_server.rate_limit_flags import EXECUTION_COUNT, OFF
from sluice_server.repository.manager import ControlMode
from sluice_server.security.restrictions import GROUPS
from sluice_server.transport_flags import add_transport_flags

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


HTTP_WORKERS_DEFAULT = 8
"""Triton's default of --http-thread-count."""


class _Parser(argparse.ArgumentParser):
    """argparse, except that a wrong command line raises."""

    def error(self, message: str) -> NoReturn:
        raise SettingsError(message)


def serve_parser() -> argparse.ArgumentParser:
    """The parser of `sluice serve`; it raises SettingsError and never ends the process, but for --help."""
    parser = _Parser(
        prog="sluice serve",
        description="Serve the ONNX models of a Triton model repository over gRPC.",
        allow_abbrev=False,
    )
    _add_model_flags(parser)
    _add_listener_flags(parser)
    _add_life_flags(parser)
    _add_log_flags(parser)
    add_capture_flags(parser.add_argument_group("capture").add_argument)
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
    add("--strict-model-config", type=switch, default=False, metavar="true|false",
        help="true: the same, as Triton's older versions had it (false)")  # fmt: skip
    add("--model-config-name", type=file_stem, default="", metavar="NAME",
        help="configs/NAME.pbtxt comes before config.pbtxt in the models that have it")  # fmt: skip
    add("--model-load-retry-count", type=count, default=0, metavar="N",
        help="how often a version that failed to load is tried again (%(default)s)")  # fmt: skip
    add("--backend-config", action="append", default=[], metavar="onnxruntime,KEY=VALUE",
        help="the one key is default-max-batch-size: for models that name no batch size (4)")  # fmt: skip
    add("--allow-provider-fallback", action="store_true",
        help="run on the CPU, with a warning, when an execution provider that a model asks for is missing")  # fmt: skip
    add("--default-queue-rows", type=whole, default=QUEUE_ROWS_DEFAULT, metavar="N",
        help="rows that may wait per model (%(default)s); 0: no limit, as in Triton")  # fmt: skip
    add("--default-queue-bytes", type=whole, default=QUEUE_BYTES_DEFAULT, metavar="N",
        help="bytes of requests that may wait per model (%(default)s); 0: no limit")  # fmt: skip
    add("--batch-curve-cache", type=Path, metavar="DIR",
        help="where the rates of batch sizes that loads measure are kept ($XDG_CACHE_HOME/sluice)")  # fmt: skip
    add("--cache-config", action="append", default=[], metavar="local,size=BYTES",
        help="for models with response_cache: keep answers, up to so many bytes in all (no cache)")  # fmt: skip
    add("--rate-limit", choices=(OFF, EXECUTION_COUNT), default=OFF,
        help="execution_count: groups with a rate_limiter run only while its resources are free (off)")  # fmt: skip
    add("--rate-limit-resource", action="append", default=[], metavar="NAME:COUNT[:DEVICE]",
        help="copies of a resource on each device, or on one (as many as the instance that needs most)")  # fmt: skip
    add("--response-cache-byte-size", type=whole, metavar="BYTES",
        help="deprecated in Triton: the same as --cache-config=local,size=BYTES; 0: no cache")  # fmt: skip


def _add_listener_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("listeners").add_argument
    for name, default in (("grpc", 8001), ("http", 8000), ("metrics", 8002)):
        add(f"--{name}-port", type=port, default=default, metavar="PORT", help="(%(default)s; 0: any that is free)")
        add(f"--{name}-address", metavar="HOST", help="the address to listen on (0.0.0.0)")
        add(f"--allow-{name}", type=switch, default=True, metavar="true|false", help="listen at all (true)")
    add("--reuse-http-port", type=switch, default=False, metavar="true|false",
        help="let several servers share the HTTP port (false)")  # fmt: skip
    add("--http-max-input-size", type=whole, default=HTTP_INPUT_BYTES_DEFAULT, metavar="BYTES",
        help="the largest body that a REST request may have, compressed or not (%(default)s)")  # fmt: skip
    add("--http-restricted-api", action="append", default=[], metavar="GROUP,...:KEY=VALUE",
        help="take these calls only with the header KEY: VALUE; several allowed, each group in one")  # fmt: skip
    add("--grpc-restricted-protocol", action="append", default=[], metavar="GROUP,...:KEY=VALUE",
        help="the same over gRPC, with the header triton-grpc-protocol-KEY; groups: " + ", ".join(GROUPS))  # fmt: skip
    add("--http-thread-count", type=positive, default=HTTP_WORKERS_DEFAULT, metavar="N",
        help="threads that (de)compress large bodies, beside the one that serves HTTP (%(default)s)")  # fmt: skip
    for name, pattern in (("http", http_header_pattern), ("grpc", grpc_header_pattern)):
        add(f"--{name}-header-forward-pattern", type=pattern, metavar="REGEX",
            help="headers whose names match become parameters of their requests, which traces show")  # fmt: skip
    add_metrics_flags(add)
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
