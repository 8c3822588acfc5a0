"""Model files and load calls that are wrong: refused with a reason, shown in the index, never the others' problem."""

from __future__ import annotations

import json
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
from onnx import helper

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.repository.manager import ControlMode
from support import models
from support.requests import answer_arrays, infer_request
from support.server import running, server_settings

INVALID = grpc.StatusCode.INVALID_ARGUMENT
INTERNAL = grpc.StatusCode.INTERNAL
DIGITS = (Path(__file__).parents[2] / "deploy" / "models" / "digits_mlp" / "1" / "model.onnx").read_bytes()

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture
def explicit(start_server, repository):
    """A server that loads on demand, with one good model loaded."""
    models.write_model(repository, "good", models.identity("INT64", ("N", 1)), max_batch_size=8)
    control = {"control_mode": ControlMode.EXPLICIT, "load_models": ("good",)}
    server = start_server(repository, models=control, http=None, metrics=None)
    yield server
    check_good(server)


def check_good(server) -> None:
    answer = server.infer(infer_request("good", {"X": np.array([[5]], np.int64)}))
    assert answer_arrays(answer)["Y"].item() == 5


def load(name: str, **parameters) -> pb.RepositoryModelLoadRequest:
    request = pb.RepositoryModelLoadRequest(model_name=name)
    for key, value in parameters.items():
        kind = "bytes_param" if isinstance(value, bytes) else "string_param"
        setattr(request.parameters[key], kind, value)
    return request


def index_of(server, name: str) -> list[tuple[str, str, str]]:
    models_of_index = server.call("RepositoryIndex", b"").models
    return [(item.version, item.state, item.reason) for item in models_of_index if item.name == name]


def with_file(repository: Path, content: bytes, name: str = "bad") -> None:
    directory = models.write_model(repository, name, models.identity("INT64", ("N", 1)), max_batch_size=8)
    (directory / "1" / "model.onnx").write_bytes(content)


def with_unknown_operator() -> bytes:
    node = helper.make_node("NoSuchOperator", ["X"], ["Y"])
    return models.build([node], [models.tensor("X")], [models.tensor("Y")])


def with_a_future_format() -> bytes:
    model = onnx.load_from_string(models.identity())
    model.ir_version = 1000
    return bytes(model.SerializeToString())


def with_a_cycle() -> bytes:
    nodes = [helper.make_node("Add", ["X", "B"], ["A"]), helper.make_node("Add", ["X", "A"], ["B"])]
    return models.build(nodes, [models.tensor("X")], [models.tensor("B")])


