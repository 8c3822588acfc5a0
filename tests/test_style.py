"""House rules that no linter has: a file says what it is for, functions fit a screen, packages list their names."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

import sluice_batching
import sluice_client
import sluice_proto
import sluice_server

ROOT = Path(__file__).parents[1]

FUNCTION_LINES_MAX = 50
"""A screen: signature, docstring and body."""

SHORTEST_PURPOSE = 15
"""Fewer characters cannot say what a file is for."""

FOLDERS = ("proto", "batching", "server", "client", "deploy", "loadtests", "tests")
OTHER_SOURCES = ("Makefile", "pyproject.toml", "proto", "deploy", ".ci/run")
COMMENT_STARTS = {".proto": "//", ".pbtxt": "#", ".toml": "#", ".yaml": "#", ".sh": "#", "": "#"}


def is_ours(path: Path) -> bool:
    return not {"__pycache__", "node_modules"} & set(path.parts) and "_pb2" not in path.name


@cache
def python_files() -> tuple[Path, ...]:
    found = (path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py")))
    return tuple(path.relative_to(ROOT) for path in found if is_ours(path))


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def packages() -> list[ModuleType]:
    """Every package of the distribution, the inner ones too."""
    found = [sluice_batching, sluice_client, sluice_proto, sluice_server]
    for package in tuple(found):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            found += [importlib.import_module(module.name)] if module.ispkg else []
    return found


def test_there_is_something_to_look_at():
    assert len(python_files()) > 100
    assert len(packages()) > 8


def test_every_python_file_begins_with_what_it_is_for():
    silent = []
    for path in python_files():
        purpose = ast.get_docstring(parse(path)) or ""
        first = (ROOT / path).read_text().partition("\n")[0]
        if not first.startswith(('"""', 'r"""')) or len(purpose.partition("\n")[0]) < SHORTEST_PURPOSE:
            silent.append(str(path))
    assert not silent


def test_every_function_fits_a_screen():
    too_long = [
        f"{path}:{node.lineno} {node.name} has {lines} lines"
        for path in python_files()
        for node in ast.walk(parse(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := (node.end_lineno or 0) - node.lineno + 1) > FUNCTION_LINES_MAX
    ]
    assert not too_long


def test_other_sources_begin_with_what_they_are_for():
    silent = []
    for place in OTHER_SOURCES:
        path = ROOT / place
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            start = COMMENT_STARTS.get(file.suffix)
            if not file.is_file() or start is None or not is_ours(file):
                continue
            lines = file.read_text().splitlines()
            first = lines[1] if lines and lines[0].startswith("#!") else (lines or [""])[0]
            if not first.startswith(start) or len(first) < SHORTEST_PURPOSE:
                silent.append(str(file.relative_to(ROOT)))
    assert not silent


@pytest.mark.parametrize("package", packages(), ids=lambda package: package.__name__)
def test_a_package_that_imports_names_lists_all_of_them_in_order(package):
    public = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value) and name not in {"annotations", "version"}
    }
    listed = getattr(package, "__all__", [])
    assert listed == sorted(listed, key=by_kind_and_name)
    assert len(set(listed)) == len(listed)
    modules = {name for name in listed if inspect.ismodule(getattr(package, name))}
    assert set(listed) - modules - {"__version__"} == public
    assert all(getattr(package, name, None) is not None for name in listed)


def by_kind_and_name(name: str) -> tuple[int, str]:
    """The order that the linter keeps: constants, classes, the rest."""
    return (0 if name.isupper() else 1 if name[0].isupper() else 2), name


def test_no_test_sleeps_or_patches():
    """Time passes by fake clocks and events, and what a test replaces is passed in."""
    banned = {"sleep", "patch", "Mock", "MagicMock"}
    found = [
        f"{path}:{node.lineno} {node.func.attr}"
        for path in python_files()
        if path.parts[0] == "tests"
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in banned
    ]
    assert not found
