"""A load generator whose requests differ, which h2load cannot do: `python -m loadtests.varied_load`.

It speaks as much HTTP/2 as it needs to send small unary gRPC calls of one method in a closed loop: heads are coded once
and never indexed, and of what comes back only the lengths of frames and the ends of streams are looked at. The messages
of a file are sent in turn. With `--offset` the eight bytes there are the request's number in each, as two float32s: no
two requests of a run are equal then.
"""

import argparse
import json
import selectors
import socket
import struct
import sys
import time
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from loadtests.framing import PREFIX_BYTES

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEAD = struct.Struct(">HBBBI")
DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
FRAME_BYTES_MAX = 16_384
WINDOW_MAX = 2**31 - 1
FIRST_WINDOW = 65_535
WINDOW_REFILL = 2**30
READ_BYTES = 1 << 20
NUMBERS_PER_FLOAT = 4096
"""The number is counted in digits of this base: all of them are exact, and small enough for any model."""

IDLE_S = 60.0
"""A server that says nothing for so long is stuck."""


def head(kind: int, flags: int, stream: int, length: int) -> bytes:
    """The nine bytes before a frame's payload (RFC 9113, section 4.1)."""
    return FRAME_HEAD.pack(length >> 8, length & 0xFF, kind, flags, stream)


def literal(name: str, value: str) -> bytes:
    """A header field that no table remembers (RFC 7541, section 6.2.2); both are short."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def numbered(first: int) -> Iterator[bytes]:
    """Eight bytes for each request, no two alike."""
    number = first
    while True:
        yield struct.pack("<ff", number % NUMBERS_PER_FLOAT, number // NUMBERS_PER_FLOAT)
        number += 1


def split_frames(data: bytes) -> list[bytes]:
    """The messages of a file, each with its gRPC prefix, as they are sent."""
    frames = []
    at = 0
    while at < len(data):
        stop = at + PREFIX_BYTES + int.from_bytes(data[at + 1 : at + PREFIX_BYTES], "big")
        frames.append(data[at:stop])
        at = stop
    return frames


def unique(body: bytes, offset: int, first: int) -> Iterator[bytes]:
    """The same body for ever, each time with another number at this offset of its message."""
    at = PREFIX_BYTES + offset
    before, behind = body[:at], body[at + 8 :]
    for number in numbered(first):
        yield before + number + behind


class Connection:
    """One connection and its streams in flight."""

    def __init__(self, port: int, path: str, bodies: Iterator[bytes]) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "127.0.0.1"}
        fields |= {"content-type": "application/grpc", "te": "trailers"}
        self._fields = b"".join(literal(name, value) for name, value in fields.items())
        self._bodies = bodies
        self._body = b""
        self._next_stream = 1
        self._window = FIRST_WINDOW
        self._received_bytes = 0
        self._rest = b""
        self._began: dict[int, float] = {}
        self.waiting = 0
        self.answer_bytes = 0
        self.ends: list[tuple[float, float]] = []
        settings = struct.pack(">HI", 4, WINDOW_MAX)
        refill = struct.pack(">I", WINDOW_MAX - FIRST_WINDOW)
        self.socket.sendall(PREFACE + head(SETTINGS, 0, 0, len(settings)) + settings + self._refill(refill))

    @staticmethod
    def _refill(increment: bytes) -> bytes:
        return head(WINDOW_UPDATE, 0, 0, 4) + increment

    def begin(self, requests: int) -> None:
        """Have so many more requests sent, as soon as the server's window lets them."""
        self.waiting += requests
        self._send(b"")

    def _send(self, first: bytes) -> None:
        parts = [first]
        now_s = time.perf_counter()
        while self.waiting:
            # One that the window has no room for yet is kept for later.
            body = self._body = self._body or next(self._bodies)
            if self._window < len(body):
                break
            self._body = b""
            stream = self._next_stream
            self._next_stream += 2
            self._window -= len(body)
            self.waiting -= 1
            self._began[stream] = now_s
            parts += (
                head(HEADERS, END_HEADERS, stream, len(self._fields)),
                self._fields,
                head(DATA, END_STREAM, stream, len(body)),
                body,
            )
        data = b"".join(parts)
        if data:
            self.socket.sendall(data)

    def receive(self) -> int:
        """Take what has come: how many requests are answered by it."""
        got = self.socket.recv(READ_BYTES)
        if not got:
            raise ConnectionError("the server closed the connection")
        now_s = time.perf_counter()
        data = self._rest + got
        at = ended = 0
        replies = []
        while len(data) - at >= FRAME_HEAD.size:
            high, low, kind, flags, stream = FRAME_HEAD.unpack_from(data, at)
            length = high << 8 | low
            stop = at + FRAME_HEAD.size + length
            if stop > len(data):
                break
            if kind == DATA:
                self.answer_bytes += length
                self._received_bytes += length
            elif kind != HEADERS:
                replies.append(self._answer(kind, flags, data[stop - length : stop]))
            if flags & END_STREAM and kind <= HEADERS:
                self.ends.append((now_s, now_s - self._began.pop(stream)))
                ended += 1
            at = stop
        self._rest = data[at:]
        if self._received_bytes >= WINDOW_REFILL:
            replies.append(self._refill(struct.pack(">I", self._received_bytes)))
            self._received_bytes = 0
        self._send(b"".join(replies))
        return ended

    def _answer(self, kind: int, flags: int, payload: bytes) -> bytes:
        if kind == SETTINGS and not flags & ACK:
            return head(SETTINGS, ACK, 0, 0)
        if kind == PING and not flags & ACK:
            return head(PING, ACK, 0, len(payload)) + payload
        if kind == WINDOW_UPDATE:
            self._window += struct.unpack(">I", payload)[0]
        elif kind in (RST_STREAM, GOAWAY):
            raise ConnectionError(f"the server ended a stream or the connection: {payload!r}")
        return b""


