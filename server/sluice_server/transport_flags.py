"""The flags of the gRPC listener, whichever transport is behind it, and the options that they become."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice_server.flag_values import (
    SettingsError,
    age_s,
    compression,
    count,
    intake_threads,
    interval_s,
    message_bytes,
    permissions,
    positive,
    switch,
    time_s,
)
from sluice_server.transport.choice import TransportChoice
from sluice_server.transport.options import (
    CONNECTIONS_MAX,
    HEADER_BYTES_MAX,
    INTAKE_THREADS,
    MESSAGE_BYTES_MAX,
    STREAMS_MAX,
    UNIX_PREFIX,
    Compression,
    TlsFiles,
    TransportOptions,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

_MS, _N, _SWITCH = "MS", "N", "true|false"

# flag -> (the field of TransportOptions, what reads its value, its metavar, its help)
_OPTIONS: dict[str, tuple[str, Callable[[str], Any], str, str]] = {
    "--grpc-keepalive-time": ("keepalive_time_s", time_s, _MS, "silence before a keepalive ping (7200000)"),
    "--grpc-keepalive-timeout": ("keepalive_timeout_s", time_s, _MS, "for the answer to a ping (20000)"),
    "--grpc-keepalive-permit-without-calls": (
        "keepalive_permit_without_calls", switch, _SWITCH, "ping idle connections too (false)",
    ),
    "--grpc-http2-max-pings-without-data": (
        "http2_max_pings_without_data", count, _N, "our pings without data in between (2); 0: any number",
    ),
    "--grpc-http2-min-recv-ping-interval-without-data": (
        "http2_min_recv_ping_interval_without_data_s", interval_s, _MS, "between two pings of a client (300000)",
    ),
    "--grpc-http2-max-ping-strikes": (
        "http2_max_ping_strikes", count, _N, "bad pings before a connection is closed (2); 0: any number",
    ),
    "--grpc-max-connection-age": ("max_connection_age_s", age_s, _MS, "that a connection may live (0: for ever)"),
    "--grpc-max-connection-age-grace": (
        "max_connection_age_grace_s", age_s, _MS, "for its calls to end after that (0: for ever)",
    ),
    "--grpc-infer-response-compression-level": (
        "compression", compression, "|".join(Compression), "for clients that take compressed responses (none)",
    ),
    "--grpc-max-concurrent-streams": (
        "max_concurrent_streams", positive, _N, f"calls in flight per connection ({STREAMS_MAX})",
    ),
    "--grpc-max-message-bytes": ("max_message_bytes", message_bytes, _N, f"of one message ({MESSAGE_BYTES_MAX})"),
    "--grpc-max-header-bytes": ("max_header_bytes", positive, _N, f"of a request's headers ({HEADER_BYTES_MAX})"),
    "--grpc-handshake-timeout": ("handshake_timeout_s", time_s, _MS, "for the handshakes of TLS and HTTP/2 (20000)"),
}  # fmt: skip

# The same, for what only the native transport can keep.
_NATIVE_OPTIONS: dict[str, tuple[str, Callable[[str], Any], str, str]] = {
    "--grpc-stall-timeout": (
        "stall_timeout_s", time_s, _MS, "without progress of a peer that owes or is owed bytes (60000); native only",
    ),
    "--grpc-max-connections": ("max_connections", positive, _N, f"at the same time ({CONNECTIONS_MAX}); native only"),
    "--grpc-infer-thread-count": (
        "intake_threads", intake_threads, _N,
        f"threads that take requests in turns, and run those that come alone ({INTAKE_THREADS}); native only",
    ),
}  # fmt: skip


def add_transport_flags(add: Callable[..., object]) -> None:
    """Add the flags of the transport to a parser, whose `add_argument` is `add`; its address and port are others'."""
    add("--transport", choices=[*TransportChoice], default=TransportChoice.AUTO,
        help="auto: the native one where it is installed (auto)")  # fmt: skip
    add("--reuse-grpc-port", type=switch, default=False, metavar=_SWITCH,
        help="let several servers share the gRPC port (false)")  # fmt: skip
    add("--grpc-unix-mode", type=permissions, metavar="OCTAL",
        help="permissions of the socket's file when --grpc-address is unix:PATH (as the umask has it)")  # fmt: skip
    add("--grpc-use-ssl", type=switch, default=False, metavar=_SWITCH, help="TLS on the gRPC port (false)")
    add("--grpc-use-ssl-mutual", type=switch, default=False, metavar=_SWITCH,
        help="TLS, and clients show certificates too (false)")  # fmt: skip
    add("--grpc-server-cert", type=Path, metavar="FILE", help="the server's certificate, PEM")
    add("--grpc-server-key", type=Path, metavar="FILE", help="the server's key, PEM")
    add("--grpc-root-cert", type=Path, metavar="FILE", help="whom clients' certificates must be signed by, PEM")
    for flag, (_, read, metavar, what) in (_OPTIONS | _NATIVE_OPTIONS).items():
        add(flag, type=read, metavar=metavar, help=what)


def transport_options(args: argparse.Namespace, address: str) -> TransportOptions:
    """What the flags say, for an address without brackets; `SettingsError` for flags that do not go together."""
    is_unix = address.startswith(UNIX_PREFIX)
    if args.grpc_unix_mode is not None and not is_unix:
        raise SettingsError("--grpc-unix-mode needs --grpc-address=unix:PATH: only a file has permissions")
    host = f"[{address}]" if ":" in address else address
    return TransportOptions(
        address=address if is_unix else f"{host}:{args.grpc_port}",
        reuse_port=args.reuse_grpc_port,
        unix_mode=args.grpc_unix_mode,
        tls=_tls_files(args),
        **{
            field: value
            for flag, (field, *_) in (_OPTIONS | _NATIVE_OPTIONS).items()
            if (value := _given(args, flag)) is not None
        },
    )


def native_flags(args: argparse.Namespace) -> tuple[str, ...]:
    """The flags that were given and that only the native transport can keep; `SettingsError` next to another one."""
    flags = tuple(flag for flag in _NATIVE_OPTIONS if _given(args, flag) is not None)
    if flags and args.transport == TransportChoice.GRPCIO:
        raise SettingsError(f"{flags[0]} needs the native transport: --transport=grpcio cannot keep it")
    return flags


def _given(args: argparse.Namespace, flag: str) -> Any:
    return getattr(args, flag.removeprefix("--").replace("-", "_"))


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
