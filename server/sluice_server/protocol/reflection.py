"""Server reflection for the services that are served, from the project's own descriptor pool.

grpcio-reflection computes the answers; the stream that they go through is the transport's own, whichever that is.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from sluice_proto import grpc_service_pb2, model_config_pb2
from sluice_server.errors import InvalidArgument, Unavailable
from sluice_server.protocol.streams import STOPPING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sluice_server.transport.call import Call, Stream

INFO = f"/{reflection.SERVICE_NAME}/ServerReflectionInfo"

OVER = object()
"""What is left as the state of a stream that has ended."""

_FILES = (model_config_pb2, grpc_service_pb2, health_pb2, reflection_pb2)


class _Pool:
    """A descriptor pool that finds the file of a method too, which grpcurl asks for; protobuf's own does not."""

    def __init__(self) -> None:
        self._pool = DescriptorPool()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def FindFileContainingSymbol(self, symbol: str) -> Any:  # noqa: N802
        try:
            return self._pool.FindFileContainingSymbol(symbol)  # type: ignore[no-untyped-call]
        except KeyError:
            return self._pool.FindMethodByName(symbol).containing_service.file  # type: ignore[no-untyped-call]


class Reflection:
    """Lets clients such as grpcurl list the services and read their descriptors."""

    def __init__(self, services: Iterable[str]) -> None:
        """`services` are listed, by their full names, and reflection itself.

        The files come from two pools (ours is private, the libraries' is the default one), so they go into a third.
        """
        pool = _Pool()
        for module in _FILES:
            pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
        self._servicer = reflection.ReflectionServicer((*services, reflection.SERVICE_NAME), pool)
        self._open: set[Stream] = set()
        self._stopping = False

    def answer(self, message: Call) -> None:
        """Answer one question of a stream at once; `InvalidArgument` for what is none, and `Unavailable` at the end."""
        stream = message.stream
        assert stream is not None, "the method is known to stream"
        if stream.state is OVER:
            return
        if stream.state is None:
            self._enter(stream)
        if message.message is None:
            self._forget(stream)
            stream.finish()
            return
        try:
            question = reflection_pb2.ServerReflectionRequest.FromString(bytes(message.message))
        except DecodeError as error:
            self._forget(stream)
            raise InvalidArgument(
                f"the {len(message.message)} bytes of the request are not a ServerReflectionRequest message"
            ) from error
        for answer in self._servicer.ServerReflectionInfo(iter((question,)), None):
            stream.send((answer.SerializeToString(),))

    def stop(self) -> None:
        """End every stream, and from now on each new one behind its first message."""
        self._stopping = True
        for stream in list(self._open):
            self._forget(stream)
            stream.finish(STOPPING)

    def _enter(self, stream: Stream) -> None:
        if self._stopping:
            stream.state = OVER
            raise Unavailable(STOPPING.message)
        stream.state = self
        stream.on_cancel = functools.partial(self._forget, stream)
        self._open.add(stream)

    def _forget(self, stream: Stream) -> None:
        self._open.discard(stream)
        stream.state = OVER
        stream.on_cancel = None  # it leads back to the stream
