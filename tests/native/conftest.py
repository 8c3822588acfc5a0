"""The native transport alone, without models, with whatever options a test needs."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import pytest

from sluice_server.transport.options import TransportOptions
from support.answering import METHODS, Answering
from support.fakes import eventually
from support.raw_http2 import RawClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sluice_server.transport.native import NativeTransport

    Serve = Callable[..., "Served"]


class Served:
    """A native transport that serves METHODS."""

    def __init__(self, transport: NativeTransport, answering: Answering, stack: ExitStack) -> None:
        self.transport = transport
        self.answering = answering
        self.target = transport.endpoints[0]
        self._stack = stack

    def connect(self, **how: Any) -> RawClient:
        """A client of raw frames, closed at the end of the test."""
        return self._stack.enter_context(RawClient(self.target, **how))

    def counts(self) -> dict[str, int]:
        """What the transport holds."""
        return self.transport.counts()

    def wait_for(self, **counts: int) -> None:
        """Wait until these counts are what the transport holds."""
        self._wait(lambda: counts.items() <= self.counts().items(), f"{counts} are held")

    def nothing_is_left(self) -> None:
        """Wait until no trace of any client is left, once the calls that the server's side holds are forgotten."""
        self.answering.held.clear()
        self._wait(lambda: not any(self.counts().values()), "nothing is held")

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        try:
            eventually(condition, what)
        except AssertionError as error:
            raise AssertionError(f"{error}; held now: {self.counts()}") from None


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Start native transports: `serve(**fields of TransportOptions)`."""
    if not os.environ.get("CI"):
        pytest.importorskip("sluice_native", reason="the native transport is not built")
    from sluice_server.transport.native import NativeTransport

    with ExitStack() as stack:

        def start(**options: Any) -> Served:
            answering = Answering()
            transport = NativeTransport(answering, METHODS, TransportOptions("127.0.0.1:0", **options))
            transport.start()
            stack.callback(transport.stop, 0.0)
            return Served(transport, answering, stack)

        yield start
