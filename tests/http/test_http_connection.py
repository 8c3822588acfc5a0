"""One HTTP connection without a socket: whose turn it is, what is written, and when it ends."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest
from uvicorn.server import ServerState

from sluice_server.http.app import HttpFront
from sluice_server.http.connection import HttpConnection
from sluice_server.http.server import KEEP_ALIVE_S, HttpListener, HttpServer
from sluice_server.protocol.rest import Exchange, HttpAnswer
from sluice_server.status import StatusMapper
from support.fakes import PATIENCE_S
from support.server import LOOPBACK

LIMIT_BYTES = 1000


class FakeLoop:
    """What a connection asks of its loop, on a clock that is set."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.timers: list[FakeTimer] = []
        self.soon: list[Any] = []

    def time(self) -> float:
        return self.now_s

    def call_soon(self, step: Any, *arguments: Any) -> None:
        self.soon.append((step, arguments))

    def call_later(self, after_s: float, step: Any, *arguments: Any) -> FakeTimer:
        timer = FakeTimer(self.now_s + after_s, step, arguments)
        self.timers.append(timer)
        return timer

    def run(self, until_s: float) -> None:
        """Let the clock come to this instant."""
        while self.timers:
            timer = min(self.timers, key=lambda timer: timer.due_s)
            if timer.due_s > until_s:
                break
            self.timers.remove(timer)
            self.now_s = timer.due_s
            if not timer.cancelled:
                timer.step(*timer.arguments)
        self.now_s = until_s


