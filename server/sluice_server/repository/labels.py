"""Label files: the names of an output's classes, for the classification extension; read once, at load."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from sluice_server.repository.errors import ModelLoadError

if TYPE_CHECKING:
    from pathlib import Path

    from sluice_proto.model_config_pb2 import ModelConfig

MAX_LABEL_FILE_BYTES: Final = 64 << 20
"""A million labels, as many classes as an answer can be made of, of 64 characters each; it stays in memory."""


def read_labels(config: ModelConfig, directory: Path) -> dict[str, tuple[bytes, ...]]:
    """Read the label file of each output that has one: a label for each line, whose number, from 0, is the class.

    `directory` is the model's, which a checked configuration does not leave. Lines may end as on Windows. Labels need
    not be UTF-8. Raises ModelLoadError for a file that cannot be read.
    """
    return {
        output.name: _read(directory / output.label_filename, output.name, config.name)
        for output in config.output
        if output.label_filename
    }


def _read(path: Path, output: str, model: str) -> tuple[bytes, ...]:
    where = f"label file '{path.name}' of output '{output}' of model '{model}'"
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LABEL_FILE_BYTES + 1)
    except OSError as error:
        raise ModelLoadError(
            f"{where} cannot be read: {error.strerror}", model=model, triton_code="Internal"
        ) from error
    if len(data) > MAX_LABEL_FILE_BYTES:
        raise ModelLoadError(f"{where} has more than {MAX_LABEL_FILE_BYTES} bytes", model=model)
    lines = data.removesuffix(b"\n").split(b"\n") if data else []
    return tuple(line.removesuffix(b"\r") for line in lines)
