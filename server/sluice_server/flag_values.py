"""What flags take: a text of the command line becomes a value, or argparse names the flag with the reason."""

from __future__ import annotations

import argparse

from sluice_server.transport.options import INTAKE_THREADS_MAX, MESSAGE_BYTES_MAX, Compression

NUMBER_MAX = 2**31 - 1
"""What gRPC's C core takes for a number; as milliseconds, it stands for ever there."""


class SettingsError(Exception):
    """A flag or a value that cannot be used; the text names it and says what to do."""


def switch(text: str) -> bool:
    """Triton's spellings of true and false."""
    values = {"true": True, "1": True, "on": True, "false": False, "0": False, "off": False}
    try:
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}") from None


def whole(text: str) -> int:
    """A number that may be 0, of any size."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text!r}")
    return value


def positive_whole(text: str) -> int:
    """A number of any size, but not 0."""
    value = whole(text)
    if not value:
        raise argparse.ArgumentTypeError("expected a whole number > 0, got 0")
    return value


def count(text: str) -> int:
    """A number that may be 0 and that a transport can keep."""
    return _at_most(NUMBER_MAX, whole(text), text)


def positive(text: str) -> int:
    """The same, but not 0."""
    return _at_most(NUMBER_MAX, positive_whole(text), text)


def port(text: str) -> int:
    """A TCP port; 0 is any that is free."""
    value = whole(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 (any that is free) to 65535, got {text!r}")
    return value


def file_stem(text: str) -> str:
    """The name of a file without its ending and without a folder; empty for none."""
    if text in (".", "..") or any(character in text for character in "/\\\0"):
        raise argparse.ArgumentTypeError(f"expected a file's name without folder and ending, got {text!r}")
    return text


def intake_threads(text: str) -> int:
    """How many threads take calls from the native transport."""
    return _at_most(INTAKE_THREADS_MAX, positive(text), text)


def no_gpu_metrics(text: str) -> bool:
    """False, as there are none."""
    if switch(text):
        raise argparse.ArgumentTypeError("metrics of GPUs are not implemented here: only false can be kept")
    return False


def message_bytes(text: str) -> int:
    """The size of a message that every transport can carry."""
    return _at_most(MESSAGE_BYTES_MAX, positive(text), text)


def time_s(text: str) -> float:
    """Milliseconds, as all of Triton's gRPC flags have them; not 0."""
    return positive(text) / 1e3


def interval_s(text: str) -> float:
    """Milliseconds that may be 0."""
    return count(text) / 1e3


def age_s(text: str) -> float | None:
    """Milliseconds; 0, Triton's default, is for ever."""
    return count(text) / 1e3 or None


def compression(text: str) -> Compression:
    """Triton's name of a level."""
    try:
        return Compression(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {', '.join(Compression)}, got {text!r}") from None


def permissions(text: str) -> int:
    """A file's mode in octal digits."""
    try:
        value = int(text, 8)
    except ValueError:
        value = -1
    if not 0 <= value <= 0o777:
        raise argparse.ArgumentTypeError(f"expected permissions in octal digits, e.g. 660, got {text!r}")
    return value


def _at_most(limit: int, value: int, text: str) -> int:
    if value > limit:
        raise argparse.ArgumentTypeError(f"expected at most {limit}, got {text!r}")
    return value
