"""The life of a connection: handshakes without an end, vanished clients, keepalive, age, and the end of the server."""

from __future__ import annotations

import gzip
import socket
import ssl
import threading
from typing import TYPE_CHECKING

import grpc
import pytest
import trustme
from h2.errors import ErrorCodes
from hyperframe.frame import DataFrame, HeadersFrame, PingFrame, WindowUpdateFrame

from sluice_server.status import Code
from sluice_server.transport.options import TlsFiles
from support.answering import ECHO, ECHO_STREAM, HOLD, LARGE, PEER, TALK, unharmed
from support.fakes import PATIENCE_S, eventually
from support.raw_http2 import PREFACE, literal, message

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from conftest import Serve, Served

SHORT_S = 0.3
"""A time limit that is to run out; an honest exchange here takes a few milliseconds."""

UNPACKED_BYTES = 64 << 20
"""Takes a good while to unpack, and 64 KiB when packed."""

MANY = 100
"""Messages that would take seconds to unpack, one after the other."""

AUTHORITY = trustme.CA()


@pytest.fixture
def tls(tmp_path: Path) -> TlsFiles:
    """A server's certificate and key."""
    return write_tls(tmp_path)


def write_tls(directory: Path, *, mutual: bool = False) -> TlsFiles:
    issued = AUTHORITY.issue_cert("localhost", "127.0.0.1")
    certificate, key, roots = directory / "cert.pem", directory / "key.pem", directory / "roots.pem"
    issued.private_key_pem.write_to_path(str(key))
    certificate.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
    AUTHORITY.cert_pem.write_to_path(str(roots))
    return TlsFiles(certificate, key, roots if mutual else None)


@pytest.fixture
def half_open(request: pytest.FixtureRequest) -> Iterator[list[socket.socket]]:
    """Plain sockets, closed at the end."""
    sockets: list[socket.socket] = []
    yield sockets
    for one in sockets:
        one.close()


def connected(served: Served, sockets: list[socket.socket], said: bytes) -> socket.socket:
    host, _, port = served.target.rpartition(":")
    client = socket.create_connection((host, int(port)), PATIENCE_S)
    sockets.append(client)
    client.sendall(said)
    return client


# Handshakes


