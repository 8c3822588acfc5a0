"""The table of what may be wrong with every RPC but plain inference: the call over gRPC and over REST, and its refusal.

Also with requests whose mistake only a certain server or model sees: of sequences, of ensembles, with shared memory.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from protocol import rest_form
from protocol.bad_requests import write_models
from sluice_proto import grpc_service_pb2 as pb
from sluice_server.status import Code
from support import models
from support.requests import infer_request, parameter
from support.shared_memory import put_into_region

if TYPE_CHECKING:
    from pathlib import Path

    from google.protobuf.message import Message

INVALID, NOT_FOUND, INTERNAL = Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.INTERNAL
UNIMPLEMENTED, EXISTS = Code.UNIMPLEMENTED, Code.ALREADY_EXISTS

REGION, REGION_BYTES = "r", 256
"""The region that there is."""


@dataclass(frozen=True)
class Rest:
    """The same call over REST. `status` and `facts` are those of the code and of the case unless they are given."""

    verb: str
    path: str
    body: bytes = b""
    head_length: int | None = None
    status: int = 0
    facts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One call; `rest` is None where REST has no way to say it."""

    name: str
    rpc: str
    message: Message
    code: Code
    facts: tuple[str, ...]
    rest: Rest | None


def write_more_models(repository: Path) -> None:
    """Add those of the bad requests, and: sequences, an ensemble that can fail, and models that cannot be loaded."""
    write_models(repository)
    models.write_accumulator(repository)
    models.write_model(repository, "table", models.gather(), max_batch_size=8)
    ports = models.port("input", "INDEX", (1,), "INT64") + models.port("output", "Y", (1,))
    models.write_ensemble(repository, "chain", ports, [models.step("table", {"INDEX": "INDEX"}, {"Y": "Y"})])
    models.write_model(repository, "unloaded", models.identity(), max_batch_size=8)
    models.write_model(repository, "corrupt", models.identity(), max_batch_size=8)
    (repository / "corrupt" / "1" / "model.onnx").write_bytes(b"no model")
    models.write_model(repository, "misspelt", models.identity(), max_batch_size=8, more="max_batch: 3")
    models.write_configured(repository, "versionless", b"", 'name: "versionless"')
    (repository / "versionless" / "1" / "model.onnx").unlink()
    (repository / "versionless" / "1").rmdir()


LOADED = ("simple", "text", "picky", "sums", "table", "chain")
"""The models that are loaded; `unloaded` was once."""


def get(path: str, status: int = 0, *facts: str) -> Rest:
    return Rest("GET", f"/v2/{path}", status=status, facts=facts)


def post(path: str, body: Any = None, status: int = 0, *facts: str) -> Rest:
    data = b"" if body is None else json.dumps(body).encode()
    return Rest("POST", f"/v2/{path}", data, status=status, facts=facts)


def infer(name: str, request: pb.ModelInferRequest, code: Code, *facts: str) -> Case:
    """An inference request, which REST has with binary tensors."""
    head, tail = rest_form.body_of(request)
    rest = Rest("POST", rest_form.path_of(request), head + tail, len(head))
    return Case(name, "ModelInfer", request, code, facts, rest)


