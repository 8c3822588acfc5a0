"""Ends a run for which nobody waits any more: all clients of its batch have left.

A run is ended by the run options that it was given, and ONNX Runtime looks at them between two nodes of the graph. So
whoever runs batches has options of its own, and one watch around them.

A request that leaves in the instant between the queue and the run is missed, and the run then goes on to its end.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np

    from sluice_server.execution.instance import Runnable
    from sluice_server.execution.request import InferRequest


class Stoppable(Protocol):
    """A session whose run, and every further one, is ended by `stop`, until `resume`."""

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """As of any session; Cancelled when it was ended."""

    def stop(self) -> None:
        """End the run that is under way, from any thread."""

    def resume(self) -> None:
        """Allow runs again; none is under way."""


@runtime_checkable
class HasStoppable(Protocol):
    """A session that gives views of itself whose runs can be stopped, each on its own."""

    def stoppable(self) -> Stoppable:
        """Another view; it runs one batch at a time."""


class RunWatch:
    """What one thread runs.

    `session` is what it runs with: a view of its own, where there are such. `batch` is set when one is about to run,
    and then `end` is called.
    """

    __slots__ = ("_left", "_lock", "_stoppable", "_stopped", "batch", "session")

    def __init__(self, session: Runnable) -> None:
        self._lock = threading.Lock()
        self.batch: Sequence[InferRequest] = ()
        self._left = 0
        self._stopped = False
        self._stoppable: Stoppable | None = None
        self.session = session
        if isinstance(session, HasStoppable):
            self._stoppable = session.stoppable()
            self.session = self._stoppable

    def end(self) -> None:
        """The batch has run, or failed; nothing of it is kept."""
        with self._lock:
            self.batch = ()
            if self._left:
                self._reset()

    def leave(self, request: InferRequest) -> bool:
        """A client has left: whether its request runs here. The last of the batch ends the run."""
        with self._lock:
            if request not in self.batch:
                return False
            self._left += 1
            if self._left == len(self.batch) and self._stoppable is not None:
                self._stopped = True
                self._stoppable.stop()
            return True

    def _reset(self) -> None:
        self._left = 0
        if self._stopped and self._stoppable is not None:
            self._stoppable.resume()
            self._stopped = False
