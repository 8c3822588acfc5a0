"""Which transport serves: the native one where it is installed and belongs to this server, else grpcio's."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

MODULE = "sluice_native"

INSTALL = "pip install ./server/native in Sluice's checkout, which needs cargo (https://rustup.rs)"

NOTICE = "running on the grpcio transport, which costs about ten times the CPU per request of the native one"


class TransportChoice(StrEnum):
    """What the user asked for."""

    AUTO = "auto"
    NATIVE = "native"
    GRPCIO = "grpcio"


class TransportUnavailable(Exception):
    """The transport that was asked for cannot be used here; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The transport's name, and the line to log when a faster one could have been had."""

    name: str
    notice: str = ""


def native_problem(version: str, import_module: Callable[[str], Any] = importlib.import_module) -> str:
    """Why the native transport cannot be used by a server of this version; empty when it can."""
    try:
        found = import_module(MODULE).__version__
    except ModuleNotFoundError as error:
        return "it is not installed" if error.name == MODULE else f"it cannot be loaded: {error}"
    except ImportError as error:
        return f"it cannot be loaded: {error}"
    return "" if found == version else f"the one that is installed is version {found} and the server {version}"


def choose(choice: TransportChoice, problem: str, native_flags: Sequence[str] = ()) -> Chosen:
    """Choose by what was asked for and `native_problem`; `TransportUnavailable` when that cannot be had.

    `native_flags` are the flags that were given and that only the native transport can keep.
    """
    if choice is TransportChoice.GRPCIO:
        return Chosen(TransportChoice.GRPCIO)
    if not problem:
        return Chosen(TransportChoice.NATIVE)
    if choice is TransportChoice.NATIVE or native_flags:
        wanted = f"--transport={choice}" if choice is TransportChoice.NATIVE else native_flags[0]
        raise TransportUnavailable(f"{wanted} needs the native transport, and {problem}: {INSTALL}")
    return Chosen(TransportChoice.GRPCIO, f"{NOTICE}, as {problem}; to get that: {INSTALL}")
