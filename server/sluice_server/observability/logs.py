"""Structured logs on the standard library's logging: one record, one line, with facts as fields.

    logger.info("model loaded", extra={"model": "digits", "version": 2})

    default   I1105 08:15:30.123456 4711 manager.py:66] model loaded model=digits version=2
    ISO8601   2026-11-05T08:15:30Z I 4711 manager.py:66] model loaded model=digits version=2
    json      {"time": "2026-11-05T08:15:30.123456Z", "level": "INFO", ..., "message": "model loaded", "model": ...}

The prefixes are Triton's; times are UTC. Names that clients sent may stand in messages and fields: whatever could
break a line or hide text is escaped, so nobody can write log lines of their own. A traceback is one member in json;
in the text formats it follows on lines of its own, each indented, which no record's line is.
"""

import json
import logging
import math
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from logging.handlers import WatchedFileHandler
from pathlib import Path
from typing import Any, Literal, TextIO, get_args

LogFormat = Literal["default", "ISO8601", "json"]

FORMATS: tuple[str, ...] = get_args(LogFormat)
"""What --log-format takes: Triton's two, and json."""

HANDLER_NAME = "sluice"
"""By this name `configure` finds the handler that it installed before."""

OWN_LOGGERS = ("sluice_server", "sluice_batching", "sluice_proto")
"""Whose information and debug records count; of other libraries only warnings do, until VERBOSE_LIBRARIES."""

VERBOSE_LIBRARIES = 2
"""From this --log-verbose on, other libraries' debug records are shown too; at 1 only the server's own."""

_INDENT = "    "
_STANDARD_ATTRIBUTES = frozenset((*logging.makeLogRecord({}).__dict__, "message", "asctime", "taskName"))


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What is logged, how and where; the flags --log-format, --log-info, ..., --log-file.

    `verbose_level` 0 shows no debug records. `file` None is standard error; a file is appended to, and opened again
    when it was moved away (logrotate).
    """

    format: LogFormat = "default"
    info: bool = True
    warning: bool = True
    error: bool = True
    verbose_level: int = 0
    file: Path | None = None

    def shows(self, level: int) -> bool:
        """Whether records of this level are shown; critical ones are errors."""
        if level >= logging.ERROR:
            return self.error
        if level >= logging.WARNING:
            return self.warning
        if level >= logging.INFO:
            return self.info
        return self.verbose_level > 0


def configure(options: LogOptions, *, stream: TextIO | None = None) -> None:
    """Send the whole process's records where `options` say, instead of where an earlier call said.

    `stream` stands in for standard error. OSError when the file cannot be opened; then nothing has changed.
    """
    handler = create_handler(options, stream or sys.stderr)
    root = logging.getLogger()
    before = [old for old in root.handlers if old.get_name() == HANDLER_NAME]
    root.addHandler(handler)
    for old in before:
        root.removeHandler(old)
        old.close()
    _set_levels(options)


def reconfigure(options: LogOptions) -> None:
    """Change levels and format of what `configure` set up, at once and for every thread; the file stays what it was."""
    for handler in logging.getLogger().handlers:
        if handler.get_name() == HANDLER_NAME:
            _dress(handler, options)
    _set_levels(options)


class LogControl:
    """What is logged, changed while the server runs; for any thread."""

    def __init__(self, start: LogOptions, apply: Callable[[LogOptions], None] = reconfigure) -> None:
        """`apply` puts options into effect."""
        self._start = start
        self._apply = apply
        self._lock = threading.Lock()
        self.options = start

    def change(self, changes: Mapping[str, Any]) -> None:
        """Set fields of LogOptions; None gives one the value of the start."""
        values = {name: getattr(self._start, name) if value is None else value for name, value in changes.items()}
        with self._lock:
            options = replace(self.options, **values)
            self._apply(options)
            self.options = options


def _set_levels(options: LogOptions) -> None:
    libraries_level = logging.DEBUG if options.verbose_level >= VERBOSE_LIBRARIES else logging.WARNING
    logging.getLogger().setLevel(libraries_level)
    for name in OWN_LOGGERS:
        logging.getLogger(name).setLevel(_own_level(options))


def create_handler(options: LogOptions, stream: TextIO) -> logging.Handler:
    """Give a handler that writes what `options` ask for, to their file or else to `stream`."""
    handler: logging.Handler
    if options.file is None:
        handler = logging.StreamHandler(stream)
    else:
        handler = WatchedFileHandler(options.file, encoding="utf-8")
    handler.set_name(HANDLER_NAME)
    _dress(handler, options)
    return handler


def _dress(handler: logging.Handler, options: LogOptions) -> None:
    # one assignment, as other threads are logging
    handler.filters = [lambda record: options.shows(record.levelno)]
    handler.setFormatter(JsonFormatter() if options.format == "json" else TextFormatter(options.format))


def _own_level(options: LogOptions) -> int:
    """Give the lowest level that is shown, so that a record that nobody will see is not even made."""
    levels = (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR)
    return next((level for level in levels if options.shows(level)), logging.CRITICAL + 1)


class TextFormatter(logging.Formatter):
    """Writes Triton's prefix, the message, and the fields as key=value."""

    def __init__(self, style: Literal["default", "ISO8601"]) -> None:
        super().__init__()
        self._iso8601 = style == "ISO8601"

    def format(self, record: logging.LogRecord) -> str:
        """Give the record's line and, when it has an exception, its traceback on indented lines."""
        when, severity = datetime.fromtimestamp(record.created, UTC), record.levelname[0]
        start = f"{when:%Y-%m-%dT%H:%M:%SZ} {severity}" if self._iso8601 else f"{severity}{when:%m%d %H:%M:%S.%f}"
        line = f"{start} {record.process} {record.filename}:{record.lineno}] {escape(record.getMessage())}"
        for key, value in _fields(record):
            line += f" {key}={_quoted(str(value))}"
        for detail in _traceback(self, record).splitlines():
            line += f"\n{_INDENT}{escape(detail)}"
        return line


class JsonFormatter(logging.Formatter):
    """Writes one JSON object per record: time, level, logger, source, message, then the fields, then `exception`."""

    def format(self, record: logging.LogRecord) -> str:
        """Give the record's line. A field cannot replace one of the members that every record has."""
        members: dict[str, object] = {
            "time": f"{datetime.fromtimestamp(record.created, UTC):%Y-%m-%dT%H:%M:%S.%fZ}",
            "level": record.levelname,
            "logger": record.name,
            "source": f"{record.filename}:{record.lineno}",
            "message": record.getMessage(),
        }
        for key, value in _fields(record):
            members.setdefault(key, _plain(value))
        if traceback := _traceback(self, record):
            members["exception"] = traceback
        return json.dumps(members)


def escape(text: str) -> str:
    r"""Give text as one visible line: every character that is not printable as its escape, e.g. `\n` or `\u202e`."""
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def _quoted(text: str) -> str:
    if text and text.isprintable() and not any(char in ' "=\\' for char in text):
        return text
    return '"' + escape(text.replace("\\", "\\\\").replace('"', '\\"')) + '"'


def _fields(record: logging.LogRecord) -> list[tuple[str, object]]:
    return [(key, value) for key, value in record.__dict__.items() if key not in _STANDARD_ATTRIBUTES]


def _plain(value: object) -> object:
    """Give a value that JSON has a form for: itself, or else its text."""
    if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value)


def _traceback(formatter: logging.Formatter, record: logging.LogRecord) -> str:
    # exc_info is (None, None, None) when a record asks for the exception and there is none
    if record.exc_info is None or record.exc_info[0] is None:
        return ""
    return formatter.formatException(record.exc_info)
