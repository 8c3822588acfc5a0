"""The models that the benchmark serves, generated into a temporary model repository, and a request to each.

Those that a bare loop runs next to have one instance with one intra-op thread, as it has.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
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
PIPELINE = {"pipeline_a": (64, 128, 96), "pipeline_b": (96, 128, 64), "pipeline_c": (64, 128, 10)}
"""The parts of an ensemble by their layers: small, as what an ensemble costs by itself shows next to small models."""
IMAGE = (3, 224, 224)
LENGTHS = (5, 128)
LENGTH_REQUESTS = 128
ENCODER_WORDS, ENCODER_WIDTH, ENCODER_TAGS, ENCODER_LAYERS = 1000, 16, 8, 2
_ENCODER_WEIGHTS: dict[str, tuple[int, int]] = {
    "words": (ENCODER_WORDS, ENCODER_WIDTH),
    "tags": (ENCODER_WIDTH, ENCODER_TAGS),
    **{
        f"{kind}{layer}_weights": (ENCODER_WIDTH, ENCODER_WIDTH)
        for kind in ("query", "key", "value")
        for layer in range(ENCODER_LAYERS)
    },
}
PAGE = (3, 320, 320)
DEMO_DIGITS = Path(__file__).resolve().parents[1] / "deploy" / "models" / "digits_mlp"

_THREADS_TEXT = f"""
instance_group {{ count: 1 kind: KIND_CPU }}
parameters {{ key: "intra_op_thread_count" value {{ string_value: "{THREADS}" }} }}
"""


@dataclass(frozen=True, slots=True)
class Variant:
    """One of several requests to a model, and the answer to it alone."""

    request: bytes
    answer: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class BenchModel:
    """A model in the repository, with one request of one row and the answer to it, and maybe others."""

    name: str
    title: str
    file: Path
    max_batch_rows: int
    request: bytes
    answer: NDArray[np.float32]
    variants: tuple[Variant, ...] = ()

    def is_answered_by(self, response: bytes, answer: NDArray[np.float32] | None = None) -> bool:
        """Whether a ModelInferResponse holds the right answer, or this one, up to float32's rounding in a batch."""
        wanted = self.answer if answer is None else answer
        message = ModelInferResponse.FromString(response)
        got = np.frombuffer(message.raw_output_contents[0], np.float32).reshape(message.outputs[0].shape)
        return got.shape == wanted.shape and np.allclose(got, wanted, rtol=1e-4, atol=1e-5)


def generate(name: str, repository: Path) -> BenchModel:
    """Write one of `GENERATORS` into the repository, in place of one that is there."""
    if (repository / name).exists():
        shutil.rmtree(repository / name)
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
    return _mlp(directory, LARGE_LAYERS)


def _mlp(directory: Path, layers: Sequence[int]) -> BenchModel:
    """A dense network of random weights."""
    max_batch_rows = 64
    random = np.random.default_rng(SEED)
    nodes, weights, tensor = [], [], "X"
    for number, (rows, columns) in enumerate(pairwise(layers), 1):
        # Scaled by He et al. 2015 (Delving Deep into Rectifiers), so that values neither vanish nor grow.
        matrix = random.standard_normal((rows, columns), np.float32) * np.float32((2 / rows) ** 0.5)
        weights += [
            numpy_helper.from_array(matrix, f"weights{number}"),
            numpy_helper.from_array(np.zeros(columns, np.float32), f"bias{number}"),
        ]
        is_last = number == len(layers) - 1
        output = "Y" if is_last else f"sum{number}"
        nodes.append(helper.make_node("Gemm", [tensor, f"weights{number}", f"bias{number}"], [output]))
        if not is_last:
            tensor = f"layer{number}"
            nodes.append(helper.make_node("Relu", [output], [tensor]))
    graph = helper.make_graph(nodes, "mlp", [_tensor("X", layers[0])], [_tensor("Y", layers[-1])], weights)
    _write(directory, graph, max_batch_rows)
    title = "MLP " + "-".join(map(str, layers))
    return _bench_model(directory, title, max_batch_rows, _random_rows(layers[0]))


def _part(layers: Sequence[int]) -> Callable[[Path], BenchModel]:
    return lambda directory: _mlp(directory, layers)


def _pipeline(directory: Path) -> BenchModel:
    """An ensemble of the models of PIPELINE, one after the other, which are in the same repository."""
    parts = [generate(name, directory.parent) for name in PIPELINE]
    first_size = next(iter(PIPELINE.values()))[0]
    request, answer = parts[0].request, _random_rows(first_size)
    for part in parts:
        answer = open_session(part.file, THREADS).run(None, {"X": answer})[0]
    tensors = ["X", *(f"between{number}" for number in range(1, len(parts))), "Y"]
    steps = "".join(
        f'step {{ model_name: "{part.name}" model_version: -1 input_map {{ key: "X" value: "{taken}" }}'
        f' output_map {{ key: "Y" value: "{made}" }} }}\n'
        for part, (taken, made) in zip(parts, pairwise(tensors), strict=True)
    )
    text = f'platform: "ensemble"\nmax_batch_size: {parts[0].max_batch_rows}\n'
    for kind, name, size in (("input", "X", first_size), ("output", "Y", answer.shape[1])):
        text += f'{kind} {{ name: "{name}" data_type: TYPE_FP32 dims: {size} }}\n'
    (directory / "1").mkdir(parents=True)
    (directory / "config.pbtxt").write_text(f"{text}ensemble_scheduling {{\n{steps}}}\n")
    message = ModelInferRequest.FromString(request)
    message.model_name = directory.name
    title = f"ensemble of {len(parts)} MLPs"
    return BenchModel(directory.name, title, directory, parts[0].max_batch_rows, message.SerializeToString(), answer)


