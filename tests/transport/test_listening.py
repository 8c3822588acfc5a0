"""Where a transport can listen, why it cannot, and how it ends what is still open when its time is up."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING

import grpc
import pytest

from sluice_server.http.app import HttpFront, Metrics
from sluice_server.http.server import HttpListener
from sluice_server.status import Code, StatusMapper
from sluice_server.transport import ListenError
from sluice_server.transport.grpcio import GrpcioTransport
from sluice_server.transport.listening import check_address
from sluice_server.transport.options import TransportOptions
from support.fakes import PATIENCE_S, eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sluice_server.transport.call import Call

ASK = "/test.Questions/Ask"


def has_ipv6() -> bool:
    """Whether this machine has IPv6 at all; containers often have not."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


@pytest.fixture
def taken() -> Iterator[int]:
    """A port that somebody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


def transport_at(address: str, handler: Callable[[Sequence[Call]], None] | None = None, **options) -> GrpcioTransport:
    return GrpcioTransport(handler or (lambda _calls: None), {ASK: False}, TransportOptions(address, **options))


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:0", "localhost:0", "0.0.0.0:0", pytest.param("[::1]:0", marks=needs_ipv6), "unix:/tmp/any.sock"],
)
def test_an_address_of_this_machine_can_be_listened_on(address):
    check_address(address)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("203.0.113.1:0", "Cannot assign requested address"),
        ("no-such-host.invalid:0", ""),
        ("unix:/no/such/directory/socket", "No such file or directory"),
    ],
)
def test_an_address_elsewhere_cannot_and_the_error_says_why(address, reason, capfd):
    transport = transport_at(address)
    with pytest.raises(ListenError, match=f"cannot listen on .* for gRPC: {reason}") as caught:
        transport.start()
    assert address in str(caught.value)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_port_in_use_is_refused_with_its_number(taken):
    with pytest.raises(ListenError, match=f"127.0.0.1:{taken} for gRPC: Address already in use"):
        transport_at(f"127.0.0.1:{taken}").start()
    with pytest.raises(ListenError, match=f"127.0.0.1:{taken} for HTTP: Address already in use"):
        HttpListener(HttpFront(Metrics(bytes), StatusMapper()), "127.0.0.1", taken).bind()


def test_two_transports_share_a_port_only_when_both_are_asked_to():
    first = transport_at("127.0.0.1:0", reuse_port=True)
    first.start()
    (address,) = first.endpoints
    second, third = transport_at(address, reuse_port=True), transport_at(address)
    second.start()
    with pytest.raises(ListenError, match="in use"):
        third.start()
    for transport in (first, second):
        transport.stop(0.0)


@needs_ipv6
def test_http_listens_on_ipv6_with_and_without_brackets():
    for address in ("::1", "[::1]"):
        listener = HttpListener(HttpFront(Metrics(bytes), StatusMapper()), address, 0)
        listener.bind()
        assert listener.port
        listener.close()


def test_a_call_that_is_open_when_time_is_up_gets_a_status_and_is_counted(no_errors_logged):
    opened = threading.Event()
    transport = transport_at("127.0.0.1:0", lambda _calls: opened.set())
    transport.start()
    with grpc.insecure_channel(transport.endpoints[0]) as channel:
        future = channel.unary_unary(ASK).future(b"", timeout=PATIENCE_S)
        assert opened.wait(PATIENCE_S)
        transport.stop(0.05)
        assert future.code() is grpc.StatusCode.UNAVAILABLE
        assert "shut down" in future.details()
    assert transport.outcomes() == {(ASK, Code.UNAVAILABLE): 1}


def test_an_accepted_call_may_end_while_the_transport_stops(no_errors_logged):
    opened: list[Call] = []
    arrived = threading.Event()

    def accept(calls: Sequence[Call]) -> None:
        opened.extend(calls)
        arrived.set()

    transport = transport_at("127.0.0.1:0", accept)
    transport.start()
    with grpc.insecure_channel(transport.endpoints[0]) as channel:
        ask = channel.unary_unary(ASK)
        future = ask.future(b"", timeout=PATIENCE_S)
        assert arrived.wait(PATIENCE_S)
        stopping = threading.Thread(target=transport.stop, args=(PATIENCE_S,))
        stopping.start()
        eventually(lambda: refusals(ask) == {grpc.StatusCode.UNAVAILABLE}, "new calls are refused")
        opened[0].reply([b"answer"])
        assert future.result() == b"answer"
        stopping.join()
    assert transport.outcomes()[ASK, Code.OK] == 1


def refusals(ask: grpc.UnaryUnaryMultiCallable) -> set[grpc.StatusCode]:
    """How a new call ends; one that came before the stop began is accepted, and given up."""
    try:
        ask(b"", timeout=0.1)
    except grpc.RpcError as error:
        return {error.code()}
    return set()
