"""Label files: one label a line, whatever the lines hold, and what keeps a model from loading."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.repository.errors import ModelLoadError
from sluice_server.repository.labels import MAX_LABEL_FILE_BYTES, read_labels

if TYPE_CHECKING:
    from pathlib import Path


def config(**files: str) -> ModelConfig:
    made = ModelConfig(name="m")
    for name, filename in files.items():
        made.output.add(name=name, label_filename=filename)
    return made


@pytest.mark.parametrize(
    ("data", "wanted"),
    [
        (b"", ()),
        (b"one", (b"one",)),
        (b"one\ntwo\n", (b"one", b"two")),
        (b"one\n\n three \n\n", (b"one", b"", b" three ", b"")),
        (b"one\r\ntwo\r\n", (b"one", b"two")),
        (b"\xff\n\0", (b"\xff", b"\0")),
    ],
)
def test_a_line_is_the_label_of_its_number(data: bytes, wanted: tuple[bytes, ...], tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_bytes(data)
    assert read_labels(config(p="labels.txt", q=""), tmp_path) == {"p": wanted}


def test_each_output_has_its_own_file_in_any_folder_of_the_model(tmp_path: Path) -> None:
    (tmp_path / "names").mkdir()
    (tmp_path / "names" / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    assert read_labels(config(p="names/a", q="b"), tmp_path) == {"p": (b"a",), "q": (b"b",)}


@pytest.mark.parametrize("kind", ["missing", "a directory", "too large"])
def test_a_file_that_cannot_be_read_is_named(kind: str, tmp_path: Path) -> None:
    if kind == "a directory":
        (tmp_path / "labels.txt").mkdir()
    if kind == "too large":
        with (tmp_path / "labels.txt").open("wb") as file:
            file.truncate(MAX_LABEL_FILE_BYTES + 1)  # a hole: it takes no disk
    with pytest.raises(ModelLoadError, match=r"label file 'labels.txt' of output 'p' of model 'm'"):
        read_labels(config(p="labels.txt"), tmp_path)
