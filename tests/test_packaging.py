"""The two distributions, sluice and sluice-native, belong together: a server takes the native one of its version."""

from __future__ import annotations

import importlib.metadata
import tomllib
from pathlib import Path

from sluice_server.transport.choice import MODULE, native_problem
from support.server import need

ROOT = Path(__file__).resolve().parents[1]
CRATE = ROOT / "server" / "native"


def read(path: Path) -> dict:
    return tomllib.loads(path.read_text())


def test_both_have_one_version():
    version = read(ROOT / "pyproject.toml")["project"]["version"]
    crate = read(CRATE / "Cargo.toml")["package"]
    (locked,) = [one for one in read(CRATE / "Cargo.lock")["package"] if one["name"] == crate["name"]]
    assert (crate["version"], locked["version"]) == (version, version)
    assert (crate["name"], read(CRATE / "Cargo.toml")["lib"]["name"]) == ("sluice-native", MODULE)


def test_both_are_for_the_same_python():
    pythons = [read(path / "pyproject.toml")["project"]["requires-python"] for path in (ROOT, CRATE)]
    assert pythons == [">=3.11"] * 2


def test_the_one_that_is_installed_is_taken():
    need("native")
    assert native_problem(importlib.metadata.version("sluice")) == ""
