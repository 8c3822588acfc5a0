"""The README's table of features: whatever of Triton's flags and fields is refused by name stands in it."""

from __future__ import annotations

import re
from pathlib import Path

from sluice_server import refused_flags
from sluice_server.repository import fields

TEXT = (Path(__file__).resolve().parents[1] / "README.md").read_text()
TABLE = [line for line in TEXT.partition("## What is there, and what is not")[2].splitlines() if line.startswith("| ")]
NAMED = {name for line in TABLE for name in re.findall(r"`([^`]+)`", line)}


def is_named(name: str) -> bool:
    """Whether a name stands there, alone or as one of a family: `--sagemaker-*`."""
    return name in NAMED or any(known.endswith("*") and name.startswith(known[:-1]) for known in NAMED)


def test_every_flag_that_is_refused_is_told():
    assert not [flag for flag in refused_flags.REFUSED if not is_named(flag)]


def test_every_field_that_is_refused_is_told():
    assert not [path for path in fields.REFUSED if not is_named(path.rpartition(".")[2])]


def test_what_is_told_to_be_refused_is():
    rows = [line for line in TABLE if "| no: refused by name" in line]
    flags = {name for line in rows for name in re.findall(r"`(--[a-z-]+)`", line)}
    assert flags
    assert flags <= set(refused_flags.REFUSED)
