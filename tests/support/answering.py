"""What the tests of a transport serve: methods without models, and a client that must not notice an attack."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from support.fakes import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from sluice_server.transport.call import Call, Stream

ECHO = "/test.Transport/Echo"
"""Answers with the message."""
HOLD = "/test.Transport/Hold"
"""Keeps the call until `release`."""
LARGE = "/test.Transport/Large"
"""Answers with as many zero bytes as the message says."""
PEER = "/test.Transport/Peer"
"""Answers with the address of the client."""
ECHO_STREAM = "/test.Transport/EchoStream"
"""Sends every message back, and ends when the client has."""
TALK = "/test.Transport/Talk"
"""A stream that sends as many messages of 64 KiB as its first message says, and stays open."""

METHODS = {ECHO: False, HOLD: False, LARGE: False, PEER: False, ECHO_STREAM: True, TALK: True}

TALK_BYTES = 65_536

PACE_S = 0.005
"""Between the neighbour's calls: often enough to meet every moment of an attack, without being a load of its own."""


class Answering:
    """The handler of a transport with METHODS."""

    def __init__(self) -> None:
        self.held: list[Call] = []
        self.cancelled: list[str] = []
        self.streams: list[Stream] = []

    def __call__(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if call.stream is not None:
                self._answer_stream(call, call.stream)
            elif call.method == HOLD:
                call.on_cancel = lambda: self.cancelled.append(HOLD)
                self.held.append(call)
            elif call.method == LARGE:
                call.reply([bytes(int(bytes(call.message)))])
            elif call.method == PEER:
                call.reply([call.peer.encode()])
            else:
                call.reply([call.message])

    def _answer_stream(self, call: Call, stream: Stream) -> None:
        if stream.state is None:
            stream.state = self
            stream.on_cancel = lambda: self.cancelled.append(stream.method)
            self.streams.append(stream)
        if call.method == TALK and call.message is not None:
            part = bytes(TALK_BYTES)
            for _ in range(int(bytes(call.message))):
                stream.send([part])
        elif call.method == ECHO_STREAM:
            if call.message is None:
                stream.finish()
            else:
                stream.send([call.message])

    def release(self) -> None:
        """Answer what is held."""
        while self.held:
            call = self.held.pop()
            call.reply([call.message])


@contextmanager
def unharmed(target: str) -> Iterator[None]:
    """Another client calls all the time; every one of its calls must be answered."""
    over = threading.Event()
    answered: list[bytes] = []
    errors: list[BaseException] = []

    def call_on(ask: grpc.UnaryUnaryMultiCallable) -> None:
        try:
            while not over.wait(PACE_S):
                answered.append(ask(b"neighbour", timeout=PATIENCE_S))
        except BaseException as error:
            errors.append(error)

    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(target, options) as channel:
        ask = channel.unary_unary(ECHO)
        ask(b"first", timeout=PATIENCE_S)
        thread = threading.Thread(target=call_on, args=(ask,))
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
        assert not errors, errors
        assert ask(b"last", timeout=PATIENCE_S) == b"last"
    assert set(answered) <= {b"neighbour"}


@contextmanager
def memory_within(most_bytes: int) -> Iterator[None]:
    """Fail when this process, with server and client in it, needs more than so much memory on top at any time.

    Only Linux tells; elsewhere nothing is checked.
    """
    peak_reset = Path("/proc/self/clear_refs")
    if not peak_reset.exists():
        yield
        return
    peak_reset.write_text("5")  # from now on VmHWM is the peak since now (proc(5))
    before = status_bytes("VmRSS")
    yield
    grown = status_bytes("VmHWM") - before
    assert grown <= most_bytes, f"{grown / 2**20:.1f} MiB more at the peak"


def status_bytes(name: str) -> int:
    """A size that Linux tells of this process: VmRSS, VmHWM, ... (proc(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"/proc/self/status has no {name}")
