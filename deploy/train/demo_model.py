"""What the four training scripts share: splitting the data, converting the pipeline, checking it, writing it.

A demo model is one graph from raw features to the answer: one FP32 input `X` of shape [rows, features] and one FP32
output, `probabilities` [rows, classes] for a classifier or `prediction` [rows, 1] for a regressor. Scaling is inside.
"""

import argparse
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray
from onnx import helper
from skl2onnx import convert_sklearn
from skl2onnx.common.data_types import FloatTensorType
from sklearn.model_selection import train_test_split
from sklearn.pipeline import Pipeline
from threadpoolctl import threadpool_limits

MODELS = Path(__file__).resolve().parents[1] / "models"

# Opset 17 of ONNX and 1 of ONNX-ML, the lowest that cover all four models, so that servers from 2022 on load them too.
TARGET_OPSET = {"": 17, "ai.onnx.ml": 1}

# The file format that came with opset 17.
IR_VERSION = 8

# The name of the open first dimension: as many rows as the caller sends.
ROWS = "rows"

# float32 carries about seven digits; the RBF kernel loses one of them in its exponent.
PARITY = 5e-6

# One row in four is kept for the golden samples and never seen in training.
TEST_SHARE = 0.25

SEED = 0


@dataclass(frozen=True)
class Split:
    """Features [rows, features] that float32 holds exactly, and their targets [rows], for training and for testing."""

    train_x: NDArray[np.float64]
    train_y: NDArray[Any]
    test_x: NDArray[np.float64]
    test_y: NDArray[Any]


def split(features: NDArray[np.float64], targets: NDArray[Any], *, stratify: bool) -> Split:
    """Split the rows into training and test rows, always the same ones; `stratify` keeps the share of each class.

    The features are rounded to float32 first: what a client sends is then what scikit-learn has seen.
    """
    rounded = features.astype(np.float32).astype(np.float64)
    train_x, test_x, train_y, test_y = train_test_split(
        rounded, targets, test_size=TEST_SHARE, random_state=SEED, stratify=targets if stratify else None
    )
    return Split(train_x, train_y, test_x, test_y)


def publish(name: str, pipeline: Pipeline, data: Split) -> None:
    """Fit `pipeline` and write DIR/<name>/1/model.onnx and DIR/<name>/golden.npz; the command line says which DIR.

    golden.npz holds the test rows: `X` float32, the model's output by its name as scikit-learn computes it (float32),
    `labels` (the truth) and, for a classifier, `predictions` (what scikit-learn's predict answers).
    Raises ValueError, and writes nothing, if ONNX Runtime and scikit-learn disagree on them.
    """
    parser = argparse.ArgumentParser(description=f"Train the demo model {name}.")
    parser.add_argument("--models", type=Path, default=MODELS, help="model repository (default: %(default)s)")
    directory = parser.parse_args().models / name

    print(f"{name}: training on {len(data.train_x)} rows", flush=True)
    # With layers this small, threads that wait for each other take five times as long.
    with threadpool_limits(limits=1):
        pipeline.fit(data.train_x, data.train_y)
        golden = golden_samples(pipeline, data)
    content = convert(name, pipeline, features=data.train_x.shape[1]).SerializeToString(deterministic=True)
    check(name, content, golden)

    (directory / "1").mkdir(parents=True, exist_ok=True)
    (directory / "1" / "model.onnx").write_bytes(content)
    np.savez_compressed(directory / "golden.npz", **golden)
    score = pipeline.score(data.test_x, data.test_y)
    measure = "accuracy" if "probabilities" in golden else "R2"
    print(f"{name}: {measure} {score:.4f} on {len(data.test_x)} test rows, written to {directory}")


def golden_samples(pipeline: Pipeline, data: Split) -> dict[str, NDArray[Any]]:
    """Return the test rows with scikit-learn's answers, as `publish` describes them."""
    golden: dict[str, NDArray[Any]] = {"X": data.test_x.astype(np.float32), "labels": data.test_y}
    if hasattr(pipeline, "predict_proba"):
        golden["probabilities"] = pipeline.predict_proba(data.test_x).astype(np.float32)
        golden["predictions"] = pipeline.predict(data.test_x)
    else:
        golden["prediction"] = pipeline.predict(data.test_x).astype(np.float32)[:, None]
    return golden


def convert(name: str, pipeline: Pipeline, features: int) -> onnx.ModelProto:
    """Return the fitted pipeline as an ONNX model with the input `X` and the one output of a demo model."""
    classifier = hasattr(pipeline, "predict_proba")
    with warnings.catch_warnings():
        # skl2onnx 1.20 asks every SVC for probA_ and probB_, which scikit-learn 1.9 deprecates; ours has neither.
        warnings.filterwarnings("ignore", message="Attribute `prob[AB]_` was deprecated", category=FutureWarning)
        converted = convert_sklearn(
            pipeline,
            initial_types=[("X", FloatTensorType([None, features]))],
            options={"zipmap": False} if classifier else None,
            target_opset=TARGET_OPSET,
        )
    # A classifier's outputs are the label and the probabilities; the label goes, as it is the argmax of the other.
    tensor = converted.graph.output[-1]
    output = "probabilities" if classifier else "prediction"
    nodes, constants = reachable(converted.graph, tensor.name, output)
    columns = tensor.type.tensor_type.shape.dim[1].dim_value
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info("X", onnx.TensorProto.FLOAT, [ROWS, features])],
        [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, [ROWS, columns])],
        constants,
    )
    opsets = [helper.make_opsetid(domain, version) for domain, version in TARGET_OPSET.items()]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="skl2onnx")
    onnx.checker.check_model(model, full_check=True)
    return model


def reachable(graph: onnx.GraphProto, tensor: str, name: str) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
    """Return the nodes and constants that `tensor` is computed from, with `tensor` itself renamed to `name`."""
    needed = {tensor}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):  # ONNX keeps nodes in topological order
        if needed.intersection(node.output):
            needed.update(node.input)
            node.output[:] = [name if output == tensor else output for output in node.output]
            nodes.insert(0, node)
    return nodes, [constant for constant in graph.initializer if constant.name in needed]


def check(name: str, content: bytes, golden: dict[str, NDArray[Any]]) -> None:
    """Raise ValueError unless ONNX Runtime gives the answers of `golden`."""
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    output = session.get_outputs()[0].name
    got = session.run([output], {"X": golden["X"]})[0]
    if not np.allclose(got, golden[output], rtol=PARITY, atol=PARITY):
        difference = np.abs(got - golden[output]).max()
        raise ValueError(f"{name}: ONNX Runtime and scikit-learn differ by {difference:.1e} in {output}")
    if "predictions" in golden and not np.array_equal(got.argmax(axis=1), golden["predictions"]):
        raise ValueError(f"{name}: the argmax of the probabilities is not what scikit-learn predicts")
