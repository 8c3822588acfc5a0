"""What the options mean for gRPC's C core: its arguments, and what a server with them does."""

from __future__ import annotations

import pytest

from sluice_server.transport.grpcio_options import channel_args
from sluice_server.transport.options import Compression, TransportOptions


def test_the_defaults_are_tritons_and_ours():
    assert dict(channel_args(TransportOptions())) == {
        "grpc.max_send_message_length": 2**31 - 1,
        "grpc.max_receive_message_length": 2**31 - 1,
        "grpc.max_concurrent_streams": 8192,
        "grpc.max_metadata_size": 16384,
        "grpc.absolute_max_metadata_size": 16384,
        "grpc.keepalive_time_ms": 7_200_000,
        "grpc.keepalive_timeout_ms": 20_000,
        "grpc.keepalive_permit_without_calls": 0,
        "grpc.http2.max_pings_without_data": 2,
        "grpc.http2.min_ping_interval_without_data_ms": 300_000,
        "grpc.http2.max_ping_strikes": 2,
        "grpc.max_connection_age_ms": 2**31 - 1,
        "grpc.max_connection_age_grace_ms": 2**31 - 1,
        "grpc.server_handshake_timeout_ms": 20_000,
        "grpc.so_reuseport": 0,
    }


@pytest.mark.parametrize(
    ("options", "argument", "value"),
    [
        (TransportOptions(reuse_port=True), "grpc.so_reuseport", 1),
        (TransportOptions(max_connection_age_s=0.005), "grpc.max_connection_age_ms", 5),
        (TransportOptions(keepalive_time_s=1e9), "grpc.keepalive_time_ms", 2**31 - 1),
        (TransportOptions(keepalive_permit_without_calls=True), "grpc.keepalive_permit_without_calls", 1),
        (TransportOptions(compression=Compression.LOW), "grpc.default_compression_level", 1),
        (TransportOptions(compression=Compression.MEDIUM), "grpc.default_compression_level", 2),
        (TransportOptions(compression=Compression.HIGH), "grpc.default_compression_level", 3),
    ],
)
def test_an_option_becomes_its_argument(options, argument, value):
    assert dict(channel_args(options))[argument] == value


def test_zlibs_effort_grows_with_the_level():
    levels = [level.zlib_level for level in Compression]
    assert levels == sorted(set(levels))
    assert (levels[0], levels[-1]) == (0, 9)
