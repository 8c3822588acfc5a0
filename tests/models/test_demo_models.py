"""Whether the demo models answer as scikit-learn does, batch, match their configuration, and can be trained again."""

import importlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from numpy.typing import NDArray

from sluice_proto.model_config_pb2 import ModelConfig

DEPLOY = Path(__file__).parents[2] / "deploy"
MODELS = DEPLOY / "models"
CLASSIFIERS = ("digits_mlp", "digits_svm", "breast_cancer")
NAMES = (*CLASSIFIERS, "diabetes")

# What the page of the demo models promises, rounded down in the third digit.
ACCURACY = {"digits_mlp": 0.984, "digits_svm": 0.988, "breast_cancer": 0.958}
R2 = 0.359

# Seven digits of float32, less one that the RBF kernel loses.
PARITY = 5e-6

# A batched matrix product may add in another order than a single row's.
BATCH_TOLERANCE = 1e-6

# Training on another processor rounds differently on the way; the answers stay this close.
RETRAIN_TOLERANCE = 1e-4

SIZE_LIMIT_BYTES = 1_000_000

Arrays = Mapping[str, NDArray[Any]]


def load(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def answer(session: onnxruntime.InferenceSession, rows: NDArray[Any]) -> NDArray[np.float32]:
    return session.run(None, {"X": rows})[0]


def read_golden(directory: Path) -> Arrays:
    with np.load(directory / "golden.npz") as archive:
        return dict(archive)


def output_name(name: str) -> str:
    return "probabilities" if name in CLASSIFIERS else "prediction"


@pytest.mark.parametrize("name", NAMES)
def test_the_answers_are_those_of_scikit_learn_on_every_test_row(name: str) -> None:
    golden = read_golden(MODELS / name)
    got = answer(load(MODELS / name / "1" / "model.onnx"), golden["X"])
    np.testing.assert_allclose(got, golden[output_name(name)], rtol=PARITY, atol=PARITY)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_class_of_highest_probability_is_what_scikit_learn_predicts(name: str) -> None:
    golden = read_golden(MODELS / name)
    classes = answer(load(MODELS / name / "1" / "model.onnx"), golden["X"]).argmax(axis=1)
    np.testing.assert_array_equal(classes, golden["predictions"])
    assert (classes == golden["labels"]).mean() >= ACCURACY[name]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_probabilities_of_a_row_sum_to_one(name: str) -> None:
    golden = read_golden(MODELS / name)
    got = answer(load(MODELS / name / "1" / "model.onnx"), golden["X"])
    np.testing.assert_allclose(got.sum(axis=1), 1, rtol=PARITY)


def test_the_regression_explains_what_its_page_says() -> None:
    golden = read_golden(MODELS / "diabetes")
    got = answer(load(MODELS / "diabetes" / "1" / "model.onnx"), golden["X"])[:, 0]
    truth = golden["labels"]
    assert 1 - ((truth - got) ** 2).sum() / ((truth - truth.mean()) ** 2).sum() >= R2


@pytest.mark.parametrize("name", NAMES)
def test_a_row_alone_gets_the_answer_it_gets_in_a_batch(name: str) -> None:
    session = load(MODELS / name / "1" / "model.onnx")
    rows = read_golden(MODELS / name)["X"]
    alone = np.concatenate([answer(session, row[None]) for row in rows])
    for batch_rows in (2, 7, 64, len(rows)):
        parts = [answer(session, rows[start : start + batch_rows]) for start in range(0, len(rows), batch_rows)]
        np.testing.assert_allclose(np.concatenate(parts), alone, rtol=BATCH_TOLERANCE, atol=BATCH_TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_the_configuration_says_what_the_graph_says(name: str) -> None:
    config = text_format.Parse((MODELS / name / "config.pbtxt").read_text(), ModelConfig())
    assert (config.name, config.backend) == (name, "onnxruntime")
    assert config.max_batch_size == 128
    assert config.HasField("dynamic_batching")
    session = load(MODELS / name / "1" / "model.onnx")
    for configured, tensors in ((config.input, session.get_inputs()), (config.output, session.get_outputs())):
        assert [(tensor.name, ["rows", *tensor.dims]) for tensor in configured] == [
            (tensor.name, tensor.shape) for tensor in tensors
        ]
        assert {tensor.type for tensor in tensors} == {"tensor(float)"}
    assert [tensor.name for tensor in session.get_inputs()] == ["X"]
    assert [tensor.name for tensor in session.get_outputs()] == [output_name(name)]


def test_every_directory_of_the_repository_is_one_of_the_models() -> None:
    assert sorted(path.name for path in MODELS.iterdir() if path.is_dir()) == sorted(NAMES)


def test_every_file_of_the_repository_is_small() -> None:
    assert all(path.stat().st_size < SIZE_LIMIT_BYTES for path in MODELS.rglob("*") if path.is_file())


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_training_again_gives_the_same_model_and_no_warning(name: str, tmp_path: Path) -> None:
    script = DEPLOY / "train" / f"{name}.py"
    command = [sys.executable, "-W", "error", str(script), "--models", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    old, new = read_golden(MODELS / name), read_golden(tmp_path / name)
    assert old.keys() == new.keys()
    np.testing.assert_array_equal(new["X"], old["X"])
    np.testing.assert_array_equal(new["labels"], old["labels"])
    got = answer(load(tmp_path / name / "1" / "model.onnx"), new["X"])
    np.testing.assert_allclose(got, old[output_name(name)], rtol=RETRAIN_TOLERANCE, atol=RETRAIN_TOLERANCE)


def test_a_model_that_answers_otherwise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DEPLOY / "train")
    check = importlib.import_module("demo_model").check
    content = (MODELS / "digits_mlp" / "1" / "model.onnx").read_bytes()
    golden = read_golden(MODELS / "digits_mlp")
    check("digits_mlp", content, golden)
    with pytest.raises(ValueError, match=r"differ by .* in probabilities"):
        check("digits_mlp", content, {**golden, "probabilities": golden["probabilities"] + np.float32(0.001)})
    with pytest.raises(ValueError, match="is not what scikit-learn predicts"):
        check("digits_mlp", content, {**golden, "predictions": golden["predictions"][::-1]})