def client_hello() -> bytes:
    """What a TLS client says first."""
    out = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(ssl.MemoryBIO(), out, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return out.read()


HELLO = client_hello()


@pytest.mark.parametrize("said", [b"", HELLO[:100], HELLO], ids=["nothing", "half a hello", "a hello"])
def test_a_tls_handshake_that_never_finishes_is_closed(serve: Serve, tls: TlsFiles, half_open, said: bytes):
    served = serve(tls=tls, handshake_timeout_s=SHORT_S)
    clients = [connected(served, half_open, said) for _ in range(20)]
    served.wait_for(handshakes=20, connections=20)
    for client in clients:
        while client.recv(65536):
            pass
    served.nothing_is_left()


@pytest.mark.parametrize("said", [b"", PREFACE[:10]], ids=["nothing", "half a preface"])
def test_an_http2_handshake_that_never_finishes_is_closed(serve: Serve, half_open, said: bytes):
    served = serve(handshake_timeout_s=SHORT_S)
    with unharmed(served.target):
        client = connected(served, half_open, said)
        while client.recv(65536):
            pass
    served.nothing_is_left()


def test_garbage_instead_of_a_tls_handshake_is_closed(serve: Serve, tls: TlsFiles, half_open):
    served = serve(tls=tls)
    client = connected(served, half_open, b"GET / HTTP/1.1\r\n\r\n")
    while client.recv(65536):
        pass
    served.nothing_is_left()


def test_a_client_that_is_killed_in_its_tls_handshake_leaves_nothing(serve: Serve, tls: TlsFiles, half_open):
    served = serve(tls=tls)
    for said in (b"", HELLO[:100], HELLO):
        connected(served, half_open, said)
    served.wait_for(handshakes=3)
    for client in half_open:
        client.close()
    served.nothing_is_left()


def test_a_client_over_tls_is_served_while_others_hang_in_their_handshakes(serve: Serve, tls: TlsFiles, half_open):
    served = serve(tls=tls)
    for _ in range(50):
        connected(served, half_open, HELLO[:100])
    served.wait_for(handshakes=50)
    credentials = grpc.ssl_channel_credentials(AUTHORITY.cert_pem.bytes())
    with grpc.secure_channel(served.target, credentials) as channel:
        assert channel.unary_unary(ECHO)(b"over TLS", timeout=PATIENCE_S) == b"over TLS"


# Clients that vanish


def test_clients_that_are_killed_in_the_middle_of_anything_leave_nothing(serve: Serve):
    served = serve()
    with unharmed(served.target):
        clients = [served.connect().greeted() for _ in range(10)]
        for client in clients:
            client.data(client.open(ECHO), message(b"in the middle of a request's body", length=1 << 20))
            client.data(client.open(ECHO_STREAM), message(b"in the middle of a stream"))
            client.data(client.open(ECHO_STREAM), message(b"of a stream's message", length=1 << 20))
            client.data(client.open(TALK), message(b"10"))
            client.call(LARGE, b"10000000")
            # The last one: when it runs, what was sent before it has been handed up too.
            client.call(HOLD, b"in the middle of a request that runs")
        eventually(lambda: len(served.answering.held) == 10, "the requests run")
        for client in clients:
            client.vanish()
        eventually(lambda: served.counts()["connections"] == 1, "only the neighbour is left")
        served.wait_for(calls=0, reading=0, handshakes=0)
        eventually(lambda: served.answering.cancelled.count(HOLD) == 10, "who held the calls was told")
        eventually(lambda: served.answering.cancelled.count(ECHO_STREAM) == 10, "who served the streams was told")
    served.nothing_is_left()
    assert served.transport.outcomes()[HOLD, Code.CANCELLED] == 10


def test_an_answer_that_comes_after_its_client_has_gone_is_of_no_consequence(serve: Serve):
    served = serve()
    with unharmed(served.target):
        client = served.connect().greeted()
        client.call(HOLD, b"too late")
        eventually(lambda: bool(served.answering.held), "the request runs")
        client.vanish()
        eventually(lambda: served.answering.cancelled == [HOLD], "who held the call was told")
        served.answering.release()
    assert served.transport.outcomes()[HOLD, Code.CANCELLED] == 1
    assert (HOLD, Code.OK) not in served.transport.outcomes()


@pytest.mark.parametrize("ends", ["with a reset", "with its connection"])
def test_a_client_that_leaves_while_its_message_is_unpacked_leaves_nothing(serve: Serve, ends: str):
    served = serve()
    packed = message(gzip.compress(bytes(UNPACKED_BYTES)), flag=1)
    with unharmed(served.target):
        client = served.connect().greeted()
        streams = [client.open(HOLD, ("grpc-encoding", "gzip")) for _ in range(MANY)]
        for stream in streams:
            client.data(stream, packed, end=True)
        eventually(lambda: served.counts()["reading"] > MANY // 2, "the messages wait to be unpacked")
        if ends == "with a reset":
            for stream in streams:
                client.reset(stream)
            assert client.alive()
        else:
            client.vanish()
        eventually(lambda: served.counts()["reading"] < 5, "most of them are not unpacked any more")
        client.close()
    served.nothing_is_left()
    assert served.transport.outcomes()[HOLD, Code.CANCELLED] == MANY
    assert len(served.answering.cancelled) < MANY // 2


# Keepalive


def test_a_peer_that_has_vanished_without_a_word_is_found_out(serve: Serve):
    served = serve(keepalive_time_s=SHORT_S, keepalive_timeout_s=SHORT_S)
    with unharmed(served.target):
        client = served.connect(answer_pings=False).greeted()
        client.call(HOLD, b"will you wait for me?")
        client.wait(lambda: client.pings, "we are asked whether we are there")
        client.wait_closed()
        eventually(lambda: served.answering.cancelled == [HOLD], "who held the call was told")
    served.nothing_is_left()


def test_a_peer_that_answers_stays_however_long_it_is_silent(serve: Serve):
    served = serve(keepalive_time_s=0.1, keepalive_timeout_s=PATIENCE_S, http2_max_pings_without_data=0)
    client = served.connect().greeted()
    stream = client.call(HOLD, b"patient")
    client.wait(lambda: len(client.pings) == 5, "we are asked again and again")
    eventually(lambda: bool(served.answering.held), "the request runs")
    served.answering.release()
    assert client.answer(stream).messages == [b"patient"]


@pytest.mark.parametrize("permitted", [True, False])
def test_a_peer_without_calls_is_asked_only_where_that_is_permitted(serve: Serve, *, permitted: bool):
    served = serve(keepalive_time_s=0.1, keepalive_timeout_s=0.1, keepalive_permit_without_calls=permitted)
    idle, calling = (served.connect(answer_pings=False).greeted() for _ in range(2))
    calling.call(HOLD)
    calling.wait_closed()  # by then the idle one would have been closed too
    served.wait_for(connections=0 if permitted else 1)
    assert idle.alive() is not permitted


# Age


def test_a_connection_of_age_takes_no_new_calls_and_ends_with_its_last(serve: Serve):
    served = serve(max_connection_age_s=SHORT_S, max_connection_age_grace_s=PATIENCE_S)
    client = served.connect().greeted()
    stream = client.call(HOLD, b"begun in time")
    client.wait(lambda: client.goaways, "the connection is of age")
    assert client.goodbye is ErrorCodes.NO_ERROR
    assert not client.closed
    eventually(lambda: bool(served.answering.held), "the request runs")
    served.answering.release()
    assert client.answer(stream).messages == [b"begun in time"]
    client.wait_closed()
    served.nothing_is_left()


def test_calls_that_outlast_the_grace_of_their_connection_are_cut(serve: Serve):
    served = serve(max_connection_age_s=SHORT_S, max_connection_age_grace_s=SHORT_S)
    client = served.connect().greeted()
    client.call(HOLD, b"for ever")
    client.wait_closed()
    served.nothing_is_left()
    eventually(lambda: served.answering.cancelled == [HOLD], "who held the call was told")


def test_an_idle_connection_of_age_ends_although_its_client_has_vanished(serve: Serve):
    served = serve(max_connection_age_s=0.1, keepalive_timeout_s=SHORT_S)
    client = served.connect(answer_pings=False).greeted()
    client.wait(lambda: client.goaways, "the connection is of age")
    client.wait_closed()
    served.nothing_is_left()


def test_a_client_library_notices_nothing_of_age(serve: Serve):
    served = serve(max_connection_age_s=0.1, max_connection_age_grace_s=PATIENCE_S)
    with grpc.insecure_channel(served.target) as channel:
        ask = channel.unary_unary(PEER)
        peers: set[bytes] = set()
        while len(peers) < 4:
            peers.add(ask(b"", timeout=PATIENCE_S, wait_for_ready=True))


# The end


def test_the_end_of_the_server_says_goodbye_and_answers_what_is_accepted(serve: Serve):
    served = serve()
    idle, busy = served.connect().greeted(), served.connect().greeted()
    stream = busy.call(HOLD, b"accepted")
    eventually(lambda: bool(served.answering.held), "the request runs")
    stopping = threading.Thread(target=served.transport.stop, args=(PATIENCE_S,))
    stopping.start()
    for client in (idle, busy):
        client.wait(lambda client=client: client.goaways, "the server says goodbye")
        assert client.goodbye is ErrorCodes.NO_ERROR
    idle.wait_closed()
    served.answering.release()
    assert busy.answer(stream).messages == [b"accepted"]
    busy.wait_closed()
    assert busy.goaways[-1].last_stream_id == stream
    stopping.join()
    served.nothing_is_left()


def test_a_call_that_begins_as_its_client_hears_of_the_end_leaves_the_others_alone(serve: Serve):
    served = serve()
    client = served.connect(answer_pings=False).greeted()
    stream = client.call(HOLD, b"accepted")
    eventually(lambda: bool(served.answering.held), "the request runs")
    stopping = threading.Thread(target=served.transport.stop, args=(PATIENCE_S,))
    stopping.start()
    client.wait(lambda: client.pings, "the server says goodbye, and asks whether it was heard")
    late = client.new_stream()
    # As gRPC's C core sends it: the answer, and along with it a call for which it grants bytes to the server.
    client.send(
        PingFrame(0, client.pings[-1], flags=["ACK"]),
        HeadersFrame(late, literal(client.headers(ECHO)), flags=["END_HEADERS"]),
        WindowUpdateFrame(late, window_increment=5),
        DataFrame(late, message(b"late"), flags=["END_STREAM"]),
    )
    assert client.alive()
    served.answering.release()
    assert client.answer(stream).messages == [b"accepted"]
    client.wait_closed()
    assert client.goodbye is ErrorCodes.NO_ERROR
    stopping.join()


def test_calls_that_outlast_the_grace_of_the_server_get_a_status(serve: Serve):
    served = serve()
    client = served.connect().greeted()
    unary = client.call(HOLD)
    stream = client.open(TALK)
    client.data(stream, message(b"0"))
    served.wait_for(calls=2)
    served.transport.stop(0.0)
    for one in (unary, stream):
        assert client.answer(one).status == Code.UNAVAILABLE
    client.wait_closed()
    served.nothing_is_left()
    assert served.transport.outcomes() == {(HOLD, Code.UNAVAILABLE): 1, (TALK, Code.UNAVAILABLE): 1}
