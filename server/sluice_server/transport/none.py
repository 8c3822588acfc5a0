"""The transport of a server without gRPC (`--allow-grpc=false`): it listens nowhere, and nothing comes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sluice_server.status import Code


class NoTransport:
    """The seam's `Transport` that has no calls."""

    name = "off"
    endpoints: tuple[str, ...] = ()

    def start(self) -> None:
        """Nothing is bound."""

    def stop(self, grace_s: float) -> None:
        """Nothing is to be waited for."""

    def outcomes(self) -> Mapping[tuple[str, Code], int]:
        """No call has ended."""
        return {}
