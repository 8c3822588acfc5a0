"""A small real gRPC server of the protocol for the client's tests, with faults injected on purpose.

It serves the models `identity` (each input comes back under its name) and `silent` (never answers until released).
`faults` are consumed first: the next calls fail as scripted. `seen` records every call. A stream of inference is
answered by `talk`, which gets an iterator of its requests.
"""

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf.message import Message

from sluice_proto import grpc_service_pb2 as pb
from sluice_proto.model_config_pb2 import ModelConfig

_SERVICE = "/inference.GRPCInferenceService/"


Talk = Callable[[Iterator[pb.ModelInferRequest], grpc.ServicerContext], Iterator[bytes]]


@dataclass(frozen=True)
class Fault:
    """How a call fails: status, text and trailers."""

    code: grpc.StatusCode
    details: str = "injected"
    trailers: tuple[tuple[str, str | bytes], ...] = ()


@dataclass(frozen=True)
class Seen:
    """A call as the server saw it."""

    rpc: str
    request: Any
    metadata: dict[str, Any]
    time_remaining_s: float


@dataclass
class FakeServer:
    """Starts when made; `address` is where it listens."""

    bind: str = "127.0.0.1:0"
    credentials: grpc.ServerCredentials | None = None
    ready: bool = True
    faults: deque[Fault] = field(default_factory=deque)
    seen: list[Seen] = field(default_factory=list)
    entered: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)
    on_call: Callable[[Seen], None] = lambda seen: None
    answers: dict[str, bytes] = field(default_factory=dict)
    talk: Talk | None = None

    def __post_init__(self) -> None:
        options = [("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)]
        self._server = grpc.server(ThreadPoolExecutor(16), handlers=(self,), options=options)
        if self.credentials is None:
            port = self._server.add_insecure_port(self.bind)
        else:
            port = self._server.add_secure_port(self.bind, self.credentials)
        self.address = self.bind if self.bind.startswith("unix:") else f"127.0.0.1:{port}"
        self._server.start()

    def stop(self) -> None:
        self.release.set()
        self._server.stop(None).wait()

    def count(self, rpc: str) -> int:
        return sum(seen.rpc == rpc for seen in self.seen)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        rpc = details.method.removeprefix(_SERVICE)
        if rpc == "ModelStreamInfer":
            return grpc.stream_stream_rpc_method_handler(self._stream)
        request_type = getattr(pb, f"{rpc}Request")

        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            metadata = dict(context.invocation_metadata())
            self.seen.append(Seen(rpc, request_type.FromString(request), metadata, context.time_remaining()))
            self.on_call(self.seen[-1])
            if self.faults:
                fault = self.faults.popleft()
                context.set_trailing_metadata(fault.trailers)
                context.abort(fault.code, fault.details)
            if rpc in self.answers:
                return self.answers[rpc]
            return _answer(self, rpc, self.seen[-1].request, context).SerializeToString()

        return grpc.unary_unary_rpc_method_handler(handle)

    def _stream(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        assert self.talk is not None
        context.add_callback(self.cancelled.set)
        metadata = dict(context.invocation_metadata())
        self.seen.append(Seen("ModelStreamInfer", None, metadata, context.time_remaining() or 0.0))
        yield from self.talk(map(pb.ModelInferRequest.FromString, requests), context)


def answer_of(request: pb.ModelInferRequest, request_id: str | None = None, error: str = "") -> bytes:
    """An answer of a stream that says X back, or an error, with this id in place of the request's."""
    response = pb.ModelStreamInferResponse(error_message=error)
    response.infer_response.id = request.id if request_id is None else request_id
    if not error:
        response.infer_response.model_name = request.model_name
        response.infer_response.outputs.add(name="X", datatype="FP32", shape=request.inputs[0].shape)
        response.infer_response.raw_output_contents.append(request.raw_input_contents[0])
    return response.SerializeToString()


def _answer(server: FakeServer, rpc: str, request: Any, context: grpc.ServicerContext) -> Message:
    answers: dict[str, Callable[[], Message]] = {
        "ServerLive": lambda: pb.ServerLiveResponse(live=True),
        "ServerReady": lambda: pb.ServerReadyResponse(ready=server.ready),
        "ModelReady": lambda: pb.ModelReadyResponse(ready=server.ready and request.name == "identity"),
        "ServerMetadata": lambda: pb.ServerMetadataResponse(name="fake", version="1.2.3", extensions=["statistics"]),
        "ModelMetadata": lambda: _metadata(request, context),
        "ModelConfig": lambda: pb.ModelConfigResponse(config=ModelConfig(name=request.name, max_batch_size=8)),
        "ModelStatistics": _statistics,
        "RepositoryIndex": lambda: _index(ready_only=request.ready),
        "RepositoryModelLoad": pb.RepositoryModelLoadResponse,
        "RepositoryModelUnload": pb.RepositoryModelUnloadResponse,
        "ModelInfer": lambda: _infer(server, request, context),
    }
    return answers[rpc]()


def _index(*, ready_only: bool) -> Message:
    models = [
        ("broken", "1", "UNAVAILABLE", "its file is cut off"),
        ("identity", "1", "READY", ""),
        ("idle", "", "", ""),
    ]
    response = pb.RepositoryIndexResponse()
    for name, version, state, reason in models:
        if state == "READY" or not ready_only:
            response.models.add(name=name, version=version, state=state, reason=reason)
    return response


def _metadata(request: Any, context: grpc.ServicerContext) -> Message:
    if request.name != "identity":
        context.abort(grpc.StatusCode.NOT_FOUND, f"model '{request.name}' is not found")
    response = pb.ModelMetadataResponse(name="identity", versions=["1"], platform="onnxruntime_onnx")
    response.inputs.add(name="X", datatype="FP32", shape=[-1, 3])
    response.inputs.add(name="S", datatype="BYTES", shape=[-1])
    response.outputs.add(name="X", datatype="FP32", shape=[-1, 3])
    return response


def _statistics() -> Message:
    response = pb.ModelStatisticsResponse()
    model = response.model_stats.add(name="identity", version="1", inference_count=12, execution_count=4)
    model.inference_stats.success.count, model.inference_stats.success.ns = 6, 12_000_000
    model.inference_stats.queue.count, model.inference_stats.queue.ns = 6, 3_000_000
    model.inference_stats.compute_infer.count, model.inference_stats.compute_infer.ns = 6, 6_000_000
    batch = model.batch_stats.add(batch_size=3)
    batch.compute_infer.count, batch.compute_infer.ns = 4, 4_000_000
    return response


def _infer(server: FakeServer, request: Any, context: grpc.ServicerContext) -> Message:
    if request.model_name == "silent":
        context.add_callback(server.cancelled.set)
        server.entered.set()
        server.release.wait(30)
    elif request.model_name != "identity":
        context.abort(grpc.StatusCode.NOT_FOUND, f"model '{request.model_name}' is not found")
    response = pb.ModelInferResponse(model_name=request.model_name, model_version="1", id=request.id)
    response.parameters["note"].string_param = "fake"
    wanted = {output.name for output in request.outputs}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if not wanted or tensor.name in wanted:
            response.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
            response.raw_output_contents.append(raw)
    return response


class DroppingProxy:
    """A TCP proxy that cuts the first `drops` connections once a request has begun, and then passes everything on."""

    def __init__(self, target: str, drops: int) -> None:
        self._target = target
        self._drops = drops
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.dropped = 0
        self._start(self._accept)

    def close(self) -> None:
        for each in (self._listener, *self._sockets):
            # Shutting down first wakes the thread that waits in recv or accept.
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        for thread in self._threads:
            thread.join()

    def _start(self, target: Callable[..., None], *args: Any) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self._sockets.append(client)
            if self.dropped < self._drops:
                self._cut_at_headers(client)
                continue
            host, _, port = self._target.rpartition(":")
            server = socket.create_connection((host, int(port)))
            self._sockets.append(server)
            self._start(_pump, client, server)
            self._start(_pump, server, client)

    def _cut_at_headers(self, client: socket.socket) -> None:
        """Speak just enough HTTP/2 that the client sends a request, and close when its HEADERS frame begins."""
        settings_frame = bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
        client.sendall(settings_frame)
        with client.makefile("rb") as stream:
            stream.read(len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
            while header := stream.read(9):
                if header[3] == 1:
                    break
                stream.read(int.from_bytes(header[:3]))
        self.dropped += 1
        client.close()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            sink.sendall(data)
