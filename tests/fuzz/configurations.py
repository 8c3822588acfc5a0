"""Fuzzed here: config.pbtxt, the JSON of a load call, and the whole of load calls with their files and names."""

from __future__ import annotations

import json
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format, text_format
from hypothesis import strategies as st

from fuzz.serving import InlinePool
from fuzz.subject import joined, parted
from manager.manager_fakes import FakeLoader, World
from sluice_proto import grpc_service_pb2 as pb
from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.errors import SluiceError
from sluice_server.execution.options import plan_options
from sluice_server.execution.parameters import parameter_values
from sluice_server.execution.placement import placements
from sluice_server.execution.providers import choose_providers
from sluice_server.execution.threads import plan_threads
from sluice_server.graph import GraphSignature, TensorSpec
from sluice_server.protocol.dispatch import Dispatcher
from sluice_server.protocol.interface import ModelInterface
from sluice_server.protocol.rpcs import ServerIdentity, path_of, rpc_table
from sluice_server.repository.autocomplete import complete, normalize
from sluice_server.repository.config import parse_json, read_config
from sluice_server.repository.describe import explain, explain_ensemble
from sluice_server.repository.ensembles import is_ensemble
from sluice_server.repository.errors import ConfigError
from sluice_server.repository.labels import read_labels
from sluice_server.repository.validate import scalar_tensors
from sluice_server.repository.versions import select
from sluice_server.security.control import ControlPolicy
from sluice_server.status import Code, StatusMapper
from support.any_messages import any_message
from support.fakes import RecordingCall

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sluice_server.repository.layout import ModelDirectory

SIGNATURES = (
    GraphSignature((TensorSpec("X", "FP32", (-1, 64)),), (TensorSpec("p", "FP32", (-1, 10)),)),
    GraphSignature(
        (TensorSpec("X", "FP32", (-1, -1)), TensorSpec("B", "FP32", (2,), optional=True)),
        (TensorSpec("Y", "BYTES", (-1,)),),
    ),
    GraphSignature((TensorSpec("X", "INT64", ()),), (TensorSpec("Y", "FP32", (16,)),)),
)
"""What model files may say: one that batches, one with an optional input and open shapes, and a scalar."""

NAME = "m"
CPUS = 2
PROVIDERS = ("CPUExecutionProvider",)


def plan(written: ModelConfig | None, signature: GraphSignature, directory: Path, name: str = NAME) -> ModelConfig:
    """All that loading decides of a configuration without ONNX Runtime; an error is one of the tree."""
    config = normalize(written, name=name)
    if is_ensemble(config):
        ModelInterface.of(config, 1, labels=read_labels(config, directory))
        assert all(explain_ensemble(config, config, [ModelConfig()] * len(config.ensemble_scheduling.step)))
        assert normalize(config, name=name) == config
        return config
    for device, members in placements(config).items():
        kind, group = members[0].kind, members[0].name
        providers = choose_providers(config, kind, max(device, 0), PROVIDERS, 0, group=group)
        threads = plan_threads(
            sum(member.count for member in members), parameter_values(config), CPUS, model=name, on_gpu=providers.on_gpu
        )
        plan_options(config, threads)
    completed = complete(config, signature)
    ModelInterface.of(completed, 1, scalar_tensors(completed, signature), read_labels(completed, directory))
    assert all(explain(written, completed, signature))
    assert complete(normalize(completed, name=name), signature) == completed
    return completed


def check_config(config: ModelConfig, directory: Path) -> None:
    """It can be planned for each model file, or the error is one of the tree; and so are versions."""
    assert set(select(config.version_policy, (1, 2, 9))) <= {1, 2, 9}
    for signature in SIGNATURES:
        try:
            plan(config, signature, directory)
        except SluiceError as error:
            str(error).encode()  # so that it can be sent


class Texts:
    """Any bytes as config.pbtxt."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._path = directory / "config.pbtxt"

    def check(self, data: bytes) -> None:
        """A configuration, or a ConfigError."""
        self._path.write_bytes(data)
        try:
            config = read_config(self._path)
        except ConfigError as error:
            str(error).encode()  # so that it can be sent
        else:
            check_config(config, self._directory)

    def look(self) -> None:
        """A usual configuration is planned as ever."""
        self._path.write_bytes(text_seeds()[0])
        assert plan(read_config(self._path), SIGNATURES[0], self._directory).max_batch_size == 8


class Jsons:
    """Any bytes that are text as the `config` of a load call."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def check(self, data: bytes) -> None:
        """A configuration, or a ConfigError. What is no text is no parameter, and is not looked at."""
        try:
            config = parse_json(data.decode())
        except ConfigError as error:
            str(error).encode()  # so that it can be sent
        except UnicodeDecodeError:
            pass
        else:
            check_config(config, self._directory)

    def look(self) -> None:
        """A usual configuration is planned as ever."""
        assert plan(parse_json(json_seeds()[0].decode()), SIGNATURES[0], self._directory).max_batch_size == 8


