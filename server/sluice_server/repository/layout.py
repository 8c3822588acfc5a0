"""Triton's folder layout: `<repository>/<model>/config.pbtxt` and `<repository>/<model>/<version>/model.onnx`.

Names that come from clients are only ever compared with what a directory lists, never joined to a path, so that no
name leads out of a repository.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sluice_server.errors import InvalidArgument
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.validate import path_problem
from sluice_server.repository.versions import MAX_VERSION

CONFIG_FILENAME: Final = "config.pbtxt"

CONFIGS_DIRECTORY: Final = "configs"
"""Has the configurations that `--model-config-name` chooses from, as `<name>.pbtxt`."""

MAX_OVERRIDE_DEPTH: Final = 8
"""Folders in the name of an uploaded file; `<version>/<file>` needs 2, external data seldom more than 3."""

_NOT_A_MODEL: Final = "lost+found"  # what a fresh ext4 volume has in its root

Fingerprint = tuple[tuple[str, int, int], ...]
"""(relative path, mtime in ns, size in bytes) of everything below a directory; equal when nothing changed."""


@dataclass(frozen=True, slots=True)
class ModelDirectory:
    """One model's directory: `versions` in rising order, `config_path` None without a configuration."""

    name: str
    path: Path
    config_path: Path | None
    versions: tuple[int, ...]

    def model_file(self, version: int, filename: str) -> Path:
        """Give the file to load: `filename` of a version, or the file of the same name in a folder of that name.

        The second form keeps a model together with its external data. Raises ModelLoadError when there is neither.
        """
        path = self.path / str(version) / filename
        if path.is_dir():
            path /= path.name
        if not path.is_file():
            raise ModelLoadError(
                f"unable to find '{path.relative_to(self.path)}' for model '{self.name}'",
                model=self.name,
                triton_code="Unavailable",
            )
        return path

    def fingerprint(self) -> Fingerprint:
        """Say what is in the directory now, so that a later call can tell whether it changed; links are followed."""
        return fingerprint(self.path)

    def of_version(self, whole: Fingerprint, version: int) -> Fingerprint:
        """What of the directory's fingerprint concerns a version: its own files, and what all versions share."""
        others = {str(number) for number in self.versions if number != version}
        return tuple(item for item in whole if item[0].partition("/")[0] not in others)


class Repositories:
    """The model repositories of a server, read anew from disk on every call."""

    def __init__(self, paths: Sequence[Path], config_name: str = "") -> None:
        """Raise ConfigError when a path is no directory that can be read, or stands there twice.

        With `config_name`, `configs/<config_name>.pbtxt` comes before config.pbtxt in the models that have it.
        """
        self.paths = tuple(paths)
        self._config_name = config_name
        seen: set[Path] = set()
        for path in self.paths:
            _list(path)
            if path.resolve() in seen:
                raise ConfigError(f"model repository '{path}' is given twice")
            seen.add(path.resolve())

    def __repr__(self) -> str:
        return f"Repositories({', '.join(map(str, self.paths))})"

    def scan(self) -> dict[str, tuple[Path, ...]]:
        """Give all model names in order, each with its directories: more than one is an error of that model."""
        models: dict[str, list[Path]] = {}
        for repository in self.paths:
            for entry in _list(repository):
                if entry.name.startswith(".") or entry.name == _NOT_A_MODEL or not entry.is_dir():
                    continue
                if not _is_unicode(entry.name):  # no client can name it, and no answer can carry it
                    continue
                models.setdefault(entry.name, []).append(repository / entry.name)
        return {name: tuple(models[name]) for name in sorted(models)}

    def fingerprints(self) -> dict[str, tuple[tuple[Path, Fingerprint], ...]]:
        """Say what is in all directories of each model now, so that a later call can tell which have changed."""
        return {name: tuple((path, fingerprint(path)) for path in paths) for name, paths in self.scan().items()}

    def find(self, name: str) -> ModelDirectory:
        """Give a model's directory.

        Raises InvalidArgument for a name that can be no model's, ConfigError when no repository has the model, or
        several have it.
        """
        check_model_name(name)
        places = self.scan().get(name, ())
        if not places:
            where = ", ".join(f"'{path}'" for path in self.paths)
            raise ConfigError(f"model '{name}' is in no model repository, looked in: {where}", model=name)
        if len(places) > 1:
            where = " and ".join(f"'{path}'" for path in places)
            raise ConfigError(f"model '{name}' is in several model repositories: {where}; keep one", model=name)
        return read_directory(name, places[0], self._config_name)


