"""Every RPC but inference: what it tells, and how it refuses names, versions and options that are not there."""

from __future__ import annotations

import grpc
import pytest
from grpc_health.v1 import health_pb2

from sluice_proto import grpc_service_pb2 as pb
from support.server import SERVICE

INVALID = grpc.StatusCode.INVALID_ARGUMENT
NOT_FOUND = grpc.StatusCode.NOT_FOUND
UNIMPLEMENTED = grpc.StatusCode.UNIMPLEMENTED

SHARED_MEMORY = {
    "SystemSharedMemoryStatus", "SystemSharedMemoryRegister", "SystemSharedMemoryUnregister", "CudaSharedMemoryStatus",
    "CudaSharedMemoryRegister", "CudaSharedMemoryUnregister",
}  # fmt: skip

BY_MODEL = {"ModelMetadata": pb.ModelMetadataRequest, "ModelConfig": pb.ModelConfigRequest}


@pytest.mark.parametrize(("method", "request_of"), BY_MODEL.items(), ids=BY_MODEL)
@pytest.mark.parametrize(("name", "version", "code", "facts"), [
    ("nope", "", NOT_FOUND, ["Request for unknown model: 'nope' is not found"]),
    ("", "", NOT_FOUND, ["Request for unknown model: '' is not found"]),
    ("simple", "9", NOT_FOUND, ["Request for unknown model: 'simple' version 9 is not found"]),
    ("simple", "0", NOT_FOUND, ["'simple'", "is not found"]),
    ("simple", "abc", INVALID, ["version", "'abc'", "integral value > 0"]),
    ("simple", "-1", INVALID, ["invalid model version", "'-1'", "> 0"]),
    ("x" * 100_000, "", NOT_FOUND, ["Request for unknown model: 'xxx", "is not found"]),
])  # fmt: skip
def test_questions_about_a_model_that_is_not_there(method, request_of, name, version, code, facts, refused):
    message = refused(request_of(name=name, version=version), code, method)
    assert not [fact for fact in facts if fact not in message], message


def test_a_model_is_ready_or_it_is_not_but_a_bad_version_is_an_error(server, refused):
    def is_ready(name: str, version: str = "") -> bool:
        return server.call("ModelReady", pb.ModelReadyRequest(name=name, version=version)).ready

    assert is_ready("simple")
    assert is_ready("simple", "1")
    assert not is_ready("simple", "2")
    assert not is_ready("nope")
    assert not is_ready("")
    for version in ("abc", "-1"):
        refused(pb.ModelReadyRequest(name="simple", version=version), INVALID, "ModelReady")


def test_the_server_is_live_and_ready(server):
    assert server.call("ServerLive", b"").live
    assert server.call("ServerReady", b"").ready


@pytest.mark.parametrize(("name", "version", "facts"), [
    ("nope", "", ["requested model 'nope' is not available"]),
    ("simple", "9", ["requested model version is not available for model 'simple'"]),
    ("simple", "abc", ["'abc'", "integral value > 0"]),
])  # fmt: skip
def test_statistics_of_what_is_not_there_are_an_invalid_argument(name, version, facts, refused):
    message = refused(pb.ModelStatisticsRequest(name=name, version=version), INVALID, "ModelStatistics")
    assert not [fact for fact in facts if fact not in message], message


def test_statistics_without_a_name_are_those_of_every_model(server):
    names = [model.name for model in server.call("ModelStatistics", b"").model_stats]
    index = [model.name for model in server.call("RepositoryIndex", b"").models]
    assert sorted(names) == sorted(index)
    assert len(server.call("ModelStatistics", pb.ModelStatisticsRequest(name="simple", version="1")).model_stats) == 1


def test_the_index_takes_no_repository_name_and_can_be_limited_to_what_is_ready(server, refused):
    request = pb.RepositoryIndexRequest(repository_name="other")
    assert "'repository_name'" in refused(request, UNIMPLEMENTED, "RepositoryIndex")
    everything = server.call("RepositoryIndex", b"")
    assert server.call("RepositoryIndex", pb.RepositoryIndexRequest(ready=True)) == everything


def test_every_rpc_of_the_service_has_been_thought_of():
    tested_elsewhere = {"ModelInfer", "ModelStreamInfer", "ServerMetadata"}
    tested_elsewhere |= {"RepositoryModelLoad", "RepositoryModelUnload", "TraceSetting", "LogSettings"}
    tested_elsewhere |= SHARED_MEMORY
    here = {"ServerLive", "ServerReady", "ModelReady", "ModelStatistics", "RepositoryIndex", *BY_MODEL}
    assert here | tested_elsewhere == {method.name for method in SERVICE.methods}


def test_health_of_a_name_of_any_length_is_answered(server):
    check = server.channel.unary_unary("/grpc.health.v1.Health/Check")
    name = "\N{KATAKANA LETTER TU}" * 10_000
    with pytest.raises(grpc.RpcError, match="no service or model") as caught:
        check(health_pb2.HealthCheckRequest(service=name).SerializeToString(), timeout=10)
    assert caught.value.code() is NOT_FOUND