CONFIGS = (
    """
    platform: "onnxruntime_onnx"
    max_batch_size: 8
    input [ { name: "X" data_type: TYPE_FP32 dims: [ 64 ] } ]
    output { name: "p" data_type: TYPE_FP32 dims: 10 label_filename: "labels.txt" }
    dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
    parameters { key: "intra_op_thread_count" value: { string_value: "1" } }
    """,
    """
    name: "m" backend: "onnxruntime" version_policy { specific { versions: [ 1, 2 ] } }
    input { name: "X" data_type: TYPE_FP32 dims: [ -1, 6 ] reshape { shape: [ -1, 2, 3 ] } }
    input { name: "B" data_type: TYPE_FP32 dims: 2 optional: true }
    output { name: "Y" data_type: TYPE_STRING dims: -1 }
    instance_group [ { count: 2 kind: KIND_CPU }, { name: "g" kind: KIND_GPU gpus: [ 0 ] } ]
    """,
    """
    version_policy { latest { num_versions: 2 } }
    optimization { graph { level: 1 } execution_accelerators { gpu_execution_accelerator { name: "cuda" } }
      input_pinned_memory { enable: false } }
    model_warmup { name: "w" batch_size: 1 } sequence_batching { direct { } } response_cache { enable: true }
    """,
    'version_policy { all { } } default_model_filename: "other.onnx" metric_tags { key: "a" value: "b" }',
    """
    platform: "ensemble" max_batch_size: 4 input { name: "X" data_type: TYPE_FP32 dims: 6 }
    output { name: "Y" data_type: TYPE_FP32 dims: 6 } ensemble_scheduling { max_inflight_requests: 3
      step { model_name: "a" model_version: -1 input_map { key: "X" value: "X" } output_map { key: "Y" value: "B" } }
      step { model_name: "b" input_map { key: "X" value: "B" } output_map { key: "Y" value: "Y" } } }
    """,
)


def text_seeds() -> list[bytes]:
    """Usual configurations, and one with enums by their numbers, of which the second is none."""
    return [text.encode() for text in (*CONFIGS, "input { data_type: 11 dims: 4 } output { data_type: 99999999999 }")]


def json_seeds() -> list[bytes]:
    """The same as JSON, in both spellings of names."""
    messages = [text_format.Parse(text, ModelConfig()) for text in CONFIGS]
    return [
        json_format.MessageToJson(message, preserving_proto_field_name=kept, indent=None).encode()
        for message in messages
        for kept in (True, False)
    ]


WORDS = (
    "m", "X", "Y", "B", "p", "onnxruntime", "onnxruntime_onnx", "ensemble", "cuda", "tensorrt", "labels.txt",
    "model.onnx", "intra_op_thread_count", "execution_mode", "enable_mem_area", "1", "0",
    "true", "memory.enable_memory_arena_shrinkage", "cpu:0", "../x", "g",
)  # fmt: skip


_configs = any_message(ModelConfig, WORDS)
built_texts = _configs.map(lambda config: text_format.MessageToString(config).encode())


@st.composite
def built_jsons(draw: st.DrawFn) -> bytes:
    """A configuration as JSON, of which some member may have been replaced by something else."""
    tree = json_format.MessageToDict(draw(_configs), preserving_proto_field_name=draw(st.booleans()))
    place: Any = tree
    while isinstance(place, dict | list) and place and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else list(range(len(place)))))
        if draw(st.booleans()):
            place = place[key]
        else:
            place[key] = draw(ODD)
    return json.dumps(tree).encode()


ODD = st.sampled_from(
    [None, True, 0, -1, 1.5, 2**31, 2**63, 1e99, "", "1", "x", "\ud800", [], {}, [None], [[]], {"a": 1}, [0], ["x"]]
)


@contextmanager
def open_texts(directory: Path) -> Iterator[Texts]:
    (directory / "labels.txt").write_text("zero\none\n")
    yield Texts(directory)


@contextmanager
def open_jsons(directory: Path) -> Iterator[Jsons]:
    (directory / "labels.txt").write_text("zero\none\n")
    yield Jsons(directory)


# --- load calls


class PlanningLoader(FakeLoader):
    """Loads everything but the model itself: the configuration is planned against a signature."""

    def __call__(
        self, directory: ModelDirectory, version: int, config: ModelConfig | None, parts: Iterable[Any]
    ) -> Any:
        """A model that has nothing to run, or an error."""
        completed = plan(config, SIGNATURES[0], directory.path, directory.name)
        if not is_ensemble(completed):
            directory.model_file(version, completed.default_model_filename)
        self.loads.clear()
        self.models.clear()
        self.files.clear()
        return super().__call__(directory, version, completed, parts)


