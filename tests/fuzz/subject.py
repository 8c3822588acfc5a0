"""What is fuzzed, whatever engine brings the inputs: subjects, targets, and several messages in one input."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from hypothesis import strategies as st

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from contextlib import AbstractContextManager
    from pathlib import Path

    from fuzz.mutators import Mutator

MESSAGES_MAX = 8
"""In one input; what stands behind them is dropped."""

MESSAGE_BYTES_MAX = 0xFFFF

EDITS_MAX = 4


class Subject(Protocol):
    """A part of the server that is open and takes inputs."""

    def check(self, data: bytes) -> None:
        """Send one input and judge what becomes of it; any exception is a violation."""

    def look(self) -> None:
        """See that good requests are still answered correctly, and that nothing of the inputs is left behind."""


@dataclass(frozen=True)
class Target:
    """One thing to fuzz: how to open it, inputs to begin with, inputs that Hypothesis builds, how many `make` sends.

    `mutator` changes inputs in ways that leave most of them in one piece; None where any bytes are as good.
    """

    name: str
    open: Callable[[Path], AbstractContextManager[Subject]]
    seeds: Callable[[], list[bytes]]
    built: st.SearchStrategy[bytes]
    bytes_inputs: int
    built_inputs: int
    mutator: Mutator | None = None


class LogWatch(logging.Handler):
    """Keeps what no input may have logged: errors, and anything with a stack trace."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.bad: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR or record.exc_info:
            trace = f"\n{logging.Formatter().formatException(record.exc_info)}" if record.exc_info else ""
            self.bad.append(record.getMessage() + trace)

    def check(self) -> None:
        """AssertionError when something has been logged since the last time."""
        bad, self.bad = self.bad, []
        assert not bad, f"logged: {bad[0]}"


@contextmanager
def watched(subject: Subject) -> Iterator[Subject]:
    """A subject that may log no error and no stack trace either."""
    watch = LogWatch()
    root = logging.getLogger()
    root.addHandler(watch)
    try:
        yield _Watched(subject, watch)
    finally:
        root.removeHandler(watch)


@dataclass(frozen=True)
class _Watched:
    subject: Subject
    watch: LogWatch

    def check(self, data: bytes) -> None:
        self.subject.check(data)
        self.watch.check()

    def look(self) -> None:
        self.subject.look()
        self.watch.check()


def joined(messages: list[bytes]) -> bytes:
    """One input of several messages: each behind its length of two bytes."""
    return b"".join(len(message).to_bytes(2, "little") + message for message in messages)


def parted(data: bytes) -> list[bytes]:
    """The messages of an input, whatever bytes it is; the last one may be cut short."""
    messages = []
    offset = 0
    while offset + 2 <= len(data) and len(messages) < MESSAGES_MAX:
        start = offset + 2
        offset = start + int.from_bytes(data[offset:start], "little")
        messages.append(data[start:offset])
    return messages


@st.composite
def changed(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A seed of which some bytes are others, are gone, or came in addition."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, EDITS_MAX))):
        place = draw(st.integers(0, len(data)))
        match draw(st.integers(0, 4)):
            case 0:
                del data[place:]
            case 1:
                del data[place : place + draw(st.integers(1, 4))]
            case 2:
                data[place:place] = draw(st.binary(min_size=1, max_size=4))
            case _:
                data[place : place + 1] = bytes([draw(st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]) | st.integers(0, 255))])
    return bytes(data)
