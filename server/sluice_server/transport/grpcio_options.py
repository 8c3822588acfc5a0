"""What the transport's options are in the terms of gRPC's C core."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc

from sluice_server.transport.certificates import CertificateWatch
from sluice_server.transport.options import Compression

if TYPE_CHECKING:
    from sluice_server.transport.certificates import TlsContents
    from sluice_server.transport.options import TlsFiles, TransportOptions

_COMPRESSION_LEVELS = {level: number for number, level in enumerate(Compression)}
"""grpc_compression_level: it picks the algorithm from those that the client takes, not zlib's effort."""

_MS_MAX = 2**31 - 1
"""C core's arguments are 32-bit integers; as a time it stands for ever."""


def channel_args(options: TransportOptions) -> list[tuple[str, int]]:
    """The arguments of a server that behaves as the options say."""
    args = [
        ("grpc.max_send_message_length", options.max_message_bytes),
        ("grpc.max_receive_message_length", options.max_message_bytes),
        ("grpc.max_concurrent_streams", options.max_concurrent_streams),
        # Equal, as between the two C core refuses at random.
        ("grpc.max_metadata_size", options.max_header_bytes),
        ("grpc.absolute_max_metadata_size", options.max_header_bytes),
        ("grpc.keepalive_time_ms", _ms(options.keepalive_time_s)),
        ("grpc.keepalive_timeout_ms", _ms(options.keepalive_timeout_s)),
        ("grpc.keepalive_permit_without_calls", int(options.keepalive_permit_without_calls)),
        ("grpc.http2.max_pings_without_data", options.http2_max_pings_without_data),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(options.http2_min_recv_ping_interval_without_data_s)),
        ("grpc.http2.max_ping_strikes", options.http2_max_ping_strikes),
        ("grpc.max_connection_age_ms", _ms(options.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", _ms(options.max_connection_age_grace_s)),
        ("grpc.server_handshake_timeout_ms", _ms(options.handshake_timeout_s)),
        # Two servers on one port would share its connections silently; asked for, it is a feature.
        ("grpc.so_reuseport", int(options.reuse_port)),
    ]
    if options.compression is not Compression.NONE:
        args.append(("grpc.default_compression_level", _COMPRESSION_LEVELS[options.compression]))
    return args


def server_credentials(files: TlsFiles) -> Any:
    """`grpc.ServerCredentials` that follow the files; `ListenError` when they cannot be used."""
    watch = CertificateWatch(files)

    def fetch() -> Any:
        contents = watch.changed()
        return None if contents is None else _configuration(contents)

    return grpc.dynamic_ssl_server_credentials(
        _configuration(watch.contents), fetch, require_client_authentication=files.client_roots is not None
    )


def _configuration(contents: TlsContents) -> Any:
    pair = (contents.key, contents.certificate)
    return grpc.ssl_server_certificate_configuration([pair], contents.client_roots)


def _ms(seconds: float | None) -> int:
    return _MS_MAX if seconds is None else min(_MS_MAX, round(seconds * 1e3))