def fingerprint(path: Path) -> Fingerprint:
    """Say what is in a directory now; links are followed."""
    return tuple(sorted(_walk(path, "", frozenset())))


def check_model_name(name: str) -> None:
    """Raise InvalidArgument for a name that is empty or would lead to another directory."""
    if not name:
        raise InvalidArgument("Model name cannot be empty. Please enter a valid name to deploy.")
    if name in (".", "..") or any(character in name for character in "/\\\0"):
        raise InvalidArgument(f"model name must not contain path traversal characters, got {name!r}")


def read_directory(name: str, path: Path, config_name: str = "") -> ModelDirectory:
    """Look at a model's directory, in a repository or written by `write_override`."""
    versions = []
    config_path = None
    for entry in _list(path):
        if entry.name == CONFIG_FILENAME:
            config_path = path / CONFIG_FILENAME
        elif _is_version(entry.name) and entry.is_dir():
            versions.append(int(entry.name))
    chosen = path / CONFIGS_DIRECTORY / f"{config_name}.pbtxt"
    if config_name and chosen.is_file():
        config_path = chosen
    return ModelDirectory(name, path, config_path, tuple(sorted(versions)))


def write_override(name: str, files: Mapping[str, bytes], directory: Path) -> ModelDirectory:
    """Write the files of a load request, named `<version>/<file>`, into an empty directory that becomes the model's.

    Raises InvalidArgument for a name that can be no model's. Raises ConfigError for a file name that would leave the
    directory or is none at all, before anything is written, and for whatever the file system refuses later.
    """
    check_model_name(name)
    for filename in files:
        problem = path_problem(filename)
        if not problem and filename.count("/") >= MAX_OVERRIDE_DEPTH:
            problem = f"has more than {MAX_OVERRIDE_DEPTH} parts"
        if problem:
            raise ConfigError(f"file '{_shorten(filename)}' of the load request {problem}", model=name)
    for filename, data in files.items():
        try:
            target = directory / filename
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("xb") as file:
                file.write(data)
        except (OSError, UnicodeEncodeError) as error:
            what = error.strerror if isinstance(error, OSError) else "is no name for this file system"
            message = f"file '{_shorten(filename)}' of the load request cannot be written: {what}"
            raise ConfigError(message, model=name) from error
    return read_directory(name, directory)


def _list(path: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        raise ConfigError(f"directory '{path}' cannot be read: {error.strerror}") from error


def _is_unicode(name: str) -> bool:
    """Whether the bytes of a file's name are UTF-8; those that are not came as halves of surrogate pairs (PEP 383)."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_version(name: str) -> bool:
    """Positive decimal numbers as they are usually written: `1`, not `01`; all other names mean something else."""
    return name.isascii() and name.isdigit() and name[0] != "0" and len(name) <= 19 and int(name) <= MAX_VERSION


def _walk(path: Path, prefix: str, above: frozenset[tuple[int, int]]) -> Iterator[tuple[str, int, int]]:
    """List everything below `path`; what vanishes meanwhile is left out, a link to a directory above is not entered."""
    try:
        own = path.stat()
        with os.scandir(path) as entries:
            listed = list(entries)
    except OSError:
        return
    identity = (own.st_dev, own.st_ino)
    if identity in above:
        return
    for entry in listed:
        name = f"{prefix}{entry.name}"
        try:
            if entry.is_dir():
                yield name, 0, 0
                yield from _walk(path / entry.name, f"{name}/", above | {identity})
            else:
                status = entry.stat()
                yield name, status.st_mtime_ns, status.st_size
        except OSError:
            continue


def _shorten(name: str) -> str:
    limit = 80  # enough to recognise a file by
    return name if len(name) <= limit else f"{name[:limit]}..."
