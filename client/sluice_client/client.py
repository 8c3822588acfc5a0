"""The blocking client: it carries out flows over grpcio's channels and decides nothing itself.

A Client may be used by many threads at once. What threads share is in Flows and Channels, which lock it, and in
gRPC's channels, which are thread-safe.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

import grpc

from sluice_client import operations
from sluice_client.base import BaseClient, CallArguments, MetadataLike
from sluice_client.channels import failure
from sluice_client.errors import ClientClosed
from sluice_client.flow import Attempt, Flow, Outcome, Pause
from sluice_client.operations import Inputs, Outputs
from sluice_client.results import ModelIndex, ModelMetadata, ModelStatistics, Parameter, Result, ServerMetadata
from sluice_client.settings import LOAD_DEADLINE_S
from sluice_client.shared_memory import SharedMemory
from sluice_client.stream import InferStream
from sluice_proto.model_config_pb2 import ModelConfig

T = TypeVar("T")


class Client(BaseClient):
    """A blocking client of one inference server or of several equal ones.

    The constructor's arguments are those of BaseClient; it connects to nothing, the first call does. Every method
    also takes the CallArguments `deadline_s`, `metadata` and `endpoint`, and raises InvalidRequest for arguments that
    cannot be sent, a ServerError when the call fails, InvalidResponse when the answer cannot be read, and
    ClientClosed after close(). An exception in a waiting thread, KeyboardInterrupt for one, cancels its call.
    """

    _grpcio = grpc

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; calls in flight end with ClientClosed. Closing again does nothing."""
        for channel in self._channels.close():
            channel.close()

    def infer(
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
        """Run the model on `inputs`, arrays by input name, and return its outputs.

        An input may also be in shared memory, as SharedMemory.write gives it. `outputs` names the wanted outputs (None:
        all); a mapping of names also says where each is to go: None for the answer, or a SharedMemory.room. `version`
        is the model version ("": the newest), `request_id` a text that comes back in the Result. `priority` is the
        model's scheduling class (1 is the highest, 0 the model's default), `timeout_us` how many microseconds the
        request may wait in the server's queue (0: as the model is configured). `parameters` go to the server as they
        are, those of sequences too; a step of a sequence is never retried once it may have been seen.
        """
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
        return self._run(self._infer(inference, call))

    def stream(self, **call: Unpack[CallArguments]) -> InferStream:
        """Open a stream (ModelStreamInfer) for many requests to one server: `with client.stream() as stream:`.

        All its requests go to one server, in their order, as those of a sequence must. One costs about what a call
        does. `deadline_s` bounds the life of the whole stream (None: nothing does), `metadata` is sent once. Nothing of
        a stream is retried. A server that is not there shows with the first request.
        """
        return InferStream(self._channels, self._flows, self._stream_options(**call))

    @contextmanager
    def shared_memory(self, size_bytes: int, **call: Unpack[CallArguments]) -> Iterator[SharedMemory]:
        """Make shared memory and register it at the server: `with client.shared_memory(1 << 20) as memory:`.

        For a server on this machine (Linux) that was started with --allow-client-shm and may open files of this user:
        what it refuses is the ServerError that it says. In the block, `memory.write(array)` is an input of this
        client's calls and streams, `memory.room(size_bytes)` a place for an output, and the array in the Result is a
        view of it: `.copy()` it before a later request writes there. At the end the server forgets the memory, and it
        is removed; only a process that is killed leaves both behind. With several endpoints, `endpoint` says which one,
        and requests with the memory go there by themselves. InvalidRequest when the system has no such memory to give.
        """
        with self._new_memory(size_bytes, call) as memory:
            self._run(self._register(memory, call))
            try:
                yield memory
            finally:
                self._run(self._unregister(memory, call))

    def server_live(self, **call: Unpack[CallArguments]) -> bool:
        """Whether the server process serves. Raises Unavailable when it cannot be reached."""
        return self._run(self._call(operations.server_live(), **call))

    def server_ready(self, **call: Unpack[CallArguments]) -> bool:
        """Whether the server is ready for inference. Raises Unavailable when it cannot be reached."""
        return self._run(self._call(operations.server_ready(), **call))

    def model_ready(self, model: str, version: str = "", **call: Unpack[CallArguments]) -> bool:
        """Whether this model (its newest version by default) is ready; False for an unknown one."""
        return self._run(self._call(operations.model_ready(model, version), **call))

    def wait_until_ready(
        self,
        timeout_s: float,
        model: str | None = None,
        version: str = "",
        *,
        metadata: MetadataLike | None = None,
        endpoint: str | None = None,
    ) -> None:
        """Wait until the server, or this model, is ready on some endpoint (or on this one).

        Raises NotReady after `timeout_s` seconds, and at once for an error that waiting does not mend.
        """
        self._run(self._wait(timeout_s, model, version, metadata, endpoint))

    def server_metadata(self, **call: Unpack[CallArguments]) -> ServerMetadata:
        """The server's name, version and protocol extensions."""
        return self._run(self._call(operations.server_metadata(), **call))

    def model_metadata(self, model: str, version: str = "", **call: Unpack[CallArguments]) -> ModelMetadata:
        """The model's inputs, outputs and served versions. Raises NotFound."""
        return self._run(self._call(operations.model_metadata(model, version), **call))

    def model_config(self, model: str, version: str = "", **call: Unpack[CallArguments]) -> ModelConfig:
        """The completed configuration as the protobuf message; str() of it is config.pbtxt. Raises NotFound."""
        return self._run(self._call(operations.model_config(model, version), **call))

    def statistics(
        self, model: str = "", version: str = "", **call: Unpack[CallArguments]
    ) -> tuple[ModelStatistics, ...]:
        """The counters of this model, of one version of it, or of all models (the default)."""
        return self._run(self._call(operations.statistics(model, version), **call))

    def repository_index(self, *, ready_only: bool = False, **call: Unpack[CallArguments]) -> tuple[ModelIndex, ...]:
        """All models of the server's repository, or those that are ready, with their state."""
        return self._run(self._call(operations.repository_index(ready_only=ready_only), **call))

    def load_model(
        self,
        model: str,
        *,
        config: str | Mapping[str, Any] | None = None,
        files: Mapping[str, bytes] | None = None,
        **call: Unpack[CallArguments],
    ) -> None:
        """Load or reload a model, and return when it serves; never retried.

        `config` (a dict or JSON of ModelConfig) is used instead of the one in the repository. `files` maps paths like
        "1/model.onnx" to contents, which are then the model's whole directory; they need a `config`. The deadline is
        LOAD_DEADLINE_S unless `deadline_s` says otherwise. With several endpoints, `endpoint` says which one.
        """
        self._run(self._control(operations.load_model(model, config, files), call, LOAD_DEADLINE_S))

    def unload_model(self, model: str, *, unload_dependents: bool = False, **call: Unpack[CallArguments]) -> None:
        """Unload all versions of a model; never retried. With several endpoints, `endpoint` says which one.

        Raises no error for a model that is not loaded.
        """
        operation = operations.unload_model(model, unload_dependents=unload_dependents)
        self._run(self._control(operation, call, LOAD_DEADLINE_S))

    def _run(self, flow: Flow[T]) -> T:
        outcome: Outcome = None
        try:
            while True:
                outcome = self._carry_out(flow.send(outcome))
        except StopIteration as stop:
            result: T = stop.value
            return result

    def _carry_out(self, step: Attempt | Pause) -> Outcome:
        if isinstance(step, Pause):
            if self._channels.closed.wait(step.delay_s):
                raise ClientClosed("the client was closed while it waited to try again")
            return None
        call = self._channels.callable(step.endpoint, step.rpc)
        try:
            answer: bytes = call(step.request, timeout=step.timeout_s, metadata=step.metadata)
        except grpc.RpcError as error:
            if self._channels.is_closed:
                raise ClientClosed("the client was closed during the call") from None
            return failure(error.code(), error.details(), error.trailing_metadata())
        except ValueError:
            # How a gRPC channel says that it was closed before the call began.
            if self._channels.is_closed:
                raise ClientClosed("the client was closed before the call") from None
            raise
        return answer