def model_calls() -> list[Case]:
    unknown, no_version = ("Request for unknown model", "'nope' is not found"), ("'simple' version 9 is not found",)
    gone = ("'unloaded' has no available versions",)
    cases = []
    for rpc, name, suffix in (("ModelMetadata", "metadata", ""), ("ModelConfig", "configuration", "/config")):
        message = vars(pb)[f"{rpc}Request"]
        cases += [
            Case(f"{name} of an unknown model", rpc, message(name="nope"), NOT_FOUND, unknown,
                 get(f"models/nope{suffix}")),
            Case(f"{name} of an unknown version", rpc, message(name="simple", version="9"), NOT_FOUND, no_version,
                 get(f"models/simple/versions/9{suffix}")),
            Case(f"{name} of a model that was unloaded", rpc, message(name="unloaded"), NOT_FOUND, gone,
                 get(f"models/unloaded{suffix}")),
            Case(f"{name} of a version that is no number", rpc, message(name="simple", version="abc"), INVALID,
                 ("'abc'", "should be an integral value > 0"),
                 get(f"models/simple/versions/abc{suffix}", 404, "Not Found")),
        ]  # fmt: skip
    return [
        *cases,
        Case("readiness of a version that is no number", "ModelReady",
             pb.ModelReadyRequest(name="simple", version="-1"), INVALID,
             ("invalid model version specified '-1' ,", "should be an integral value > 0"),
             get("models/simple/versions/-1/ready", 404, "Not Found")),
        Case("statistics of an unknown model", "ModelStatistics", pb.ModelStatisticsRequest(name="nope"), INVALID,
             ("requested model 'nope' is not available",), get("models/nope/stats")),
        Case("statistics of an unknown version", "ModelStatistics",
             pb.ModelStatisticsRequest(name="simple", version="9"), INVALID,
             ("requested model version is not available for model 'simple'",), get("models/simple/versions/9/stats")),
        infer("inference with a model that was unloaded",
              infer_request("unloaded", {"X": np.ones((1, 4), np.float32)}), NOT_FOUND, *gone),
    ]  # fmt: skip


def load_calls() -> list[Case]:
    def load(name: str, model: str, code: Code, *facts: str, **parameters: Any) -> Case:
        message = pb.RepositoryModelLoadRequest(model_name=model)
        for key, value in parameters.items():
            field = {bool: "bool_param", str: "string_param", bytes: "bytes_param"}[type(value)]
            setattr(message.parameters[key], field, value)
        body = {"parameters": parameters} if parameters else None
        return Case(name, "RepositoryModelLoad", message, code, facts, post(f"repository/models/{model}/load", body))

    def poll(model: str) -> str:
        return f"failed to load '{model}', failed to poll from model repository"

    files = pb.RepositoryModelLoadRequest(model_name="new")
    files.parameters["file:1/model.onnx"].bytes_param = b"no model"
    kind = pb.RepositoryModelLoadRequest(model_name="simple")
    kind.parameters["config"].bytes_param = b"{}"
    return [
        load("a load of what is in no repository", "nope", INTERNAL, poll("nope")),
        load("a load of what cannot be read", "corrupt", INVALID, "load failed for model 'corrupt': version 1",
             "Internal: onnx runtime error"),
        load("a load with an unknown field", "misspelt", INTERNAL, poll("misspelt"), "max_batch"),
        load("a load without a version", "versionless", INVALID, "load failed for model 'versionless'",
             "at least one version must be available under the version policy"),
        load("a load with a configuration that is no JSON", "simple", INTERNAL, poll("simple"), config="{"),
        load("a load with an unknown field in its configuration", "simple", INTERNAL, poll("simple"), "colour",
             config='{"colour": 1}'),
        load("a load with an unknown parameter", "simple", INVALID, "unrecognized load parameter 'k'", k="v"),
        Case("a load with a configuration that is no text", "RepositoryModelLoad", kind, INVALID,
             ("invalid value type for load parameter 'config'", "expected string_param"),
             post("repository/models/simple/load", {"parameters": {"config": 1}}, 0, "'config'")),
        Case("a load of files without a configuration", "RepositoryModelLoad", files, INTERNAL, (poll("new"),),
             post("repository/models/new/load", {"parameters": {"file:1/model.onnx": "bm8gbW9kZWw="}})),
        Case("a load of files that are no bytes", "RepositoryModelLoad", _with_text_file(), INVALID,
             ("invalid value type for load parameter 'file:1/model.onnx'", "expected bytes_param"),
             post("repository/models/new/load", {"parameters": {"file:1/model.onnx": 1}}, 0, "file:1/model.onnx")),
        Case("a load of a path", "RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="../simple"), INVALID,
             ("model name must not contain path traversal characters",),
             post("repository/models/..%2Fsimple/load")),
        Case("a load without a name", "RepositoryModelLoad", pb.RepositoryModelLoadRequest(), INVALID,
             ("Model name cannot be empty. Please enter a valid name to deploy.",), None),
    ]  # fmt: skip


