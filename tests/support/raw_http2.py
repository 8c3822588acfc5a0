"""A client that speaks HTTP/2 frame by frame, so that it can break every rule, over a socket with deadlines.

Frames are hyperframe's; headers are coded by hpack, and codes have h2's names. Nothing is answered by itself but the
server's SETTINGS and PINGs: no window is opened unless a test sends the frame. What the server says is kept by stream,
and can be waited for.
"""

from __future__ import annotations

import select
import socket
import struct
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from h2.errors import ErrorCodes
from hpack import Decoder, Encoder, NeverIndexedHeaderTuple
from hyperframe.frame import (
    ContinuationFrame,
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from support.fakes import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

FRAME_HEADER_BYTES = 9

READ_BYTES = 1 << 16

INITIAL_WINDOW_BYTES = 65_535
"""Of every connection and stream until somebody says otherwise (RFC 9113, 6.9.2)."""


def message(payload: bytes, *, flag: int = 0, length: int | None = None) -> bytes:
    """A gRPC message with its prefix, which may lie."""
    return struct.pack(">BI", flag, len(payload) if length is None else length) + payload


@dataclass
class Answer:
    """What has come on one stream."""

    headers: list[dict[str, str]] = field(default_factory=list)
    """Header blocks in their order: the response's, and the trailers."""
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: ErrorCodes | None = None
    """The code with which the server gave the stream up; NO_ERROR behind a complete answer."""

    @property
    def over(self) -> bool:
        """Whether nothing more can come."""
        return self.ended or self.reset is not None

    @property
    def status(self) -> int | None:
        """The gRPC status, when there is one."""
        last = self.headers[-1] if self.headers else {}
        return int(last["grpc-status"]) if "grpc-status" in last else None

    @property
    def details(self) -> str:
        """The status's text as it is on the wire."""
        return self.headers[-1].get("grpc-message", "")

    @property
    def messages(self) -> list[bytes]:
        """The complete messages so far."""
        found, rest = [], bytes(self.body)
        while len(rest) >= 5:
            end = 5 + int.from_bytes(rest[1:5], "big")
            if len(rest) < end:
                break
            found.append(rest[5:end])
            rest = rest[end:]
        return found


class RawClient:
    """One connection. `settings` are ours, by their numbers; without `greet`, not even the preface is sent.

    A small `receive_buffer_bytes` makes what is not read pile up at the server soon.
    """

    def __init__(
        self,
        target: str,
        *,
        settings: Mapping[int, int] | None = None,
        greet: bool = True,
        answer_pings: bool = True,
        receive_buffer_bytes: int | None = None,
    ) -> None:
        self._socket = _connect(target, receive_buffer_bytes)
        self._answer_pings = answer_pings
        self._encoder = Encoder()
        self._decoder = Decoder()
        self._unparsed = bytearray()
        self._unsent = bytearray()
        self._block: tuple[int, bytearray, bool] | None = None
        self._next_stream = 1
        self.authority = target
        self.settings: dict[int, int] = {}
        self.settings_acks = 0
        self.ping_acks: list[bytes] = []
        self.pings: list[bytes] = []
        self.goaways: list[GoAwayFrame] = []
        self.answers: defaultdict[int, Answer] = defaultdict(Answer)
        self.window_updates: list[tuple[int, int]] = []
        self.closed = False
        if greet:
            self.send_bytes(PREFACE)
            self.send(SettingsFrame(0, settings=dict(settings or {})))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Sending

    def send(self, *frames: Frame) -> None:
        """Send frames, whatever they say."""
        self.send_bytes(b"".join(frame.serialize() for frame in frames))

    def send_bytes(self, data: bytes) -> None:
        """Send bytes, and read what comes in the meantime, or both sides might wait for each other.

        A server that has closed the connection is no error: `closed` says it. AssertionError when nothing moves.
        """
        self._unsent += data
        until = time.monotonic() + PATIENCE_S
        while self._unsent and not self.closed:
            readable, writable = self._ready(until, read=True, write=True)
            if readable:
                self._receive()
            if writable:
                del self._unsent[: self._send_some(self._unsent)]

    def send_until_stuck(self, data: bytes, stuck_s: float, *, most_bytes: int) -> int:
        """Send `data` again and again without reading, until the server takes no more for `stuck_s`, or has gone.

        Gives how many bytes went; AssertionError when the server takes more than `most_bytes`.
        """
        sent = 0
        rest = memoryview(data)
        while not self.closed:
            _, writable, _ = select.select([], [self._socket], [], stuck_s)
            if not writable:
                break
            count = self._send_some(rest)
            sent += count
            rest = rest[count:] or memoryview(data)
            assert sent <= most_bytes, f"the server took {sent} bytes"
        return sent

    def _send_some(self, data: bytes | bytearray | memoryview) -> int:
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._drain()
            return 0

    def headers(self, path: str, *more: tuple[str, str]) -> list[tuple[str, str]]:
        """A request's headers; one of the same name among `more` replaces ours."""
        ours = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": self.authority,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        names = {name for name, _ in more}
        return [*((name, value) for name, value in ours.items() if name not in names), *more]

    def encode(self, headers: Iterable[tuple[str, str]]) -> bytes:
        """A header block, in the compression state of this connection: it must be sent, and in this order."""
        return bytes(self._encoder.encode(headers))

    def new_stream(self) -> int:
        """The number of the next stream."""
        number, self._next_stream = self._next_stream, self._next_stream + 2
        return number

    def open(self, path: str, *more: tuple[str, str], end: bool = False) -> int:
        """Send a request's headers; gives its stream."""
        stream = self.new_stream()
        flags = ["END_HEADERS", *(["END_STREAM"] if end else [])]
        self.send(HeadersFrame(stream, self.encode(_pseudo_first(self.headers(path, *more))), flags=flags))
        return stream

    def data(self, stream: int, data: bytes, *, end: bool = False) -> None:
        """Send the body's next bytes in frames of the size that every peer takes; windows are the test's affair."""
        pieces = [data[at : at + 16_384] for at in range(0, len(data), 16_384)] or [b""]
        for number, piece in enumerate(pieces, 1):
            flags = ["END_STREAM"] if end and number == len(pieces) else []
            self.send(DataFrame(stream, piece, flags=flags))

    def call(self, path: str, payload: bytes = b"", *more: tuple[str, str]) -> int:
        """Send a whole unary request; gives its stream."""
        stream = self.open(path, *more)
        self.data(stream, message(payload), end=True)
        return stream

    def reset(self, stream: int, code: ErrorCodes = ErrorCodes.CANCEL) -> None:
        """Take a request back."""
        self.send(RstStreamFrame(stream, error_code=code))

    def ping(self, data: bytes = b"\0" * 8) -> None:
        """Send a PING."""
        self.send(PingFrame(0, data))

    def open_window(self, stream: int, by_bytes: int) -> None:
        """Allow the server more bytes, on a stream, or (0) on the connection."""
        self.send(WindowUpdateFrame(stream, window_increment=by_bytes))

    # Receiving

    def wait(self, condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> None:
        """Read until the condition holds; AssertionError, which says `what`, when it does not in time, or cannot."""
        until = time.monotonic() + patience_s
        while not condition():
            assert not self.closed, f"the connection was closed before: {what}; {self.goaways}"
            self._ready(until, read=True, write=False, what=what)
            self._receive()
            self.send_bytes(b"")  # what we owe in answer to that

    def wait_closed(self, patience_s: float = PATIENCE_S) -> None:
        """Wait for the end of the connection."""
        self.wait(lambda: self.closed, "the connection is closed", patience_s)

    def answer(self, stream: int) -> Answer:
        """Wait for the end of a stream."""
        self.wait(lambda: self.answers[stream].over, f"stream {stream} is over")
        return self.answers[stream]

    def greeted(self) -> RawClient:
        """Wait for the server's SETTINGS and for its acknowledgement of ours."""
        self.wait(lambda: self.settings and self.settings_acks, "the handshake is complete")
        return self

    def alive(self) -> bool:
        """Whether the server answers a PING on this connection."""
        count = len(self.ping_acks)
        self.ping(b"are you?")
        try:
            self.wait(lambda: len(self.ping_acks) > count, "a PING is answered")
        except AssertionError:
            if self.closed:
                return False
            raise
        return True

    @property
    def goodbye(self) -> ErrorCodes | None:
        """The code of the last GOAWAY."""
        return ErrorCodes(self.goaways[-1].error_code) if self.goaways else None

    def _ready(self, until: float, *, read: bool, write: bool, what: str = "the server reads") -> tuple[bool, bool]:
        remaining_s = until - time.monotonic()
        one = [self._socket]
        readable, writable, _ = select.select(one if read else [], one if write else [], [], max(0.0, remaining_s))
        assert readable or writable, f"did not happen in time: {what}"
        return bool(readable), bool(writable)

    def _receive(self) -> None:
        try:
            data = self._socket.recv(READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self.closed = True
            return
        self._unparsed += data
        self._parse()

    def _drain(self) -> None:
        """Read what came before the end that sending has met."""
        while not self.closed:
            readable, _, _ = select.select([self._socket], [], [], 0.0)
            if not readable:
                self.closed = True
            else:
                self._receive()

    def _parse(self) -> None:
        unparsed = self._unparsed
        at = 0
        while len(unparsed) - at >= FRAME_HEADER_BYTES:
            frame, length = Frame.parse_frame_header(memoryview(unparsed)[at : at + FRAME_HEADER_BYTES])
            end = at + FRAME_HEADER_BYTES + length
            if len(unparsed) < end:
                break
            frame.parse_body(memoryview(bytes(unparsed[at + FRAME_HEADER_BYTES : end])))
            self._take(frame)
            at = end
        del unparsed[:at]

    def _take(self, frame: Frame) -> None:
        match frame:
            case SettingsFrame() if "ACK" in frame.flags:
                self.settings_acks += 1
            case SettingsFrame():
                self.settings.update(frame.settings)
                self._unsent += SettingsFrame(0, flags=["ACK"]).serialize()
            case PingFrame() if "ACK" in frame.flags:
                self.ping_acks.append(frame.opaque_data)
            case PingFrame():
                self.pings.append(frame.opaque_data)
                if self._answer_pings:
                    self._unsent += PingFrame(0, frame.opaque_data, flags=["ACK"]).serialize()
            case GoAwayFrame():
                self.goaways.append(frame)
            case WindowUpdateFrame():
                self.window_updates.append((frame.stream_id, frame.window_increment))
            case _:
                self._take_of_stream(frame)

    def _take_of_stream(self, frame: Frame) -> None:
        answer = self.answers[frame.stream_id]
        match frame:
            case RstStreamFrame():
                # The first one counts: a frame that comes after it may be answered with another.
                if answer.reset is None:
                    answer.reset = ErrorCodes(frame.error_code)
            case DataFrame():
                answer.body += frame.data
                answer.ended |= "END_STREAM" in frame.flags
            case HeadersFrame():
                self._block = (frame.stream_id, bytearray(frame.data), "END_STREAM" in frame.flags)
            case ContinuationFrame():
                assert self._block is not None
                self._block[1].extend(frame.data)
        if isinstance(frame, HeadersFrame | ContinuationFrame) and "END_HEADERS" in frame.flags:
            assert self._block is not None
            _, block, ended = self._block
            answer.headers.append(dict(self._decoder.decode(bytes(block))))
            answer.ended |= ended

    # The end

    def vanish(self) -> None:
        """End the connection as the kernel does for a process that was killed: with a reset, as data is unread."""
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._socket.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()


def _connect(target: str, receive_buffer_bytes: int | None) -> socket.socket:
    host, _, port = target.rpartition(":")
    connection = socket.socket(socket.AF_INET)
    if receive_buffer_bytes is not None:
        # Before connecting, or TCP has promised more already.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer_bytes)
    connection.connect((host, int(port)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(False)
    return connection


def _pseudo_first(headers: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(headers, key=lambda header: not header[0].startswith(":"))


def literal(headers: Iterable[tuple[str, str]]) -> bytes:
    """A header block that leaves no trace in the compression state: it may be sent any number of times, or never."""
    plain = [NeverIndexedHeaderTuple(name, value) for name, value in _pseudo_first(headers)]
    return bytes(Encoder().encode(plain, huffman=False))