class FakeTimer:
    def __init__(self, due_s: float, step: Any, arguments: tuple[Any, ...]) -> None:
        self.due_s = due_s
        self.step = step
        self.arguments = arguments
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeTransport(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written: list[bytes] = []
        self.closed = False

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return {"peername": (LOOPBACK, 1), "sockname": (LOOPBACK, 2)}.get(name, default)

    def write(self, data: Any) -> None:
        self.written.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        """Everything is given to the connection by the test."""

    resume_reading = pause_reading


class Kept:
    """A handler that keeps exchanges; the test answers them."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.bodies: list[bytes] = []

    def take(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        self.bodies.append(exchange.body)

    def flush(self) -> None:
        """Nothing waits."""


class Talk:
    """A connection, and what it stands between."""

    def __init__(self) -> None:
        self.handler = Kept()
        self.loop = FakeLoop()
        self.transport = FakeTransport()
        config = HttpListener(HttpFront(self.handler, StatusMapper(), LIMIT_BYTES), LOOPBACK, 0).server.config
        config.load()
        self.connection = HttpConnection(config, ServerState(), {}, self.loop)  # type: ignore[arg-type]
        self.connection.connection_made(self.transport)

    def answer(self, place: int, text: bytes = b"yes") -> None:
        self.handler.exchanges[place].answer(HttpAnswer(200, (("x-name", "value"),), (text,)))


@pytest.fixture
def talk() -> Talk:
    return Talk()


def post(body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST /path HTTP/{version}", "host: x", f"content-length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def test_an_answer_is_one_write(talk):
    talk.connection.data_received(post(b"question"))
    assert talk.handler.bodies == [b"question"]
    talk.answer(0)
    assert talk.transport.written == [b"HTTP/1.1 200 OK\r\nx-name: value\r\ncontent-length: 3\r\n\r\nyes"]
    assert not talk.transport.closed


def test_a_large_answer_is_written_part_by_part_without_being_copied(talk):
    talk.connection.data_received(post(b""))
    parts = (b"x" * (64 << 10), b"y")
    talk.handler.exchanges[0].answer(HttpAnswer(200, (), parts))
    assert talk.transport.written == [b"HTTP/1.1 200 OK\r\ncontent-length: 65537\r\n\r\n", *parts]


@pytest.mark.parametrize("cut", [1, 30, 55, 60])
def test_a_request_may_come_in_pieces(cut, talk):
    data = post(b"0123456789")
    talk.connection.data_received(data[:cut])
    assert not talk.handler.exchanges
    talk.connection.data_received(data[cut:])
    assert talk.handler.bodies == [b"0123456789"]


def test_the_next_request_begins_when_the_one_before_it_is_answered(talk):
    talk.connection.data_received(post(b"one") + post(b"two") + post(b"three"))
    for place, body in enumerate((b"one", b"two", b"three")):
        assert talk.handler.bodies[place:] == [body]
        talk.answer(place, body)
    assert [data.rpartition(b"\r\n")[2] for data in talk.transport.written] == [b"one", b"two", b"three"]


def test_the_body_of_a_request_that_waits_for_its_turn_may_come_before_and_after_that(talk):
    second = post(b"abcdef")
    talk.connection.data_received(post(b"one") + second[:-4])
    talk.answer(0)
    assert talk.handler.bodies == [b"one"]
    talk.connection.data_received(second[-4:])
    assert talk.handler.bodies == [b"one", b"abcdef"]


def test_a_client_that_asks_is_told_to_go_on_with_its_body(talk):
    data = post(b"question", "expect: 100-continue")
    talk.connection.data_received(data[:-8])
    assert talk.transport.written == [b"HTTP/1.1 100 Continue\r\n\r\n"]
    talk.connection.data_received(data[-8:])
    assert talk.handler.bodies == [b"question"]


def test_a_client_that_asks_with_too_large_a_body_is_told_that_instead(talk):
    talk.connection.data_received(post(b"x" * (LIMIT_BYTES + 1), "expect: 100-continue")[:100])
    (written,) = talk.transport.written
    assert written.startswith(b"HTTP/1.1 400 Bad Request\r\n")
    assert not talk.handler.exchanges


@pytest.mark.parametrize(("headers", "version"), [(("connection: close",), "1.1"), ((), "1.0")])
def test_a_connection_that_is_not_to_be_kept_ends_behind_the_answer(headers, version, talk):
    talk.connection.data_received(post(b"", *headers, version=version))
    talk.answer(0)
    (written,) = talk.transport.written
    assert b"\r\nconnection: close\r\n\r\nyes" in written
    assert talk.transport.closed


def test_a_question_for_the_head_gets_no_body(talk):
    talk.connection.data_received(b"HEAD /path HTTP/1.1\r\nhost: x\r\n\r\n")
    talk.answer(0)
    assert talk.transport.written == [b"HTTP/1.1 200 OK\r\nx-name: value\r\ncontent-length: 3\r\n\r\n"]


def test_an_idle_connection_ends_when_it_has_been_that_for_long_enough(talk):
    for _ in range(3):
        talk.connection.data_received(post(b""))
        talk.answer(-1)
        talk.loop.run(talk.loop.now_s + KEEP_ALIVE_S - 1)
        assert not talk.transport.closed
    assert len(talk.loop.timers) == 1, "not one for each answer"
    talk.loop.run(talk.loop.now_s + 2)
    assert talk.transport.closed


def test_a_connection_in_use_is_not_idle(talk):
    talk.connection.data_received(post(b""))
    talk.answer(0)
    talk.connection.data_received(post(b""))
    talk.loop.run(talk.loop.now_s + 10 * KEEP_ALIVE_S)
    assert not talk.transport.closed
    talk.answer(1)
    talk.loop.run(talk.loop.now_s + 2 * KEEP_ALIVE_S)
    assert talk.transport.closed


def test_a_connection_that_is_lost_leaves_nothing_behind(talk):
    talk.connection.data_received(post(b""))
    talk.answer(0)
    talk.connection.data_received(post(b"more"))
    told = []
    talk.handler.exchanges[1].left = lambda: told.append("left")
    talk.connection.connection_lost(None)
    talk.answer(1)
    assert told == ["left"]
    assert len(talk.transport.written) == 1
    assert all(timer.cancelled for timer in talk.loop.timers)


def test_a_bug_of_the_handler_is_an_incident_and_the_connection_goes_on(talk, caplog):
    def fail(exchange: Exchange) -> None:
        raise RuntimeError("a bug")

    talk.handler.take = fail
    talk.connection.data_received(post(b""))
    (written,) = talk.transport.written
    assert written.startswith(b"HTTP/1.1 500 Internal Server Error\r\n")
    assert b"incident" in written
    assert b"a bug" not in written
    assert [record.exc_info[1].args for record in caplog.records if record.exc_info] == [("a bug",)]
    del talk.handler.take
    talk.connection.data_received(post(b"again"))
    assert talk.handler.bodies == [b"again"]


def test_who_is_not_answered_when_the_server_ends_is_told_as_left():
    taken, left = threading.Event(), threading.Event()

    class Waiting(Kept):
        def take(self, exchange: Exchange) -> None:
            exchange.left = left.set
            taken.set()

    listener = HttpListener(HttpFront(Waiting(), StatusMapper()), LOOPBACK, 0)
    server = HttpServer([listener], 1)
    server.start()
    with socket.create_connection((LOOPBACK, listener.port), timeout=PATIENCE_S) as peer:
        peer.sendall(post(b""))
        assert taken.wait(PATIENCE_S)
        server.stop()
        assert left.is_set()
        assert peer.recv(1) == b""
