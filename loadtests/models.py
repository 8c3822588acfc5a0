"""The models that the benchmark serves, generated into a temporary model repository, and a request to each.

Those that a bare loop runs next to have one instance with one intra-op thread, as it has.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from loadtests.ort_loop import open_session
from sluice_proto.grpc_service_pb2 import ModelInferRequest, ModelInferResponse

OPSET = 17
IR_VERSION = 8
"""The file format that came with opset 17."""

SEED = 0
THREADS = 1
LARGE_LAYERS = (1024, 4096, 4096, 1000)
IMAGE = (3, 224, 224)
PAGE = (3, 320, 320)
DEMO_DIGITS = Path(__file__).resolve().parents[1] / "deploy" / "models" / "digits_mlp"

_THREADS_TEXT = f"""
instance_group {{ count: 1 kind: KIND_CPU }}
parameters {{ key: "intra_op_thread_count" value {{ string_value: "{THREADS}" }} }}
"""


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model in the repository, with one request of one row and the answer to it."""

    name: str
    title: str
    file: Path
    max_batch_rows: int
    request: bytes
    answer: NDArray[np.float32]

    def is_answered_by(self, response: bytes) -> bool:
        """Whether a ModelInferResponse holds the right answer, up to float32's rounding in a batch."""
        message = ModelInferResponse.FromString(response)
        got = np.frombuffer(message.raw_output_contents[0], np.float32).reshape(message.outputs[0].shape)
        return got.shape == self.answer.shape and np.allclose(got, self.answer, rtol=1e-4, atol=1e-5)


def generate(name: str, repository: Path) -> BenchModel:
    """Write one of `GENERATORS` into the repository."""
    return GENERATORS[name](repository / name)


def _identity(directory: Path) -> BenchModel:
    columns, max_batch_rows = 16, 64
    graph = helper.make_graph(
        [helper.make_node("Identity", ["X"], ["Y"])], "identity", [_tensor("X", columns)], [_tensor("Y", columns)]
    )
    _write(directory, graph, max_batch_rows)
    return _bench_model(directory, "identity 1x16", max_batch_rows, _random_rows(columns))


def _images(directory: Path) -> BenchModel:
    """Pictures as image models take them, 600 KB each, unchanged: what carrying large tensors costs."""
    max_batch_rows = 8
    graph = helper.make_graph(
        [helper.make_node("Identity", ["X"], ["Y"])], "images", [_tensor("X", *IMAGE)], [_tensor("Y", *IMAGE)]
    )
    _write(directory, graph, max_batch_rows)
    return _bench_model(directory, "identity " + "x".join(map(str, (1, *IMAGE))), max_batch_rows, _random_rows(*IMAGE))


def _digits_mlp(directory: Path) -> BenchModel:
    """The demo model and its first test digit, with the configuration that comes with it."""
    shutil.copytree(DEMO_DIGITS / "1", directory / "1")
    (directory / "config.pbtxt").write_text((DEMO_DIGITS / "config.pbtxt").read_text() + _THREADS_TEXT)
    with np.load(DEMO_DIGITS / "golden.npz") as golden:
        row = golden["X"][:1]
    return _bench_model(directory, "digits MLP 64-128-10", 128, row)


def _cached(make: Callable[[Path], BenchModel]) -> Callable[[Path], BenchModel]:
    """A model with a response cache, where the server has one."""

    def generate_cached(directory: Path) -> BenchModel:
        model = make(directory)
        config = directory / "config.pbtxt"
        lines = [line for line in config.read_text().splitlines() if not line.startswith("name:")]
        config.write_text("\n".join([*lines, "response_cache { enable: true }\n"]))
        return replace(model, title=f"{model.title}, response_cache")

    return generate_cached


