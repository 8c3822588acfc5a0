"""The OpenAPI description: it is valid, it names every path, and what it says holds for requests made up from it."""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import checks

from support import models
from support.rest import request
from support.server import CALL_TIMEOUT_S, LOOPBACK, running, server_settings

pytestmark = pytest.mark.usefixtures("no_errors_logged")

EXAMPLES = 20
"""Requests per path and verb: with some forty of these, a few seconds."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """On one transport: gRPC's has no part in it."""
    repository = tmp_path_factory.mktemp("models")
    models.write_model(repository, "m", models.identity(), max_batch_size=8)
    with running(server_settings(repository), "grpcio") as server:
        yield server


@pytest.fixture
def described(server):
    return schemathesis.openapi.from_url(f"http://{LOOPBACK}:{server.server.http_port}/v2/openapi.json")


CHECKS = (
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
)


def test_requests_made_up_from_the_description_are_answered_as_it_says(described):
    operations = [found.ok() for found in described.get_all_operations()]
    assert len(operations) > 30
    for operation in operations:

        @given(operation.as_strategy())
        @settings(
            max_examples=EXAMPLES, derandomize=True, database=None,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        def ask(case):
            answer = case.call(timeout=CALL_TIMEOUT_S)
            case.validate_response(answer, checks=CHECKS)
            assert "incident" not in answer.text

        ask()


def test_the_description_names_the_server(server):
    described = request(server, "GET", "/v2/openapi.json").json()
    assert described["openapi"] == "3.1.0"
    assert described["info"]["title"] == "Sluice"
    assert described["paths"]["/v2/models/{model}/infer"]["post"]["requestBody"]["required"]
