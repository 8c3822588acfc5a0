"""`--capture-file` and its companions: a share of the requests, in a file for `sluice replay`. Not in Triton."""

from __future__ import annotations

import argparse
import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from sluice_proto.capture import EMPTY_FILE_BYTES
from sluice_server.flag_values import SettingsError, positive_whole
from sluice_server.observability.capture import MAX_BYTES_DEFAULT, CaptureOptions

if TYPE_CHECKING:
    from collections.abc import Callable

    from sluice_server.observability.capture import Redact


def add_capture_flags(add: Callable[..., object]) -> None:
    """Add the flags to a parser, whose `add_argument` is `add`."""
    add("--capture-file", type=Path, metavar="FILE",
        help="capture inference requests, their times and answers in this new file, for sluice replay")  # fmt: skip
    add("--capture-rate", type=_share, metavar="SHARE",
        help="the share of the requests that is captured, chosen at random: above 0, up to 1 (1)")  # fmt: skip
    add("--capture-max-bytes", type=positive_whole, metavar="BYTES",
        help=f"capturing ends before the file is larger than this ({MAX_BYTES_DEFAULT})")  # fmt: skip
    add("--capture-redact", type=_hook, metavar="MODULE:FUNCTION",
        help="called with each captured ModelInferRequest: gives what is written, or None to leave it out")  # fmt: skip


def capture_options(args: argparse.Namespace) -> CaptureOptions | None:
    """What the flags say together, None for nothing; `SettingsError` names the one that is wrong."""
    given = {
        name: value
        for name in ("rate", "max_bytes", "redact")
        if (value := getattr(args, f"capture_{name}")) is not None
    }
    if args.capture_file is None:
        if given:
            flag = f"--capture-{next(iter(given)).replace('_', '-')}"
            raise SettingsError(f"{flag} needs --capture-file: nothing is captured without it")
        return None
    options = CaptureOptions(args.capture_file, **given)
    if options.max_bytes <= EMPTY_FILE_BYTES:
        raise SettingsError(
            f"--capture-max-bytes={options.max_bytes} leaves no room for a request: the head of the file takes"
            f" {EMPTY_FILE_BYTES}"
        )
    return options


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a share above 0 and up to 1, got {text!r}")
    return value


def _hook(text: str) -> Redact:
    module, colon, name = text.partition(":")
    if not colon or not module or not name:
        raise argparse.ArgumentTypeError(f"expected MODULE:FUNCTION, got {text!r}")
    try:
        found = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise argparse.ArgumentTypeError(f"module {module} has no {name!r}") from None
    except Exception as error:  # whatever a module that is imported raises
        raise argparse.ArgumentTypeError(
            f"module {module!r} cannot be imported (PYTHONPATH says where modules are): {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise argparse.ArgumentTypeError(f"{text} is no function but a {type(found).__name__}")
    hook: Redact = found
    return hook