def _large_mlp(directory: Path) -> BenchModel:
    """A dense network whose weights, 100 MB, are read once for each batch: where batching pays."""
    max_batch_rows = 64
    random = np.random.default_rng(SEED)
    nodes, weights, tensor = [], [], "X"
    for number, (rows, columns) in enumerate(pairwise(LARGE_LAYERS), 1):
        # Scaled by He et al. 2015 (Delving Deep into Rectifiers), so that values neither vanish nor grow.
        matrix = random.standard_normal((rows, columns), np.float32) * np.float32((2 / rows) ** 0.5)
        weights += [
            numpy_helper.from_array(matrix, f"weights{number}"),
            numpy_helper.from_array(np.zeros(columns, np.float32), f"bias{number}"),
        ]
        is_last = number == len(LARGE_LAYERS) - 1
        output = "Y" if is_last else f"sum{number}"
        nodes.append(helper.make_node("Gemm", [tensor, f"weights{number}", f"bias{number}"], [output]))
        if not is_last:
            tensor = f"layer{number}"
            nodes.append(helper.make_node("Relu", [output], [tensor]))
    graph = helper.make_graph(
        nodes, "large_mlp", [_tensor("X", LARGE_LAYERS[0])], [_tensor("Y", LARGE_LAYERS[-1])], weights
    )
    _write(directory, graph, max_batch_rows)
    title = "MLP " + "-".join(map(str, LARGE_LAYERS))
    return _bench_model(directory, title, max_batch_rows, _random_rows(LARGE_LAYERS[0]))


OCR_PACKAGE = "rapidocr-onnxruntime"
OCR_FILE = "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx"
OCR_SIZES = (1, 2, 4)
"""Up to the batch size that a model without a configuration gets."""


def find_ocr() -> Path | None:
    """The model of text detection, out of a package of which nothing else is used; None where that is not installed."""
    try:
        file = Path(str(metadata.distribution(OCR_PACKAGE).locate_file(OCR_FILE)))
    except metadata.PackageNotFoundError:
        return None
    return file if file.is_file() else None


def _ocr(directory: Path) -> BenchModel:
    """Text detection on a small page, 1.2 MB, without any configuration: batches of it are slower than single rows."""
    file = find_ocr()
    if file is None:
        raise FileNotFoundError(f"{OCR_FILE}: install {OCR_PACKAGE} (make bench does)")
    (directory / "1").mkdir(parents=True)
    shutil.copy(file, directory / "1" / "model.onnx")
    title = "text detection " + "x".join(map(str, (1, *PAGE)))
    return _bench_model(directory, title, OCR_SIZES[-1], _random_rows(*PAGE), "x")


def _ocr_in_batches(most: int) -> Callable[[Path], BenchModel]:
    """The same, merged up to a size that the configuration says."""

    def generate_ocr(directory: Path) -> BenchModel:
        model = _ocr(directory)
        parameter = 'parameters { key: "batch_curve" value { string_value: "off" } }'
        (directory / "config.pbtxt").write_text(f'backend: "onnxruntime"\nmax_batch_size: {most}\n{parameter}\n')
        return replace(model, title=f"{model.title}, batches up to {most}", max_batch_rows=most)

    return generate_ocr


GENERATORS: dict[str, Callable[[Path], BenchModel]] = {
    "identity": _identity,
    "digits_mlp": _digits_mlp,
    "large_mlp": _large_mlp,
    "images": _images,
    "digits_cached": _cached(_digits_mlp),
    "identity_cached": _cached(_identity),
    "ocr": _ocr,
    **{f"ocr_{most}": _ocr_in_batches(most) for most in OCR_SIZES},
}


def _random_rows(*dims: int) -> NDArray[np.float32]:
    return np.random.default_rng(SEED).random((1, *dims), np.float32)


def _tensor(name: str, *dims: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["rows", *dims])


def _write(directory: Path, graph: onnx.GraphProto, max_batch_rows: int) -> None:
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    (directory / "1").mkdir(parents=True)
    (directory / "1" / "model.onnx").write_bytes(model.SerializeToString())
    text = f'backend: "onnxruntime"\nmax_batch_size: {max_batch_rows}\ndynamic_batching {{ }}\n'
    (directory / "config.pbtxt").write_text(text + _THREADS_TEXT)


def _bench_model(
    directory: Path, title: str, max_batch_rows: int, row: NDArray[np.float32], input_name: str = "X"
) -> BenchModel:
    """Build the request for the row, and ask ONNX Runtime for the answer."""
    file = directory / "1" / "model.onnx"
    session = open_session(file, THREADS)
    answer = session.run(None, {input_name: row})[0]
    request = ModelInferRequest(model_name=directory.name, raw_input_contents=[row.tobytes()])
    request.inputs.add(name=input_name, datatype="FP32", shape=row.shape)
    return BenchModel(directory.name, title, file, max_batch_rows, request.SerializeToString(), answer)
