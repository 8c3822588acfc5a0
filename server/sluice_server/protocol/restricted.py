"""Stands before the dispatcher where some of gRPC's RPCs are restricted: lets pass whom their restriction admits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_server.protocol.rpcs import name_of
from sluice_server.status import Code, Status

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from sluice_server.security.restrictions import Restriction
    from sluice_server.transport.call import Call, LendingHandler


class RestrictedHandler:
    """A handler for a transport; a server without restrictions has none, so that they cost nothing there."""

    def __init__(self, handler: LendingHandler, methods: Iterable[str], restricted: Mapping[str, Restriction]) -> None:
        """`methods` are the paths of all RPCs, `restricted` is by the names of RPCs."""
        self._handler = handler
        self._by_method = {path: restricted[name_of(path)] for path in methods if name_of(path) in restricted}

    def __call__(self, calls: Sequence[Call], /, *, lend: bool = False) -> Callable[[], None] | None:
        """Hand the calls on that may pass, and end the others with UNAVAILABLE, as Triton does."""
        return self._handler([call for call in calls if self._admits(call)], lend=lend)

    def _admits(self, call: Call) -> bool:
        restriction = self._by_method.get(call.method)
        if restriction is None or restriction.admits(call.metadata):
            return True
        call.fail(Status(Code.UNAVAILABLE, restriction.refusal))
        return False
