"""Whose load and unload calls are taken: a table of peers as gRPC writes them, and calls from elsewhere."""

from __future__ import annotations

import ipaddress
import socket

import grpc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.errors import PermissionDenied
from sluice_server.protocol.dispatch import Dispatcher
from sluice_server.protocol.rpcs import ServerIdentity, path_of, rpc_table
from sluice_server.repository.manager import ControlMode
from sluice_server.security.control import ControlPolicy, is_local
from sluice_server.status import Code, StatusMapper
from sluice_server.transport.options import TransportOptions
from support import models
from support.fakes import RecordingCall
from support.server import CALL_TIMEOUT_S, SERVICE

LOCAL = [
    "ipv4:127.0.0.1:4711",
    "ipv4:127.0.0.2:1",
    "ipv4:127.255.255.254:1",
    "ipv6:[::1]:4711",
    "ipv6:%5B::1%5D:4711",
    "ipv6:[0:0:0:0:0:0:0:1]:1",
    "ipv6:[::ffff:127.0.0.1]:1",
    "ipv6:%5B::ffff:127.0.0.1%5D:1",
    "ipv6:[::ffff:7f00:1]:1",
    "unix:",
    "unix:/run/sluice.sock",
    "unix:%00abstract",
]

ELSEWHERE = [
    "ipv4:10.0.0.1:4711",
    "ipv4:128.0.0.1:1",
    "ipv4:0.0.0.0:1",
    "ipv4:192.168.0.127:127",
    "ipv4:127.0.0.1.evil.example:1",
    "ipv6:[2001:db8::1]:1",
    "ipv6:[::]:1",
    "ipv6:[fe80::1%25eth0]:1",
    "ipv6:[::ffff:10.0.0.1]:1",
    "ipv6:%5B::ffff:10.0.0.1%5D:1",
    "ipv6:[::127.0.0.1]:1",
    "ipv6:[64:ff9b::127.0.0.1]:1",
    "dns:localhost",
    "localhost:1",
    "127.0.0.1:1",
    "",
    ":",
    "ipv4:",
    "ipv4:127.0.0.1",
    "unknown",
    "vsock:1:2",
    "unixes:",
]


@pytest.mark.parametrize("peer", LOCAL)
def test_a_peer_on_this_machine_may_control(peer):
    assert is_local(peer)
    ControlPolicy().check("RepositoryModelLoad", peer)


@pytest.mark.parametrize("peer", ELSEWHERE)
def test_a_peer_elsewhere_may_not_and_is_told_what_to_do(peer):
    assert not is_local(peer)
    with pytest.raises(PermissionDenied) as caught:
        ControlPolicy().check("RepositoryModelLoad", peer)
    for fact in ("RepositoryModelLoad", peer, "--allow-control=any"):
        assert fact in str(caught.value)


@pytest.mark.parametrize("peer", [*LOCAL, *ELSEWHERE])
def test_anybody_may_when_it_is_said_so(peer):
    ControlPolicy(allow_any=True).check("RepositoryModelLoad", peer)


@given(st.ip_addresses(v=4), st.integers(1, 65535))
def test_of_ipv4_only_the_loopback_net_is_local_also_when_mapped(address, port):
    local = address in ipaddress.ip_network("127.0.0.0/8")
    assert is_local(f"ipv4:{address}:{port}") is local
    assert is_local(f"ipv6:[::ffff:{address}]:{port}") is local


@given(st.text())
def test_no_text_makes_the_policy_fail(text):
    assert is_local(text) in (True, False)


@pytest.fixture
def explicit(start_server, repository):
    """A server in explicit mode, whose parts take calls from any peer."""
    models.write_model(repository, "m", models.identity(), max_batch_size=8)
    modes = {"control_mode": ControlMode.EXPLICIT}
    return start_server(repository, models=modes, http=None, metrics=None).server


@pytest.mark.parametrize("allow_any", [False, True])
@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload", "RepositoryIndex"])
def test_a_call_from_elsewhere_is_refused_before_anything_else_but_may_look(method, allow_any, explicit):
    policy = ControlPolicy(allow_any=allow_any)
    rpcs = rpc_table(explicit.manager, ServerIdentity("triton", "1"), policy)
    dispatcher = Dispatcher(explicit.manager, rpcs, StatusMapper(), explicit._slow_pool)
    message = pb.RepositoryModelLoadRequest(model_name="m") if "Model" in method else pb.RepositoryIndexRequest()
    call = RecordingCall(message.SerializeToString(), path_of(method), peer="ipv4:10.0.0.1:1")
    dispatcher([call])
    refused = not allow_any and method != "RepositoryIndex"
    status, _ = call.wait()
    assert status.code is (Code.PERMISSION_DENIED if refused else Code.OK)
    expected = "READY" if method == "RepositoryModelLoad" and allow_any else ""
    assert [entry.state for entry in explicit.manager.index()] == [expected]


def outward_address() -> str | None:
    """This machine's address towards others; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))
        except OSError:
            return None
        address: str = probe.getsockname()[0]
        return None if ipaddress.ip_address(address).is_loopback else address


@pytest.mark.skipif(outward_address() is None, reason="this machine has no address but the loopback")
@pytest.mark.parametrize(
    ("allow_any", "code"), [(False, grpc.StatusCode.PERMISSION_DENIED), (True, grpc.StatusCode.OK)]
)
def test_a_client_that_comes_through_the_network_is_held_to_the_policy(allow_any, code, start_server, repository):
    models.write_model(repository, "m", models.identity(), max_batch_size=8)
    server = start_server(
        repository,
        models={"control_mode": ControlMode.EXPLICIT},
        grpc=TransportOptions("0.0.0.0:0"),
        http=None,
        metrics=None,
        allow_any_control=allow_any,
    )
    with grpc.insecure_channel(f"{outward_address()}:{server.target.rpartition(':')[2]}") as channel:
        load = channel.unary_unary(f"/{SERVICE.full_name}/RepositoryModelLoad")
        request = pb.RepositoryModelLoadRequest(model_name="m")
        assert load.future(request.SerializeToString(), timeout=CALL_TIMEOUT_S).code() is code
