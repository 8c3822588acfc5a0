"""The blocking client's stream: many requests in flight on one ModelStreamInfer, sent and awaited by many threads.

A thread of its own hears the answers and wakes the callers they belong to; exchange.py decides whose they are.
"""

import queue
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from sluice_client.channels import STREAM_INFER, Channels, failure
from sluice_client.errors import ClientClosed, ClientError, InvalidResponse
from sluice_client.exchange import Exchange, StreamOptions
from sluice_client.flow import Flows, check_deadline
from sluice_client.operations import InferArguments, Inputs
from sluice_client.results import Result
from sluice_client.retries import Failure
from sluice_client.settings import STREAM_CLOSE_S


class InferStream:
    """A stream of requests to one server, made by Client.stream; any number of threads may use it at once.

    When the stream breaks, or the server ends it, every request in flight raises that ServerError, and so does every
    later one: nothing is sent again, and a new stream is the caller's to open.
    """

    def __init__(self, channels: Channels, flows: Flows, options: StreamOptions) -> None:
        self._channels = channels
        self._deadline_s = options.request_deadline_s
        self._outbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._exchange = Exchange(flows, options.endpoint, self._outbox.put, lambda: self._call.cancel())
        call = channels.callable(self._exchange.endpoint, STREAM_INFER)
        try:
            self._call: Any = call(iter(self._outbox.get, None), timeout=options.timeout_s, metadata=options.metadata)
        except ValueError:
            # How a gRPC channel says that it was closed before the call began.
            if channels.is_closed:
                raise ClientClosed("the client was closed before the call") from None
            raise
        self._reader = threading.Thread(target=self._read, name="sluice-stream", daemon=True)
        self._reader.start()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self._exchange}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close(0.0 if error is not None else STREAM_CLOSE_S)

    @property
    def is_open(self) -> bool:
        """Whether requests are taken: False once it was closed, broke, or was ended by the server."""
        return self._exchange.is_open

    def infer(
        self,
        model: str,
        inputs: Inputs,
        *,
        deadline_s: float | None = None,
        **request: Unpack[InferArguments],
    ) -> Result:
        """Run the model on `inputs` and return its outputs, as Client.infer, in this stream.

        Requests are sent in the order of the calls, so the steps of a sequence are the calls of one thread. They run
        at the same time, and a server answers them in their order: a slow one holds those behind it up. `request_id`
        must differ from those in flight; without one the client makes one.

        `deadline_s` (None: the client's) bounds the waiting here, with DeadlineExceeded, and is not sent: the server
        still runs the request, and its answer is dropped. `timeout_us` bounds how long it may wait in the server's
        queue. Raises InvalidRequest, InvalidResponse, ClientClosed after close(), and the ServerError that answers the
        request or ended the stream; of a server that tells no status of errors inside a stream (Triton) it is Unknown.
        """
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        check_deadline(deadline_s)
        inference, request_id = self._exchange.prepare(model, inputs, request)
        future: Future[Result | ClientError] = Future()
        begun = self._exchange.begin(inference, request_id, future.set_result)
        try:
            outcome = future.result(deadline_s)
        except TimeoutError:
            raise self._exchange.late(begun, deadline_s) from None
        except BaseException:
            self._exchange.give_up(begun)
            raise
        if isinstance(outcome, ClientError):
            raise outcome
        return outcome

    def close(self, timeout_s: float = STREAM_CLOSE_S) -> None:
        """Take no more requests, and wait for the answers that somebody waits for; closing again does the same.

        After `timeout_s` seconds the stream is cancelled: who still waits gets ClientClosed, and the server drops what
        it has not begun to run. Leaving a `with` block by an exception cancels at once.
        """
        self._exchange.close()
        try:
            self._reader.join(timeout_s)
        finally:
            if self._reader.is_alive():
                self._exchange.leave()
        self._reader.join()

    def _read(self) -> None:
        self._exchange.end(self._hear_all())

    def _hear_all(self) -> Failure | ClientError | None:
        """Pass on every answer; gives how the stream ended, None for well."""
        try:
            for answer in self._call:
                self._exchange.take(answer)
        except grpc.RpcError as error:
            if self._channels.is_closed:
                return ClientClosed("the client was closed during the call")
            # Of a call that is iterated, the error raised is the call.
            return failure(error.code(), error.details(), error.trailing_metadata())
        except InvalidResponse as error:
            self._call.cancel()
            return error
        return None
