"""Fuzzed here: the bytes of inference requests, alone and in streams, and the messages of every other RPC."""

from __future__ import annotations

import threading
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hypothesis import strategies as st

from fuzz import serving
from fuzz.serving import Serving, check_at_rest, check_good, judge, judge_answer
from fuzz.subject import joined, parted
from protocol.any_requests import VALID, requests
from sluice_proto import grpc_service_pb2 as pb
from sluice_proto.wire import SPLIT_BYTES_MIN
from sluice_server.protocol import health, reflection
from sluice_server.protocol.dispatch import STREAM_INFER
from sluice_server.protocol.rpcs import SERVICE, path_of
from sluice_server.protocol.streams import ERROR_AS_STATUS
from sluice_server.status import Code
from support.any_messages import any_message
from support.fakes import PATIENCE_S, RecordingStream, eventually

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from sluice_server.status import Status
    from support.fakes import RecordingCall

SURPLUS = pb.ModelInferRequest(raw_input_contents=[bytes(SPLIT_BYTES_MIN)]).SerializeToString()
"""One more tensor, which no input takes, behind a message: its tensors are cut out before it is parsed."""

KEPT_CALLS = 64
"""Ended calls that are looked at again: none may be ended twice."""

WORDS = (
    *VALID, "X", "Y", "B", "INPUT0", "OUTPUT0", "OUTPUT1", "INDEX", "FP32", "INT32", "INT64", "BYTES", "1", "2", "-1",
    serving.REGION, "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset", "classification",
    "timeout", "priority", "sequence_id", "triton_enable_empty_final_response",
)  # fmt: skip

built_requests = (requests() | any_message(pb.ModelInferRequest, WORDS)).map(
    lambda message: message.SerializeToString()
)


@dataclass
class Requests:
    """Requests from bytes to bytes: decoding, queue, ONNX Runtime and encoding, on this thread or on an instance's."""

    serving: Serving
    kept: list[RecordingCall] = field(default_factory=list)

    def check(self, data: bytes) -> None:
        """The request alone; of some also two at once, and with a large tensor in addition."""
        kind = zlib.crc32(data) % 8  # the same for the same input
        first = self._send(data, lend=True)
        if kind == 0:
            self._send(data + SURPLUS, lend=True)
        elif kind <= 2:
            self._send_twice(data, first)

    def _send(self, data: bytes, *, lend: bool) -> tuple[Status, bytes]:
        call = self.serving.end_of(data, lend=lend)
        self._keep(call)
        (end,) = call.ends
        self._judge(data, end)
        return end

    def _send_twice(self, data: bytes, first: tuple[Status, bytes]) -> None:
        """Two of the same in one list, which may run as one batch: each has an outcome of its own, of the same kind."""
        calls = [serving.RecordingCall(data) for _ in range(2)]
        self.serving.dispatcher(calls)
        for call in calls:
            end = call.wait()
            self._keep(call)
            self._judge(data, end)
            if Code.DEADLINE_EXCEEDED not in (end[0].code, first[0].code):
                assert end[0].code is first[0].code, (end[0], first[0])

    @staticmethod
    def _judge(data: bytes, end: tuple[Status, bytes]) -> None:
        status, payload = end
        if status.code is Code.OK:
            judge_answer(data, payload)
        else:
            judge(data, status.code, status.message)

    def _keep(self, call: RecordingCall) -> None:
        self.kept.append(call)
        if len(self.kept) > KEPT_CALLS:
            assert len(self.kept.pop(0).ends) == 1

    def look(self) -> None:
        """A good request is answered, and the queues are empty."""
        assert all(len(call.ends) == 1 for call in self.kept)
        check_good(self.serving)
        check_at_rest(self.serving.manager.served())


@contextmanager
def open_requests(directory: Path) -> Iterator[Requests]:
    with serving.serving(directory) as server:
        yield Requests(server)


# --- streams


class EndingStream(RecordingStream):
    """A stream whose end can be waited for."""

    __slots__ = ("ended",)

    def __init__(self, method: str, metadata: Any = ()) -> None:
        super().__init__(method, metadata=metadata)
        self.ended = threading.Event()

    def finish(self, *status: Status) -> None:
        super().finish(*status)
        self.ended.set()


STREAMS = (STREAM_INFER, STREAM_INFER, reflection.INFO, health.WATCH)
"""By the first byte of an input; the second one is that of a client which wants errors as status."""