def control_calls() -> list[Case]:
    dependents = pb.RepositoryModelUnloadRequest(model_name="nope")
    dependents.parameters["unload_dependents"].string_param = "yes"
    unsupported = ("'repository_name' specification is not supported",)
    return [
        Case("an unload with another kind of switch", "RepositoryModelUnload", dependents, INVALID,
             ("invalid value type for 'unload_dependents' parameter", "expected bool_param"),
             post("repository/models/nope/unload", {"parameters": {"unload_dependents": "yes"}}, 0,
                  "unload_dependents")),
        *(
            Case(f"{rpc} in one repository", rpc, vars(pb)[f"{rpc}Request"](repository_name="r"), UNIMPLEMENTED,
                 unsupported, None)
            for rpc in ("RepositoryIndex", "RepositoryModelLoad", "RepositoryModelUnload")
        ),
    ]  # fmt: skip


def _with_text_file() -> pb.RepositoryModelLoadRequest:
    message = pb.RepositoryModelLoadRequest(model_name="new")
    message.parameters["file:1/model.onnx"].string_param = "no model"
    return message


def setting_calls() -> list[Case]:
    def trace(name: str, code: Code, fact: str, model: str = "", **settings: str) -> Case:
        message = pb.TraceSettingRequest(model_name=model)
        for key, value in settings.items():
            message.settings[key].value.append(value)
        path = f"models/{model}/trace/setting" if model else "trace/setting"
        return Case(name, "TraceSetting", message, code, (fact,), post(path, settings))

    def log(name: str, code: Code, fact: str, rest: int, **settings: str) -> Case:
        message = pb.LogSettingsRequest()
        for key, value in settings.items():
            message.settings[key].string_param = value
        return Case(name, "LogSettings", message, code, (fact,), post("logging", settings, rest))

    return [
        trace("a trace_rate that is no number", INVALID, "Unable to parse 'trace_rate', got: abc", trace_rate="abc"),
        trace("a trace_count below -1", INVALID, "Unable to parse 'trace_count'. Expecting value >= -1, got: -5",
              trace_count="-5"),
        trace("a log_frequency that is no number", INVALID, "Unable to parse 'log_frequency', got: x",
              log_frequency="x"),
        trace("trace settings of an unknown model", INVALID, "Request for unknown model : nope", "nope",
              trace_rate="1"),
        trace("another trace_file", UNIMPLEMENTED, "trace file location can not be updated through network protocol",
              trace_file="/tmp/x"),
        log("another log_file", UNIMPLEMENTED, "log file location can not be updated through network protocol", 501,
            log_file="/tmp/x"),
        log("an unknown log_format", INVALID, "invalid argument for log_format, got: weird", 503,
            log_format="weird"),
        log("a log_verbose_level that is text", INVALID, "log_verbose_level", 500, log_verbose_level="x"),
    ]  # fmt: skip


