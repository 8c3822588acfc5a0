"""A real server in this process, on ports of its own, and a client that speaks raw protobuf to it."""

from __future__ import annotations

import importlib.metadata
import os
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.execution.cuda_driver import find_driver
from sluice_server.lifecycle import Server
from sluice_server.observability.logs import LogOptions
from sluice_server.settings import HttpSettings, ModelSettings, ServerSettings
from sluice_server.transport.choice import TransportChoice, native_problem
from sluice_server.transport.options import TransportOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from sluice_server.execution.cuda_driver import CudaDriver
    from sluice_server.execution.model import ServedModel

LOOPBACK = "127.0.0.1"

CALL_TIMEOUT_S = 30.0
"""A call that takes so long hangs; on a loaded machine an honest one takes tens of milliseconds."""

CHANNEL_OPTIONS = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))

TRANSPORTS = (TransportChoice.GRPCIO, TransportChoice.NATIVE)
"""Every transport by its name; a new one joins the tests here."""

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]


def server_settings(*repositories: Path, models: Mapping[str, Any] | None = None, **changes: Any) -> ServerSettings:
    """Settings on free ports of the loopback; `models` are fields of ModelSettings, `changes` of ServerSettings."""
    settings = ServerSettings(
        models=ModelSettings(repositories=repositories, **(models or {})),
        grpc=TransportOptions(f"{LOOPBACK}:0"),
        http=HttpSettings(LOOPBACK, 0),
        metrics=HttpSettings(LOOPBACK, 0),
        log=LogOptions(),
        exit_timeout_s=10.0,
    )
    return replace(settings, **changes)


def need(transport: str) -> None:
    """Skip the test, with the reason, where this transport cannot run; with CI=true that is a failure."""
    problem = native_problem(importlib.metadata.version("sluice")) if transport == TransportChoice.NATIVE else ""
    if problem and os.environ.get("CI") == "true":
        pytest.fail(f"CI=true, and there is no native transport: {problem}")
    if problem:
        pytest.skip(f"no native transport: {problem}")


class RunningServer:
    """A server that has started, and one channel to it: straight, or the one that is given, through a proxy."""

    def __init__(self, server: Server, channel: grpc.Channel | None = None) -> None:
        self.server = server
        self.target = server.transport.endpoints[0]
        self.channel = channel or grpc.insecure_channel(self.target, CHANNEL_OPTIONS)
        self._callables = {method.name: self._callable(method) for method in SERVICE.methods}

    def _callable(self, method: Any) -> Any:
        make = self.channel.stream_stream if method.client_streaming else self.channel.unary_unary
        return make(
            f"/{SERVICE.full_name}/{method.name}",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=GetMessageClass(method.output_type).FromString,
        )

    def call(self, method: str, message: Message | bytes, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """The answer to a unary call, or `grpc.RpcError`; `message` may be any bytes."""
        return self._callables[method](message, timeout=timeout_s)

    def begin(self, method: str, message: Message | bytes, timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """A unary call in progress: a `grpc.Future` that also has `code`, `details` and `cancel`."""
        return self._callables[method].future(message, timeout=timeout_s)

    def stream(self, method: str, messages: Iterator[Message], timeout_s: float = CALL_TIMEOUT_S) -> Any:
        """A streaming call in progress."""
        return self._callables[method](messages, timeout=timeout_s)

    def infer(self, request: pb.ModelInferRequest | bytes) -> pb.ModelInferResponse:
        """The answer to an inference request, or `grpc.RpcError`."""
        answer: pb.ModelInferResponse = self.call("ModelInfer", request)
        return answer

    def refusal(self, method: str, message: Message | bytes) -> tuple[grpc.StatusCode, str]:
        """The status of a call that must not succeed."""
        try:
            answer = self.call(method, message)
        except grpc.RpcError as error:
            return error.code(), error.details()
        raise AssertionError(f"{method} was answered: {answer}")

    def executions(self, model: str) -> int:
        """How many runs ModelStatistics tells of a model with one version."""
        (found,) = self.call("ModelStatistics", pb.ModelStatisticsRequest(name=model)).model_stats
        return found.execution_count

    def model(self, name: str) -> ServedModel:
        """The served model itself, for its queue and its counters."""
        return self.server.manager.find(name, "")

    def close(self) -> None:
        """Close the channel and stop the server."""
        self.channel.close()
        self.server.stop()


@contextmanager
def running(
    settings: ServerSettings,
    transport: str,
    environ: Mapping[str, str] | None = None,
    find_cuda: Callable[[], tuple[CudaDriver | None, str]] = find_driver,
) -> Iterator[RunningServer]:
    """A started server on one of the TRANSPORTS; stopped at the end."""
    server = Server(replace(settings, transport=TransportChoice(transport)), environ or {}, find_cuda)
    try:
        server.start()
    except BaseException:
        server.stop()
        raise
    client = RunningServer(server)
    try:
        yield client
    finally:
        client.close()
