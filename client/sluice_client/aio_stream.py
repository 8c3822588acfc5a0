"""The asyncio client's stream: as the blocking one's, with tasks for threads."""

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Any, Self, Unpack

import grpc.aio

from sluice_client.channels import STREAM_INFER, Channels, failure
from sluice_client.errors import ClientClosed, ClientError, InvalidResponse
from sluice_client.exchange import Exchange, StreamOptions
from sluice_client.flow import Flows, check_deadline
from sluice_client.operations import InferArguments, Inputs
from sluice_client.results import Result
from sluice_client.retries import Failure
from sluice_client.settings import STREAM_CLOSE_S


class AsyncInferStream:
    """A stream of requests to one server, made by AsyncClient.stream: as InferStream, for any number of tasks."""

    def __init__(self, channels: Channels, flows: Flows, options: StreamOptions) -> None:
        self._loop = asyncio.get_running_loop()
        self._channels = channels
        self._deadline_s = options.request_deadline_s
        self._outbox: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._exchange = Exchange(flows, options.endpoint, self._outbox.put_nowait, lambda: self._call.cancel())
        call = channels.callable(self._exchange.endpoint, STREAM_INFER)
        self._call: Any = call(self._requests(), timeout=options.timeout_s, metadata=options.metadata)
        self.reader = self._loop.create_task(self._read())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._exchange}>"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        await self.close(0.0 if error is not None else STREAM_CLOSE_S)

    @property
    def is_open(self) -> bool:
        """As InferStream.is_open."""
        return self._exchange.is_open

    async def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        deadline_s: float | None = None,
        **request: Unpack[InferArguments],
    ) -> Result:
        """As InferStream.infer. Cancelling the task ends its waiting as the deadline does."""
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        check_deadline(deadline_s)
        inference, request_id = self._exchange.prepare(model, inputs, request)
        future: asyncio.Future[Result | ClientError] = self._loop.create_future()

        def settle(outcome: Result | ClientError) -> None:
            if not future.done():
                future.set_result(outcome)

        begun = self._exchange.begin(inference, request_id, settle)
        try:
            async with asyncio.timeout(deadline_s):
                outcome = await future
        except TimeoutError:
            raise self._exchange.late(begun, deadline_s) from None
        except BaseException:
            self._exchange.give_up(begun)
            raise
        if isinstance(outcome, ClientError):
            raise outcome
        return outcome

    async def close(self, timeout_s: float = STREAM_CLOSE_S) -> None:
        """As InferStream.close."""
        self._exchange.close()
        try:
            await asyncio.wait([self.reader], timeout=timeout_s)
        finally:
            if not self.reader.done():
                self._exchange.leave()
        await asyncio.wait([self.reader])

    async def _requests(self) -> AsyncIterator[bytes]:
        while (request := await self._outbox.get()) is not None:
            yield request

    async def _read(self) -> None:
        how: Failure | ClientError | None = ClientClosed("the event loop of the stream was stopped")
        try:
            how = await self._hear_all()
        finally:
            self._exchange.end(how)

    async def _hear_all(self) -> Failure | ClientError | None:
        """Pass on every answer; gives how the stream ended, None for well."""
        try:
            async for answer in self._call:
                self._exchange.take(answer)
        except grpc.aio.AioRpcError as error:
            if self._channels.is_closed:
                return ClientClosed("the client was closed during the call")
            return failure(error.code(), error.details(), error.trailing_metadata())
        except asyncio.CancelledError:
            # That the call was cancelled, not this task.
            task = asyncio.current_task()
            if task is not None and not task.cancelling():
                if self._channels.is_closed:
                    return ClientClosed("the client was closed during the call")
                return Failure("CANCELLED", "the call was cancelled on this side")
            raise
        except InvalidResponse as error:
            self._call.cancel()
            return error
        return None
