"""grpc.health.v1 over a table of names: Check and Watch, for the server (`""`) and for each model by its name.

grpcio-health-checking brings the messages; the service is written here, once for every transport.
"""

from __future__ import annotations

import functools
import threading
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from sluice_server.errors import InvalidArgument, NotFound
from sluice_server.protocol.rpcs import Rpc

if TYPE_CHECKING:
    from google.protobuf.message import Message

    from sluice_server.transport.call import Call, Stream

SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"]
CHECK, WATCH = (f"/{SERVICE.full_name}/{method}" for method in ("Check", "Watch"))

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN


class Health:
    """The statuses and who watches them. Every method is for any thread; `_lock` guards both tables."""

    def __init__(self) -> None:
        """Begin with the server itself as not serving, and no other name."""
        self._lock = threading.Lock()
        self._statuses: dict[str, int] = {"": NOT_SERVING}
        self._watches: dict[Stream, str] = {}
        self._stopped = False

    def set_serving(self, name: str, *, serving: bool) -> None:
        """Change what a name is answered with, and tell those who watch it; `""` is the whole server."""
        status = SERVING if serving else NOT_SERVING
        with self._lock:
            if self._statuses.get(name) == status:
                return
            self._statuses[name] = status
            for stream, watched in self._watches.items():
                if watched == name:
                    _send(stream, status)

    @property
    def check(self) -> Rpc:
        """The RPC Check."""
        return Rpc(health_pb2.HealthCheckRequest, self._check)

    def _check(self, request: Any, _call: Call) -> Message:
        """Answer with the status of one name; `NotFound` for a name that was never set (health.proto)."""
        status = self._statuses.get(request.service)
        if status is None:
            raise NotFound(f"no service or model '{request.service}' here")
        answer: Message = health_pb2.HealthCheckResponse(status=status)
        return answer

    def watch(self, message: Call) -> None:
        """Send the status of one name now and at each change; a name that is not known may become so (health.proto).

        `InvalidArgument` for a stream that does not begin with a request.
        """
        stream = message.stream
        assert stream is not None, "the method is known to stream"
        if stream.state is not None:  # the end of the client's side, which a watch outlives
            return
        stream.state = WATCH
        name = _watched_name(message.message)
        with self._lock:
            _send(stream, self._statuses.get(name, SERVICE_UNKNOWN))
            if not self._stopped:
                self._watches[stream] = name
                stream.on_cancel = functools.partial(self._forget, stream)
                return
        stream.finish()

    def stop(self) -> None:
        """End every watch behind the status of now: a watch must not hold the end of the server."""
        with self._lock:
            self._stopped = True
            watches = list(self._watches)
        for stream in watches:
            self._forget(stream)
            stream.finish()

    def _forget(self, stream: Stream) -> None:
        with self._lock:
            self._watches.pop(stream, None)
        stream.on_cancel = None  # it leads back to the stream


def _watched_name(message: bytes | memoryview | None) -> str:
    if message is None:
        raise InvalidArgument("Watch needs a request")
    try:
        name: str = health_pb2.HealthCheckRequest.FromString(bytes(message)).service
    except DecodeError as error:
        raise InvalidArgument(
            f"the {len(message)} bytes of the request are not a HealthCheckRequest message"
        ) from error
    return name


def _send(stream: Stream, status: int) -> None:
    stream.send((health_pb2.HealthCheckResponse(status=status).SerializeToString(),))