BAD_FILES = {
    "nothing": b"",
    "a tenth of a model": DIGITS[: len(DIGITS) // 10],
    "half a model": DIGITS[: len(DIGITS) // 2],
    "a model less one byte": DIGITS[:-1],
    "text": b"this is not a model\n" * 100,
    "a gzip file": b"\x1f\x8b\x08\x00" + bytes(1000),
    "zeros": bytes(5000),
    "random bytes": np.random.default_rng(3).bytes(5000),
    "a model of an unknown opset": models.identity(opset=999),
    "a model of an unknown format": with_a_future_format(),
    "a model with an unknown operator": with_unknown_operator(),
    "a model with a cycle": with_a_cycle(),
}


@pytest.mark.parametrize("content", BAD_FILES.values(), ids=BAD_FILES)
def test_a_model_file_that_holds(content, explicit, repository):
    with_file(repository, content)
    code, message = explicit.refusal("RepositoryModelLoad", load("bad"))
    assert code is INVALID
    assert "load failed for model 'bad': version 1 is at UNAVAILABLE state: " in message
    ((version, state, reason),) = index_of(explicit, "bad")
    assert (version, state) == ("1", "UNAVAILABLE")
    assert reason in message
    assert "onnx runtime error" in reason
    code, message = explicit.refusal("ModelInfer", infer_request("bad", {"X": np.array([[5]], np.int64)}))
    assert (code, message) == (grpc.StatusCode.NOT_FOUND, "Request for unknown model: 'bad' has no available versions")
    assert not explicit.call("ModelReady", pb.ModelReadyRequest(name="bad")).ready


def test_a_model_whose_file_is_missing(explicit, repository):
    directory = models.write_model(repository, "bad", models.identity(), max_batch_size=8)
    (directory / "1" / "model.onnx").unlink()
    code, message = explicit.refusal("RepositoryModelLoad", load("bad"))
    assert code in {INVALID, INTERNAL}
    assert "'bad'" in message
    assert "model.onnx" in message


def test_a_directory_where_the_model_file_should_be(explicit, repository):
    directory = models.write_model(repository, "bad", models.identity(), max_batch_size=8)
    (directory / "1" / "model.onnx").unlink()
    (directory / "1" / "model.onnx").mkdir()
    code, message = explicit.refusal("RepositoryModelLoad", load("bad"))
    assert code in {INVALID, INTERNAL}
    assert "'bad'" in message


def test_a_model_without_versions(explicit, repository):
    (repository / "bad").mkdir()
    code, message = explicit.refusal("RepositoryModelLoad", load("bad"))
    assert code is INVALID
    assert "load failed for model 'bad': at least one version must be available" in message


def test_a_model_that_is_in_no_repository(explicit):
    code, message = explicit.refusal("RepositoryModelLoad", load("nowhere"))
    assert code is INTERNAL
    assert "failed to load 'nowhere', failed to poll from model repository" in message


CONFIGS = {
    "an unknown field": ("nope: 1", INTERNAL, ["failed to load 'bad'", "'nope'", "config.pbtxt:1:1"]),
    "a syntax error": ("input {", INTERNAL, ["failed to load 'bad'"]),
    "another name": ('name: "other"', INTERNAL, ["failed to load 'bad'", "'other'"]),
    "another backend": ('backend: "pytorch"', INTERNAL, ["failed to load 'bad'", "pytorch"]),
    "a negative batch size": ("max_batch_size: -1", INTERNAL, ["failed to load 'bad'", "max_batch_size"]),
    "an unknown input": (
        'input { name: "NOPE" data_type: TYPE_INT64 dims: 1 } output { name: "Y" data_type: TYPE_INT64 dims: 1 }',
        INVALID,
        ["load failed for model 'bad'", "NOPE", "X"],
    ),
    "another data type": (
        'max_batch_size: 8 input { name: "X" data_type: TYPE_FP32 dims: 1 }',
        INVALID,
        ["load failed for model 'bad'", "TYPE_FP32", "TYPE_INT64", "'X'"],
    ),
    "other dims": (
        'max_batch_size: 8 input { name: "X" data_type: TYPE_INT64 dims: 5 }',
        INVALID,
        ["load failed for model 'bad'", "'X'", "[-1,1]", "[-1,5]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("text", CONFIGS)
def test_a_configuration_with(text, explicit, repository):
    written, code, facts = CONFIGS[text]
    directory = models.write_model(repository, "bad", models.identity("INT64", ("N", 1)), max_batch_size=8)
    (directory / "config.pbtxt").write_text(written)
    got, message = explicit.refusal("RepositoryModelLoad", load("bad"))
    assert got is code, message
    assert not [fact for fact in facts if fact not in message], message


OVERRIDES = {
    "JSON that is none": ({"config": "{"}, INTERNAL, ["failed to load 'good'"]),
    "an unknown field": ({"config": '{"nope": 1}'}, INTERNAL, ["failed to load 'good'", "nope"]),
    "a value of another type": ({"config": '{"max_batch_size": "x"}'}, INTERNAL, ["failed to load 'good'"]),
    "files alone": ({"file:1/model.onnx": b"x"}, INTERNAL, ["failed to load 'good'", "config"]),
    "a configuration as bytes": ({"config": b"{}"}, INVALID, ["'config'", "string_param"]),
    "a file as text": ({"config": "{}", "file:1/model.onnx": "x"}, INVALID, ["'file:1/model.onnx'", "bytes_param"]),
    "an unknown key": ({"nope": "x"}, INVALID, ["unrecognized load parameter 'nope'"]),
    "a file that is no model": ({"config": "{}", "file:1/model.onnx": b"x"}, INVALID, ["load failed", "'good'"]),
    "a file outside": ({"config": "{}", "file:../../x": b"x"}, None, ["../../x"]),
    "a file at the root": ({"config": "{}", "file:/tmp/x": b"x"}, None, ["/tmp/x"]),
    "a file's name of a thousand bytes": ({"config": "{}", f"file:1/{'x' * 1000}": b"x"}, None, ["xxx"]),
}


@pytest.mark.parametrize("what", OVERRIDES)
def test_a_load_call_with(what, explicit):
    parameters, code, facts = OVERRIDES[what]
    got, message = explicit.refusal("RepositoryModelLoad", load("good", **parameters))
    assert got in ({code} if code else {INVALID, INTERNAL}), message
    assert not [fact for fact in facts if fact not in message], message
    # What was serving goes on, as `explicit` checks, and the index says so.
    assert index_of(explicit, "good") == [("1", "READY", "")]


@pytest.mark.parametrize("name", ["", ".", "..", "../good", "/etc", "good/1", "a\0b", "x" * 1000, "x" * 100_000])
def test_a_name_that_is_no_models(name, explicit):
    code, message = explicit.refusal("RepositoryModelLoad", load(name))
    assert code in {INVALID, INTERNAL}
    assert message
    explicit.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=name))


def test_a_good_file_may_follow_a_bad_one(explicit, repository):
    with_file(repository, b"nothing")
    explicit.refusal("RepositoryModelLoad", load("bad"))
    (repository / "bad" / "1" / "model.onnx").write_bytes(models.identity("INT64", ("N", 1)))
    explicit.call("RepositoryModelLoad", load("bad"))
    answer = explicit.infer(infer_request("bad", {"X": np.array([[5]], np.int64)}))
    assert answer_arrays(answer)["Y"].item() == 5
    assert index_of(explicit, "bad") == [("1", "READY", "")]


def test_a_bad_file_does_not_replace_a_good_one(explicit, repository):
    path = repository / "good" / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[:20])
    code, message = explicit.refusal("RepositoryModelLoad", load("good"))
    assert code is INVALID
    assert "load failed for model 'good'" in message
    assert index_of(explicit, "good") == [("1", "READY", "")]


def test_an_override_serves_a_model_that_is_in_no_repository(explicit):
    config = json.dumps({"max_batch_size": "8", "backend": "onnxruntime"})
    content = models.identity("INT64", ("N", 1))
    explicit.call("RepositoryModelLoad", load("given", **{"config": config, "file:7/model.onnx": content}))
    answer = explicit.infer(infer_request("given", {"X": np.array([[5]], np.int64)}))
    assert (answer.model_version, answer_arrays(answer)["Y"].item()) == ("7", 5)


def test_bad_models_at_the_start_leave_the_good_ones_serving(transport, repository, caplog, no_errors_logged):
    models.write_model(repository, "good", models.identity("INT64", ("N", 1)), max_batch_size=8)
    for name, content in BAD_FILES.items():
        with_file(repository, content, name.replace(" ", "_"))
    settings = server_settings(repository, http=None, metrics=None, exit_on_error=False, strict_readiness=False)
    with running(settings, transport) as server:
        check_good(server)
        states = {item.name: item.state for item in server.call("RepositoryIndex", b"").models}
        assert states.pop("good") == "READY"
        assert set(states.values()) == {"UNAVAILABLE"}
        assert len(states) == len(BAD_FILES)
        assert server.call("ServerReady", b"").ready
    reported = [record for record in caplog.records if record.getMessage() == "model failed to load"]
    assert len(reported) == len(BAD_FILES)
    assert not any(record.exc_info for record in reported)
    caplog.clear()  # they were expected


@pytest.mark.parametrize(("method", "request_of"), [
    ("RepositoryModelLoad", pb.RepositoryModelLoadRequest), ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest),
])  # fmt: skip
def test_control_is_refused_outside_explicit_mode(method, request_of, start_server, repository):
    models.write_model(repository, "good", models.identity("INT64", ("N", 1)), max_batch_size=8)
    server = start_server(repository, http=None, metrics=None)
    code, text = server.refusal(method, request_of(model_name="good"))
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "explicit model load / unload is not allowed" in text
    check_good(server)
