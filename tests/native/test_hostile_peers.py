"""Peers that break the rules of HTTP/2 and gRPC, or stretch them: closed with the right code, in bounded memory, at
nobody else's cost."""

from __future__ import annotations

import gzip
import threading
import zlib
from typing import TYPE_CHECKING

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from sluice_server.status import Code
from support.answering import ECHO, ECHO_STREAM, HOLD, LARGE, TALK, memory_within, unharmed
from support.fakes import eventually
from support.raw_http2 import INITIAL_WINDOW_BYTES, PREFACE, RawClient, literal, message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from hyperframe.frame import Frame

    from conftest import Serve

    Frames = Callable[[RawClient], Iterable[bytes]]

MEMORY_BYTES_MAX = 48 << 20
"""For server and client together: a small part of what these attacks send, or ask for."""

SHORT_S = 0.3
"""A time limit that is to run out; an honest exchange here takes a few milliseconds."""

FLOOD_FRAMES = 200_000
"""Beyond any limit: an attack that is not stopped within them is not stopped."""

CHUNK_FRAMES = 500

SLOWLY_BYTES = 32_768
"""What a slow reader takes at a time."""

MESSAGE_BYTES_MAX = 1 << 20
"""Where a test sets the limit."""


def flood(client: RawClient, frames: Iterable[bytes]) -> ErrorCodes | None:
    """Send frames until the server closes the connection; gives the code of its GOAWAY."""
    chunk = bytearray()
    for number, frame in enumerate(frames, 1):
        chunk += frame
        if number % CHUNK_FRAMES == 0:
            client.send_bytes(bytes(chunk))
            chunk.clear()
            if client.closed:
                break
    client.send_bytes(bytes(chunk))
    client.wait_closed()
    return client.goodbye


def on_new_streams(frame: Frame) -> Frames:
    """Open a stream, send one frame on it, and so on; put together by hand, as an attacker is fast."""

    def frames(client: RawClient) -> Iterable[bytes]:
        opening = HeadersFrame(1, literal(client.headers(HOLD)), flags=["END_HEADERS"]).serialize()
        following = frame.serialize()
        for _ in range(FLOOD_FRAMES):
            stream = client.new_stream().to_bytes(4, "big")
            yield opening[:5] + stream + opening[9:] + following[:5] + stream + following[9:]

    return frames


def repeated(frame: Frame) -> Frames:
    data = frame.serialize()
    return lambda _client: (data for _ in range(FLOOD_FRAMES))


def on_a_stream(make: Callable[[int], Frame]) -> Frames:
    def frames(client: RawClient) -> Iterable[bytes]:
        data = make(client.open(ECHO_STREAM)).serialize()
        return (data for _ in range(FLOOD_FRAMES))

    return frames


def endless_headers(piece: bytes) -> Frames:
    def frames(client: RawClient) -> Iterable[bytes]:
        stream = client.new_stream()
        yield HeadersFrame(stream, literal(client.headers(ECHO))).serialize()
        data = ContinuationFrame(stream, piece).serialize()
        for _ in range(FLOOD_FRAMES):
            yield data

    return frames


FLOODS: dict[str, Frames] = {
    "rapid resets": on_new_streams(RstStreamFrame(1, ErrorCodes.CANCEL)),
    "resets that the server is made to send": on_new_streams(WindowUpdateFrame(1, (1 << 31) - 1)),
    "pings": repeated(PingFrame(0, b"12345678")),
    "settings": repeated(SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20})),
    "empty settings": repeated(SettingsFrame(0)),
    "window updates": repeated(WindowUpdateFrame(0, 1)),
    "window updates of a stream": on_a_stream(lambda stream: WindowUpdateFrame(stream, 1)),
    "priorities": repeated(PriorityFrame(1, depends_on=3)),
    "empty data": on_a_stream(DataFrame),
    "endless empty headers": endless_headers(b""),
}


@pytest.mark.parametrize("name", FLOODS)
def test_a_flood_is_ended_with_enhance_your_calm(serve: Serve, name: str):
    served = serve()
    with unharmed(served.target), memory_within(MEMORY_BYTES_MAX):
        client = served.connect().greeted()
        assert flood(client, FLOODS[name](client)) is ErrorCodes.ENHANCE_YOUR_CALM
    served.nothing_is_left()


