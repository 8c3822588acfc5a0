"""grpcurl, which knows nothing of the protocol but what reflection tells: it lists, describes and calls."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import numpy as np
import pytest

from support import models

if TYPE_CHECKING:
    from support.server import RunningServer

SERVICE = "inference.GRPCInferenceService"
HEALTH = "grpc.health.v1.Health"

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture
def server(start_server, repository) -> RunningServer:
    models.write_model(repository, "echo", models.identity(dims=("N", 2)), max_batch_size=8)
    return start_server(repository, http=None, metrics=None)


@pytest.fixture
def ask(grpcurl, server):
    """What grpcurl prints when it has ended well."""

    def run(*words: str, flags: tuple[str, ...] = ()) -> str:
        done = grpcurl.run("-plaintext", *flags, server.target, *words)
        assert done.returncode == 0, done.stderr
        printed: str = done.stdout
        return printed

    return run


def call(ask, method: str, **fields) -> dict:
    """The answer, its fields by their names in the .proto: descriptors that a server holds have no other ones."""
    answer: dict = json.loads(ask(method, flags=("-d", json.dumps(fields))))
    return answer


def test_grpcurl_lists_the_services_and_their_methods(ask):
    assert {SERVICE, HEALTH} <= set(ask("list").split())
    assert {f"{SERVICE}.ModelInfer", f"{SERVICE}.ModelStreamInfer"} <= set(ask("list", SERVICE).split())


@pytest.mark.parametrize(
    ("symbol", "said"),
    [
        (SERVICE, "rpc ModelStreamInfer ( stream .inference.ModelInferRequest )"),
        (f"{SERVICE}.ServerLive", "rpc ServerLive ( .inference.ServerLiveRequest )"),
        ("inference.ModelInferRequest", "repeated bytes raw_input_contents = 7;"),
        ("inference.ModelConfig", "int32 max_batch_size = 4;"),
    ],
)
def test_grpcurl_describes(symbol, said, ask):
    assert said in ask("describe", symbol)


def test_grpcurl_asks_for_health(ask):
    assert call(ask, f"{HEALTH}/Check", service="echo") == {"status": "SERVING"}


def test_grpcurl_infers(ask):
    values = np.array([[1.5, -2.0]], np.float32)
    raw = base64.b64encode(values.tobytes()).decode()
    tensor = {"name": "X", "datatype": "FP32", "shape": [1, 2]}
    answer = call(ask, f"{SERVICE}/ModelInfer", model_name="echo", inputs=[tensor], raw_input_contents=[raw])
    assert answer["raw_output_contents"] == [raw]
    typed = tensor | {"contents": {"fp32_contents": values[0].tolist()}}
    answer = call(ask, f"{SERVICE}/ModelStreamInfer", model_name="echo", id="a", inputs=[typed])
    assert answer["infer_response"]["id"] == "a"


def test_grpcurl_shows_the_status_of_an_error(grpcurl, server):
    flags = ("-plaintext", "-format-error", "-d", '{"name": "nope"}')
    done = grpcurl.run(*flags, server.target, f"{SERVICE}/ModelMetadata")
    assert json.loads(done.stderr)["code"] == 5
    assert "'nope' is not found" in json.loads(done.stderr)["message"]
