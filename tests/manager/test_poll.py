"""Control mode poll, one look after the other: what is picked up, when, and what goes on meanwhile."""

from __future__ import annotations

import threading

import pytest
from manager_fakes import write

from sluice_server.errors import NotFound, Unavailable
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.manager import ControlMode
from sluice_server.repository.poller import Poller
from sluice_server.repository.table import IndexEntry
from support import models
from support.fakes import PATIENCE_S, eventually

READY = [("1", "READY", "")]


@pytest.fixture
def polled(make_world):
    """A world in mode poll that serves `m`, of version 1."""
    world = make_world(mode=ControlMode.POLL)
    write(world.root, "m", config="max_batch_size: 1")
    assert world.start() == []
    return world


def look_twice(world) -> None:
    """See a change, and see that it is over."""
    world.manager.poll()
    world.manager.poll()


def test_everything_is_loaded_at_start_and_stays_while_nothing_changes(polled):
    model = polled.served("m")
    for _ in range(3):
        polled.manager.poll()
    assert polled.served("m") is model
    assert polled.loader.loads == [("m", 1)]
    assert polled.manager.server_ready


def test_load_and_unload_calls_are_refused(polled):
    for call in (polled.manager.load, polled.manager.unload):
        with pytest.raises(Unavailable, match=r"explicit model load / unload is not allowed.*poll"):
            call("m")


def test_a_new_model_is_loaded_once_it_is_no_longer_changing(polled):
    directory = write(polled.root, "new")
    polled.manager.poll()
    (directory / "1" / "model.onnx").write_bytes(b"more of it")  # still being copied
    polled.manager.poll()
    assert polled.manager.index() == [IndexEntry("m", "1", "READY"), IndexEntry("new")]
    polled.manager.poll()
    assert polled.index("new") == READY
    assert polled.readiness[-2:] == [("new", True), ("", True)]


@pytest.mark.parametrize("change", ["1/model.onnx", "config.pbtxt", "1/data.bin"])
def test_a_changed_file_puts_a_new_one_in_its_place(change, polled):
    old = polled.served("m")
    (polled.root / "m" / change).write_text("max_batch_size: 8")
    look_twice(polled)
    assert polled.served("m") is not old
    assert old.draining


def test_a_new_version_is_live_before_the_old_one_leaves(polled):
    old = polled.served("m")
    old.finished.clear()  # a request runs
    gate = polled.loader.held["m"] = threading.Event()
    write(polled.root, "m", (2,))
    polled.manager.poll()
    look = threading.Thread(target=polled.manager.poll)
    look.start()
    polled.loader.wait_for_load()
    polled.loader.wait_for_load()
    assert polled.served("m") is old
    assert not old.draining
    gate.set()
    look.join(PATIENCE_S)
    assert polled.served("m").interface.version == "2"
    assert polled.index("m") == [("1", "UNLOADING", ""), ("2", "READY", "")]
    old.finished.set()
    eventually(lambda: polled.index("m")[0] == ("1", "UNAVAILABLE", "unloaded"), "version 1 is unloaded")


def test_a_removed_version_gives_way_to_the_one_before(polled):
    write(polled.root, "m", (2,))
    look_twice(polled)
    (polled.root / "m" / "2").rename(polled.root / "m" / ".old")
    look_twice(polled)
    assert polled.served("m").interface.version == "1"


def test_a_removed_model_is_unloaded_and_may_come_back(polled):
    old = polled.served("m")
    directory = polled.root / "m"
    directory.rename(polled.root / ".m")
    polled.manager.poll()
    assert polled.served("m") is old  # it may be about to be replaced
    polled.manager.poll()
    with pytest.raises(NotFound, match="'m' has no available versions"):
        polled.served("m")
    assert old.draining
    assert polled.manager.server_ready
    (polled.root / ".m").rename(directory)
    look_twice(polled)
    assert polled.served("m") is not old


def test_a_model_that_fails_leaves_the_others_and_its_older_self_and_waits_for_a_change(polled, caplog):
    old = polled.served("m")
    polled.loader.errors = {"m": ModelLoadError("half of it", model="m"), "new": ConfigError("it is half")}
    (polled.root / "m" / "1" / "model.onnx").write_bytes(b"half")
    write(polled.root, "new")
    look_twice(polled)
    tried = len(polled.loader.loads)
    look_twice(polled)
    assert len(polled.loader.loads) == tried == 3
    assert polled.served("m") is old
    assert polled.index("m") == READY
    assert polled.index("new")[0][:2] == ("1", "UNAVAILABLE")
    assert [record.getMessage() for record in caplog.records] == ["model failed to load"] * 2
    polled.loader.errors.clear()
    for name in ("m", "new"):
        (polled.root / name / "1" / "model.onnx").write_bytes(b"all of it")
    look_twice(polled)
    assert polled.index("new") == READY
    assert polled.served("m") is not old
    assert polled.manager.server_ready


def test_a_repository_that_cannot_be_read_changes_nothing(polled, caplog):
    model = polled.served("m")
    polled.root.rename(polled.root.with_name("gone"))
    look_twice(polled)
    assert polled.served("m") is model
    assert {record.getMessage() for record in caplog.records} == {"the model repository cannot be read"}
    polled.root.with_name("gone").rename(polled.root)
    look_twice(polled)
    assert polled.served("m") is model


def test_no_load_is_begun_once_the_server_ends(polled):
    write(polled.root, "new")
    polled.manager.poll()
    polled.manager.poll(lambda: True)
    assert polled.index("new") == [("", "", "")]


def test_the_poller_goes_on_after_a_bug_and_ends_when_it_is_told(caplog):
    looks = threading.Semaphore(0)

    def look(should_stop) -> None:
        assert not should_stop()
        looks.release()
        raise ZeroDivisionError

    poller = Poller(look, 0.001)
    assert poller.join(0)
    poller.start()
    for _ in range(3):
        assert looks.acquire(timeout=PATIENCE_S)
    poller.stop()
    assert poller.join(PATIENCE_S)
    assert "polling the model repository failed" in caplog.text


def test_a_server_in_mode_poll_serves_what_is_put_into_its_repository(start_server, repository):
    server = start_server(repository, models={"control_mode": ControlMode.POLL, "poll_interval_s": 0.02})
    models.write_model(repository, "new", models.identity(), max_batch_size=8)
    eventually(lambda: server.server.manager.served_versions("new") == [1], "the model is served")
    assert server.call("ServerReady", b"").ready
