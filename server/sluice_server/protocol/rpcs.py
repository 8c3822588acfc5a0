"""Every RPC but inference: health, metadata, configuration, statistics, model control (compatibility, section 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.errors import InvalidArgument, NotFound, Unimplemented
from sluice_server.observability.statistics import to_proto
from sluice_server.protocol import shared_memory
from sluice_server.repository.manager import Override

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from google.protobuf.message import Message

    from sluice_server.protocol.interface import TensorInterface
    from sluice_server.protocol.log_settings import LogSettings
    from sluice_server.protocol.shared_memory import SharedMemory
    from sluice_server.protocol.trace_settings import TraceSettings
    from sluice_server.repository.manager import ModelManager
    from sluice_server.security.control import ControlPolicy
    from sluice_server.transport.call import Call

SERVICE = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"]

EXTENSIONS = (
    "binary_tensor_data",
    "logging",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "sequence",
    "statistics",
    "trace",
)
"""The protocol's extensions that are there, in ServerMetadata; a name is added with the feature."""

_FILE_PREFIX = "file:"


@dataclass(frozen=True, slots=True)
class Rpc:
    """One RPC: its request's class, what answers it, and whether that may take long."""

    request: type[Message]
    answer: Callable[[Any, Call], Message]
    slow: bool = False


@dataclass(frozen=True, slots=True)
class ServerIdentity:
    """What ServerMetadata tells; example clients insist on the name `triton`."""

    name: str
    version: str
    extensions: tuple[str, ...] = EXTENSIONS


def path_of(method: str) -> str:
    """The path on the wire of one of the service's RPCs, such as `ModelInfer`."""
    return f"/{SERVICE.full_name}/{method}"


def name_of(path: str) -> str:
    """The name of an RPC without its service."""
    return path.rpartition("/")[2]


def rpc_table(
    manager: ModelManager,
    identity: ServerIdentity,
    control: ControlPolicy,
    regions: SharedMemory = shared_memory.OFF,
) -> Mapping[str, Rpc]:
    """The RPCs by their paths."""
    questions = _Questions(manager, identity)
    commands = _Commands(manager, control)
    rpcs = {
        "ServerLive": Rpc(pb.ServerLiveRequest, questions.server_live),
        "ServerReady": Rpc(pb.ServerReadyRequest, questions.server_ready),
        "ModelReady": Rpc(pb.ModelReadyRequest, questions.model_ready),
        "ServerMetadata": Rpc(pb.ServerMetadataRequest, questions.server_metadata),
        "ModelMetadata": Rpc(pb.ModelMetadataRequest, questions.model_metadata),
        "ModelConfig": Rpc(pb.ModelConfigRequest, questions.model_config),
        "ModelStatistics": Rpc(pb.ModelStatisticsRequest, questions.model_statistics),
        "RepositoryIndex": Rpc(pb.RepositoryIndexRequest, questions.repository_index, slow=True),
        "RepositoryModelLoad": Rpc(pb.RepositoryModelLoadRequest, commands.load, slow=True),
        "RepositoryModelUnload": Rpc(pb.RepositoryModelUnloadRequest, commands.unload, slow=True),
        **{
            name: Rpc(request, answer, slow=name in shared_memory.SLOW)
            for name, (request, answer) in regions.rpcs().items()
        },
    }
    return {path_of(name): rpc for name, rpc in rpcs.items()}


def settings_table(trace: TraceSettings, log: LogSettings) -> Mapping[str, Rpc]:
    """The RPCs that tell and change the settings of traces and logs, by their paths."""
    return {
        path_of("TraceSetting"): Rpc(pb.TraceSettingRequest, trace.answer),
        path_of("LogSettings"): Rpc(pb.LogSettingsRequest, log.answer),
    }