class Loads:
    """Load and unload calls, several after each other: of each the first byte says which it is."""

    def __init__(self, directory: Path) -> None:
        self._root = directory / "models"
        self._scratch = directory / "scratch"
        self._scratch.mkdir()
        (self._root / "m" / "1").mkdir(parents=True)
        (self._root / "m" / "1" / "model.onnx").write_bytes(b"fake")
        tempfile.tempdir = str(self._scratch)  # where the files of load calls are written
        self._found = sorted(self._root.rglob("*"))
        self._begin()

    def _begin(self) -> None:
        manager = World(self._root, PlanningLoader()).manager
        manager.start(["m"])
        rpcs = rpc_table(manager, ServerIdentity("triton", "0"), ControlPolicy())
        self._manager = manager
        self._dispatcher = Dispatcher(manager, rpcs, StatusMapper(), InlinePool())  # type: ignore[arg-type]

    def check(self, data: bytes) -> None:
        """Each ends once, as Triton has it; nothing is left of its files, wherever their names lead to."""
        for message in parted(data):
            self._call(message)
        assert not os.listdir(self._scratch)  # noqa: PTH208

    def _call(self, message: bytes) -> None:
        method = "RepositoryModelUnload" if message[:1] == b"\1" else "RepositoryModelLoad"
        call = RecordingCall(message[1:], path_of(method))
        self._dispatcher([call])
        call.wait()
        ((status, _),) = call.ends
        status.message.encode()  # so that it can be sent
        if status.code is Code.INTERNAL:  # what is written is wrong: Triton's code for it
            assert status.message.startswith("failed to load '"), status.message
        else:
            assert status.code in (Code.OK, Code.INVALID_ARGUMENT, Code.UNIMPLEMENTED), status

    def look(self) -> None:
        """The model of the repository is loaded as ever, by a server that has not heard of the others."""
        assert sorted(self._root.rglob("*")) == self._found
        self._call(b"\0" + load("m"))
        assert self._manager.find("m", "").interface.name == "m"
        self._begin()


def load(model: str, config: str | None = None, **files: bytes) -> bytes:
    """A load call; the names of the files have `_` for a slash."""
    request = pb.RepositoryModelLoadRequest(model_name=model)
    if config is not None:
        request.parameters["config"].string_param = config
    for name, data in files.items():
        request.parameters[f"file:{name.replace('_', '/')}"].bytes_param = data
    return request.SerializeToString()


def load_seeds() -> list[bytes]:
    """Loads with and without overrides, and unloads."""
    config = '{"max_batch_size": 4}'
    unload = pb.RepositoryModelUnloadRequest(model_name="m")
    unload.parameters["unload_dependents"].bool_param = True
    plain = b"\0" + load("m")
    brought = b"\0" + load("m", config, **{"1_model.onnx": b"x", "1_data_weights": b"y", "labels.txt": b"a\nb"})
    return [
        joined([plain]),
        joined([b"\0" + load("m", config), plain]),
        joined([brought, b"\1" + unload.SerializeToString()]),
        joined([b"\1" + unload.SerializeToString(), b"\0" + load("new", "{}", **{"2_model.onnx": b"x"})]),
        joined([b"\0" + load("m", config, **{".._.._x": b"x"}), b"\0" + load("..", "{}"), b"\0" + load("nope")]),
    ]


FILES = st.sampled_from(
    ["1/model.onnx", "2/model.onnx", "config.pbtxt", "1", "1/", "/1", "..", "../x", "1/../../x", "a/b/c/d/e/f/g/h/i",
     "1/model.onnx/x", "\0", "\ud7ff", "x" * 300, "1//x", "01/model.onnx", "labels.txt", "\\", "1\\x", "."]
)  # fmt: skip


@st.composite
def built_loads(draw: st.DrawFn) -> bytes:
    """Calls with any configuration and files of any names."""
    calls = []
    for _ in range(draw(st.integers(1, 3))):
        if draw(st.integers(0, 4)) == 0:
            unload = any_message(pb.RepositoryModelUnloadRequest, (*WORDS, "unload_dependents"))
            calls.append(b"\1" + draw(unload).SerializeToString())
            continue
        request = draw(any_message(pb.RepositoryModelLoadRequest, (*WORDS, "config", "file:1/model.onnx")))
        request.model_name = draw(st.sampled_from(["m", "m", "new", request.model_name]))
        if draw(st.integers(0, 3)):
            request.ClearField("repository_name")
            request.ClearField("parameters")
        if draw(st.booleans()):
            request.parameters["config"].string_param = draw(built_jsons()).decode()
        for name in draw(st.lists(FILES | st.text(max_size=4), max_size=3)):
            request.parameters[f"file:{name}"].bytes_param = draw(st.binary(max_size=8))
        calls.append(b"\0" + request.SerializeToString())
    return joined(calls)


@contextmanager
def open_loads(directory: Path) -> Iterator[Loads]:
    before = tempfile.tempdir
    try:
        yield Loads(directory)
    finally:
        tempfile.tempdir = before
