"""tritonclient as it is, blocking and asyncio, on the demo models: its answers are scikit-learn's on all test data."""

from __future__ import annotations

import asyncio
import queue
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio

from support.fakes import PATIENCE_S
from support.server import running, server_settings

DEPLOYED = Path(__file__).parents[2] / "deploy" / "models"
CLASSIFIERS = ("digits_mlp", "digits_svm", "breast_cancer")
NAMES = (*CLASSIFIERS, "diabetes")

PARITY = 5e-6
"""Seven digits of float32, less one that the RBF kernel loses."""

IN_FLIGHT = 32
"""Requests under way at once where a client sends rows one by one."""

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture(scope="module")
def target(transport):
    with running(server_settings(DEPLOYED, http=None, metrics=None), transport) as server:
        yield server.target


@pytest.fixture
def client(target):
    with triton.InferenceServerClient(target) as client:
        yield client


def golden_of(name: str) -> dict[str, np.ndarray]:
    with np.load(DEPLOYED / name / "golden.npz") as archive:
        return dict(archive)


def output_of(name: str) -> str:
    return "probabilities" if name in CLASSIFIERS else "prediction"


def inputs_of(rows: np.ndarray) -> list[triton.InferInput]:
    tensor = triton.InferInput("X", list(rows.shape), "FP32")
    tensor.set_data_from_numpy(rows)
    return [tensor]


def check(name: str, got: np.ndarray, golden: dict[str, np.ndarray]) -> None:
    """Every row: the class that scikit-learn predicts, or its number."""
    output = output_of(name)
    assert got.shape == golden[output].shape
    np.testing.assert_allclose(got, golden[output], rtol=PARITY, atol=PARITY)
    if name in CLASSIFIERS:
        np.testing.assert_array_equal(got.argmax(axis=1), golden["predictions"])


@pytest.mark.parametrize("name", NAMES)
def test_the_blocking_client_gets_scikit_learns_answers_for_batches_of_all_sizes(name, client):
    golden = golden_of(name)
    answers, start, size = [], 0, 1
    while start < len(golden["X"]):
        rows = golden["X"][start : start + size]
        answers.append(client.infer(name, inputs_of(rows)).as_numpy(output_of(name)))
        assert len(answers[-1]) == len(rows)
        start, size = start + size, size % 128 + 7
    check(name, np.concatenate(answers), golden)


@pytest.mark.parametrize("name", NAMES)
def test_the_asyncio_client_gets_scikit_learns_answers_for_every_row_on_its_own(name, target):
    golden = golden_of(name)

    async def ask_all() -> list[np.ndarray]:
        async with triton_aio.InferenceServerClient(target) as client:
            slots = asyncio.Semaphore(IN_FLIGHT)

            async def ask(row: np.ndarray) -> np.ndarray:
                async with slots:
                    result = await client.infer(name, inputs_of(row[None]))
                    return result.as_numpy(output_of(name))

            return await asyncio.gather(*map(ask, golden["X"]))

    check(name, np.concatenate(asyncio.run(ask_all())), golden)


def test_the_blocking_clients_callbacks_get_answers_too(client):
    golden = golden_of("digits_mlp")
    rows = golden["X"][:64]
    answers: queue.Queue = queue.Queue()
    for row in rows:
        client.async_infer("digits_mlp", inputs_of(row[None]), lambda result, error: answers.put((result, error)))
    results = [answers.get(timeout=PATIENCE_S) for _ in rows]
    assert {error for _, error in results} == {None}
    classes = [int(result.as_numpy("probabilities").argmax()) for result, _ in results]
    assert sorted(classes) == sorted(golden["predictions"][:64])


def test_an_answer_names_the_model_and_the_request(client):
    result = client.infer("digits_mlp", inputs_of(golden_of("digits_mlp")["X"][:1]), request_id="7")
    response = result.get_response()
    assert (response.model_name, response.model_version, response.id) == ("digits_mlp", "1", "7")


def test_requested_outputs_compression_and_headers_are_taken(client):
    golden = golden_of("digits_mlp")
    for algorithm in (None, "gzip", "deflate"):
        result = client.infer(
            "digits_mlp",
            inputs_of(golden["X"][:64]),
            outputs=[triton.InferRequestedOutput("probabilities")],
            headers={"x-header": "value"},
            compression_algorithm=algorithm,
            timeout=60_000_000,
            client_timeout=60.0,
            parameters={"a": 1, "b": "c", "d": True},
        )
        np.testing.assert_array_equal(result.as_numpy("probabilities").argmax(axis=1), golden["predictions"][:64])


