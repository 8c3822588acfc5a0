"""What a log line looks like in each format, which records are shown, and that nobody can forge a line."""

import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_server.observability.logs import (
    HANDLER_NAME,
    OWN_LOGGERS,
    LogFormat,
    LogOptions,
    configure,
    create_handler,
    escape,
)

CREATED_S = 1_793_866_530.123456  # 2026-11-05 08:15:30 UTC


def line(options: LogOptions, record: logging.LogRecord) -> str:
    stream = io.StringIO()
    create_handler(options, stream).handle(record)
    return stream.getvalue()


def new_record(message: str = "model loaded", level: int = logging.INFO, **fields: object) -> logging.LogRecord:
    record = logging.LogRecord("sluice_server.manager", level, "/src/manager.py", 66, message, None, None)
    record.created = CREATED_S
    record.process = 4711
    record.__dict__.update(fields)
    return record


def failed_record(text: str) -> logging.LogRecord:
    record = new_record("load failed", logging.ERROR, model="digits")
    try:
        raise ValueError(text)
    except ValueError:
        record.exc_info = sys.exc_info()
    return record


@pytest.fixture
def process_logging() -> Iterator[None]:
    loggers = [logging.getLogger(), *(logging.getLogger(name) for name in OWN_LOGGERS)]
    levels = [logger.level for logger in loggers]
    yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    for handler in our_handlers():
        logging.getLogger().removeHandler(handler)
        handler.close()


def our_handlers() -> list[logging.Handler]:
    return [handler for handler in logging.getLogger().handlers if handler.get_name() == HANDLER_NAME]


def test_the_default_format_is_tritons_prefix_then_message_then_fields() -> None:
    record = new_record(model="digits", version=2)
    assert (
        line(LogOptions(), record) == "I1105 08:15:30.123456 4711 manager.py:66] model loaded model=digits version=2\n"
    )


def test_iso8601_puts_the_time_before_the_severity() -> None:
    record = new_record(level=logging.WARNING)
    assert line(LogOptions(format="ISO8601"), record) == "2026-11-05T08:15:30Z W 4711 manager.py:66] model loaded\n"


def test_json_has_the_fields_as_members_of_their_own_type() -> None:
    record = new_record(model="digits", version=2, rows=[1, 2], share=0.5, ready=True, reason=None, path=Path("/m"))
    assert json.loads(line(LogOptions(format="json"), record)) == {
        "time": "2026-11-05T08:15:30.123456Z",
        "level": "INFO",
        "logger": "sluice_server.manager",
        "source": "manager.py:66",
        "message": "model loaded",
        "model": "digits",
        "version": 2,
        "rows": [1, 2],
        "share": 0.5,
        "ready": True,
        "reason": None,
        "path": "/m",
    }


def test_a_number_that_json_does_not_know_becomes_text() -> None:
    members = json.loads(line(LogOptions(format="json"), new_record(share=float("nan"))))
    assert members["share"] == "nan"


def test_a_field_cannot_replace_a_member_that_every_record_has() -> None:
    members = json.loads(line(LogOptions(format="json"), new_record(level_="x", time="never", logger="other")))
    assert members["time"] == "2026-11-05T08:15:30.123456Z"
    assert members["logger"] == "sluice_server.manager"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("plain-name_1/a.b", "plain-name_1/a.b"),
        ("", '""'),
        ("two words", '"two words"'),
        ('say "hi"', '"say \\"hi\\""'),
        ("a=b", '"a=b"'),
        ("C:\\models", '"C:\\\\models"'),
        ("two\nlines", '"two\\nlines"'),
        ("literal\\n", '"literal\\\\n"'),
        ("\u202etxt", '"\\u202etxt"'),
        ("caf\udce9", '"caf\\udce9"'),
        ("mödel", "mödel"),
    ],
)
def test_values_are_quoted_when_they_could_be_misread(value: str, written: str) -> None:
    assert line(LogOptions(), new_record(model=value)).endswith(f"] model loaded model={written}\n")


@pytest.mark.parametrize("style", ["default", "ISO8601", "json"])
def test_a_name_with_a_line_break_cannot_forge_a_record(style: LogFormat) -> None:
    forged = "x\nI1105 08:15:30.000000 4711 manager.py:1] all is well\r\x1b[2K\u2028"
    text = line(LogOptions(format=style), new_record(f"unknown model {forged}", model=forged))
    assert text.endswith("\n")
    assert len(text.splitlines()) == 1
    assert "\x1b" not in text


