"""Ensembles under model control through a server: swaps of parts under load, unload_dependents, what check says."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.cli import check
from sluice_server.repository.manager import ControlMode
from support import models
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request
from support.rest import request as rest_request

pytestmark = pytest.mark.usefixtures("no_errors_logged")

X = np.arange(4, dtype=np.float32)[None]
EXPLICIT = {"control_mode": ControlMode.EXPLICIT}


def write_pair(repository, factor: float = 2) -> None:
    """E: X times a factor, then plus 1."""
    models.write_model(repository, "times", models.affine(factor, 0), max_batch_size=8)
    models.write_model(repository, "plus", models.affine(1, 1), max_batch_size=8)
    models.write_ensemble(
        repository,
        "E",
        models.port("input", "X") + models.port("output", "Y"),
        [models.step("times", {"X": "X"}, {"Y": "scaled"}), models.step("plus", {"X": "scaled"}, {"Y": "Y"})],
    )


def index(server) -> dict[str, tuple[str, str]]:
    found = server.call("RepositoryIndex", pb.RepositoryIndexRequest()).models
    return {item.name: (item.state, item.reason) for item in found}


def result(server) -> np.ndarray:
    return answer_arrays(server.infer(infer_request("E", {"X": X})))["Y"]


def test_parts_are_swapped_under_load_and_no_request_is_lost(start_server, repository):
    write_pair(repository)
    server = start_server(repository, models={**EXPLICIT, "load_models": ("E",)})
    over = threading.Event()
    allowed = [(factor * X + 1).tolist() for factor in (2, 3)]

    def ask() -> int:
        asked = 0
        while not over.is_set():
            assert result(server).tolist() in allowed
            asked += 1
        return asked

    with ThreadPoolExecutor(4) as pool:
        askers = [pool.submit(ask) for _ in range(4)]
        try:
            for factor in (3, 2, 3, 2, 3, 2, 3):
                (repository / "times" / "1" / "model.onnx").write_bytes(models.affine(factor, 0))
                server.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="times"))
                np.testing.assert_array_equal(result(server), factor * X + 1)
        finally:
            over.set()
        assert all(asker.result() for asker in askers)
    eventually(lambda: not server.server.manager._retiring, "the old ones are gone")


def test_a_request_between_its_steps_is_finished_on_the_parts_that_it_began_with(start_server, repository):
    write_pair(repository)
    server = start_server(repository, models={**EXPLICIT, "load_models": ("E",)})
    with held(server.model("times")) as session:
        call = server.begin("ModelInfer", infer_request("E", {"X": X}))
        session.wait_for_runs(1)
        for part in ("plus", "times"):
            server.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=part))
        code, text = server.refusal("ModelInfer", infer_request("E", {"X": X}))
        assert code is grpc.StatusCode.NOT_FOUND
        assert text == "Request for unknown model: 'E' has no available versions"
        assert not server.call("ModelReady", pb.ModelReadyRequest(name="E")).ready
        session.release()
        np.testing.assert_array_equal(answer_arrays(call.result())["Y"], 2 * X + 1)
    eventually(lambda: index(server)["times"] == ("UNAVAILABLE", "unloaded"), "the part is unloaded")
    state, reason = index(server)["E"]
    assert state == "UNAVAILABLE"
    assert "ensemble 'E' depends on 'times' which has no loaded version" in reason
    assert server.call("ServerReady", pb.ServerReadyRequest()).ready
    for part in ("plus", "times"):
        server.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=part))
    np.testing.assert_array_equal(result(server), 2 * X + 1)


def test_unload_dependents_is_taken_over_grpc_and_rest(start_server, repository):
    write_pair(repository)
    server = start_server(repository, models=EXPLICIT)
    with triton.InferenceServerClient(server.target) as client:
        assert "model_repository(unload_dependents)" in client.get_server_metadata().extensions
        for unload in (
            lambda: client.unload_model("E", unload_dependents=True),
            lambda: rest_request(
                server, "POST", "/v2/repository/models/E/unload", b'{"parameters": {"unload_dependents": true}}'
            ),
        ):
            client.load_model("E")
            assert {name: state for name, (state, _) in index(server).items()} == dict.fromkeys(
                ("E", "plus", "times"), "READY"
            )
            unload()
            eventually(
                lambda: {reason for _, reason in index(server).values()} == {"unloaded"}, "all three are unloaded"
            )


def test_a_part_that_does_not_fit_fails_the_load_of_the_ensemble(start_server, repository, caplog):
    write_pair(repository)
    models.write_model(repository, "other", models.affine(1, 1, ("N", 5)), max_batch_size=8)
    config = (repository / "E" / "config.pbtxt").read_text()
    (repository / "E" / "config.pbtxt").write_text(config.replace('"plus"', '"other"'))
    server = start_server(repository, models=EXPLICIT)
    code, text = server.refusal("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="E"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert text.startswith("load failed for model 'E': version 1 is at UNAVAILABLE state: Invalid argument: ")
    assert "ensemble tensor 'scaled': inconsistent shape: [-1,4] is inferred from model 'times' while [-1,5]" in text
    (repository / "E" / "config.pbtxt").write_text(config.replace("step {", "step { model_namespace: 'a' "))
    code, text = server.refusal("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="E"))
    assert code is grpc.StatusCode.INTERNAL
    assert "failed to poll from model repository" in text
    assert "ensemble_scheduling.step[0].model_namespace is not implemented" in text


def test_check_describes_an_ensemble_and_its_steps(repository, capsys):
    write_pair(repository)
    assert check([str(repository), "--model", "E"]) == 0
    lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
    said = (
        "ensemble of 2 step(s) for requests of up to 8 rows, which go whole from step to step; no instances of its own"
    )
    assert said in lines
    assert "step 0: 'times', the latest version, at once: X <- X; Y -> scaled" in lines
    assert "step 1: 'plus', the latest version, after 1 other(s): X <- scaled; Y -> Y" in lines
    assert "max_inflight_requests: no limit" in lines
    assert "input 'X': FP32 [4]" in lines
    assert "version_policy: the latest 1, the default" in lines


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (('"plus"', '"nowhere"'), "model 'nowhere' is in no model repository"),
        (("model_version: -1", "model_version: 4"), "'times' whose required version 4 is not loaded: it has 1"),
        (('key: "X" value: "scaled"', 'key: "Z" value: "scaled"'), "non-existing input 'Z' in model 'plus'"),
        (('"plus"', '"F"'), "ensemble 'E' contains itself: E -> F -> E"),
        (("max_batch_size: 8", "max_batch_size: 9"), "only allows maximum batch size to be 8"),
    ],
)
def test_check_says_what_is_wrong_with_an_ensemble(repository, capsys, change, reason):
    write_pair(repository)
    ports = models.port("input", "X") + models.port("output", "Y")
    models.write_ensemble(repository, "F", ports, [models.step("E", {"X": "X"}, {"Y": "Y"})])
    config = repository / "E" / "config.pbtxt"
    config.write_text(config.read_text().replace(*change))
    assert check([str(repository), "--model", "E"]) == 1
    out = capsys.readouterr().out
    assert "BROKEN: " in out
    assert reason in out
