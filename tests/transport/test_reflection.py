"""Server reflection, as grpcurl and others use it: the list of services, and descriptors that describe them fully."""

from __future__ import annotations

import threading
import time

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from support import models
from support.fakes import PATIENCE_S
from support.server import SERVICE, RunningServer, running, server_settings

HEALTH = "grpc.health.v1.Health"
REFLECTION = "grpc.reflection.v1alpha.ServerReflection"


@pytest.fixture(scope="module")
def server(transport, tmp_path_factory) -> RunningServer:
    repository = tmp_path_factory.mktemp("models")
    models.write_model(repository, "echo", models.identity(), max_batch_size=8)
    with running(server_settings(repository, http=None, metrics=None), transport) as server:
        yield server


def ask(server: RunningServer, **question: str) -> reflection_pb2.ServerReflectionResponse:
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    (answer,) = stub.ServerReflectionInfo(
        iter([reflection_pb2.ServerReflectionRequest(**question)]), timeout=PATIENCE_S
    )
    return answer


def pool_of(server: RunningServer, symbol: str) -> descriptor_pool.DescriptorPool:
    """A pool that knows nothing but what reflection told, dependencies asked for one by one as grpcurl does."""
    pool = descriptor_pool.DescriptorPool()
    files = [
        descriptor_pb2.FileDescriptorProto.FromString(data)
        for data in ask(server, file_containing_symbol=symbol).file_descriptor_response.file_descriptor_proto
    ]
    known = {file.name: file for file in files}
    missing = [name for file in files for name in file.dependency if name not in known]
    while missing:
        answer = ask(server, file_by_filename=missing.pop()).file_descriptor_response
        for file in map(descriptor_pb2.FileDescriptorProto.FromString, answer.file_descriptor_proto):
            known.setdefault(file.name, file)
            missing += [name for name in file.dependency if name not in known]

    def add(name: str) -> None:
        if (file := known.pop(name, None)) is not None:
            for dependency in file.dependency:
                add(dependency)
            pool.Add(file)

    for name in list(known):
        add(name)
    return pool


def test_all_services_are_listed(server):
    services = ask(server, list_services="").list_services_response.service
    assert {service.name for service in services} == {SERVICE.full_name, HEALTH, REFLECTION}


def test_the_descriptors_name_every_rpc_with_its_messages(server):
    service = pool_of(server, SERVICE.full_name).FindServiceByName(SERVICE.full_name)
    described = {(item.name, item.input_type.full_name, item.output_type.full_name) for item in service.methods}
    assert described == {(item.name, item.input_type.full_name, item.output_type.full_name) for item in SERVICE.methods}
    assert len(described) == 20


def test_a_call_can_be_made_with_nothing_but_what_reflection_told(server):
    pool = pool_of(server, SERVICE.full_name)
    method = pool.FindServiceByName(SERVICE.full_name).FindMethodByName("ModelConfig")
    request, answer = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    call = server.channel.unary_unary(
        f"/{SERVICE.full_name}/ModelConfig",
        request_serializer=request.SerializeToString,
        response_deserializer=answer.FromString,
    )
    assert call(request(name="echo"), timeout=PATIENCE_S).config.max_batch_size == 8


SYMBOLS = (
    HEALTH,
    f"{HEALTH}.Check",
    "inference.ModelConfig",
    "inference.ModelInferRequest.InferInputTensor",
    "inference.ModelInferRequest.id",
    "inference.GRPCInferenceService.ModelInfer",
)


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_other_symbols_are_found_too(symbol, server):
    assert ask(server, file_containing_symbol=symbol).file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize(
    "question",
    [
        {"file_containing_symbol": "no.Such"},
        {"file_containing_symbol": f"{HEALTH}.No"},
        {"file_by_filename": "no.proto"},
    ],
)
def test_what_is_not_there_is_an_error_in_the_answer(question, server):
    error = ask(server, **question).error_response
    assert error.error_code == grpc.StatusCode.NOT_FOUND.value[0]


def test_the_librarys_own_client_makes_a_pool_of_it(server):
    database = ProtoReflectionDescriptorDatabase(server.channel)
    assert set(database.get_services()) == {SERVICE.full_name, HEALTH, REFLECTION}
    pool = descriptor_pool.DescriptorPool(database)
    service = pool.FindServiceByName(SERVICE.full_name)
    assert [method.name for method in service.methods] == [method.name for method in SERVICE.methods]
    assert pool.FindServiceByName(HEALTH).FindMethodByName("Watch").server_streaming


def test_many_questions_on_one_stream_are_answered_in_order(server):
    stub = reflection_pb2_grpc.ServerReflectionStub(server.channel)
    questions = [
        reflection_pb2.ServerReflectionRequest(file_by_filename=name)
        for name in ("health.proto", "nope")
        for _ in "123"
    ]
    answers = stub.ServerReflectionInfo(iter(questions), timeout=PATIENCE_S)
    assert [answer.original_request for answer in answers] == questions


def test_a_question_that_cannot_be_read_ends_its_stream_and_no_other(server):
    call = server.channel.stream_stream(f"/{REFLECTION}/ServerReflectionInfo")
    with pytest.raises(grpc.RpcError, match="1 bytes of the request") as caught:
        list(call(iter([b"\xff", b"\xff"]), timeout=PATIENCE_S))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ask(server, list_services="")


def test_a_stream_that_stays_open_does_not_hold_the_end_of_the_server(transport, tmp_path):
    settings = server_settings(tmp_path, http=None, metrics=None, exit_timeout_s=2 * PATIENCE_S)
    with running(settings, transport) as server:
        over = threading.Event()

        def questions():
            yield reflection_pb2.ServerReflectionRequest(list_services="")
            over.wait(PATIENCE_S)

        answers = reflection_pb2_grpc.ServerReflectionStub(server.channel).ServerReflectionInfo(questions())
        assert next(answers).list_services_response.service
        begun = time.monotonic()
        server.server.stop()
        assert time.monotonic() - begun < PATIENCE_S
        assert answers.code() is grpc.StatusCode.UNAVAILABLE
        over.set()
