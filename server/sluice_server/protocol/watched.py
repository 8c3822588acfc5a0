"""A call that passes everything on to another, and tells how it ended: for what watches some of the requests."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import TYPE_CHECKING

from sluice_server.status import Code
from sluice_server.transport.call import Call

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Buffer

    from sluice_server.status import Status
    from sluice_server.transport.call import Metadata


class WatchedCall(Call):
    """Wraps a call from the transport; only requests that are watched pay for it."""

    __slots__ = ("_call",)

    def __init__(self, call: Call) -> None:
        self._call = call
        self.method = call.method
        self.message = call.message
        self.received_ns = call.received_ns
        self.deadline_ns = call.deadline_ns
        self.on_cancel = None
        call.on_cancel = self._client_left

    @property
    def front(self) -> str:
        """What the call came over, as its trace names it."""
        # Only calls that came otherwise than over gRPC say so.
        return getattr(self._call, "front", "GRPC")

    @property
    def metadata(self) -> Metadata:
        """The request's headers."""
        return self._call.metadata

    @property
    def peer(self) -> str:
        """The client's address."""
        return self._call.peer

    @property
    def peer_names(self) -> tuple[str, ...]:
        """The names in the client's certificate."""
        return self._call.peer_names

    def reply(self, parts: Sequence[Buffer]) -> None:
        """End the call with an answer."""
        ended_ns = time.monotonic_ns()
        self._call.reply(parts)
        self._end(Code.OK, ended_ns, parts)

    def fail(self, status: Status) -> None:
        """End the call with an error."""
        ended_ns = time.monotonic_ns()
        self._call.fail(status)
        self._end(status.code, ended_ns, ())

    def _client_left(self) -> None:
        if self.on_cancel is not None:
            self.on_cancel()
        ended_ns = time.monotonic_ns()
        self._end(self.code_of_leaving(ended_ns), ended_ns, ())

    @abstractmethod
    def _end(self, code: Code, ended_ns: int, answer: Sequence[Buffer]) -> None:
        """Note an end and the parts of the answer, none unless it is OK.

        A running batch may still answer a call whose client left: the first end counts, as it does on the wire.
        """
