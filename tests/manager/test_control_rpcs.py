"""Load, unload and index over the wire, as tritonclient makes the calls, with models that really run."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import grpc
import numpy as np
import onnx
import pytest
import tritonclient.grpc as triton
from onnx import helper, numpy_helper
from tritonclient.utils import InferenceServerException

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.repository.manager import ControlMode
from support import models
from support.fakes import PATIENCE_S, eventually, held
from support.requests import answer_arrays, infer_request

if TYPE_CHECKING:
    from pathlib import Path

    from support.server import RunningServer

pytestmark = pytest.mark.usefixtures("no_errors_logged")


def plus(constant: float) -> bytes:
    """X -> Y = X + constant, FP32 [N,1]: which model answered can be read from the answer."""
    value = numpy_helper.from_array(np.array(constant, np.float32), "constant")
    node = helper.make_node("Add", ["X", "constant"], ["Y"])
    return models.build([node], [models.tensor("X", dims=("N", 1))], [models.tensor("Y", dims=("N", 1))], [value])


def replace_file(directory: Path, content: bytes, version: int = 1) -> None:
    """Put a model file in the place of another one as deployments do: at once."""
    new = directory / str(version) / "new"
    new.write_bytes(content)
    new.rename(directory / str(version) / "model.onnx")


@pytest.fixture
def server(start_server, repository) -> RunningServer:
    return start_server(repository, models={"control_mode": ControlMode.EXPLICIT}, http=None, metrics=None)


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.target) as client:
        yield client


def ask(server: RunningServer, name: str, version: str = "") -> float:
    """The constant of the model that answers."""
    answer = server.infer(infer_request(name, {"X": np.zeros((1, 1), np.float32)}, version=version))
    value: float = answer_arrays(answer)["Y"].item()
    return value


def index_of(client: triton.InferenceServerClient, name: str) -> list[tuple[str, str, str]]:
    items = client.get_model_repository_index().models
    return [(item.version, item.state, item.reason) for item in items if item.name == name]


def test_tritonclient_loads_and_unloads_and_sees_the_states(server, client, repository):
    models.write_model(repository, "m", plus(5), max_batch_size=8)
    assert index_of(client, "m") == [("", "", "")]
    assert not client.is_model_ready("m")
    client.load_model("m")
    assert index_of(client, "m") == [("1", "READY", "")]
    assert client.is_model_ready("m")
    assert ask(server, "m") == 5
    with held(server.model("m")) as session:
        request = infer_request("m", {"X": np.ones((1, 1), np.float32)})
        accepted = server.begin("ModelInfer", request)
        session.wait_for_runs(1)
        waiting = server.begin("ModelInfer", request)
        eventually(lambda: len(server.model("m").queue) == 1, "the second request waits")
        client.unload_model("m")
        assert index_of(client, "m") == [("1", "UNLOADING", "")]
        assert not client.is_model_ready("m")
        assert server.refusal("ModelInfer", request) == (
            grpc.StatusCode.NOT_FOUND,
            "Request for unknown model: 'm' has no available versions",
        )
        session.release()
        assert [answer_arrays(call.result())["Y"].item() for call in (accepted, waiting)] == [6, 6]
    eventually(lambda: index_of(client, "m") == [("1", "UNAVAILABLE", "unloaded")], "it is unloaded")
    assert client.is_server_ready()
    client.load_model("m")
    assert ask(server, "m") == 5


def test_a_model_that_loads_is_shown_as_loading_and_the_others_serve(server, client, repository):
    for name in ("m", "other"):
        models.write_model(repository, name, plus(1), max_batch_size=8)
    client.load_model("other")
    gate, began = threading.Event(), threading.Event()
    load_version = server.server.manager._loader

    def held_loader(*arguments):
        began.set()
        assert gate.wait(PATIENCE_S)
        return load_version(*arguments)

    server.server.manager._loader = held_loader
    load = server.begin("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="m"))
    assert began.wait(PATIENCE_S)
    assert index_of(client, "m") == [("1", "LOADING", "")]
    assert ask(server, "other") == 1
    assert server.refusal("ModelInfer", infer_request("m", {}))[0] is grpc.StatusCode.NOT_FOUND
    gate.set()
    load.result()
    assert ask(server, "m") == 1


def test_unloading_what_is_unknown_succeeds(client):
    client.unload_model("nope")
    client.unload_model("")
    client.unload_model("nope", unload_dependents=True)


def test_no_request_is_lost_while_a_model_is_reloaded_again_and_again(server, client, repository):
    """Every caller sees every answer, and never an older model after a newer one."""
    reloads = 15
    directory = models.write_model(repository, "m", plus(0), max_batch_size=8, instances=2)
    client.load_model("m")
    finished = threading.Event()

    def call_on_and_on() -> list[float]:
        seen = []
        while not finished.is_set():
            seen.append(ask(server, "m"))
        return [*seen, ask(server, "m")]

    with ThreadPoolExecutor(4) as pool:
        callers = [pool.submit(call_on_and_on) for _ in range(4)]
        try:
            for number in range(1, reloads + 1):
                replace_file(directory, plus(number))
                client.load_model("m")
        finally:
            finished.set()
        answers = [caller.result(PATIENCE_S) for caller in callers]
    assert all(seen == sorted(seen) for seen in answers)
    assert {number for seen in answers for number in seen} <= set(range(reloads + 1))
    assert {seen[-1] for seen in answers} == {reloads}
    assert sum(map(len, answers)) > 2 * reloads
    (after,) = server.call("ModelStatistics", pb.ModelStatisticsRequest(name="m")).model_stats
    assert after.inference_stats.fail.count == 0


def test_an_unchanged_model_is_not_loaded_again(server, client, repository):
    directory = models.write_model(repository, "m", plus(1), max_batch_size=8)
    client.load_model("m")
    ask(server, "m")
    before = server.model("m")
    client.load_model("m")
    assert server.model("m") is before
    replace_file(directory, plus(2))
    client.load_model("m")
    assert server.model("m") is not before
    assert ask(server, "m") == 2


def test_a_reload_that_fails_keeps_the_old_one_and_its_counters(server, client, repository):
    directory = models.write_model(repository, "m", plus(1), max_batch_size=8)
    client.load_model("m")
    ask(server, "m")
    for spoil, text in (
        (lambda: replace_file(directory, b"no model"), "load failed for model 'm'"),
        (lambda: (directory / "config.pbtxt").write_text("nope: 1"), "failed to load 'm', failed to poll"),
    ):
        spoil()
        with pytest.raises(InferenceServerException, match=text):
            client.load_model("m")
        assert ask(server, "m") == 1
    assert index_of(client, "m") == [("1", "READY", "")]
    assert client.is_server_ready()
    (statistics,) = client.get_inference_statistics("m").model_stats
    assert statistics.inference_count == 3


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        ("", ["5"]),
        ("version_policy { latest { num_versions: 2 } }", ["3", "5"]),
        ("version_policy { all {} }", ["1", "3", "5"]),
        ("version_policy { specific { versions: [1, 3] } }", ["1", "3"]),
    ],
)
def test_the_version_policy_says_which_versions_answer(policy, served, server, client, repository):
    directory = models.write_model(repository, "m", plus(1), max_batch_size=8, more=policy)
    for version in (3, 5):
        (directory / str(version)).mkdir()
        replace_file(directory, plus(version), version)
    (directory / "not_a_version").mkdir()
    client.load_model("m")
    assert list(client.get_model_metadata("m").versions) == served
    assert [version for version, *_ in index_of(client, "m")] == served
    assert ask(server, "m") == int(served[-1])
    for version in ("1", "3", "5"):
        if version in served:
            assert ask(server, "m", version) == int(version)
        else:
            code, text = server.refusal("ModelInfer", infer_request("m", {}, version=version))
            assert (code, f"version {version} is not found" in text) == (grpc.StatusCode.NOT_FOUND, True)


def test_a_configuration_of_a_call_holds_until_the_model_is_loaded_without_one(server, client, repository):
    models.write_model(repository, "m", plus(1), max_batch_size=8)

    def max_batch_size() -> int:
        size: int = client.get_model_config("m").config.max_batch_size
        return size

    client.load_model("m", config=json.dumps({"max_batch_size": "2", "backend": "onnxruntime"}))
    assert max_batch_size() == 2
    assert ask(server, "m") == 1
    rows = infer_request("m", {"X": np.zeros((3, 1), np.float32)})
    assert "batch-size must be <= 2" in server.refusal("ModelInfer", rows)[1]
    with pytest.raises(InferenceServerException, match="failed to load 'm', failed to poll from model repository"):
        client.load_model("m", config='{"max_batch_size": ')
    assert max_batch_size() == 2
    client.unload_model("m")
    client.load_model("m")
    assert max_batch_size() == 8


def test_a_configuration_that_is_not_unicode_is_refused_with_a_text_that_arrives(server):
    request = pb.RepositoryModelLoadRequest(model_name="m")
    for config in ('{"\\ud800": 1}', '{"input": [{"data_type": "\\ud800"}]}'):
        request.parameters["config"].string_param = config
        code, message = server.refusal("RepositoryModelLoad", request)
        assert code is grpc.StatusCode.INTERNAL
        assert "failed to load 'm', failed to poll from model repository: config override:" in message
        assert r"'\ud800' is not Unicode text" in message


def test_the_files_of_a_call_make_a_model_that_is_in_no_repository(server, client):
    config = json.dumps({"max_batch_size": 4})
    client.load_model("given", config=config, files={"file:2/model.onnx": plus(2), "file:7/model.onnx": plus(7)})
    assert ask(server, "given") == 7
    assert index_of(client, "given") == [("7", "READY", "")]
    config = json.dumps({"max_batch_size": 4, "version_policy": {"all": {}}})
    client.load_model("given", config=config, files={"file:2/model.onnx": plus(3), "file:7/model.onnx": plus(8)})
    assert [ask(server, "given", version) for version in ("2", "7", "")] == [3, 8, 8]
    client.unload_model("given")
    with pytest.raises(InferenceServerException, match="failed to load 'given', failed to poll"):
        client.load_model("given")


def test_the_files_of_a_call_replace_those_on_disk_until_the_next_load(server, client, repository):
    models.write_model(repository, "m", plus(1), max_batch_size=8)
    client.load_model("m")
    client.load_model("m", config=json.dumps({"max_batch_size": 8}), files={"file:1/model.onnx": plus(9)})
    assert ask(server, "m") == 9
    client.load_model("m")
    assert ask(server, "m") == 1


def with_external_data(constant: float, directory: Path) -> dict[str, bytes]:
    """The files of a model whose weights are beside it, by their names."""
    weights = np.full((1, 4096), constant, np.float32)
    initializer = numpy_helper.from_array(weights, "weights")
    nodes = [helper.make_node("ReduceMean", ["weights"], ["mean"]), helper.make_node("Add", ["X", "mean"], ["Y"])]
    tensors = [models.tensor("X", dims=("N", 1))], [models.tensor("Y", dims=("N", 1))]
    model = onnx.load_from_string(models.build(nodes, *tensors, [initializer]))
    directory.mkdir()
    onnx.save_model(model, directory / "model.onnx", save_as_external_data=True, location="weights.bin")
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_models_with_external_data_load_from_disk_and_from_a_call(server, client, repository, tmp_path):
    files = with_external_data(3, tmp_path / "saved")
    assert len(files["weights.bin"]) == 4 * 4096
    for layout in ("1", "1/model.onnx"):
        name = layout.replace("/", "_")
        directory = models.write_model(repository, name, plus(0), max_batch_size=8)
        (directory / "1" / "model.onnx").unlink()
        (directory / layout).mkdir(exist_ok=True)
        for file, content in files.items():
            (directory / layout / file).write_bytes(content)
        client.load_model(name)
        assert ask(server, name) == 3
    changed = with_external_data(4, tmp_path / "changed")
    (repository / "1" / "1" / "weights.bin").write_bytes(changed["weights.bin"])
    client.load_model("1")
    assert ask(server, "1") == 4
    uploaded = {f"file:1/{name}": content for name, content in files.items()}
    client.load_model("given", config=json.dumps({"max_batch_size": 8}), files=uploaded)
    assert ask(server, "given") == 3


def test_a_model_without_its_external_data_is_refused(client, repository, tmp_path):
    files = with_external_data(3, tmp_path / "saved")
    directory = models.write_model(repository, "m", plus(0), max_batch_size=8)
    replace_file(directory, files["model.onnx"])
    with pytest.raises(InferenceServerException, match="load failed for model 'm': version 1 is at UNAVAILABLE state"):
        client.load_model("m")


def test_a_bug_in_a_load_is_an_incident_for_the_client_and_a_trace_in_the_log(server, client, repository, caplog):
    models.write_model(repository, "m", plus(1), max_batch_size=8)
    models.write_model(repository, "other", plus(2), max_batch_size=8)
    load_version = server.server.manager._loader

    def buggy(directory, *arguments):
        if directory.name == "m":
            raise RuntimeError("secret")
        return load_version(directory, *arguments)

    server.server.manager._loader = buggy
    with pytest.raises(InferenceServerException, match="incident") as caught:
        client.load_model("m")
    assert caught.value.status() == "StatusCode.INTERNAL"
    ((_, state, reason),) = index_of(client, "m")
    assert (state, "secret" in reason + str(caught.value)) == ("UNAVAILABLE", False)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert "incident" in record.getMessage()
    caplog.clear()  # it was expected
    client.load_model("other")
    assert ask(server, "other") == 2


@pytest.mark.parametrize(
    ("key", "value", "facts"),
    [
        ("config", {"int64_param": 1}, ["'config'", "string_param"]),
        ("config", {"bytes_param": b"{}"}, ["'config'", "string_param"]),
        ("file:1/model.onnx", {"string_param": "x"}, ["'file:1/model.onnx'", "bytes_param"]),
        ("file:1/model.onnx", {"bool_param": True}, ["'file:1/model.onnx'", "bytes_param"]),
        ("other", {"string_param": "x"}, ["unrecognized load parameter 'other'"]),
        ("config", {}, ["'config'", "string_param"]),
    ],
)
def test_load_parameters_of_the_wrong_type_are_refused_by_name(key, value, facts, server, repository):
    models.write_model(repository, "m", plus(1), max_batch_size=8)
    request = pb.RepositoryModelLoadRequest(model_name="m")
    request.parameters[key].CopyFrom(pb.ModelRepositoryParameter(**value))
    code, text = server.refusal("RepositoryModelLoad", request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert not [fact for fact in facts if fact not in text], text


@pytest.mark.parametrize(
    ("key", "value", "fact"),
    [
        ("unload_dependents", {"string_param": "true"}, "'unload_dependents' parameter, expected bool_param"),
        ("other", {"bool_param": True}, "unrecognized unload parameter 'other'"),
    ],
)
def test_unload_parameters_of_the_wrong_type_are_refused_by_name(key, value, fact, server):
    request = pb.RepositoryModelUnloadRequest(model_name="m")
    request.parameters[key].CopyFrom(pb.ModelRepositoryParameter(**value))
    code, text = server.refusal("RepositoryModelUnload", request)
    assert (code, fact in text) == (grpc.StatusCode.INVALID_ARGUMENT, True)


@pytest.mark.parametrize("method", ["RepositoryModelLoad", "RepositoryModelUnload"])
def test_a_repository_name_is_not_supported(method, server):
    request = pb.RepositoryModelLoadRequest(repository_name="r", model_name="m")
    code, text = server.refusal(method, request)
    assert (code, "'repository_name'" in text) == (grpc.StatusCode.UNIMPLEMENTED, True)
