"""Targets that are broken on purpose, each in its own way: what a run must find."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from fuzz.subject import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

BAD = b"\7"
"""Inputs with this byte bring it out."""

KEPT_BYTES = 1 << 18
kept: list[bytes] = []


class Broken:
    """A subject that does something for each bad input, and something at each look."""

    def __init__(self, does: Callable[[], object], at_look: Callable[[], object] = bool, bad: bytes = BAD) -> None:
        self._does = does
        self._at_look = at_look
        self._bad = bad

    def check(self, data: bytes) -> None:
        if self._bad in data:
            self._does()

    def look(self) -> None:
        self._at_look()


def fail() -> None:
    raise AssertionError("a bad input")


def hang() -> None:
    for _ in itertools.count():
        pass


def log() -> None:
    logging.getLogger("sluice_server").error("went wrong")


@contextmanager
def opened(subject: Broken, _directory: Path) -> Iterator[Broken]:
    yield subject


SUBJECTS = {
    "good": Broken(bool),
    "fails": Broken(fail),
    "hangs": Broken(hang),
    "dies": Broken(lambda: os.kill(os.getpid(), signal.SIGSEGV)),
    "logs": Broken(log),
    "leaks": Broken(lambda: kept.append(os.urandom(KEPT_BYTES)), bad=b""),
    "breaks": Broken(bool, at_look=fail),
}
TARGETS = {
    name: Target(name, functools.partial(opened, subject), lambda: [b"seed", BAD], st.binary(max_size=3), 1, 1)
    for name, subject in SUBJECTS.items()
}