@dataclass
class Streams:
    """Streams of any messages: the first byte says of which RPC, the rest is the messages."""

    serving: Serving

    def check(self, data: bytes) -> None:
        """All messages of a stream, and its end."""
        kind = data[0] % len(STREAMS) if data else 0
        messages = parted(data[1:])
        stream = EndingStream(STREAMS[kind], (ERROR_AS_STATUS,) if kind == 1 else ())
        self.serving.dispatcher([stream.message(message) for message in [*messages, None]])
        if stream.method == health.WATCH:
            self._judge_watch(stream)
            return
        assert stream.ended.wait(PATIENCE_S), "the stream was not ended"
        assert len(stream.ends) == 1
        (status,) = stream.ends
        if stream.method == STREAM_INFER:
            judge_stream(messages, stream, status, errors_end_it=kind == 1)
        else:
            assert status.code in (Code.OK, Code.INVALID_ARGUMENT), status
            assert status.code is not Code.OK or len(stream.sent) == len(messages)

    @staticmethod
    def _judge_watch(stream: EndingStream) -> None:
        """A watch goes on until its client leaves, unless it began with no request."""
        if stream.ends:
            assert [status.code for status in stream.ends] == [Code.INVALID_ARGUMENT]
            return
        assert len(stream.sent) == 1
        assert stream.on_cancel is not None
        stream.on_cancel()

    def look(self) -> None:
        """A good request is answered, no stream is left, and the queues are empty."""
        check_good(self.serving)
        assert not len(self.serving.dispatcher._infer_streams)
        check_at_rest(self.serving.manager.served())


def judge_stream(messages: list[bytes], stream: EndingStream, status: Status, *, errors_end_it: bool) -> None:
    """Every message has its answer, in order, up to the first refusal where that ends the stream."""
    answers = [pb.ModelStreamInferResponse.FromString(sent) for sent in stream.sent]
    for message, answer in zip(messages, answers, strict=False):
        if answer.error_message:
            assert not errors_end_it
            assert "incident" not in answer.error_message, answer.error_message
        else:
            assert answer.infer_response.id == pb.ModelInferRequest.FromString(message).id
    if status.code is Code.OK:
        assert len(answers) == len(messages)
    else:
        assert errors_end_it
        judge(messages[len(answers)], status.code, status.message)


def stream_seeds() -> list[bytes]:
    good = serving.seeds()
    names = [pb_message(health.health_pb2.HealthCheckRequest(service=name)) for name in ("", "simple", "nope")]
    reflected = reflection_requests()
    return [
        *(b"\0" + joined(good[start : start + 3]) for start in range(0, len(good), 3)),
        b"\1" + joined([good[0], good[5], b"\xff", good[1]]),
        b"\0" + joined([good[0], b"\xfftriton_enable_empty_final_response", good[1]]),
        b"\2" + joined(reflected),
        *(b"\3" + joined([name]) for name in names),
    ]


