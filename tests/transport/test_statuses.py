"""Statuses as a client sees them, on every transport: with metadata, and in place of an answer that is too large."""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc
import pytest

from sluice_server.status import Code, Status
from sluice_server.transport.grpcio import GrpcioTransport
from sluice_server.transport.native import NativeTransport
from sluice_server.transport.options import TransportOptions
from support.server import CALL_TIMEOUT_S, LOOPBACK, need

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_server.transport.call import Call

REFUSE, REFUSE_STREAM, ZEROS = "/test.Transport/Refuse", "/test.Transport/RefuseStream", "/test.Transport/Zeros"
TRANSPORTS = {"grpcio": GrpcioTransport, "native": NativeTransport}

BUSY = Status(
    Code.RESOURCE_EXHAUSTED,
    "100 % full: come back later, naïve one\n",
    (("grpc-retry-pushback-ms", "250"), ("grpc-status-details-bin", b"\x00\xff\x10"), ("x-part", "a"), ("x-part", "b")),
)


def answer(calls: Sequence[Call]) -> None:
    """Refuse with BUSY, or reply as many zero bytes as the message says."""
    for call in calls:
        if call.stream is not None:
            call.stream.send([b"first"])
            call.stream.finish(BUSY)
        elif call.method == ZEROS:
            call.reply([bytes(int(call.message))])
        else:
            call.fail(BUSY)


@pytest.fixture
def channel(transport):
    """A channel to a transport whose messages may have 1,000 bytes."""
    need(transport)
    methods = {REFUSE: False, REFUSE_STREAM: True, ZEROS: False}
    server = TRANSPORTS[transport](answer, methods, TransportOptions(f"{LOOPBACK}:0", max_message_bytes=1000))
    server.start()
    with grpc.insecure_channel(server.endpoints[0]) as opened:
        yield opened
    server.stop(0.0)


def trailers_of(error: grpc.RpcError) -> list[tuple[str, str | bytes]]:
    return sorted((key, value) for key, value in error.trailing_metadata() if key in dict(BUSY.trailers))


def test_a_status_brings_its_message_and_its_metadata(channel):
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(REFUSE)(b"", timeout=CALL_TIMEOUT_S)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, BUSY.message)
    assert trailers_of(caught.value) == sorted(BUSY.trailers)


def test_a_status_behind_messages_of_a_stream_does_too(channel):
    answers = channel.stream_stream(REFUSE_STREAM)(iter([b""]), timeout=CALL_TIMEOUT_S)
    assert next(answers) == b"first"
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.RESOURCE_EXHAUSTED, BUSY.message)
    assert trailers_of(caught.value) == sorted(BUSY.trailers)


def test_an_answer_above_the_limit_is_resource_exhausted(channel):
    ask = channel.unary_unary(ZEROS)
    assert len(ask(b"1000", timeout=CALL_TIMEOUT_S)) == 1000
    with pytest.raises(grpc.RpcError) as caught:
        ask(b"1001", timeout=CALL_TIMEOUT_S)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "1001" in caught.value.details()
