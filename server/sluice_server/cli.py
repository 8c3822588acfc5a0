"""The server's commands: `sluice serve` and `sluice check`. Exit codes: 0 done, 1 failed, 2 wrong command line."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from sluice_server.check import check_models
from sluice_server.errors import SluiceError
from sluice_server.flag_values import SettingsError, file_stem
from sluice_server.lifecycle import Server, StartError, check_runtime
from sluice_server.observability.logs import configure
from sluice_server.observability.tracing import TracingError
from sluice_server.open_files import raise_limit
from sluice_server.settings import ModelSettings, parse_serve
from sluice_server.termination import Termination
from sluice_server.transport import ListenError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_server.settings import ServerSettings


def serve(argv: Sequence[str]) -> int:
    """Serve models until SIGTERM or SIGINT."""
    try:
        settings = parse_serve(argv)
    except SettingsError as error:
        return _say("serve", error, code=2)
    termination = Termination()
    with termination.listening():
        return _serve(settings, termination)


def _serve(settings: ServerSettings, termination: Termination) -> int:
    try:
        configure(settings.log)
        raise_limit()
        check_runtime()
        server = Server(settings, os.environ)
    except (ListenError, OSError, SluiceError, StartError, TracingError) as error:
        return _say("serve", error)
    code, finished = 0, True
    try:
        server.start(lambda: termination.asked)
        termination.wait()
    except (ListenError, SluiceError, StartError) as error:
        code = _say("serve", error)
    finally:
        finished = server.stop()
    if not finished:
        # A run or a load that does not end must not keep the process alive: its thread cannot be stopped from here.
        logging.shutdown()
        os._exit(code)
    return code


def check(argv: Sequence[str]) -> int:
    """Print what each model's configuration becomes, and why."""
    parser = argparse.ArgumentParser(prog="sluice check", description=check.__doc__, allow_abbrev=False)
    parser.add_argument("repository", nargs="+", type=Path, help="a folder of models in Triton's layout")
    parser.add_argument("--model", action="append", default=[], metavar="NAME", help="only this one; several allowed")
    parser.add_argument("--disable-auto-complete-config", action="store_true", help="as for sluice serve")
    parser.add_argument("--model-config-name", type=file_stem, default="", metavar="NAME", help="as for sluice serve")
    parser.add_argument("--allow-provider-fallback", action="store_true", help="as for sluice serve")
    parser.add_argument("--batch-curve-cache", type=Path, metavar="DIR", help="as for sluice serve")
    args = parser.parse_args(argv)
    settings = ModelSettings(
        repositories=tuple(args.repository),
        auto_complete=not args.disable_auto_complete_config,
        allow_provider_fallback=args.allow_provider_fallback,
        config_name=args.model_config_name,
        curve_directory=args.batch_curve_cache,
    )
    try:
        check_runtime()
        return check_models(settings, args.model, os.environ, sys.stdout)
    except (SluiceError, StartError) as error:
        return _say("check", error)


def _say(command: str, error: Exception, *, code: int = 1) -> int:
    print(f"sluice {command}: {error}", file=sys.stderr)  # noqa: T201 - a command's own words
    return code
