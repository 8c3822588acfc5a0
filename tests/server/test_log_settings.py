"""LogSettings over the wire: what it tells, what it refuses, and that a change counts at once."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import replace
from typing import TYPE_CHECKING

import grpc
import pytest
import tritonclient.grpc

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.observability.logs import OWN_LOGGERS, LogOptions, configure

if TYPE_CHECKING:
    from collections.abc import Iterator

    from support.server import RunningServer

START = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}
KINDS = {bool: "bool_param", int: "uint32_param", str: "string_param"}

logger = logging.getLogger("sluice_server.tested")


def change(**settings: bool | int | str | None) -> pb.LogSettingsRequest:
    request = pb.LogSettingsRequest()
    for key, value in settings.items():
        if value is None:
            request.settings[key].SetInParent()
        else:
            setattr(request.settings[key], KINDS[type(value)], value)
    return request


def told(server: RunningServer, **settings: bool | int | str | None) -> dict[str, bool | int | str]:
    answer = server.call("LogSettings", change(**settings))
    return {key: getattr(value, value.WhichOneof("parameter_choice")) for key, value in answer.settings.items()}


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the process logs, set up as the command does it; everything is as before at the end."""
    root = logging.getLogger()
    handlers, levels = list(root.handlers), {name: logging.getLogger(name).level for name in ("", *OWN_LOGGERS)}
    stream = io.StringIO()
    configure(LogOptions(), stream=stream)
    yield stream
    root.handlers[:] = handlers
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture
def logging_server(lines, start_server, repository) -> tuple[RunningServer, io.StringIO]:
    """A server whose log can be read."""
    return start_server(repository), lines


def test_every_setting_is_told(logging_server):
    assert told(logging_server[0]) == START


def test_levels_change_at_once(logging_server):
    server, lines = logging_server
    assert told(server, log_info=False, log_verbose_level=1) == START | {"log_info": False, "log_verbose_level": 1}
    lines.seek(0)
    lines.truncate()
    logger.debug("details")
    logger.info("news")
    logger.warning("beware")
    assert [line.rpartition("] ")[2] for line in lines.getvalue().splitlines()] == ["details", "beware"]
    assert told(server, log_info=True, log_verbose_level=0, log_warning=False)["log_warning"] is False
    lines.seek(0)
    lines.truncate()
    logger.debug("details")
    logger.info("news")
    logger.warning("beware")
    assert [line.rpartition("] ")[2] for line in lines.getvalue().splitlines()] == ["news"]


@pytest.mark.parametrize(("name", "looks_right"), [
    ("ISO8601", lambda line: line[10] == "T"),
    ("json", lambda line: json.loads(line)["message"] == "news"),
    ("default", lambda line: line[0] == "I"),
])  # fmt: skip
def test_the_format_changes_at_once(name, looks_right, logging_server):
    server, lines = logging_server
    told(server, log_format="ISO8601")
    assert told(server, log_format=name)["log_format"] == name
    logger.info("news")
    assert looks_right(lines.getvalue().splitlines()[-1])


def test_a_setting_without_a_value_goes_back_to_the_start(logging_server):
    server, _ = logging_server
    told(server, log_info=False, log_format="ISO8601")
    assert told(server, log_info=None, log_format=None) == START


@pytest.mark.parametrize(("settings", "code", "fact"), [
    ({"log_file": "/tmp/x"}, grpc.StatusCode.UNIMPLEMENTED,
     "log file location can not be updated through network protocol"),
    ({"log_format": "weird"}, grpc.StatusCode.INVALID_ARGUMENT, "invalid argument for log_format, got: weird"),
    ({"log_format": True}, grpc.StatusCode.INVALID_ARGUMENT, "'log_format'"),
    ({"log_info": "yes"}, grpc.StatusCode.INVALID_ARGUMENT, "'log_info'"),
    ({"log_verbose_level": True}, grpc.StatusCode.INVALID_ARGUMENT, "'log_verbose_level'"),
])  # fmt: skip
def test_a_value_that_is_refused_changes_nothing(settings, code, fact, logging_server):
    server, _ = logging_server
    got, message = server.refusal("LogSettings", change(log_warning=False, **settings))
    assert got is code
    assert fact in message
    assert told(server) == START


def test_unknown_settings_are_passed_over(logging_server):
    assert told(logging_server[0], nonsense=True) == START


def test_the_file_of_the_start_is_told(lines, start_server, repository, tmp_path):
    file = tmp_path / "log"
    server = start_server(repository, log=replace(LogOptions(), file=file))
    assert told(server)["log_file"] == str(file)


def test_tritonclient_reads_and_updates(logging_server):
    server, _ = logging_server
    with tritonclient.grpc.InferenceServerClient(server.target) as client:
        client.update_log_settings({"log_verbose_level": 2, "log_format": "ISO8601", "log_error": False})
        settings = client.get_log_settings(as_json=True)["settings"]
    assert settings["log_verbose_level"] == {"uint32_param": 2}
    assert settings["log_error"] == {"bool_param": False}
    assert settings["log_format"] == {"string_param": "ISO8601"}
