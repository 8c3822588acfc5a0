"""Keeps measured batch curves in files, one for each model on each hardware, so that only the first load measures.

A file holds what the curve depends on, and is taken only where all of that is the same: the model file's content, ONNX
Runtime's version, the session's providers and options, the shapes that ran, the processors. Files are replaced as a
whole; a broken one is as good as none, and one that cannot be written costs the next load a measurement.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice_server.execution.batch_curve import Point

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

FOLDER = "batch-curves"

FILE_BYTES_MAX = 1 << 20
"""A curve has some dozens of numbers; what is larger is none."""

FORMAT = 1

Facts = dict[str, Any]
"""What a curve depends on, as JSON has it."""


def default_directory(environ: Mapping[str, str]) -> Path | None:
    """Where caches of this user are: `$XDG_CACHE_HOME/sluice`, `~/.cache/sluice`, or nowhere.

    The XDG Base Directory Specification, which also says that relative paths are to be ignored.
    """
    for variable, below in (("XDG_CACHE_HOME", "sluice"), ("HOME", ".cache/sluice")):
        path = Path(environ.get(variable, ""))
        if path.is_absolute():
            return path / below
    return None


def processors(root: Path = Path("/")) -> str:
    """The names of this machine's processors and NVIDIA GPUs, as Linux tells them; "" where it does not."""
    names: dict[str, None] = {}
    files = [root / "proc/cpuinfo", *sorted(root.glob("proc/driver/nvidia/gpus/*/information"))]
    for file in files:
        try:
            lines = file.read_text(errors="replace").splitlines()
        except OSError:
            continue
        for line in lines:
            key, _, value = line.partition(":")
            if key.strip() in ("model name", "Model"):
                names[value.strip()] = None
    return ", ".join(names)


def file_digest(path: Path) -> str:
    """SHA-256 of a model file. Weights beside it are left out: their values do not change what a run takes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class CurveCache:
    """The curves in one directory, for any thread and process; None keeps nothing."""

    def __init__(self, directory: Path | None) -> None:
        self._directory = directory and directory / FOLDER

    @property
    def keeps(self) -> bool:
        """Whether anything is kept, so that it is worth finding out what a curve depends on."""
        return self._directory is not None

    def get(self, facts: Facts) -> tuple[Point, ...] | None:
        """The curve that was measured under the same circumstances; None for none."""
        if self._directory is None:
            return None
        try:
            with self._path(self._directory, facts).open("rb") as file:
                content = json.loads(file.read(FILE_BYTES_MAX))
            if content["format"] != FORMAT or content["facts"] != facts:
                return None
            points = tuple(Point(rows, float(rate)) for rows, rate in content["points"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return points if _is_curve(points) else None

    def put(self, facts: Facts, points: tuple[Point, ...]) -> None:
        """Keep a curve; what keeps it from that is logged."""
        if self._directory is None:
            return
        text = json.dumps({"format": FORMAT, "facts": facts, "points": [[p.rows, p.rows_per_s] for p in points]})
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            _replace(self._path(self._directory, facts), text)
        except OSError as error:
            extra = {"directory": str(self._directory), "reason": error.strerror or str(error)}
            logger.warning("a batch curve cannot be kept, and is measured again at the next load", extra=extra)

    @staticmethod
    def _path(directory: Path, facts: Facts) -> Path:
        return directory / f"{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()}.json"


def _is_curve(points: tuple[Point, ...]) -> bool:
    sizes = [point.rows for point in points]
    return (
        all(type(size) is int and size > 0 for size in sizes)
        and sizes == sorted(set(sizes))
        and all(math.isfinite(point.rows_per_s) and point.rows_per_s > 0 for point in points)
    )


def _replace(path: Path, text: str) -> None:
    """Write a file that is there as a whole or not at all."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