def memory_calls() -> list[Case]:
    def register(name: str, region: str, key: str, offset: int, size: int, code: Code, *facts: str) -> Case:
        message = pb.SystemSharedMemoryRegisterRequest(name=region, key=key, offset=offset, byte_size=size)
        body = {"key": key, "offset": offset, "byte_size": size}
        rest = post(f"systemsharedmemory/region/{region}/register", body)
        return Case(name, "SystemSharedMemoryRegister", message, code, facts, rest)

    def shared(name: str, code: Code, fact: str, *, output: bool = False, **place: Any) -> Case:
        """A request with its first input, or its first output, at this place."""
        ones = np.ones((1, 16), np.int32)
        request = infer_request("simple", {"INPUT0": ones, "INPUT1": ones}, outputs=["OUTPUT0"])
        tensor = request.outputs[0] if output else request.inputs[0]
        if not output:
            del request.raw_input_contents[0]
        for key, value in place.items():
            tensor.parameters[f"shared_memory_{key}"].CopyFrom(parameter(value))
        return infer(name, request, code, fact)

    message = pb.CudaSharedMemoryRegisterRequest(name="g", raw_handle=b"handle", device_id=0, byte_size=8)
    body = {"raw_handle": {"b64": "aGFuZGxl"}, "device_id": 0, "byte_size": 8}
    return [
        register("a region twice", REGION, "/nope", 0, 8, EXISTS, "shared memory region 'r' already in manager"),
        register("a region of an object that is not there", "q", "/sluice-not-there", 0, 8, INTERNAL,
                 "Unable to open shared memory region: '/sluice-not-there'"),
        Case("the status of an unknown region", "SystemSharedMemoryStatus",
             pb.SystemSharedMemoryStatusRequest(name="q"), NOT_FOUND,
             ("Unable to find system shared memory region: 'q'",), get("systemsharedmemory/region/q/status")),
        Case("a region of a GPU that is not there", "CudaSharedMemoryRegister", message, INVALID,
             ("failed to register CUDA shared memory region: 'g'",),
             post("cudasharedmemory/region/g/register", body)),
        shared("a tensor in an unknown region", NOT_FOUND, "Unable to find shared memory region: 'q'", region="q",
               byte_size=64),
        shared("a tensor in a region without a size", INVALID,
               "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter",
               region=REGION),
        shared("a tensor behind its region", INVALID, "Invalid offset for shared memory region: 'r'", region=REGION,
               byte_size=64, offset=REGION_BYTES),
        shared("a tensor that ends behind its region", INVALID,
               "Invalid offset + byte size for shared memory region: 'r'", region=REGION, byte_size=64,
               offset=REGION_BYTES - 32),
        shared("a tensor of another size", INVALID, "byte size mismatch for input 'INPUT0'", region=REGION,
               byte_size=32),
        shared("an output without room", INTERNAL,
               "shared memory size specified with the request for output 'OUTPUT0' (32 bytes) should be at least 64",
               output=True, region=REGION, byte_size=32),
        infer("classes in a region", _classes_in_region(), INVALID, "classification", "'OUTPUT0'"),
    ]  # fmt: skip


def _classes_in_region() -> pb.ModelInferRequest:
    ones = np.ones((1, 16), np.int32)
    request = infer_request("simple", {"INPUT0": ones, "INPUT1": ones}, outputs=["OUTPUT0"])
    put_into_region(request.outputs[0], REGION, 128)
    request.outputs[0].parameters["classification"].int64_param = 1
    return request


def part_calls() -> list[Case]:
    def sums(name: str, fact: str, rows: int = 1, **parameters: Any) -> Case:
        request = infer_request("sums", {"INPUT": np.ones((rows, 1), np.int64)}, parameters=parameters)
        return infer(name, request, INVALID, fact)

    index = np.array([[99]], np.int64)
    no_id = "inference request to model 'sums' must specify a non-zero or non-empty correlation ID"
    return [
        sums("no sequence", no_id),
        sums("sequence 0", no_id, sequence_id=0),
        sums("a sequence without a name", no_id, sequence_id=""),
        sums("a sequence of several rows", "must specify batch-size 1 due to requirements of sequence batcher", 2,
             sequence_id=1, sequence_start=True),
        sums("a sequence that has not begun",
             "inference request for sequence 42 to model 'sums' must specify the START flag on the first request",
             sequence_id=42),
        sums("a sequence with a name where numbers are wanted",
             "'CORRID' data-type is 'BYTES', but model 'sums' expects 'UINT64'", sequence_id="a", sequence_start=True),
        infer("a step that fails", infer_request("chain", {"INDEX": index}), INTERNAL,
              "in ensemble 'chain', onnx runtime error"),
        infer("another shape for an ensemble", infer_request("chain", {"INDEX": index.reshape(1, 1, 1)}), INVALID,
              "unexpected shape for input 'INDEX' for model 'chain'"),
        infer("too many rows for an ensemble", infer_request("chain", {"INDEX": np.zeros((9, 1), np.int64)}), INVALID,
              "batch-size must be <= 8 for 'chain'"),
    ]  # fmt: skip


CASES = [*model_calls(), *load_calls(), *control_calls(), *setting_calls(), *memory_calls(), *part_calls()]
