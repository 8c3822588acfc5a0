"""The HTTP front: compression, bounds on bodies and heads, kept connections, and clients that leave."""

from __future__ import annotations

import gzip
import http.client
import json
import socket
import struct
import zlib

import numpy as np
import pytest

from sluice_proto import grpc_service_pb2 as pb
from support import models
from support.fakes import eventually, held
from support.requests import infer_request
from support.rest import HEAD_LENGTH, post_infer, request, split_answer
from support.server import LOOPBACK

pytestmark = pytest.mark.usefixtures("no_errors_logged")

DATA = struct.pack("<4f", 1, 2, 3, 4)
HEAD = {
    "inputs": [{"name": "X", "shape": [1, 4], "datatype": "FP32", "parameters": {"binary_data_size": 16}}],
    "outputs": [{"name": "Y", "parameters": {"binary_data": True}}],
}
TEXT = json.dumps(HEAD).encode()


@pytest.fixture
def server(start_server, repository):
    models.write_model(repository, "m", models.identity(), max_batch_size=8)
    models.write_model(repository, "open", models.identity(dims=("N", "W")), max_batch_size=8)
    return start_server(repository, http_max_input_bytes=1 << 20)


PACK = {"gzip": gzip.compress, "deflate": zlib.compress}


@pytest.mark.parametrize("encoding", PACK)
def test_bodies_may_be_compressed_both_ways(encoding, server):
    headers = {"content-encoding": encoding, "accept-encoding": encoding, HEAD_LENGTH: str(len(TEXT))}
    answer = request(server, "POST", "/v2/models/m/infer", PACK[encoding](TEXT + DATA), headers)
    assert answer.headers["content-encoding"] == encoding
    body = zlib.decompress(answer.body, 47)
    assert split_answer(answer._replace(body=body))[1] == {"Y": DATA}


def test_large_bodies_may_be_compressed_too(server):
    data = np.arange(200_000, dtype=np.float32).tobytes()
    head = json.loads(json.dumps(HEAD).replace("[1, 4]", "[1, 200000]").replace("16", str(len(data))))
    text = json.dumps(head).encode()
    headers = {"content-encoding": "gzip", "accept-encoding": "gzip", HEAD_LENGTH: str(len(text))}
    answer = request(server, "POST", "/v2/models/open/infer", gzip.compress(text + data, 1), headers)
    assert split_answer(answer._replace(body=gzip.decompress(answer.body)))[1] == {"Y": data}


@pytest.mark.parametrize(
    ("accept", "encoding"),
    [
        ("gzip, deflate, br", "gzip"),
        ("gzip;q=0.1, deflate;q=0.9", "deflate"),
        ("gzip;q=0", None),
        ("br", None),
        ("identity", None),
        ("", None),
        ("gzip;q=nonsense", None),
    ],
)
def test_an_answer_is_compressed_as_the_client_prefers(accept, encoding, server):
    answer = post_infer(server, "m", HEAD, DATA, headers={"accept-encoding": accept})
    assert answer.headers.get("content-encoding") == encoding
    assert int(answer.headers["content-length"]) == len(answer.body)


def test_only_answers_of_inference_are_compressed(server):
    assert "content-encoding" not in request(server, "GET", "/v2", headers={"accept-encoding": "gzip"}).headers
    bad = post_infer(server, "m", b"{", headers={"accept-encoding": "gzip"})
    assert "content-encoding" not in bad.headers


@pytest.mark.parametrize(
    ("encoding", "body", "status", "text"),
    [
        ("br", b"x", 501, "Unsupported compression type"),
        ("gzip", b"no gzip", 400, "is not gzip"),
        ("gzip", gzip.compress(TEXT)[:-1], 400, "it is cut off"),
        ("gzip", b"", 400, "it is cut off"),
        ("gzip", gzip.compress(TEXT) + b"more", 400, "is not gzip"),
        ("deflate", zlib.compress(TEXT) + b"more", 400, "4 bytes follow its end"),
        ("gzip", gzip.compress(b" " * (8 << 20)), 400, "exceeds the maximum allowed value"),
        ("gzip", gzip.compress(b" " * (1 << 19)) * 3, 400, "exceeds the maximum allowed value"),
        ("deflate", zlib.compress(b" " * (1 << 20) + b" "), 400, "exceeds the maximum allowed value"),
    ],
)
def test_what_cannot_be_inflated_within_the_limit_is_refused(encoding, body, status, text, server):
    answer = request(server, "POST", "/v2/models/m/infer", body, {"content-encoding": encoding})
    assert (answer.status, text in answer.json()["error"]) == (status, True), answer.json()


def test_a_body_above_the_limit_is_refused_and_one_at_it_is_not(server):
    answer = post_infer(server, "m", b" " * ((1 << 20) - len(TEXT)) + TEXT.replace(b"16", b"0 "))
    assert "byte size mismatch" in answer.json()["error"]
    answer = post_infer(server, "m", b" " * ((1 << 20) + 1))
    assert answer.status == 400
    assert "Use --http-max-input-size to increase the limit" in answer.json()["error"]


