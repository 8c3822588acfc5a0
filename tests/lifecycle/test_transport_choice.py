"""Which transport a server starts on, and what it says about it."""

from __future__ import annotations

import logging
import sys

import pytest

from sluice_server.flag_values import SettingsError
from sluice_server.lifecycle import Server, StartError
from sluice_server.settings import parse_serve
from sluice_server.transport.choice import TransportChoice
from support.server import need, server_settings


@pytest.fixture
def no_native(monkeypatch):
    """As if sluice-native were not installed."""
    monkeypatch.setitem(sys.modules, "sluice_native", None)


def logged_start(repository, caplog, **changes) -> list[logging.LogRecord]:
    """What a server logs from its making to its end."""
    caplog.set_level(logging.INFO)
    server = Server(server_settings(repository, **changes), {})
    server.start()
    server.stop()
    return caplog.records


def test_auto_takes_the_native_one_and_says_so(repository, caplog):
    need("native")
    records = logged_start(repository, caplog)
    assert [record.transport for record in records if record.msg == "server is serving"] == ["native"]
    assert not [record for record in records if record.levelno >= logging.WARNING]


def test_auto_without_the_native_one_serves_on_grpcio_and_says_in_one_line_what_that_costs(
    no_native, repository, caplog
):
    records = logged_start(repository, caplog)
    assert [record.transport for record in records if record.msg == "server is serving"] == ["grpcio"]
    (warning,) = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    for fact in ("grpcio", "ten times the CPU", "not installed", "pip install ./server/native"):
        assert fact in warning


def test_grpcio_asked_for_says_nothing(no_native, repository, caplog):
    records = logged_start(repository, caplog, transport=TransportChoice.GRPCIO)
    assert not [record for record in records if record.levelno >= logging.WARNING]


def test_the_native_one_asked_for_and_missing_is_an_error(no_native, repository):
    with pytest.raises(StartError, match=r"--transport=native needs .* pip install ./server/native"):
        Server(server_settings(repository, transport=TransportChoice.NATIVE), {})


def test_a_bound_that_only_the_native_one_keeps_is_never_dropped(no_native, repository):
    settings = server_settings(repository, native_flags=("--grpc-max-connections",))
    with pytest.raises(StartError, match=r"--grpc-max-connections needs the native transport"):
        Server(settings, {})
    with pytest.raises(SettingsError, match=r"--grpc-stall-timeout needs the native transport"):
        parse_serve(["--model-repository=/models", "--transport=grpcio", "--grpc-stall-timeout=1"])