def test_a_traceback_follows_on_indented_lines() -> None:
    first, *rest = line(LogOptions(), failed_record("boom\nI1105 forged")).splitlines()
    assert first == "E1105 08:15:30.123456 4711 manager.py:66] load failed model=digits"
    assert rest[0] == "    Traceback (most recent call last):"
    assert rest[-2:] == ["    ValueError: boom", "    I1105 forged"]
    assert all(text.startswith("    ") for text in rest)


def test_a_traceback_is_one_member_in_json() -> None:
    text = line(LogOptions(format="json"), failed_record("boom"))
    members = json.loads(text)
    assert text.count("\n") == 1
    assert members["exception"].startswith("Traceback (most recent call last):\n")
    assert members["exception"].endswith("\nValueError: boom")


def test_a_record_that_asks_for_an_exception_outside_of_one_has_none() -> None:
    record = new_record()
    record.exc_info = (None, None, None)
    assert line(LogOptions(), record).count("\n") == 1
    assert "exception" not in json.loads(line(LogOptions(format="json"), record))


@given(st.text(), st.text())
def test_any_text_is_one_line(message: str, value: str) -> None:
    text = line(LogOptions(), new_record(message.replace("%", "%%"), field=value))
    assert text[:-1].isprintable()
    assert text[-1] == "\n"


@given(st.text(st.characters(categories=["L", "N", "P", "Zs"], exclude_characters="\\")))
def test_escaping_is_undone_by_reading_the_escapes(text: str) -> None:
    assert escape(text).encode("latin-1", "backslashreplace").decode("unicode_escape") == text


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        (LogOptions(), "IWEC"),
        (LogOptions(info=False), "WEC"),
        (LogOptions(warning=False), "IEC"),
        (LogOptions(error=False), "IW"),
        (LogOptions(info=False, verbose_level=1), "DWEC"),
        (LogOptions(info=False, warning=False, error=False), ""),
    ],
)
def test_each_flag_switches_its_own_level(process_logging: None, options: LogOptions, shown: str) -> None:
    stream = io.StringIO()
    configure(options, stream=stream)
    logger = logging.getLogger("sluice_server.manager")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR, logging.CRITICAL):
        logger.log(level, "text")
    assert "".join(text[0] for text in stream.getvalue().splitlines()) == shown


@pytest.mark.parametrize(("verbose_level", "shown"), [(0, "W"), (1, "W"), (2, "DIW")])
def test_other_libraries_are_quiet_until_verbose_two(process_logging: None, verbose_level: int, shown: str) -> None:
    stream = io.StringIO()
    configure(LogOptions(verbose_level=verbose_level), stream=stream)
    logger = logging.getLogger("some_library")
    for level in (logging.DEBUG, logging.INFO, logging.WARNING):
        logger.log(level, "text")
    assert "".join(text[0] for text in stream.getvalue().splitlines()) == shown


def test_a_level_that_nothing_shows_is_not_even_asked_for(process_logging: None) -> None:
    configure(LogOptions(info=False, warning=False), stream=io.StringIO())
    logger = logging.getLogger("sluice_server.manager")
    assert not logger.isEnabledFor(logging.WARNING)
    assert logger.isEnabledFor(logging.ERROR)


def test_configuring_again_replaces_the_handler(process_logging: None) -> None:
    first, second = io.StringIO(), io.StringIO()
    configure(LogOptions(), stream=first)
    configure(LogOptions(format="ISO8601"), stream=second)
    logging.getLogger("sluice_server").warning("once")
    assert (first.getvalue(), second.getvalue().count("\n")) == ("", 1)
    assert len(our_handlers()) == 1


def test_a_file_is_appended_to_and_follows_rotation(process_logging: None, tmp_path: Path) -> None:
    path = tmp_path / "sluice.log"
    path.write_text("earlier\n")
    configure(LogOptions(file=path))
    logger = logging.getLogger("sluice_server")
    logger.info("before", extra={"model": "mödel"})
    path.rename(tmp_path / "sluice.log.1")
    logger.info("after")
    earlier, before = (tmp_path / "sluice.log.1").read_text(encoding="utf-8").splitlines()
    assert earlier == "earlier"
    assert before.endswith("] before model=mödel")
    assert path.read_text().endswith("] after\n")


def test_a_file_that_cannot_be_opened_leaves_the_old_log(process_logging: None, tmp_path: Path) -> None:
    stream = io.StringIO()
    configure(LogOptions(), stream=stream)
    with pytest.raises(FileNotFoundError):
        configure(LogOptions(file=tmp_path / "missing" / "sluice.log"))
    logging.getLogger("sluice_server").info("still here")
    assert stream.getvalue().endswith("] still here\n")