def _lengths(directory: Path) -> BenchModel:
    """A small encoder of sequences, two layers of attention, and as many requests as are in flight twice over."""
    max_batch_rows = 32
    random = np.random.default_rng(SEED)
    weights = {name: random.standard_normal(shape).astype(np.float32) * 0.2 for name, shape in _ENCODER_WEIGHTS.items()}
    constants = {"one": np.float32(1), "far": np.float32(1e9), "axis": np.array([1], np.int64)}
    nodes = [
        helper.make_node("Gather", ["words", "IDS"], ["seen0"]),
        helper.make_node("Cast", ["MASK"], ["shown"], to=TensorProto.FLOAT),
        helper.make_node("Sub", ["shown", "one"], ["hidden"]),
        helper.make_node("Mul", ["hidden", "far"], ["off"]),
        helper.make_node("Unsqueeze", ["off", "axis"], ["off_each"]),
    ]
    for layer in range(ENCODER_LAYERS):
        nodes += _attention(layer)
    nodes.append(helper.make_node("MatMul", [f"seen{ENCODER_LAYERS}", "tags"], ["Y"]))
    graph = helper.make_graph(
        nodes,
        "lengths",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["rows", "length"]) for name in ("IDS", "MASK")],
        [_tensor("Y", "length", ENCODER_TAGS)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (weights | constants).items()],
    )
    _write(directory, graph, max_batch_rows)
    file = directory / "1" / "model.onnx"
    session = open_session(file, THREADS)
    lengths = random.integers(LENGTHS[0], LENGTHS[1] + 1, LENGTH_REQUESTS)
    variants = tuple(_variant(directory.name, session, int(length), random) for length in lengths)
    first = variants[0]
    title = "encoder, lengths {} to {}".format(*LENGTHS)
    return BenchModel(directory.name, title, file, max_batch_rows, first.request, first.answer, variants)


def _attention(layer: int) -> list[onnx.NodeProto]:
    """One layer of an encoder: attention to what the mask shows, and a residual."""
    seen, own = f"seen{layer}", [f"{kind}{layer}" for kind in ("query", "key", "value")]
    return [
        *(helper.make_node("MatMul", [seen, f"{name}_weights"], [name]) for name in own),
        helper.make_node("Transpose", [own[1]], [f"turned{layer}"], perm=[0, 2, 1]),
        helper.make_node("MatMul", [own[0], f"turned{layer}"], [f"scores{layer}"]),
        helper.make_node("Add", [f"scores{layer}", "off_each"], [f"masked{layer}"]),
        helper.make_node("Softmax", [f"masked{layer}"], [f"weights{layer}"], axis=-1),
        helper.make_node("MatMul", [f"weights{layer}", own[2]], [f"attended{layer}"]),
        helper.make_node("Add", [f"attended{layer}", seen], [f"seen{layer + 1}"]),
    ]


def _variant(name: str, session: onnxruntime.InferenceSession, length: int, random: np.random.Generator) -> Variant:
    ids = random.integers(0, ENCODER_WORDS, (1, length))
    feeds = {"IDS": ids, "MASK": np.ones_like(ids)}
    request = ModelInferRequest(model_name=name, raw_input_contents=[array.tobytes() for array in feeds.values()])
    for tensor, array in feeds.items():
        request.inputs.add(name=tensor, datatype="INT64", shape=array.shape)
    return Variant(request.SerializeToString(), session.run(None, feeds)[0])


def _bucketed(make: Callable[[Path], BenchModel]) -> Callable[[Path], BenchModel]:
    """A model of sequences with shape buckets."""

    def generate_bucketed(directory: Path) -> BenchModel:
        model = make(directory)
        shapes = {"sequence": {"sizes": [16, 32, 48, 64, 96, 128], "axes": dict.fromkeys(("IDS", "MASK", "Y"), 0)}}
        text = json.dumps(json.dumps(shapes))
        with (directory / "config.pbtxt").open("a") as config:
            config.write(f'parameters {{ key: "shape_buckets" value {{ string_value: {text} }} }}\n')
        return replace(model, title=f"{model.title}, buckets")

    return generate_bucketed


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
    "lengths": _lengths,
    "lengths_bucketed": _bucketed(_lengths),
    **{name: _part(layers) for name, layers in PIPELINE.items()},
    "pipeline": _pipeline,
    "ocr": _ocr,
    **{f"ocr_{most}": _ocr_in_batches(most) for most in OCR_SIZES},
}


def _random_rows(*dims: int) -> NDArray[np.float32]:
    return np.random.default_rng(SEED).random((1, *dims), np.float32)


def _tensor(name: str, *dims: int | str) -> onnx.ValueInfoProto:
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