class _Questions:
    """RPCs that change nothing."""

    def __init__(self, manager: ModelManager, identity: ServerIdentity) -> None:
        self._manager = manager
        self._identity = identity

    def server_live(self, _request: Any, _call: Call) -> Message:
        return pb.ServerLiveResponse(live=True)

    def server_ready(self, _request: Any, _call: Call) -> Message:
        return pb.ServerReadyResponse(ready=self._manager.server_ready)

    def model_ready(self, request: Any, _call: Call) -> Message:
        try:
            self._manager.find(request.name, request.version)
        except NotFound:
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=True)

    def server_metadata(self, _request: Any, _call: Call) -> Message:
        return pb.ServerMetadataResponse(
            name=self._identity.name, version=self._identity.version, extensions=self._identity.extensions
        )

    def model_metadata(self, request: Any, _call: Call) -> Message:
        model = self._manager.find(request.name, request.version)
        batch = (-1,) if model.interface.max_batch_rows else ()
        response = pb.ModelMetadataResponse(
            name=model.interface.name,
            versions=[str(version) for version in self._manager.served_versions(request.name)],
            platform=model.config.platform,
            inputs=[_tensor_metadata(tensor, batch) for tensor in model.interface.inputs.values()],
            outputs=[_tensor_metadata(tensor, batch) for tensor in model.interface.outputs.values()],
        )
        response.properties.update(model.properties)
        return response

    def model_config(self, request: Any, _call: Call) -> Message:
        return pb.ModelConfigResponse(config=self._manager.find(request.name, request.version).config)

    def model_statistics(self, request: Any, _call: Call) -> Message:
        response = pb.ModelStatisticsResponse()
        for model in self._manager.select(request.name, request.version):
            name, version = model.interface.name, model.interface.version
            response.model_stats.append(to_proto(name, version, model.statistics.snapshot()))
        return response

    def repository_index(self, request: Any, _call: Call) -> Message:
        _refuse_repository_name(request)
        response = pb.RepositoryIndexResponse()
        for entry in self._manager.index(ready_only=request.ready):
            response.models.add(name=entry.name, version=entry.version, state=entry.state, reason=entry.reason)
        return response


class _Commands:
    """RPCs that change what is served; each is checked against the control policy first."""

    def __init__(self, manager: ModelManager, control: ControlPolicy) -> None:
        self._manager = manager
        self._control = control

    def load(self, request: Any, call: Call) -> Message:
        self._control.check(name_of(call.method), call.peer)
        _refuse_repository_name(request)
        self._manager.load(request.model_name, _override(request.parameters))
        return pb.RepositoryModelLoadResponse()

    def unload(self, request: Any, call: Call) -> Message:
        self._control.check(name_of(call.method), call.peer)
        _refuse_repository_name(request)
        for key in request.parameters:
            if key != "unload_dependents":
                raise InvalidArgument(f"unrecognized unload parameter '{key}', expected unload_dependents")
            if request.parameters[key].WhichOneof("parameter_choice") != "bool_param":
                raise InvalidArgument("invalid value type for 'unload_dependents' parameter, expected bool_param")
        with_parts = "unload_dependents" in request.parameters and request.parameters["unload_dependents"].bool_param
        self._manager.unload(request.model_name, with_parts=with_parts)
        return pb.RepositoryModelUnloadResponse()


def _tensor_metadata(tensor: TensorInterface, batch: tuple[int, ...]) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.dtype.name, shape=batch + tensor.dims
    )


def _refuse_repository_name(request: Any) -> None:
    if request.repository_name:
        raise Unimplemented("'repository_name' specification is not supported")


def _override(parameters: Any) -> Override | None:
    """The load parameters `config` and `file:<version>/<file>`, checked for their types."""
    if not parameters:
        return None
    config = None
    files: dict[str, bytes] = {}
    for key in parameters:
        kind = parameters[key].WhichOneof("parameter_choice")
        if key == "config":
            _expect_kind("load", key, kind, "string_param")
            config = parameters[key].string_param
        elif key.startswith(_FILE_PREFIX):
            _expect_kind("load", key, kind, "bytes_param")
            files[key.removeprefix(_FILE_PREFIX)] = parameters[key].bytes_param
        else:
            raise InvalidArgument(
                f"unrecognized load parameter '{key}', expected config or {_FILE_PREFIX}<version>/<file>"
            )
    return Override(config=config, files=files)


def _expect_kind(call: str, key: str, kind: str | None, expected: str) -> None:
    if kind != expected:
        raise InvalidArgument(f"invalid value type for {call} parameter '{key}', expected {expected}")
