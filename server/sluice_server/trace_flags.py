"""`--trace-config`, as Triton has it: `MODE,SETTING=VALUE` for one mode, `SETTING=VALUE` for all; several times."""

from __future__ import annotations

import urllib.parse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sluice_server.flag_values import SettingsError
from sluice_server.observability.trace_control import TraceConfig, TraceMode
from sluice_server.observability.trace_sampling import LEVELS, OFF

if TYPE_CHECKING:
    from collections.abc import Sequence

_BATCHING = {
    "bsp_max_queue_size": "max_queue_size",
    "bsp_schedule_delay": "schedule_delay_ms",
    "bsp_max_export_batch_size": "max_export_batch_size",
}


def trace_config(entries: Sequence[str]) -> TraceConfig:
    """What the flag's values say together; `SettingsError` names the one that is wrong."""
    config = TraceConfig()
    levels: set[str] = set()
    for entry in entries:
        mode, comma, setting = entry.partition(",")
        if not comma:
            mode, setting = "", entry
        key, equals, value = setting.partition("=")
        if not equals or not value:
            raise SettingsError(f"--trace-config={entry}: expected MODE,SETTING=VALUE or SETTING=VALUE")
        try:
            if mode == "" and key == "level":
                levels |= _level(value)
            else:
                config = _TAKE[mode](config, key, value)
        except (KeyError, ValueError) as error:
            reason = f": {error}" if type(error) is ValueError else ""
            raise SettingsError(f"--trace-config={entry} is not a setting that there is here{reason}") from None
    ordered = tuple(level for level in LEVELS if level in levels)
    config = replace(config, options=replace(config.options, levels=ordered))
    _check(config)
    return config


def _check(config: TraceConfig) -> None:
    if config.mode is TraceMode.OPENTELEMETRY and "TENSORS" in config.options.levels:
        raise SettingsError("--trace-config: level TENSORS is there in mode triton only, spans have no tensors")
    if config.mode is TraceMode.TRITON and config.options.levels and config.file is None:
        raise SettingsError("--trace-config: mode triton writes to a file, name it with triton,file=FILE")


def _level(value: str) -> set[str]:
    if value not in (*LEVELS, OFF):
        raise ValueError(f"there are {', '.join((OFF, *LEVELS))}")
    return set() if value == OFF else {value}


def _of_all(config: TraceConfig, key: str, value: str) -> TraceConfig:
    if key == "mode":
        return replace(config, mode=TraceMode(value))
    return _with_number(config, {"rate": "rate", "count": "count"}[key], value)


def _with_number(config: TraceConfig, name: str, value: str) -> TraceConfig:
    changes: dict[str, Any] = {name: _number(name, value)}
    return replace(config, options=replace(config.options, **changes))


def _number(key: str, value: str) -> int:
    least = -1 if key == "count" else 0
    number = int(value)
    if number < least:
        raise ValueError(f"expected a number >= {least}")
    return number


def _of_triton(config: TraceConfig, key: str, value: str) -> TraceConfig:
    if key == "file":
        return replace(config, file=Path(value))
    return _with_number(config, {"log-frequency": "log_frequency"}[key], value)


def _of_opentelemetry(config: TraceConfig, key: str, value: str) -> TraceConfig:
    changes: dict[str, Any]
    if key == "url":
        changes = {"url": _grpc_url(value)}
    elif key == "resource":
        name, equals, text = value.partition("=")
        if not equals or not name:
            raise ValueError("expected resource=NAME=VALUE")
        changes = {"resource": (*config.otlp.resource, (name, text))}
    else:
        changes = {_BATCHING[key]: _number(key, value)}
    return replace(config, otlp=replace(config.otlp, **changes))


def _grpc_url(value: str) -> str:
    """The collector's address; Triton speaks OTLP over HTTP, whose address has a path, and this server over gRPC."""
    url = value if "://" in value else f"http://{value}"
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc or parts.path not in ("", "/"):
        raise ValueError(
            "traces are sent by OTLP over gRPC, not over HTTP: give the collector's gRPC address without a path,"
            " such as http://localhost:4317"
        )
    return url


_TAKE = {"": _of_all, TraceMode.TRITON: _of_triton, TraceMode.OPENTELEMETRY: _of_opentelemetry}
