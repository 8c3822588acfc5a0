"""The thread of control mode poll: looks at the repositories at an interval, until it is stopped."""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)


class Poller:
    """Calls `look` every `interval_s` seconds, the first time after one; it is told how to see that it is to end."""

    def __init__(self, look: Callable[[Callable[[], bool]], None], interval_s: float) -> None:
        self._look = look
        self._interval_s = interval_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="repository-poll", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """Begin no further look, and no further load of the one under way."""
        self._stopping.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the look under way; False when it takes longer."""
        if self._thread.ident is not None:
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._stopping.wait(self._interval_s):
            try:
                self._look(self._stopping.is_set)
            except Exception:  # a bug; the next look may go well
                logger.exception("polling the model repository failed")