def test_headers_without_end_are_ended(serve: Serve):
    served = serve()
    with unharmed(served.target), memory_within(MEMORY_BYTES_MAX):
        client = served.connect().greeted()
        code = flood(client, endless_headers(literal([("x-more", "y" * 16_000)]))(client))
        assert code in {ErrorCodes.ENHANCE_YOUR_CALM, ErrorCodes.PROTOCOL_ERROR}
    served.nothing_is_left()


def test_a_client_that_pings_too_much_is_told_so_in_the_words_that_grpc_clients_look_for(serve: Serve):
    client = serve().connect().greeted()
    flood(client, FLOODS["pings"](client))
    assert client.goaways[-1].additional_data == b"too_many_pings"


def test_a_client_may_cancel_many_calls_and_go_on(serve: Serve):
    served = serve()
    client = served.connect().greeted()
    for _ in range(300):
        client.reset(client.call(HOLD))
    assert client.answer(client.call(ECHO, b"still here")).messages == [b"still here"]
    served.wait_for(calls=0, reading=0)


def test_acknowledgements_that_nobody_reads_do_not_pile_up(serve: Serve):
    served = serve()
    data = SettingsFrame(0, settings={SettingCodes.INITIAL_WINDOW_SIZE: 1 << 20}).serialize() * CHUNK_FRAMES
    with unharmed(served.target), memory_within(MEMORY_BYTES_MAX):
        client = served.connect(receive_buffer_bytes=4096).greeted()
        client.send_until_stuck(data, SHORT_S, most_bytes=MEMORY_BYTES_MAX)
        client.vanish()
    served.nothing_is_left()


# Frames that are not allowed

