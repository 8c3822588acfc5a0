"""grpc.health.v1 over a table of names: Check and Watch, for the server (`""`) and for each model by its name.

grpcio-health-checking brings the messages. Its asyncio servicer is not used: when one of two watchers of a name
leaves, it forgets the other one too.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sluice_server.transport.message import fit_message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class HealthService(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """The health servicer. `set_serving` is for any thread; everything else runs on the server's event loop."""

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {"": NOT_SERVING}
        self._watchers: set[asyncio.Event] = set()
        self._closed = False

    def set_serving(self, service: str, *, serving: bool) -> None:
        """Change what a name is answered with; `notify`, on the event loop, then tells who watches."""
        self._statuses[service] = SERVING if serving else NOT_SERVING

    def notify(self) -> None:
        """Wake every watcher; each writes only if its own status differs from the last one it wrote."""
        for changed in self._watchers:
            changed.set()

    def close(self) -> None:
        """End every watch after the status of now, on the event loop: a watch must not hold the end of the server."""
        self._closed = True
        self.notify()

    def add_to(self, server: grpc.aio.Server) -> None:
        """Register with a server."""
        health_pb2_grpc.add_HealthServicer_to_server(self, server)

    async def Check(self, request: Any, context: Any) -> health_pb2.HealthCheckResponse:  # noqa: N802 - gRPC's name
        """Answer with the status of one name; NOT_FOUND for a name that was never set (health.proto)."""
        status = self._statuses.get(request.service)
        if status is None:
            message = fit_message(f"no service or model '{request.service}' here")
            await context.abort(grpc.StatusCode.NOT_FOUND, message)
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, request: Any, _context: Any) -> AsyncIterator[health_pb2.HealthCheckResponse]:  # noqa: N802
        """Send the status of one name now and at each change; a name that is not known may become so (health.proto)."""
        changed = asyncio.Event()
        self._watchers.add(changed)
        last = None
        try:
            while True:
                changed.clear()
                closed = self._closed
                status = self._statuses.get(request.service, SERVICE_UNKNOWN)
                if status != last:
                    last = status
                    yield health_pb2.HealthCheckResponse(status=status)
                if closed:
                    return
                await changed.wait()
        finally:
            self._watchers.discard(changed)
