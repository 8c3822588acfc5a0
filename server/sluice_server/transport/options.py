"""What a transport is configured with: the same for every transport, and free of any library's names.

Names and defaults are Triton's where Triton has the option (its --grpc-* flags, there in milliseconds).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

UNIX_PREFIX = "unix:"

MESSAGE_BYTES_MAX = 2**31 - 1
"""tritonclient's own limit both ways, and the largest that gRPC's framing in C core takes."""

STREAMS_MAX = 8192
"""Concurrent streams per connection: well above what a load generator opens, and a bound on what one peer can hold."""

HEADER_BYTES_MAX = 16 * 1024
"""Request headers as HTTP/2 counts them (RFC 9113, 6.5.2): where gRPC's C core refuses always by its defaults."""

CONNECTIONS_MAX = 10_000
"""Ten times the clients that a busy server has, and few enough to be held in the memory of a small pod."""

HANDSHAKE_TIMEOUT_S = 20.0
"""From accepting a connection to the end of its TLS and HTTP/2 handshakes; an honest one takes some round trips."""

STALL_TIMEOUT_S = 60.0
"""For a peer that owes bytes, or does not take ours: longer than any network's hiccup that TCP survives well."""


INTAKE_THREADS = 2
"""One at the intake, and one that runs a lone request: more would only compete for the interpreter."""

INTAKE_THREADS_MAX = 128
"""Triton's own limit on --grpc-infer-thread-count."""


class Compression(StrEnum):
    """How much time responses may take to become smaller, for clients that accept compressed ones."""

    NONE = "none"
    LOW = "low"
    MEDIUM = "medium"
    HIGH = "high"

    @property
    def zlib_level(self) -> int:
        """The effort on zlib's scale, 0 (none) to 9 (smallest)."""
        return {Compression.NONE: 0, Compression.LOW: 1, Compression.MEDIUM: 6, Compression.HIGH: 9}[self]


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """PEM files of a TLS listener; `client_roots` makes it mutual. Changed files are taken without a restart."""

    certificate: Path
    key: Path
    client_roots: Path | None = None


@dataclass(frozen=True, slots=True)
class TransportOptions:
    """How a transport listens, and what it allows its peers. None for a time: for ever."""

    address: str = "0.0.0.0:8001"
    """`HOST:PORT`, `[IPV6]:PORT` (port 0: any that is free), or `unix:PATH`."""
    reuse_port: bool = False
    unix_mode: int | None = None
    """The permissions of a Unix socket's file; None: as the process's umask has it."""
    tls: TlsFiles | None = None

    keepalive_time_s: float = 7200.0
    """Silence before we ping."""
    keepalive_timeout_s: float = 20.0
    """How long the answer may take before the connection is closed."""
    keepalive_permit_without_calls: bool = False
    """Ping idle connections too, and let clients do so."""
    http2_max_pings_without_data: int = 2
    """Of our own pings without a DATA or HEADERS frame of ours in between: further ones come a minute apart, as in
    gRPC's C core; 0: any number."""
    http2_min_recv_ping_interval_without_data_s: float = 300.0
    """A client's ping that comes sooner after its last one, without frames of ours in between, is a strike."""
    http2_max_ping_strikes: int = 2
    """More of them close the connection with ENHANCE_YOUR_CALM; 0: never."""
    max_connection_age_s: float | None = None
    max_connection_age_grace_s: float | None = None
    """How long calls may take after their connection has come of age."""

    max_concurrent_streams: int = STREAMS_MAX
    max_message_bytes: int = MESSAGE_BYTES_MAX
    """Of one message, decompressed, in either direction."""
    max_header_bytes: int = HEADER_BYTES_MAX
    compression: Compression = Compression.NONE
    """Of responses; compressed requests are always taken."""
    handshake_timeout_s: float = HANDSHAKE_TIMEOUT_S

    # Only the native transport can keep these.
    stall_timeout_s: float = STALL_TIMEOUT_S
    """A peer that makes no progress for so long, in sending what it began or in taking what is due, is closed."""
    max_connections: int = CONNECTIONS_MAX
    """Further ones are closed when they are accepted."""
    intake_threads: int = INTAKE_THREADS
    """Take lists of calls in turns; all but one may run the batches of lone requests meanwhile."""
