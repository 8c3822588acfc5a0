"""The calls of the protocol as values: arguments in, an Operation with the request's bytes and the answer's reader out.

Nothing here does I/O. Every argument is checked before anything is sent, as far as the client can know; the rest is
for the server to say.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypedDict, TypeVar

import numpy as np
from google.protobuf.message import DecodeError, Message

from sluice_client.errors import InvalidRequest, InvalidResponse
from sluice_client.flow import Operation, Timing
from sluice_client.results import (
    Array,
    BatchStatistics,
    Duration,
    ModelIndex,
    ModelMetadata,
    ModelStatistics,
    Parameter,
    Result,
    ServerMetadata,
    TensorMetadata,
)
from sluice_client.retries import Failure, Safety
from sluice_client.settings import MAX_MESSAGE_BYTES
from sluice_client.shared_memory import SharedMemory, SharedRoom, SharedTensor
from sluice_proto import tensors, wire
from sluice_proto.errors import ProtoError, TensorError
from sluice_proto.grpc_service_pb2 import (
    InferParameter,
    ModelConfigRequest,
    ModelConfigResponse,
    ModelInferRequest,
    ModelInferResponse,
    ModelMetadataRequest,
    ModelMetadataResponse,
    ModelReadyRequest,
    ModelReadyResponse,
    ModelRepositoryParameter,
    ModelStatisticsRequest,
    ModelStatisticsResponse,
    ModelStreamInferResponse,
    RepositoryIndexRequest,
    RepositoryIndexResponse,
    RepositoryModelLoadRequest,
    RepositoryModelUnloadRequest,
    ServerLiveRequest,
    ServerLiveResponse,
    ServerMetadataRequest,
    ServerMetadataResponse,
    ServerReadyRequest,
    ServerReadyResponse,
    StatisticDuration,
    SystemSharedMemoryRegisterRequest,
    SystemSharedMemoryUnregisterRequest,
)
from sluice_proto.model_config_pb2 import ModelConfig

M = TypeVar("M", bound=Message)
T = TypeVar("T")
Inputs = Mapping[str, Array | SharedTensor]
Outputs = Sequence[str] | Mapping[str, SharedRoom | None]
Rooms = Mapping[str, SharedRoom]

_RAW_FIELD: Final = ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER
# How an answer of a stream that is an error tells its status (both Sluice's own; others have the text alone).
_STATUS, _PUSHBACK_MS = "grpc_status", "grpc_retry_pushback_ms"
_NS_PER_MS: Final = 1_000_000
_MIN_INT64, _MAX_INT64, _MAX_UINT64 = -(2**63), 2**63 - 1, 2**64 - 1


class InferArguments(TypedDict, total=False):
    """What an inference takes besides model and inputs, each as Client.infer explains it."""

    outputs: Outputs | None
    version: str
    request_id: str
    priority: int
    timeout_us: int
    parameters: Mapping[str, Parameter] | None


@dataclass(frozen=True, slots=True)
class Inference(Operation[Result]):
    """An inference: `rooms` are where outputs come in shared memory, `endpoint` the server that knows it ("": none)."""

    rooms: Rooms = field(default_factory=dict)
    endpoint: str = ""


def infer(
    model: str,
    inputs: Inputs,
    *,
    outputs: Outputs | None = None,
    version: str = "",
    request_id: str = "",
    priority: int = 0,
    timeout_us: int = 0,
    parameters: Mapping[str, Parameter] | None = None,
) -> Inference:
    """ModelInfer. Inputs are sent in raw form, each array copied once, into the message."""
    extra = dict(parameters or {})
    for name, value in (("priority", priority), ("timeout", timeout_us)):
        _check_count(name, value)
        if value and name in extra:
            raise InvalidRequest(f"{name!r} is given as a parameter and as an argument of its own")
        if value:
            extra[name] = value
    head = ModelInferRequest(
        model_name=_name("model", model), model_version=_text("version", version), id=_text("request_id", request_id)
    )
    for key, parameter in extra.items():
        head.parameters[_name("parameter", key)].CopyFrom(_infer_parameter(key, parameter))
    rooms = _add_outputs(head, outputs or ())
    parts: list[Any] = [b""]
    for name, tensor in inputs.items():
        if isinstance(tensor, SharedTensor):
            item = head.inputs.add(name=_name("input", name), datatype=tensor.datatype, shape=tensor.shape)
            _put_into_region(item, tensor)
            continue
        raw = _add_input(head, name, tensor)
        parts += (wire.length_delimited(_RAW_FIELD, len(raw)), raw)
    parts[0] = head.SerializeToString()
    size_bytes = sum(map(len, parts))
    if size_bytes > MAX_MESSAGE_BYTES:
        raise InvalidRequest(f"the request has {size_bytes} bytes, gRPC carries at most {MAX_MESSAGE_BYTES}")
    in_sequence = extra.get("sequence_id", 0) not in (0, "")
    safety = Safety.UNSENT if in_sequence else Safety.REPEATABLE
    memories = [tensor.memory for tensor in (*inputs.values(), *rooms.values()) if not isinstance(tensor, np.ndarray)]

    def read(answer: bytes, timing: Timing) -> Result:
        return result_of(_message(ModelInferResponse, answer), timing, rooms)

    return Inference("ModelInfer", b"".join(parts), read, safety, model, rooms, _endpoint_of(memories))


def server_live() -> Operation[bool]:
    """ServerLive."""
    return _operation(ServerLiveRequest(), ServerLiveResponse, lambda answer: answer.live)


def server_ready() -> Operation[bool]:
    """ServerReady."""
    return _operation(ServerReadyRequest(), ServerReadyResponse, lambda answer: answer.ready)


def model_ready(model: str, version: str) -> Operation[bool]:
    """ModelReady."""
    request = ModelReadyRequest(name=_name("model", model), version=_text("version", version))
    return _operation(request, ModelReadyResponse, lambda answer: answer.ready, model=model)


def server_metadata() -> Operation[ServerMetadata]:
    """ServerMetadata."""
    return _operation(
        ServerMetadataRequest(),
        ServerMetadataResponse,
        lambda answer: ServerMetadata(answer.name, answer.version, tuple(answer.extensions)),
    )


def model_metadata(model: str, version: str) -> Operation[ModelMetadata]:
    """ModelMetadata."""

    def tensor(message: ModelMetadataResponse.TensorMetadata) -> TensorMetadata:
        return TensorMetadata(message.name, message.datatype, tuple(message.shape))

    def read(answer: ModelMetadataResponse) -> ModelMetadata:
        inputs, outputs = tuple(map(tensor, answer.inputs)), tuple(map(tensor, answer.outputs))
        return ModelMetadata(answer.name, tuple(answer.versions), answer.platform, inputs, outputs)

    request = ModelMetadataRequest(name=_name("model", model), version=_text("version", version))
    return _operation(request, ModelMetadataResponse, read, model=model)


def model_config(model: str, version: str) -> Operation[ModelConfig]:
    """ModelConfig."""
    request = ModelConfigRequest(name=_name("model", model), version=_text("version", version))
    return _operation(request, ModelConfigResponse, lambda answer: answer.config, model=model)


def statistics(model: str, version: str) -> Operation[tuple[ModelStatistics, ...]]:
    """ModelStatistics; "" for all models."""
    request = ModelStatisticsRequest(name=_text("model", model), version=_text("version", version))
    return _operation(request, ModelStatisticsResponse, _statistics, model=model)


def repository_index(*, ready_only: bool) -> Operation[tuple[ModelIndex, ...]]:
    """RepositoryIndex."""
    return _operation(
        RepositoryIndexRequest(ready=ready_only),
        RepositoryIndexResponse,
        lambda answer: tuple(ModelIndex(m.name, m.version, m.state, m.reason) for m in answer.models),
    )


def load_model(
    model: str, config: str | Mapping[str, Any] | None, files: Mapping[str, bytes] | None
) -> Operation[None]:
    """RepositoryModelLoad; never repeated."""
    request = RepositoryModelLoadRequest(model_name=_name("model", model))
    if files and config is None:
        raise InvalidRequest("files replace the model's whole directory, so they need a config too")
    if config is not None:
        request.parameters["config"].string_param = _config_json(config)
    for path, content in (files or {}).items():
        if not isinstance(content, bytes):
            raise InvalidRequest(f"file {path!r} must be bytes, got {type(content).__name__}")
        request.parameters["file:" + _name("file", path)].CopyFrom(ModelRepositoryParameter(bytes_param=content))
    return Operation("RepositoryModelLoad", request.SerializeToString(), _nothing, Safety.NEVER, model)


def register_memory(memory: SharedMemory) -> Operation[None]:
    """SystemSharedMemoryRegister; never repeated."""
    request = SystemSharedMemoryRegisterRequest(name=memory.name, key=memory.key, byte_size=memory.size_bytes)
    return Operation("SystemSharedMemoryRegister", request.SerializeToString(), _nothing, Safety.NEVER)


def unregister_memory(memory: SharedMemory) -> Operation[None]:
    """SystemSharedMemoryUnregister; to say it twice does no harm."""
    request = SystemSharedMemoryUnregisterRequest(name=memory.name)
    return Operation("SystemSharedMemoryUnregister", request.SerializeToString(), _nothing)


def unload_model(model: str, *, unload_dependents: bool) -> Operation[None]:
    """RepositoryModelUnload; never repeated."""
    request = RepositoryModelUnloadRequest(model_name=_name("model", model))
    if unload_dependents:
        request.parameters["unload_dependents"].bool_param = True
    return Operation("RepositoryModelUnload", request.SerializeToString(), _nothing, Safety.NEVER, model)


def _operation(request: Message, answer_type: type[M], read: Callable[[M], T], model: str = "") -> Operation[T]:
    """A read-only call: its RPC is named like its request."""
    rpc = type(request).__name__.removesuffix("Request")

    def parse(answer: bytes, _: Timing) -> T:
        return read(_message(answer_type, answer))

    return Operation(rpc, request.SerializeToString(), parse, Safety.REPEATABLE, model)


def _nothing(_: bytes, __: Timing) -> None:
    """The reader of an answer that says no more than that it came."""


def _message(answer_type: type[M], answer: bytes) -> M:
    try:
        return answer_type.FromString(answer)
    except DecodeError as error:
        raise InvalidResponse(f"the answer is not a {answer_type.__name__}: {error}") from None


def _add_input(head: ModelInferRequest, name: str, array: Array) -> bytes | Array:
    """Describe the input in `head` and return its data."""
    if not isinstance(array, np.ndarray):
        raise InvalidRequest(
            f"input {name!r} must be a numpy array, got {type(array).__name__}; numpy.asarray(value, dtype) makes one"
        )
    try:
        datatype, raw = tensors.of_array(array), tensors.to_buffer(array)
    except TensorError as error:
        raise InvalidRequest(f"input {name!r}: {error}") from None
    head.inputs.add(name=_name("input", name), datatype=datatype.name, shape=array.shape)
    return raw


def _add_outputs(head: ModelInferRequest, outputs: Outputs) -> Rooms:
    """Name the wanted outputs in `head`; gives those that are to go into shared memory."""
    rooms = {}
    for name in _names("outputs", outputs):
        output = head.outputs.add(name=name)
        room = outputs[name] if isinstance(outputs, Mapping) else None
        if room is not None:
            if not isinstance(room, SharedRoom):
                raise InvalidRequest(
                    f"output {name!r}: None or a SharedRoom says where it is to go, got {type(room).__name__}"
                )
            _put_into_region(output, room)
            rooms[name] = room
    return rooms


def _put_into_region(item: Any, place: SharedTensor | SharedRoom) -> None:
    place.memory.check_open()
    item.parameters["shared_memory_region"].string_param = place.memory.name
    item.parameters["shared_memory_byte_size"].int64_param = place.size_bytes
    if place.offset:
        item.parameters["shared_memory_offset"].int64_param = place.offset


def _endpoint_of(memories: Iterable[SharedMemory]) -> str:
    """The one server that knows all of them, "" for none."""
    endpoints = sorted({memory.endpoint for memory in memories})
    if len(endpoints) > 1:
        raise InvalidRequest(
            f"the request's shared memory is registered at several servers, {', '.join(endpoints)}; one has to know all"
        )
    return endpoints[0] if endpoints else ""


def outputs_of(message: ModelInferResponse, rooms: Rooms = MappingProxyType({})) -> dict[str, Array]:
    """The outputs of an answer by name, in its order, those of `rooms` from there. Raises InvalidResponse."""
    raws = iter(message.raw_output_contents)
    outputs = {}
    for output in message.outputs:
        dtype = tensors.BY_NAME.get(output.datatype)
        if dtype is None:
            raise InvalidResponse(f"output {output.name!r} has the unknown datatype {output.datatype!r}")
        room = rooms.get(output.name)
        try:
            if output.HasField("contents"):
                array = tensors.from_contents(dtype, output.shape, output.contents)
            elif room is None:
                array = tensors.view(dtype, output.shape, next(raws))
            else:
                # A server that knows nothing of shared memory has put the data here.
                raw = next(raws, b"")
                array = tensors.view(dtype, output.shape, raw) if raw else room.read(dtype, tuple(output.shape))
        except StopIteration:
            raise InvalidResponse(f"the answer holds no data for output {output.name!r}") from None
        except ProtoError as error:
            raise InvalidResponse(f"output {output.name!r}: {error}") from None
        outputs[output.name] = array
    return outputs


def stream_answer(answer: bytes) -> ModelStreamInferResponse:
    """An answer of a stream; for whom it is stands in it. Raises InvalidResponse."""
    return _message(ModelStreamInferResponse, answer)


def stream_failure(message: ModelStreamInferResponse) -> Failure | None:
    """The error that an answer of a stream is, None when it is none. Its code is UNKNOWN unless the server told it."""
    if not message.error_message:
        return None
    told = message.infer_response.parameters
    code = told[_STATUS].string_param if _STATUS in told else "UNKNOWN"
    pushback_ns = told[_PUSHBACK_MS].int64_param * _NS_PER_MS if _PUSHBACK_MS in told else None
    return Failure(code, message.error_message, pushback_ns=pushback_ns)


def result_of(message: ModelInferResponse, timing: Timing, rooms: Rooms) -> Result:
    """The Result that an answer is, with the outputs that are in shared memory. Raises InvalidResponse."""
    outputs = outputs_of(message, rooms)
    parameters = {key: _parameter_value(value) for key, value in message.parameters.items()}
    return Result(
        MappingProxyType(outputs),
        message.model_name,
        message.model_version,
        message.id,
        MappingProxyType(parameters),
        timing,
    )


def _statistics(answer: ModelStatisticsResponse) -> tuple[ModelStatistics, ...]:
    def duration(message: StatisticDuration) -> Duration:
        return Duration(message.count, message.ns)

    def batch(message: Any) -> BatchStatistics:
        parts = (message.compute_input, message.compute_infer, message.compute_output)
        return BatchStatistics(message.batch_size, *map(duration, parts))

    return tuple(
        ModelStatistics(
            name=model.name,
            version=model.version,
            last_inference_ms=model.last_inference,
            inference_count=model.inference_count,
            execution_count=model.execution_count,
            success=duration(model.inference_stats.success),
            fail=duration(model.inference_stats.fail),
            queue=duration(model.inference_stats.queue),
            compute_input=duration(model.inference_stats.compute_input),
            compute_infer=duration(model.inference_stats.compute_infer),
            compute_output=duration(model.inference_stats.compute_output),
            cache_hit=duration(model.inference_stats.cache_hit),
            cache_miss=duration(model.inference_stats.cache_miss),
            batches=tuple(map(batch, model.batch_stats)),
        )
        for model in answer.model_stats
    )


def _parameter_value(parameter: InferParameter) -> Parameter:
    choice = parameter.WhichOneof("parameter_choice")
    if choice is None:
        return ""
    value: Parameter = getattr(parameter, choice)
    return value


def _infer_parameter(key: str, value: Parameter) -> InferParameter:
    if isinstance(value, bool):
        return InferParameter(bool_param=value)
    if isinstance(value, int):
        if _MIN_INT64 <= value <= _MAX_INT64:
            return InferParameter(int64_param=value)
        if 0 <= value <= _MAX_UINT64:
            return InferParameter(uint64_param=value)
        raise InvalidRequest(f"parameter {key!r} is {value}, which does not fit into 64 bits")
    if isinstance(value, float):
        return InferParameter(double_param=value)
    if isinstance(value, str):
        return InferParameter(string_param=_text(f"parameter {key!r}", value))
    raise InvalidRequest(f"parameter {key!r} must be bool, int, float or str, got {type(value).__name__}")


def _config_json(config: str | Mapping[str, Any]) -> str:
    if isinstance(config, str):
        return _text("config", config)
    try:
        return json.dumps(config)
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"config cannot be written as JSON: {error}") from None


def _text(what: str, value: str) -> str:
    """A string that protobuf can carry, which lone surrogates are not."""
    if not isinstance(value, str):
        raise InvalidRequest(f"{what} must be a str, got {type(value).__name__}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(f"{what} is not valid Unicode: {value!a}") from None
    return value


def _name(what: str, value: str) -> str:
    if value == "":
        raise InvalidRequest(f"the {what} name is empty")
    return _text(f"the {what} name", value)


def _names(what: str, values: Iterable[str]) -> Sequence[str]:
    if isinstance(values, str):
        raise InvalidRequest(f"{what} is a sequence of names, got the string {values!r}; write [{values!r}]")
    return [_name("output", value) for value in values]


def _check_count(what: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= _MAX_INT64:
        raise InvalidRequest(f"{what} must be a whole number, not negative and within 64 bits, got {value!r}")