def run(connections: list[Connection], streams: int, requests: int) -> dict[str, float | int | list[float]]:
    """Send the requests, so many at a time on each connection, and measure."""
    began_s, cpu_began_s, left = time.perf_counter(), time.process_time(), requests
    with selectors.DefaultSelector() as selector:
        for connection in connections:
            selector.register(connection.socket, selectors.EVENT_READ, connection)
            connection.begin(streams)
            left -= streams
        unanswered = requests
        while unanswered:
            ready = selector.select(IDLE_S)
            if not ready:
                raise TimeoutError(f"{unanswered} requests are not answered")
            for key, _ in ready:
                ended = key.data.receive()
                unanswered -= ended
                more = min(ended, left)
                left -= more
                key.data.begin(more)
    ends = [end for connection in connections for end in connection.ends]
    return {
        "elapsed_s": time.perf_counter() - began_s,
        "cpu_s": time.process_time() - cpu_began_s,
        "answer_bytes": sum(connection.answer_bytes for connection in connections),
        "ends_us": sorted(round((end_s - began_s) * 1e6) for end_s, _ in ends),
        "latencies_us": [round(latency_s * 1e6) for _, latency_s in ends],
    }


def main() -> None:
    """Send, and print what was measured as JSON."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.varied_load", description=__doc__, allow_abbrev=False)
    parser.add_argument("path", help="of the RPC")
    parser.add_argument("messages", type=Path, help="a file with messages, each behind its gRPC prefix")
    for name in ("port", "connections", "streams", "requests"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--offset", type=int, help="where the number of a request is in the one message")
    parser.add_argument("--first", type=int, default=0, help="the first number")
    args = parser.parse_args()
    frames = split_frames(args.messages.read_bytes())
    longest = max(map(len, frames))
    if longest > FRAME_BYTES_MAX:
        raise SystemExit(f"a message has {longest} bytes with its prefix, and only what fits one frame can be sent")
    bodies = cycle(frames) if args.offset is None else unique(frames[0], args.offset, args.first)
    connections = [Connection(args.port, args.path, bodies) for _ in range(args.connections)]
    json.dump(run(connections, args.streams, args.requests), sys.stdout)


if __name__ == "__main__":
    main()
