"""Fuzzed here: `model_warmup` of models that are loaded for each input, with ONNX Runtime and all."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

from google.protobuf import text_format
from google.protobuf.message import DecodeError
from hypothesis import strategies as st

from sluice_batching import ExpiryTimer
from sluice_proto.model_config_pb2 import DataType, ModelConfig, ModelWarmup
from sluice_server.errors import SluiceError
from sluice_server.execution.loader import ModelLoader
from sluice_server.execution.warmup import DIRECTORY
from sluice_server.repository.layout import Repositories
from sluice_server.settings import ModelSettings
from sluice_server.status import StatusMapper
from support import models
from support.any_messages import any_message

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RUNS_MAX = 8
"""Of one sample: as many as somebody asks for are run, and this is about what is asked for."""

ELEMENTS_MAX = 1 << 16
"""Of one input: a sample may have as many as fit into memory, and take as long."""

MODELS = ("identity", "text", "picky", "open")


class Warmups:
    """A configuration's samples, by the first byte for one of the models: it is loaded, or why not is told."""

    def __init__(self, directory: Path) -> None:
        repository = directory / "models"
        models.write_model(repository, "identity", models.identity("FP32", ("N", 4)), max_batch_size=8)
        models.write_model(repository, "text", models.identity("BYTES", ("N", 2)), max_batch_size=8)
        models.write_model(repository, "picky", models.gather(), max_batch_size=8)
        models.write_model(repository, "open", models.identity("FP32", ("A", "B")))
        for name in MODELS:
            folder = repository / name / DIRECTORY
            folder.mkdir()
            (folder / "row").write_bytes(bytes(16))
            (folder / "short").write_bytes(b"\3")
        self._timer = ExpiryTimer()
        self._repositories = Repositories([repository])
        self._loader = ModelLoader(ModelSettings(repositories=(repository,)), StatusMapper(), self._timer, environ={})

    def check(self, data: bytes) -> None:
        """It loads and every run is counted, or the error is one of the tree and names the model."""
        if not data:
            return
        name = MODELS[data[0] % len(MODELS)]
        try:
            written = ModelConfig.FromString(data[1:])
        except DecodeError:
            return
        if any(is_large(sample) for sample in written.model_warmup):
            return
        directory = self._repositories.find(name)
        config = text_format.Parse((directory.path / "config.pbtxt").read_text(), ModelConfig())
        config.model_warmup.extend(written.model_warmup)
        try:
            model = self._loader(directory, 1, config)
        except SluiceError as error:
            self._judge_refusal(str(error), name)
            return
        runs = sum(max(1, sample.count) for sample in config.model_warmup)
        assert model.statistics.snapshot().execution_count == runs

    @staticmethod
    def _judge_refusal(text: str, name: str) -> None:
        assert name in text
        text.encode()  # so that it can be sent

    def look(self) -> None:
        """Samples of every model are run as ever."""
        for data in warmup_seeds():
            self.check(data)

    def close(self) -> None:
        self._timer.stop()


def is_large(sample: ModelWarmup) -> bool:
    """Whether it takes more time than a fuzzer has, rightly."""
    sizes = [math.prod(max(1, dim) for dim in item.dims) * max(1, sample.batch_size) for item in sample.inputs.values()]
    return sample.count > RUNS_MAX or any(size > ELEMENTS_MAX for size in sizes)


@contextmanager
def open_warmups(directory: Path) -> Iterator[Warmups]:
    subject = Warmups(directory)
    try:
        yield subject
    finally:
        subject.close()


def _sample(key: str, item: str, more: str = "batch_size: 1") -> str:
    return f'model_warmup {{ name: "a" {more} inputs {{ key: "{key}" value {{ {item} }} }} }}\n'


TEXTS = {
    "identity": (
        _sample("X", "data_type: TYPE_FP32 dims: 4 zero_data: true", "batch_size: 2 count: 2"),
        _sample("X", "data_type: TYPE_FP32 dims: 4 random_data: true"),
        _sample("X", 'data_type: TYPE_FP32 dims: 4 input_data_file: "row"'),
    ),
    "text": (
        _sample("X", "data_type: TYPE_STRING dims: 2 random_data: true", "batch_size: 8"),
        _sample("X", 'data_type: TYPE_STRING dims: 2 input_data_file: "short"'),
    ),
    "picky": (
        _sample("INDEX", "data_type: TYPE_INT64 dims: 1 zero_data: true"),
        _sample("INDEX", "data_type: TYPE_INT64 dims: 1 random_data: true"),
    ),
    "open": (_sample("X", "data_type: TYPE_FP32 dims: [ 3, 0 ] zero_data: true"),),
}
"""Of each model; the last sample of `text` and of `picky` fails."""


def warmup_seeds() -> list[bytes]:
    """All samples of each model together, and each alone."""
    found = []
    for name, samples in TEXTS.items():
        number = bytes([MODELS.index(name)])
        messages = [text_format.Parse(text, ModelConfig()) for text in ("".join(samples), *samples)]
        found += [number + message.SerializeToString() for message in messages]
    return found


FILES = ("row", "short", "nope", "../config.pbtxt", "..", "", ".", "/etc/hostname")


@st.composite
def built_warmups(draw: st.DrawFn) -> bytes:
    """A few samples that fit their model nearly, or any sample."""
    number = draw(st.integers(0, len(MODELS) - 1))
    config = ModelConfig()
    for _ in range(draw(st.integers(1, 2))):
        if draw(st.integers(0, 3)) == 0:
            config.model_warmup.append(draw(any_message(ModelWarmup, ("X", "INDEX", *FILES))))
            continue
        sample = config.model_warmup.add(
            name=draw(st.sampled_from(["a", "", "\u00e9"])),
            batch_size=draw(st.sampled_from([1, 1, 2, 8, 9, 0])),
            count=draw(st.sampled_from([0, 1, 2])),
        )
        for name in draw(st.lists(st.sampled_from(["X", "X", "INDEX", "Y", ""]), max_size=2)):
            item = sample.inputs[name]
            item.data_type = draw(st.sampled_from(DataType.values()))
            item.dims.extend(draw(st.lists(st.sampled_from([0, 1, 2, 4, 4, -1]), max_size=3)))
            match draw(st.integers(0, 3)):
                case 0:
                    item.zero_data = draw(st.booleans())
                case 1:
                    item.random_data = draw(st.booleans())
                case 2:
                    item.input_data_file = draw(st.sampled_from(FILES))
    return bytes([number]) + config.SerializeToString()
