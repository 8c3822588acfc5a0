"""The asyncio client: the same flows as the blocking one's, carried out over grpc.aio's channels.

An AsyncClient belongs to the event loop of its first call.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc.aio

from sluice_client import operations
from sluice_client.aio_stream import AsyncInferStream
from sluice_client.base import BaseClient, CallArguments, MetadataLike
from sluice_client.channels import failure
from sluice_client.errors import ClientClosed
from sluice_client.flow import Attempt, Flow, Outcome, Pause
from sluice_client.operations import Inputs, Outputs
from sluice_client.results import ModelIndex, ModelMetadata, ModelStatistics, Parameter, Result, ServerMetadata
from sluice_client.settings import LOAD_DEADLINE_S
from sluice_client.shared_memory import SharedMemory
from sluice_proto.model_config_pb2 import ModelConfig

T = TypeVar("T")


class AsyncClient(BaseClient):
    """Client for asyncio: the same methods, arguments and errors, to be awaited."""

    _grpcio = grpc.aio

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """As Client.close."""
        channels = self._channels.close()
        for stream in list(self._streams):
            await stream.close(0.0)
        for channel in channels:
            await channel.close()

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        outputs: Outputs | None = None,
        version: str = "",
        request_id: str = "",
        priority: int = 0,
        timeout_us: int = 0,
        parameters: Mapping[str, Parameter] | None = None,
        **call: Unpack[CallArguments],
    ) -> Result:
        """As Client.infer. Cancelling the task cancels the call."""
        inference = operations.infer(
            model,
            inputs,
            outputs=outputs,
            version=version,
            request_id=request_id,
            priority=priority,
            timeout_us=timeout_us,
            parameters=parameters,
        )
        return await self._run(self._infer(inference, call))

    def stream(self, **call: Unpack[CallArguments]) -> AsyncInferStream:
        """As Client.stream, in a running event loop: `async with client.stream() as stream:`."""
        stream = AsyncInferStream(self._channels, self._flows, self._stream_options(**call))
        self._streams.add(stream)
        stream.reader.add_done_callback(lambda _: self._streams.discard(stream))
        return stream

    @asynccontextmanager
    async def shared_memory(self, size_bytes: int, **call: Unpack[CallArguments]) -> AsyncIterator[SharedMemory]:
        """As Client.shared_memory: `async with client.shared_memory(1 << 20) as memory:`."""
        with self._new_memory(size_bytes, call) as memory:
            await self._run(self._register(memory, call))
            try:
                yield memory
            finally:
                await self._run(self._unregister(memory, call))

    async def server_live(self, **call: Unpack[CallArguments]) -> bool:
        """As Client.server_live."""
        return await self._run(self._call(operations.server_live(), **call))

    async def server_ready(self, **call: Unpack[CallArguments]) -> bool:
        """As Client.server_ready."""
        return await self._run(self._call(operations.server_ready(), **call))

    async def model_ready(self, model: str, version: str = "", **call: Unpack[CallArguments]) -> bool:
        """As Client.model_ready."""
        return await self._run(self._call(operations.model_ready(model, version), **call))

    async def wait_until_ready(
        self,
        timeout_s: float,
        model: str | None = None,
        version: str = "",
        *,
        metadata: MetadataLike | None = None,
        endpoint: str | None = None,
    ) -> None:
        """As Client.wait_until_ready."""
        await self._run(self._wait(timeout_s, model, version, metadata, endpoint))

    async def server_metadata(self, **call: Unpack[CallArguments]) -> ServerMetadata:
        """As Client.server_metadata."""
        return await self._run(self._call(operations.server_metadata(), **call))

    async def model_metadata(self, model: str, version: str = "", **call: Unpack[CallArguments]) -> ModelMetadata:
        """As Client.model_metadata."""
        return await self._run(self._call(operations.model_metadata(model, version), **call))

    async def model_config(self, model: str, version: str = "", **call: Unpack[CallArguments]) -> ModelConfig:
        """As Client.model_config."""
        return await self._run(self._call(operations.model_config(model, version), **call))

    async def statistics(
        self, model: str = "", version: str = "", **call: Unpack[CallArguments]
    ) -> tuple[ModelStatistics, ...]:
        """As Client.statistics."""
        return await self._run(self._call(operations.statistics(model, version), **call))

    async def repository_index(
        self, *, ready_only: bool = False, **call: Unpack[CallArguments]
    ) -> tuple[ModelIndex, ...]:
        """As Client.repository_index."""
        return await self._run(self._call(operations.repository_index(ready_only=ready_only), **call))

    async def load_model(
        self,
        model: str,
        *,
        config: str | Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        **call: Unpack[CallArguments],
    ) -> None:
        """As Client.load_model."""
        await self._run(self._control(operations.load_model(model, config, files), call, LOAD_DEADLINE_S))

    async def unload_model(self, model: str, *, unload_dependents: bool = False, **call: Unpack[CallArguments]) -> None:
        """As Client.unload_model."""
        operation = operations.unload_model(model, unload_dependents=unload_dependents)
        await self._run(self._control(operation, call, LOAD_DEADLINE_S))

    async def _run(self, flow: Flow[T]) -> T:
        outcome: Outcome = None
        try:
            while True:
                outcome = await self._carry_out(flow.send(outcome))
        except StopIteration as stop:
            result: T = stop.value
            return result

    async def _carry_out(self, step: Attempt | Pause) -> Outcome:
        if isinstance(step, Pause):
            await asyncio.sleep(step.delay_s)
            return None
        call = self._channels.callable(step.endpoint, step.rpc)
        try:
            answer: bytes = await call(step.request, timeout=step.timeout_s, metadata=step.metadata)
        except grpc.aio.AioRpcError as error:
            if self._channels.is_closed:
                raise ClientClosed("the client was closed during the call") from None
            return failure(error.code(), error.details(), error.trailing_metadata())
        except asyncio.CancelledError:
            # grpc.aio cancels the calls of a channel that is closed; only a task that was cancelled may end so.
            task = asyncio.current_task()
            if self._channels.is_closed and task is not None and not task.cancelling():
                raise ClientClosed("the client was closed during the call") from None
            raise
        return answer