def pb_message(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def reflection_requests() -> list[bytes]:
    """One of each kind."""
    request = reflection.reflection_pb2.ServerReflectionRequest
    return [
        pb_message(request(list_services="")),
        pb_message(request(file_containing_symbol="inference.GRPCInferenceService")),
        pb_message(request(file_by_filename="grpc_service.proto")),
        pb_message(request(all_extension_numbers_of_type="inference.ModelInferRequest")),
    ]


@contextmanager
def open_streams(directory: Path) -> Iterator[Streams]:
    with serving.serving(directory) as server:
        yield Streams(server)


REFLECTION_WORDS = ("inference.GRPCInferenceService", "inference.ModelInferRequest", "grpc.health.v1.Health", "1")
_stream_messages = st.one_of(
    st.tuples(st.sampled_from([b"\0", b"\1"]), st.lists(built_requests | st.binary(max_size=8), max_size=4)),
    st.tuples(
        st.just(b"\2"),
        st.lists(
            any_message(reflection.reflection_pb2.ServerReflectionRequest, REFLECTION_WORDS).map(pb_message), max_size=3
        ),
    ),
    st.tuples(
        st.just(b"\3"), st.lists(any_message(health.health_pb2.HealthCheckRequest, WORDS).map(pb_message), max_size=2)
    ),
)
built_streams = _stream_messages.map(lambda parts: parts[0] + joined(parts[1]))


# --- every other RPC


RPC_PATHS = (
    *sorted(
        path_of(method.name)
        for method in SERVICE.methods
        if not method.client_streaming
        and method.name not in ("ModelInfer", "RepositoryModelLoad", "RepositoryModelUnload")
    ),
    health.CHECK,
)


@dataclass
class Rpcs:
    """Messages of every unary RPC but inference, load and unload: the first byte says of which."""

    serving: Serving

    def check(self, data: bytes) -> None:
        """One message; the answer is one of the RPC, or the refusal is one for the client."""
        path = RPC_PATHS[data[0] % len(RPC_PATHS)] if data else RPC_PATHS[0]
        (end,) = self.serving.end_of(data[1:], path).ends
        status, payload = end
        if status.code is Code.OK:
            answer_class(path).FromString(payload)
            return
        allowed = {Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED}
        if path.endswith("SharedMemoryRegister"):  # these three are Triton's
            allowed |= {Code.ALREADY_EXISTS, Code.RESOURCE_EXHAUSTED}
            if status.message.startswith("Unable to open shared memory region"):
                return
        assert status.code in allowed, (path, status)
        assert status.message

    def look(self) -> None:
        """A good request is answered; regions that were registered are forgotten."""
        for kind in ("System", "Cuda"):
            (end,) = self.serving.end_of(b"", path_of(f"{kind}SharedMemoryUnregister")).ends
            assert end[0].code is Code.OK, end
        eventually(lambda: not self.serving.gpu.times_open, "the memory of the GPU is let go")
        check_good(self.serving)


RPC_WORDS = (
    *VALID, "1", "2", "-1", "x", serving.REGION, "trace_level", "TIMESTAMPS", "TENSORS", "OFF", "trace_rate",
    "trace_count", "log_frequency", "trace_file", "trace_mode", "log_file", "log_info", "log_verbose_level",
    "log_format", "default", "ISO8601", "json",
)  # fmt: skip


def request_class(path: str) -> Any:
    """Of an RPC's messages."""
    return health.health_pb2.HealthCheckRequest if path == health.CHECK else _by_name(path, "Request")


def answer_class(path: str) -> Any:
    """Of an RPC's answers."""
    return health.health_pb2.HealthCheckResponse if path == health.CHECK else _by_name(path, "Response")


def _by_name(path: str, kind: str) -> Any:
    return vars(pb)[f"{path.rpartition('/')[2]}{kind}"]


def rpc_seeds() -> list[bytes]:
    """Of every RPC an empty message, and some that say something."""
    told: list[tuple[str, Any]] = [(path, request_class(path)()) for path in RPC_PATHS]
    named = [path for path in RPC_PATHS if "name" in request_class(path).DESCRIPTOR.fields_by_name]
    told += [(path, request_class(path)(name="simple")) for path in named]
    register = pb.SystemSharedMemoryRegisterRequest(name="other", key="/nope", offset=1, byte_size=8)
    on_gpu = pb.CudaSharedMemoryRegisterRequest(name="gpu", raw_handle=serving.GPU_HANDLE, byte_size=64)
    trace = pb.TraceSettingRequest(model_name="simple")
    trace.settings["trace_level"].value.extend(["TIMESTAMPS", "TENSORS"])
    trace.settings["trace_rate"].value.append("2")
    log = pb.LogSettingsRequest()
    log.settings["log_verbose_level"].uint32_param = 1
    log.settings["log_format"].string_param = "ISO8601"
    for name, message in (
        ("SystemSharedMemoryRegister", register),
        ("CudaSharedMemoryRegister", on_gpu),
        ("TraceSetting", trace),
        ("LogSettings", log),
    ):
        told.append((path_of(name), message))
    return [bytes([RPC_PATHS.index(path)]) + pb_message(message) for path, message in told]


@st.composite
def built_rpcs(draw: st.DrawFn) -> bytes:
    """The number of an RPC, and a message of its request's class."""
    number = draw(st.integers(0, len(RPC_PATHS) - 1))
    return bytes([number]) + pb_message(draw(any_message(request_class(RPC_PATHS[number]), RPC_WORDS)))


@contextmanager
def open_rpcs(directory: Path) -> Iterator[Rpcs]:
    with serving.serving(directory) as server:
        yield Rpcs(server)
