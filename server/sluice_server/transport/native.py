"""The native transport: the Rust extension `sluice_native` behind the seam.

Its own thread owns every socket. Python threads (two, if not told otherwise) take what has arrived, in lists and
without the interpreter while they wait; one at a time: another takes its place when it lets go. So the handler is never
called by two at once, and a thread that has let go may run the batch of a lone request itself. Calls are answered from
any thread.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING, Any, cast

from sluice_server.status import Code
from sluice_server.transport.call import STREAM_AHEAD, ListenError
from sluice_server.transport.listening import reason
from sluice_server.transport.message import fit_message

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sluice_server.transport.call import Handler, LendingHandler
    from sluice_server.transport.options import TransportOptions

logger = logging.getLogger(__name__)

CALLS_MAX = 256
"""Calls that go up in one list: their decoding takes a few milliseconds, which the first of them waits for."""

LAST_LIST_S = 1.0
"""What an intake thread gets to end that has only a list to decode, also when the calls took all the time."""

HELD_BYTES_MAX = 4 << 30
"""Bytes of requests in memory over all connections: two of the largest messages; the queues' own bounds are lower."""


class NativeTransport:
    """The seam's `Transport` on the Rust extension."""

    name = "native"

    def __init__(
        self,
        handler: Handler | LendingHandler,
        methods: Mapping[str, bool],
        options: TransportOptions,
        *,
        lends: bool = False,
        held_bytes_max: int = HELD_BYTES_MAX,
    ) -> None:
        """`methods` maps the path of each RPC to whether it streams; ImportError without the extension.

        With `lends`, the handler is asked for work that one of the intake threads may do.
        """
        import sluice_native  # an installation without it has the other transport

        self._handler = handler
        self._lends = lends
        self._address = options.address
        self._server = sluice_native.Server(
            options,
            list(methods.items()),
            now_ns=time.monotonic_ns(),
            max_held_bytes=held_bytes_max,
            stream_ahead=STREAM_AHEAD,
            fit_message=fit_message,
        )
        self._endpoints: tuple[str, ...] = ()
        self._threads = [
            threading.Thread(target=self._hand_up, name=f"native-intake-{number}", daemon=True)
            for number in range(options.intake_threads if lends else 1)
        ]

    @property
    def endpoints(self) -> tuple[str, ...]:
        """Where it listens; known after `start`."""
        return self._endpoints

    def start(self) -> None:
        """Bind and serve, or raise `ListenError`; returns when clients can connect."""
        try:
            self._endpoints = (self._server.start(),)
        except OSError as error:
            raise ListenError(f"cannot listen on {self._address} for gRPC: {reason(error)}") from error
        except ValueError as error:
            raise ListenError(str(error)) from error
        for thread in self._threads:
            thread.start()

    def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, wait up to `grace_s` seconds for accepted ones, cancel the rest."""
        until = time.monotonic() + grace_s
        self._server.stop(grace_s)
        for thread in self._threads:
            if thread.ident is not None:
                # One that runs a lent batch does so for as long as the model takes; its calls have ended.
                thread.join(max(LAST_LIST_S, until - time.monotonic()))

    def outcomes(self) -> Mapping[tuple[str, Code], int]:
        """How many calls of each method have ended with each code."""
        return {(path, Code(code)): count for path, code, count in self._server.outcomes()}

    def counts(self) -> Mapping[str, int]:
        """What is held at the moment: connections, handshakes, messages being read, calls, bytes of requests."""
        return self._server.counts()

    def _hand_up(self) -> None:
        leads = False
        while (taken := self._server.take(CALLS_MAX, leads)) is not None:
            leads = True
            calls, left, notices, followers = taken
            for notice in notices:
                logger.warning(notice)
            while left:
                left.pop(0)()
            work = self._take_over(calls, lend=followers > 0) if calls else None
            # Nothing of the list may stay alive while this thread waits for the next one.
            del taken, calls, left
            if work is not None:
                self._server.release()
                leads = False
                work()
                del work

    def _take_over(self, calls: list[Any], *, lend: bool) -> Callable[[], None] | None:
        if self._lends:
            return cast("LendingHandler", self._handler)(calls, lend=lend)
        self._handler(calls)
        return None