def connect(server) -> http.client.HTTPConnection:
    return http.client.HTTPConnection(LOOPBACK, server.server.http_port, timeout=30)


def test_chunks_count_against_the_limit_as_they_come_and_the_connection_is_kept(server):
    connection = connect(server)
    connection.request("POST", "/v2/models/m/infer", iter([b" " * 65536] * 17), encode_chunked=True)
    response = connection.getresponse()
    assert b"exceeds the maximum" in response.read()
    assert response.status == 400
    head = {HEAD_LENGTH: str(len(TEXT)), "transfer-encoding": "chunked"}
    connection.request("POST", "/v2/models/m/infer", iter([TEXT[:5], TEXT[5:], DATA]), head, encode_chunked=True)
    assert connection.getresponse().read().endswith(DATA)
    connection.close()


def test_one_connection_lives_through_errors_of_every_kind(server):
    connection = connect(server)
    steps = [(b"{", 500), (b" " * (1 << 21), 400), (TEXT, 400), (b"", 500), (TEXT + DATA, 200)]
    for body, status in steps * 2:
        connection.request("POST", "/v2/models/m/infer", body, {HEAD_LENGTH: str(len(TEXT))} if status == 200 else {})
        own_port = connection.sock.getsockname()[1]
        response = connection.getresponse()
        response.read()
        assert response.status == status
        assert connection.sock is not None
        assert connection.sock.getsockname()[1] == own_port
    connection.close()


def test_a_head_without_end_is_hung_up_on(server):
    with socket.create_connection((LOOPBACK, server.server.http_port), timeout=30) as peer:
        peer.sendall(b"GET /v2 HTTP/1.1\r\nx: ")
        with pytest.raises((ConnectionResetError, BrokenPipeError, EOFError)):  # noqa: PT012 - whichever comes first
            for _ in range(1000):
                peer.sendall(b"y" * 65536)
            raise EOFError
    assert request(server, "GET", "/v2/health/live").status == 200


def test_many_headers_are_too_many(server):
    answer = request(server, "GET", "/v2", headers={f"x-{number}": "y" * 1000 for number in range(100)})
    assert answer.status == 400
    assert request(server, "GET", "/v2", headers={f"x-{number}": "y" * 1000 for number in range(60)}).status == 200


def send_and_leave(server, body: bytes) -> None:
    """Send a whole request, or part of it, and hang up without waiting for the answer."""
    head = f"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\n{HEAD_LENGTH}: {len(TEXT)}\r\n"
    with socket.create_connection((LOOPBACK, server.server.http_port), timeout=30) as peer:
        peer.sendall(f"{head}content-length: {len(TEXT + DATA)}\r\n\r\n".encode() + body)
        eventually(lambda: server.model("m").queue.rows == (body == TEXT + DATA), "it has come")


def test_a_client_that_leaves_takes_its_waiting_request_with_it(server):
    with held(server.model("m")) as session:
        running = server.begin("ModelInfer", infer_request("m", {"X": np.zeros((1, 4), np.float32)}))
        session.wait_for_runs(1)
        send_and_leave(server, TEXT + DATA)
        eventually(lambda: server.model("m").queue.rows == 0, "its request has left the queue")
        session.release()
        running.result()
    (statistics,) = server.call("ModelStatistics", pb.ModelStatisticsRequest(name="m")).model_stats
    assert statistics.inference_stats.fail.count == 1
    assert post_infer(server, "m", HEAD, DATA).status == 200


def test_a_client_that_leaves_in_its_body_harms_nobody(server):
    send_and_leave(server, TEXT[:10])
    assert post_infer(server, "m", HEAD, DATA).status == 200


def test_pipelined_requests_are_answered_in_their_order(server):
    one = (
        f"POST /v2/models/m/infer HTTP/1.1\r\nhost: x\r\n{HEAD_LENGTH}: {len(TEXT)}\r\ncontent-length: {len(TEXT) + 16}"
    )
    with socket.create_connection((LOOPBACK, server.server.http_port), timeout=30) as peer:
        peer.sendall(b"".join(one.encode() + b"\r\n\r\n" + TEXT + struct.pack("<4f", *[n] * 4) for n in range(5)))
        got = b""
        while got.count(b"HTTP/1.1 200") < 5 or not got.endswith(struct.pack("<4f", *[4] * 4)):
            piece = peer.recv(65536)
            assert piece
            got += piece
    assert [got.index(struct.pack("<4f", *[n] * 4)) for n in range(1, 5)] == sorted(
        got.index(struct.pack("<4f", *[n] * 4)) for n in range(1, 5)
    )


def test_what_is_in_flight_is_answered_when_the_server_ends(server):
    connection = connect(server)
    with held(server.model("m")) as session:
        connection.request("POST", "/v2/models/m/infer", TEXT + DATA, {HEAD_LENGTH: str(len(TEXT))})
        session.wait_for_runs(1)
        session.release()
        server.server.stop()
    assert connection.getresponse().read().endswith(DATA)
    connection.close()
