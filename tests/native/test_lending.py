"""Threads of the native transport that run a lone request themselves: the end of the server does not wait for one."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import grpc
import pytest

from sluice_server.transport.options import TransportOptions
from support.fakes import PATIENCE_S, eventually
from support.server import need

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice_server.transport.call import Call

ASK = "/test.Lending/Ask"


class Borrower:
    """Answers each call, and keeps every thread that is lent to it until it is released."""

    def __init__(self) -> None:
        self.has_thread = threading.Event()
        self.released = threading.Event()

    def __call__(self, calls: Sequence[Call], /, *, lend: bool = False) -> Callable[[], None] | None:
        for call in calls:
            call.reply([b"answered"])
        return self._work if lend else None

    def _work(self) -> None:
        self.has_thread.set()
        self.released.wait()


@pytest.fixture
def borrower():
    borrower = Borrower()
    yield borrower
    borrower.released.set()


def test_a_thread_that_is_lent_and_does_not_come_back_does_not_hold_the_end(borrower):
    need("native")
    from sluice_server.transport.native import NativeTransport

    transport = NativeTransport(borrower, {ASK: False}, TransportOptions("127.0.0.1:0"), lends=True)
    transport.start()
    with grpc.insecure_channel(transport.endpoints[0]) as channel:
        ask = channel.unary_unary(ASK)
        # A thread is lent once another waits to take its place.
        eventually(lambda: ask(b"", timeout=PATIENCE_S) == b"answered" and borrower.has_thread.is_set(), "one is lent")
    stopping = threading.Thread(target=transport.stop, args=(0.0,), daemon=True)
    stopping.start()
    stopping.join(PATIENCE_S)
    assert not stopping.is_alive()
