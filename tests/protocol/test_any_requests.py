"""Any inference request, through a server: an answer that is whole or a refusal, never the server's own failure."""

from __future__ import annotations

import grpc
import pytest
from hypothesis import given, settings

from protocol.any_requests import check_answer, check_refusal, requests, write_models
from support.server import running, server_settings


@pytest.fixture(scope="module")
def server(transport, tmp_path_factory):
    repository = tmp_path_factory.mktemp("any")
    write_models(repository)
    with running(server_settings(repository), transport) as server:
        yield server


@settings(max_examples=400)
@given(request=requests())
def test_any_request_is_answered_or_refused(request, server):
    try:
        answer = server.infer(request)
    except grpc.RpcError as error:
        check_refusal(error.code(), error.details())
    else:
        check_answer(request, answer)