GARBAGE = {
    "another protocol": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n" + b"x" * 100,
    "a TLS handshake": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"x" * 100,
    "nothing sensible": bytes(range(256)),
    "a preface that ends wrongly": PREFACE[:-2] + b"!!" + b"x" * 100,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_garbage_instead_of_a_preface_is_closed(serve: Serve, name: str):
    served = serve()
    with unharmed(served.target):
        client = served.connect(greet=False)
        client.send_bytes(GARBAGE[name])
        client.wait_closed()
        assert client.goodbye in {None, ErrorCodes.PROTOCOL_ERROR}
    served.nothing_is_left()


def frame_bytes(kind: int, stream: int, body: bytes, *, flags: int = 0, length: int | None = None) -> bytes:
    """A frame that hyperframe would not write."""
    size = len(body) if length is None else length
    return size.to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body


CONTINUED = literal([("x-continued", "y")])

BROKEN = {
    "a frame above the size we take": (frame_bytes(0, 1, b"", length=(1 << 24) - 1), ErrorCodes.FRAME_SIZE_ERROR),
    "a PING of 7 bytes": (frame_bytes(6, 0, b"1234567"), ErrorCodes.FRAME_SIZE_ERROR),
    "SETTINGS of 5 bytes": (frame_bytes(4, 0, b"12345"), ErrorCodes.FRAME_SIZE_ERROR),
    "data on no stream": (frame_bytes(0, 0, b"x"), ErrorCodes.PROTOCOL_ERROR),
    "data on a stream that was never opened": (frame_bytes(0, 99, b"x"), ErrorCodes.PROTOCOL_ERROR),
    "a stream of the server's": (
        HeadersFrame(2, CONTINUED, flags=["END_HEADERS"]).serialize(),
        ErrorCodes.PROTOCOL_ERROR,
    ),
    "a continuation of nothing": (
        ContinuationFrame(1, CONTINUED, flags=["END_HEADERS"]).serialize(),
        ErrorCodes.PROTOCOL_ERROR,
    ),
    "a header block that another frame cuts": (
        HeadersFrame(1, CONTINUED).serialize() + PingFrame(0, b"12345678").serialize(),
        ErrorCodes.PROTOCOL_ERROR,
    ),
    "headers that cannot be decompressed": (
        HeadersFrame(1, b"\xff\xff\xff\xff\xff\xff\xff\xff", flags=["END_HEADERS"]).serialize(),
        ErrorCodes.COMPRESSION_ERROR,
    ),
    "a promise": (
        PushPromiseFrame(1, promised_stream_id=2, data=CONTINUED, flags=["END_HEADERS"]).serialize(),
        ErrorCodes.PROTOCOL_ERROR,
    ),
    "a window above what there is": (
        WindowUpdateFrame(0, (1 << 31) - 1).serialize() * 2,
        ErrorCodes.FLOW_CONTROL_ERROR,
    ),
    "a setting out of its range": (
        SettingsFrame(0, settings={SettingCodes.MAX_FRAME_SIZE: 1}).serialize(),
        ErrorCodes.PROTOCOL_ERROR,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_frame_that_is_not_allowed_closes_the_connection_with_its_code(serve: Serve, name: str):
    """The code of RFC 9113, or the general one, which the RFC allows in place of every other."""
    served = serve()
    data, code = BROKEN[name]
    with unharmed(served.target):
        client = served.connect().greeted()
        client.send_bytes(data)
        client.wait_closed()
        assert client.goodbye in {code, ErrorCodes.PROTOCOL_ERROR}
    served.nothing_is_left()


def test_more_data_than_its_window_is_a_flow_control_error(serve: Serve):
    served = serve()
    client = served.connect().greeted()
    window_bytes = client.settings[SettingCodes.INITIAL_WINDOW_SIZE]
    with unharmed(served.target), memory_within(MEMORY_BYTES_MAX):
        # Nothing of it is read while the server has as many messages of the stream as it takes.
        stream = client.open(TALK)
        client.data(stream, message(b"1") + message(b"0") * 5000)
        served.wait_for(calls=1)
        client.data(stream, bytes(window_bytes + 16_384))
        client.wait(lambda: client.closed or client.answers[stream].reset, "the stream or the connection is ended")
    codes = {client.goodbye, client.answers[stream].reset}
    assert ErrorCodes.FLOW_CONTROL_ERROR in codes


# Headers


def test_headers_above_the_limit_are_refused_and_the_connection_goes_on(serve: Serve):
    served = serve(max_header_bytes=8192)
    with unharmed(served.target):
        client = served.connect().greeted()
        answer = client.answer(client.open(ECHO, ("x-large", "y" * 10_000), end=True))
        assert answer.status == Code.RESOURCE_EXHAUSTED
        far_above = client.open(ECHO, ("x-larger", "y" * 15_000), ("x-as-large", "y" * 15_000), ("x-more", "y" * 8_000))
        assert client.answer(far_above).headers[0][":status"] == "431"
        assert client.answer(client.call(ECHO, b"small")).messages == [b"small"]


def test_a_small_header_block_that_unpacks_to_a_large_one_is_refused(serve: Serve):
    served = serve()
    with unharmed(served.target), memory_within(MEMORY_BYTES_MAX):
        client = served.connect().greeted()
        # The first one goes into the table; from then on each repetition is one byte.
        client.answer(client.call(ECHO, b"", ("x-bomb", "y" * 3000)))
        client.open(ECHO, *[("x-bomb", "y" * 3000)] * 10_000, end=True)
        client.wait_closed()
        assert client.goodbye is ErrorCodes.ENHANCE_YOUR_CALM
    served.nothing_is_left()


# Streams and windows


def test_streams_above_the_limit_are_refused_and_those_below_are_served(serve: Serve):
    served = serve(max_concurrent_streams=10)
    with unharmed(served.target):
        client = served.connect().greeted()
        assert client.settings[SettingCodes.MAX_CONCURRENT_STREAMS] == 10
        held = [client.call(HOLD, b"one of ten") for _ in range(10)]
        # The transport counts a call before it hands it up, and counts the neighbour's too.
        eventually(lambda: len(served.answering.held) == 10, "all ten are held")
        assert client.answer(client.call(HOLD)).reset is ErrorCodes.REFUSED_STREAM
        served.answering.release()
        assert [client.answer(stream).messages for stream in held] == [[b"one of ten"]] * 10


def test_connections_above_the_limit_are_closed_and_those_below_are_served(serve: Serve):
    served = serve(max_connections=3)
    clients = [served.connect().greeted() for _ in range(3)]
    served.connect().wait_closed()
    assert all(client.alive() for client in clients)
    clients[0].close()
    served.wait_for(connections=2)
    served.connect().greeted()


def test_a_window_of_one_byte_gets_its_answer_byte_by_byte(serve: Serve):
    served = serve()
    with unharmed(served.target):
        client = served.connect(settings={SettingCodes.INITIAL_WINDOW_SIZE: 1}).greeted()
        stream = client.call(ECHO, b"a patient client")
        for count in range(1, 5 + len(b"a patient client") + 1):
            client.wait(lambda count=count: len(client.answers[stream].body) == count, f"{count} bytes")
            client.open_window(stream, 1)
        assert client.answer(stream).messages == [b"a patient client"]


def test_a_client_that_takes_nothing_of_its_answers_is_closed(serve: Serve):
    served = serve(stall_timeout_s=SHORT_S)
    with unharmed(served.target):
        client = served.connect(settings={SettingCodes.INITIAL_WINDOW_SIZE: 1}).greeted()
        for _ in range(20):
            client.call(LARGE, b"100000")
        client.wait_closed()
        assert client.goodbye is ErrorCodes.ENHANCE_YOUR_CALM
    served.nothing_is_left()


def test_small_answers_that_are_not_taken_do_not_stay_either(serve: Serve):
    served = serve(stall_timeout_s=SHORT_S)
    with unharmed(served.target), memory_within(MEMORY_BYTES_MAX):
        client = served.connect(settings={SettingCodes.INITIAL_WINDOW_SIZE: 0}).greeted()
        for _ in range(1000):
            client.call(ECHO, bytes(1000))
        client.wait_closed()
        assert client.goodbye is ErrorCodes.ENHANCE_YOUR_CALM
    served.nothing_is_left()


def test_a_client_that_does_not_read_its_socket_is_closed(serve: Serve):
    served = serve(stall_timeout_s=SHORT_S)
    with unharmed(served.target), memory_within(2 * MEMORY_BYTES_MAX):
        client = served.connect(
            settings={SettingCodes.INITIAL_WINDOW_SIZE: (1 << 31) - 1}, receive_buffer_bytes=4096
        ).greeted()
        client.open_window(0, (1 << 30))
        client.call(LARGE, str(32 << 20).encode())
        served.wait_for(connections=1)
    served.nothing_is_left()


def test_a_reader_that_is_slow_but_goes_on_is_served(serve: Serve):
    client = serve(stall_timeout_s=SHORT_S).connect().greeted()
    stream = client.call(LARGE, str(INITIAL_WINDOW_BYTES + 20 * SLOWLY_BYTES).encode())
    for count in range(20):
        expected_bytes = INITIAL_WINDOW_BYTES + count * SLOWLY_BYTES
        client.wait(lambda: len(client.answers[stream].body) == expected_bytes, "the window is full")  # noqa: B023
        threading.Event().wait(SHORT_S / 5)  # this is how slow it is
        client.open_window(0, SLOWLY_BYTES)
        client.open_window(stream, SLOWLY_BYTES)
    client.open_window(0, SLOWLY_BYTES)
    client.open_window(stream, SLOWLY_BYTES)
    assert client.answer(stream).status == Code.OK


def test_a_stream_that_nobody_reads_holds_up_its_own_answers_only(serve: Serve):
    served = serve(stall_timeout_s=SHORT_S)
    with unharmed(served.target):
        client = served.connect().greeted()
        stream = client.open(TALK)
        client.data(stream, message(b"100"))
        client.wait(lambda: len(client.answers[stream].body) == INITIAL_WINDOW_BYTES, "the window is full")
        client.wait_closed()
        assert client.goodbye is ErrorCodes.ENHANCE_YOUR_CALM
    served.nothing_is_left()
    eventually(lambda: served.answering.cancelled == [TALK], "the stream's server is told")


def test_a_request_that_is_never_completed_is_ended(serve: Serve):
    served = serve(stall_timeout_s=SHORT_S)
    with unharmed(served.target):
        client = served.connect().greeted()
        for path in (ECHO, ECHO_STREAM):
            stream = client.open(path)
            client.data(stream, message(b"begun", length=100))
            assert client.answer(stream).status == Code.UNAVAILABLE
        assert client.alive()
    served.wait_for(calls=0, reading=0, held_bytes=0)


def test_a_stream_may_be_silent_between_its_messages(serve: Serve):
    served = serve(stall_timeout_s=SHORT_S)
    client = served.connect().greeted()
    silent, begun = client.open(ECHO_STREAM), client.open(ECHO)
    assert client.answer(begun).status == Code.UNAVAILABLE  # the time that the silence must outlast
    client.data(silent, message(b"here I am"), end=True)
    assert client.answer(silent).messages == [b"here I am"]


def test_unfinished_requests_hold_no_more_than_one_server_may(serve: Serve):
    served = serve(max_message_bytes=64 << 20)
    with unharmed(served.target), memory_within(MEMORY_BYTES_MAX):
        client = served.connect().greeted()
        for _ in range(1000):
            client.data(client.open(ECHO), message(b"of 64 MiB", length=64 << 20))
        served.wait_for(reading=1000)
        client.vanish()
        served.wait_for(reading=0, connections=1)
    served.nothing_is_left()


# Messages

MESSAGES = {
    "truncated": (message(b"abc", length=100), Code.INTERNAL),
    "without its whole prefix": (b"\0\0", Code.INTERNAL),
    "with a flag that there is not": (message(b"abc", flag=2), Code.INTERNAL),
    "compressed without saying how": (message(b"abc", flag=1), Code.INTERNAL),
    "above the limit": (message(bytes(MESSAGE_BYTES_MAX + 1)), Code.RESOURCE_EXHAUSTED),
    "missing": (b"", Code.INTERNAL),
    "one too many": (message(b"abc") * 2, Code.UNIMPLEMENTED),
}


OF_UNARY_CALLS = {"missing", "one too many"}
"""A stream may have any number of messages."""


@pytest.mark.parametrize(
    ("name", "path"),
    [(name, path) for name in MESSAGES for path in (ECHO, ECHO_STREAM) if path == ECHO or name not in OF_UNARY_CALLS],
)
def test_a_message_that_is_wrong_ends_its_call_only(serve: Serve, name: str, path: str):
    served = serve(max_message_bytes=MESSAGE_BYTES_MAX)
    data, code = MESSAGES[name]
    with unharmed(served.target):
        client = served.connect().greeted()
        stream = client.open(path)
        client.open_window(0, 1)
        client.data(stream, data[:INITIAL_WINDOW_BYTES], end=len(data) <= INITIAL_WINDOW_BYTES)
        answer = client.answer(stream)
        assert (answer.status, bool(answer.details)) == (code, True)
        assert client.alive()
    served.wait_for(calls=0, reading=0, held_bytes=0)


def test_a_length_above_the_limit_is_refused_before_its_bytes_come(serve: Serve):
    served = serve(max_message_bytes=MESSAGE_BYTES_MAX)
    client = served.connect().greeted()
    stream = client.open(ECHO)
    client.data(stream, message(b"", length=(1 << 32) - 1))
    answer = client.answer(stream)
    assert answer.status == Code.RESOURCE_EXHAUSTED
    assert str((1 << 32) - 1) in answer.details


BOMB_BYTES = 200 << 20

BOMBS = {
    "gzip": gzip.compress(bytes(BOMB_BYTES)),
    "deflate": zlib.compress(bytes(BOMB_BYTES), 9),
}


@pytest.mark.parametrize("encoding", BOMBS)
def test_a_bomb_is_refused_without_being_unpacked(serve: Serve, encoding: str):
    served = serve(max_message_bytes=MESSAGE_BYTES_MAX)
    with unharmed(served.target), memory_within(MEMORY_BYTES_MAX):
        client = served.connect().greeted()
        for _ in range(5):
            stream = client.open(ECHO, ("grpc-encoding", encoding))
            client.data(stream, message(BOMBS[encoding], flag=1), end=True)
            assert client.answer(stream).status == Code.RESOURCE_EXHAUSTED
        assert client.alive()
    served.wait_for(calls=0, reading=0, held_bytes=0)


def test_a_compressed_message_that_is_damaged_ends_its_call_only(serve: Serve):
    client = serve().connect().greeted()
    stream = client.open(ECHO, ("grpc-encoding", "gzip"))
    client.data(stream, message(gzip.compress(b"intact")[:-6], flag=1), end=True)
    assert client.answer(stream).status == Code.INTERNAL
    assert client.alive()


def test_data_behind_the_end_of_an_answered_call_is_of_no_consequence(serve: Serve):
    served = serve(max_message_bytes=MESSAGE_BYTES_MAX)
    client = served.connect().greeted()
    stream = client.open(ECHO)
    client.data(stream, message(b"", length=1 << 30))
    client.answer(stream)
    client.data(stream, b"more" * 1000)
    assert client.answer(client.call(ECHO, b"next")).messages == [b"next"]
