"""The signals that ask the process to end: the first one is heard whenever it comes, the second one ends it at once."""

from __future__ import annotations

import os
import signal
import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SIGNAL_EXIT_BASE = 128
"""The exit status of a process that a signal ended is this plus the signal's number, as shells have it."""


class Termination:
    """Whether this process was asked to end, by SIGTERM or SIGINT; when it is asked again it ends at once.

    The interpreter writes to a socket the moment that a signal arrives. A wait for an Event that the handler sets may
    miss the signal, or never end: the handler runs on the main thread, perhaps while that holds the Event's lock.
    """

    def __init__(self) -> None:
        self.asked = False
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)

    def wait(self) -> None:
        """Return once the process was asked to end."""
        while not self.asked:
            self._reader.recv(1)

    def _on_signal(self, number: int, _frame: object) -> None:
        if self.asked:
            # As the first process of a container it could not end itself by the signal's default action.
            os._exit(SIGNAL_EXIT_BASE + number)
        self.asked = True

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals, on the main thread; what was in place before is restored at the end."""
        wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._reader.close()
            self._writer.close()
