"""Every refusal of a call that is no plain inference, over gRPC and REST: code, facts, and a server that lives."""

from __future__ import annotations

import pytest

from protocol.bad_calls import CASES, LOADED, REGION, REGION_BYTES, write_more_models
from sluice_proto import grpc_service_pb2 as pb
from sluice_server.protocol.rpcs import SERVICE
from sluice_server.repository.manager import ControlMode
from sluice_server.status import HTTP_CODES
from support.rest import HEAD_LENGTH, request
from support.server import running, server_settings
from support.shared_memory import Object
from support.shared_server import check_alive

REST_CASES = [case for case in CASES if case.rest is not None]

NEVER_REFUSED = {"ServerLive", "ServerReady", "ServerMetadata", "SystemSharedMemoryUnregister",
                 "CudaSharedMemoryUnregister", "CudaSharedMemoryStatus"}  # fmt: skip
"""RPCs that answer whatever they are asked."""


@pytest.fixture(scope="module")
def served(transport, tmp_path_factory):
    repository = tmp_path_factory.mktemp("models")
    write_more_models(repository)
    models = {"control_mode": ControlMode.EXPLICIT, "load_models": (*LOADED, "unloaded")}
    settings = server_settings(repository, models=models, allow_client_shm=True, metrics=None)
    with running(settings, transport) as server, Object(REGION_BYTES) as shared:
        server.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="unloaded"))
        region = pb.SystemSharedMemoryRegisterRequest(name=REGION, key=shared.key, byte_size=REGION_BYTES)
        server.call("SystemSharedMemoryRegister", region)
        yield server


@pytest.fixture
def server(served):
    yield served
    check_alive(served)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_call_with(case, server):
    code, message = server.refusal(case.rpc, case.message)
    assert code.name == case.code.name, message
    assert [fact for fact in case.facts if fact not in message] == [], message


@pytest.mark.parametrize("case", REST_CASES, ids=[case.name for case in REST_CASES])
def test_a_rest_call_with(case, server):
    rest = case.rest
    headers = {} if rest.head_length is None else {HEAD_LENGTH: str(rest.head_length)}
    answer = request(server, rest.verb, rest.path, rest.body, headers)
    message = answer.json()["error"]
    assert answer.status == (rest.status or HTTP_CODES[case.code]), message
    assert [fact for fact in rest.facts or case.facts if fact not in message] == [], message


def test_the_table_has_every_rpc_that_can_refuse():
    tried = {case.rpc for case in CASES}
    assert tried | NEVER_REFUSED == {method.name for method in SERVICE.methods} - {"ModelStreamInfer"}
    assert not tried & NEVER_REFUSED