def test_health_is_told(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert all(client.is_model_ready(name) and client.is_model_ready(name, "1") for name in NAMES)
    assert not client.is_model_ready("nope")
    assert not client.is_model_ready("digits_mlp", "2")


def test_the_server_tells_its_name_version_and_extensions(client):
    metadata = client.get_server_metadata(as_json=True)
    assert metadata["name"] == "triton"
    assert metadata["version"]
    assert {"statistics", "model_repository", "model_configuration"} <= set(metadata["extensions"])


def test_a_models_metadata_has_the_batch_dimension_and_what_it_runs_on(client):
    metadata = client.get_model_metadata("digits_mlp", as_json=True)
    assert metadata["versions"] == ["1"]
    assert metadata["platform"] == "onnxruntime_onnx"
    assert metadata["inputs"] == [{"name": "X", "datatype": "FP32", "shape": ["-1", "64"]}]
    assert metadata["outputs"] == [{"name": "probabilities", "datatype": "FP32", "shape": ["-1", "10"]}]


def test_a_models_configuration_is_complete(client):
    config = client.get_model_config("digits_mlp").config
    assert (config.name, config.platform, config.backend) == ("digits_mlp", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 128
    assert list(config.dynamic_batching.preferred_batch_size) == [128]
    assert config.version_policy.latest.num_versions == 1
    assert config.default_model_filename == "model.onnx"
    assert [(group.name, group.count) for group in config.instance_group] == [("digits_mlp", 2)]
    assert [(tensor.name, list(tensor.dims)) for tensor in (*config.input, *config.output)] == [
        ("X", [64]),
        ("probabilities", [10]),
    ]


def test_statistics_grow_by_what_was_asked(client):
    def counts():
        (model,) = client.get_inference_statistics("diabetes").model_stats
        by_size = {batch.batch_size: batch.compute_infer.count for batch in model.batch_stats}
        return model.inference_count, model.execution_count, model.inference_stats.success.count, by_size.get(3, 0)

    before = counts()
    rows = golden_of("diabetes")["X"][:3]
    for _ in range(5):
        client.infer("diabetes", inputs_of(rows))
    assert [new - old for new, old in zip(counts(), before, strict=True)] == [15, 5, 5, 5]
    statistics = client.get_inference_statistics()
    assert sorted(model.name for model in statistics.model_stats) == sorted(NAMES)
    assert all(model.version == "1" for model in statistics.model_stats)


def test_the_index_lists_every_model_as_ready(client):
    index = client.get_model_repository_index().models
    assert [(model.name, model.version, model.state) for model in index] == [
        (name, "1", "READY") for name in sorted(NAMES)
    ]


def test_the_asyncio_client_asks_the_same_questions(target):
    async def ask() -> None:
        async with triton_aio.InferenceServerClient(target) as client:
            assert await client.is_server_live()
            assert await client.is_server_ready()
            assert await client.is_model_ready("digits_svm")
            assert (await client.get_server_metadata()).name == "triton"
            assert (await client.get_model_metadata("digits_svm")).versions == ["1"]
            assert (await client.get_model_config("digits_svm")).config.max_batch_size == 128
            assert len((await client.get_inference_statistics()).model_stats) == len(NAMES)
            assert len((await client.get_model_repository_index()).models) == len(NAMES)

    asyncio.run(ask())


X = np.zeros((1, 64), np.float32)


def wrong_inputs(name: str = "X", shape: tuple[int, ...] = (1, 64), datatype: str = "FP32") -> list[triton.InferInput]:
    tensor = triton.InferInput(name, list(shape), datatype)
    tensor.set_data_from_numpy(np.zeros(shape, np.dtype({"FP32": "f4", "INT32": "i4", "INT64": "i8"}[datatype])))
    return [tensor]


@pytest.mark.parametrize(("inputs", "how", "code", "facts"), [
    (wrong_inputs(), {"model_name": "nope"}, "NOT_FOUND", ["'nope'", "is not found"]),
    (wrong_inputs(), {"model_version": "9"}, "NOT_FOUND", ["version 9 is not found"]),
    (wrong_inputs(), {"model_version": "x"}, "INVALID_ARGUMENT", ["'x'", "integral value > 0"]),
    (wrong_inputs(), {"priority": 2**63}, None, []),
    (wrong_inputs("NOPE"), {}, "INVALID_ARGUMENT", ["unexpected inference input 'NOPE'"]),
    (wrong_inputs(shape=(1, 63)), {}, "INVALID_ARGUMENT", ["unexpected shape for input 'X'", "[-1,64]", "[1,63]"]),
    (wrong_inputs(shape=(129, 64)), {}, "INVALID_ARGUMENT", ["batch-size must be <= 128", "129"]),
    (wrong_inputs(shape=(64,)), {}, "INVALID_ARGUMENT", ["unexpected shape for input 'X'", "[64]"]),
    (wrong_inputs(datatype="INT32"), {}, "INVALID_ARGUMENT", ["data-type is 'INT32'", "expects 'FP32'"]),
    (wrong_inputs() * 2, {}, "INVALID_ARGUMENT", ["input 'X' already exists"]),
    (wrong_inputs() + wrong_inputs("Z"), {}, "INVALID_ARGUMENT", ["expected 1 inputs but got 2"]),
    ([], {}, "INVALID_ARGUMENT", ["expected 1 inputs but got 0"]),
    (wrong_inputs(), {"outputs": [triton.InferRequestedOutput("NOPE")]}, "INVALID_ARGUMENT",
     ["unexpected inference output 'NOPE'"]),
    (wrong_inputs(), {"outputs": [triton.InferRequestedOutput("probabilities", class_count=-1)]}, "INVALID_ARGUMENT",
     ["'classification'", "-1"]),
])  # fmt: skip
def test_what_the_client_can_get_wrong_comes_back_as_its_own_exception(inputs, how, code, facts, client):
    call = {"model_name": "digits_mlp", **how}
    if code is None:
        assert client.infer(inputs=inputs, **call).as_numpy("probabilities").shape == (1, 10)
        return
    with pytest.raises(triton.InferenceServerException) as caught:
        client.infer(inputs=inputs, **call)
    assert caught.value.status() == f"StatusCode.{code}"
    assert not [fact for fact in facts if fact not in caught.value.message()], caught.value.message()
    check_row = golden_of("digits_mlp")["X"][:1]
    assert client.infer("digits_mlp", inputs_of(check_row)).as_numpy("probabilities").shape == (1, 10)
