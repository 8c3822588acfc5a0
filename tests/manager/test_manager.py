"""Which versions are served, and what the index says of each: traces of loads and unloads over a fake loader."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from manager_fakes import FakeLoader, write

from sluice_server.errors import BackendError, Internal, InvalidArgument, NotFound, Unavailable
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.manager import UNEXPECTED, ControlMode, Override
from sluice_server.repository.table import IndexEntry
from support.fakes import PATIENCE_S, eventually

READY = [("1", "READY", "")]
PAUSE_S = 0.0005  # so that threads that only ask leave room for the one that loads
UNLOADED = [("1", "UNAVAILABLE", "unloaded")]


@pytest.fixture
def background():
    """Calls that are still under way while the test goes on; all of them must have ended well."""
    with ThreadPoolExecutor(8) as pool:
        futures = []
        yield lambda function, *arguments: futures.append(pool.submit(function, *arguments)) or futures[-1]
        for future in futures:
            future.result(PATIENCE_S)


# --- states ------------------------------------------------------------------------------------------------------


def test_a_model_that_was_never_loaded_has_nothing_but_a_name(world):
    write(world.root, "m")
    assert world.manager.index() == [IndexEntry("m")]
    with pytest.raises(NotFound, match=r"unknown model: 'm' is not found$"):
        world.served("m")


def test_the_states_of_a_model_from_its_load_to_its_end(world, background):
    write(world.root, "m")
    gate = world.loader.held["m"] = threading.Event()
    load = background(world.manager.load, "m")
    world.loader.wait_for_load()
    assert world.index("m") == [("1", "LOADING", "")]
    with pytest.raises(NotFound, match="'m' has no available versions"):
        world.served("m")
    gate.set()
    load.result(PATIENCE_S)
    assert world.index("m") == READY
    model = world.served("m")
    assert model.started
    model.finished.clear()  # a request runs
    world.manager.unload("m")
    assert world.index("m") == [("1", "UNLOADING", "")]
    assert model.draining
    with pytest.raises(NotFound, match="'m' has no available versions"):
        world.served("m")
    model.finished.set()
    eventually(lambda: world.index("m") == UNLOADED, "the model is unloaded")
    assert world.readiness == [("", True), ("m", True), ("", True), ("m", False), ("", True)]


def test_the_index_can_be_limited_to_what_is_ready_and_is_in_order(world):
    for name in ("b", "a", "c"):
        write(world.root, name, (1, 2), "version_policy { all {} }")
    world.manager.load("c")
    world.manager.load("b")
    world.manager.unload("b")
    eventually(lambda: world.index("b")[1][1] == "UNAVAILABLE", "b is unloaded")
    assert world.manager.index(ready_only=True) == [
        IndexEntry("c", "1", "READY"),
        IndexEntry("c", "2", "READY"),
    ]
    assert [(item.name, item.version) for item in world.manager.index()] == [
        ("a", ""),
        ("b", "1"),
        ("b", "2"),
        ("c", "1"),
        ("c", "2"),
    ]


def test_a_model_that_left_the_disk_stays_in_the_index_while_it_is_served(world):
    directory = write(world.root, "m")
    world.manager.load("m")
    directory.rename(directory.with_name(".gone"))
    assert world.index("m") == READY


def test_unloading_what_is_unknown_or_unloaded_is_no_error(world):
    write(world.root, "m")
    for name in ("", "nope", "../m", "m", "x" * 10_000):
        world.manager.unload(name)
    world.manager.load("m")
    world.manager.unload("m")
    world.manager.unload("m")
    eventually(lambda: world.index("m") == UNLOADED, "the model is unloaded")


def test_a_version_that_ends_late_does_not_speak_for_its_successor(world):
    write(world.root, "m")
    world.manager.load("m")
    first = world.served("m")
    first.finished.clear()
    world.manager.unload("m")
    world.manager.load("m")
    second = world.served("m")
    assert second is not first
    second.finished.clear()
    world.manager.unload("m")
    first.finished.set()
    eventually(lambda: first not in world.manager._retiring, "the first one has ended")
    assert world.index("m") == [("1", "UNLOADING", "")]
    second.finished.set()
    eventually(lambda: world.index("m") == UNLOADED, "the second one has ended too")


# --- reloads -----------------------------------------------------------------------------------------------------


def test_a_load_of_an_unchanged_model_does_nothing(world):
    write(world.root, "m", config="max_batch_size: 4")
    world.manager.load("m")
    model = world.served("m")
    world.manager.load("m")
    assert world.loader.loads == [("m", 1)]
    assert world.served("m") is model


@pytest.mark.parametrize("change", ["1/model.onnx", "config.pbtxt", "1/data.bin", "labels.txt"])
def test_a_load_of_a_changed_model_puts_a_new_one_in_its_place(change, world):
    directory = write(world.root, "m", config="max_batch_size: 4")
    world.manager.load("m")
    old = world.served("m")
    (directory / change).write_text("max_batch_size: 8")
    world.manager.load("m")
    new = world.served("m")
    assert new is not old
    assert (new.started, new.draining, old.draining) == (True, False, True)
    assert world.index("m") == READY


def test_the_old_model_serves_until_the_new_one_is_there(world, background):
    directory = write(world.root, "m")
    world.manager.load("m")
    old = world.served("m")
    gate = world.loader.held["m"] = threading.Event()
    (directory / "1" / "model.onnx").write_bytes(b"changed")
    world.loader.wait_for_load()
    load = background(world.manager.load, "m")
    world.loader.wait_for_load()
    assert world.served("m") is old
    assert not old.draining
    assert world.index("m") == READY
    gate.set()
    load.result(PATIENCE_S)
    assert world.served("m") is not old


def test_a_reload_that_fails_leaves_the_old_one_and_is_tried_again(world):
    directory = write(world.root, "m", (1, 2), "version_policy { all {} }")
    world.manager.load("m")
    old = [world.served("m", "1"), world.served("m", "2")]
    (directory / "labels.txt").write_text("both versions have it")
    world.loader.errors["m/2"] = ModelLoadError("it does not fit", model="m")
    with pytest.raises(InvalidArgument, match="load failed for model 'm': version 2 is at UNAVAILABLE state: Invalid"):
        world.manager.load("m")
    assert [world.served("m", "1"), world.served("m", "2")] == old
    assert not any(model.draining for model in old)
    assert world.index("m") == [("1", "READY", ""), ("2", "READY", "")]
    assert world.manager.server_ready
    unused = world.loader.models[-1]
    assert (unused.started, unused.draining) == (False, True)
    world.loader.errors.clear()
    world.manager.load("m")
    assert world.served("m", "2") not in old


def test_a_reload_keeps_the_versions_of_which_nothing_has_changed(world):
    directory = write(world.root, "m", (1, 2), "version_policy { all {} }")
    world.manager.load("m")
    first, second = world.served("m", "1"), world.served("m", "2")
    (directory / "2" / "model.onnx").write_bytes(b"changed")
    write(world.root, "m", (3,))
    world.manager.load("m")
    assert world.served("m", "1") is first
    assert not first.draining
    assert second.draining
    assert world.served("m", "2") is not second
    assert world.loader.loads == [("m", 1), ("m", 2), ("m", 2), ("m", 3)]
    assert [state for _, state, _ in world.index("m")] == ["READY"] * 3


def test_a_reload_may_take_versions_away_and_bring_others(world):
    directory = write(world.root, "m", (1, 2), "version_policy { all {} }")
    world.manager.load("m")
    first = world.served("m", "1")
    first.finished.clear()
    (directory / "1").rename(directory / "3")
    world.manager.load("m")
    assert world.manager.served_versions("m") == [2, 3]
    assert world.index("m") == [("1", "UNLOADING", ""), ("2", "READY", ""), ("3", "READY", "")]
    first.finished.set()
    eventually(lambda: world.index("m")[0] == UNLOADED[0], "version 1 is unloaded")
    with pytest.raises(NotFound, match="'m' version 1 is not found"):
        world.served("m", "1")


def test_a_load_reads_the_disk_when_its_turn_comes_and_not_before(world, background):
    directory = write(world.root, "m", config="max_batch_size: 1")
    gate = world.loader.held["m"] = threading.Event()
    first = background(world.manager.load, "m")
    world.loader.wait_for_load()
    second = background(world.manager.load, "m")
    (directory / "config.pbtxt").write_text("max_batch_size: 16")
    gate.set()
    first.result(PATIENCE_S)
    second.result(PATIENCE_S)
    assert world.served("m").config.max_batch_size == 16
    world.manager.load("m")
    assert len(world.loader.loads) == 2


def test_requests_find_a_model_at_every_moment_of_many_reloads(world, background):
    directory = write(world.root, "m")
    world.manager.load("m")
    ended = threading.Event()

    def find() -> None:
        while not ended.wait(PAUSE_S):
            for _ in range(100):
                assert world.served("m").started

    callers = [background(find) for _ in range(3)]
    for content in range(50):
        (directory / "1" / "model.onnx").write_text(str(content))
        world.manager.load("m")
    ended.set()
    for caller in callers:
        caller.result(PATIENCE_S)
    assert len(world.loader.loads) == 51
    assert [model.draining for model in world.loader.models] == [True] * 50 + [False]


def test_loads_of_other_models_do_not_wait_for_a_slow_one(world, background):
    write(world.root, "slow")
    write(world.root, "fast")
    gate = world.loader.held["slow"] = threading.Event()
    background(world.manager.load, "slow")
    world.loader.wait_for_load()
    world.manager.load("fast")
    assert world.index("fast") == READY
    assert world.index("slow") == [("1", "LOADING", "")]
    gate.set()


# --- versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "served"),
    [
        (None, [10]),
        ("", [10]),
        ("version_policy { latest {} }", [10]),
        ("version_policy { latest { num_versions: 2 } }", [3, 10]),
        ("version_policy { latest { num_versions: 9 } }", [1, 3, 10]),
        ("version_policy { all {} }", [1, 3, 10]),
        ("version_policy { specific { versions: [1, 3] } }", [1, 3]),
        ("version_policy { specific { versions: [3, 77] } }", [3]),
    ],
)
def test_the_policy_chooses_the_versions_and_the_highest_one_is_meant_without_a_number(policy, served, world):
    write(world.root, "m", (1, 3, 10), policy)
    world.manager.load("m")
    assert world.manager.served_versions("m") == served
    assert world.served("m").interface.version == str(served[-1])
    assert [model.interface.version for model in world.manager.served()] == [str(number) for number in served]
    for number in served:
        assert world.served("m", str(number)).interface.version == str(number)
        assert world.served("m", f"00{number}") is world.served("m", str(number))
    for number in {1, 3, 10, 77, 0} - {*served}:
        with pytest.raises(NotFound, match=f"'m' version {number} is not found"):
            world.served("m", str(number))


def test_a_policy_without_a_version_to_serve_is_a_load_error(world):
    write(world.root, "m", (1, 2), "version_policy { specific { versions: [7] } }")
    write(world.root, "empty", ())
    (world.root / "empty").mkdir()
    for name in ("m", "empty"):
        text = f"load failed for model '{name}': at least one version must be available under the version policy"
        with pytest.raises(InvalidArgument, match=text):
            world.manager.load(name)
    assert not world.loader.loads


@pytest.mark.parametrize("version", ["abc", "-1", "1.0", " 1", "9" * 30, "1" * 10_000])
def test_a_version_that_is_no_number_is_an_invalid_argument(version, world):
    write(world.root, "m")
    world.manager.load("m")
    with pytest.raises(InvalidArgument, match="version should be an integral value > 0"):
        world.served("m", version)


def test_the_versions_that_load_serve_when_others_of_the_model_fail(world):
    write(world.root, "m", (1, 2), "version_policy { all {} }")
    world.loader.errors["m/2"] = BackendError(7, "no such operator")
    with pytest.raises(InvalidArgument, match="version 2 is at UNAVAILABLE state: Internal: onnx runtime error 7"):
        world.manager.load("m")
    assert world.served("m").interface.version == "1"
    assert [item[1] for item in world.index("m")] == ["READY", "UNAVAILABLE"]
    assert not world.manager.server_ready


def test_statistics_are_of_all_versions_of_one_or_of_every_model(world):
    write(world.root, "a", (1, 2), "version_policy { all {} }")
    write(world.root, "b")
    world.manager.load("a")
    world.manager.load("b")

    def select(name: str, version: str) -> list[str]:
        models = world.manager.select(name, version)
        return [f"{model.interface.name}/{model.interface.version}" for model in models]

    assert select("", "") == ["a/1", "a/2", "b/1"]
    assert select("a", "") == ["a/1", "a/2"]
    assert select("a", "2") == ["a/2"]
    with pytest.raises(InvalidArgument, match="requested model 'c' is not available"):
        select("c", "")
    with pytest.raises(InvalidArgument, match="requested model version is not available for model 'b'"):
        select("b", "2")


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModelLoadError("dims differ", model="m"), "Invalid argument: dims differ"),
        (ModelLoadError("no file", model="m", triton_code="Unavailable"), "Unavailable: no file"),
        (BackendError(7, "bad protobuf"), "Internal: onnx runtime error 7: bad protobuf"),
        (InvalidArgument("no GPU"), "Invalid argument: no GPU"),
    ],
)
def test_a_model_that_does_not_fit_is_shown_with_its_reason(error, reason, world):
    write(world.root, "m")
    world.loader.errors["m"] = error
    with pytest.raises(InvalidArgument) as caught:
        world.manager.load("m")
    assert str(caught.value) == f"load failed for model 'm': version 1 is at UNAVAILABLE state: {reason};\n"
    assert world.index("m") == [("1", "UNAVAILABLE", reason)]
    assert world.readiness[-1] == ("", False)


@pytest.mark.parametrize("config", ["input {", "no_such_field: 1", 'max_batch_size: "x"', "\xff"])
def test_a_configuration_that_cannot_be_read_is_the_other_family(config, world):
    (write(world.root, "m") / "config.pbtxt").write_bytes(config.encode("latin-1"))
    with pytest.raises(Internal, match=r"^failed to load 'm', failed to poll from model repository: .*config.pbtxt"):
        world.manager.load("m")
    assert not world.loader.loads


def test_a_configuration_that_the_loader_refuses_is_of_that_family_too(world):
    write(world.root, "m")
    world.loader.errors["m"] = ConfigError("preferred size is too large", model="m")
    with pytest.raises(Internal, match=r"^failed to load 'm', failed to poll from model repository: preferred size"):
        world.manager.load("m")
    assert world.index("m") == [("1", "UNAVAILABLE", "preferred size is too large")]


def test_a_bug_while_loading_is_raised_but_never_shown(world):
    write(world.root, "m")
    write(world.root, "other")
    world.loader.errors["m"] = RuntimeError("secret")
    with pytest.raises(RuntimeError):
        world.manager.load("m")
    assert world.index("m") == [("1", "UNAVAILABLE", UNEXPECTED)]
    world.manager.load("other")
    assert world.index("other") == READY
    world.loader.errors.clear()
    world.manager.load("m")
    assert world.index("m") == READY


def test_a_model_whose_threads_cannot_be_started_is_not_left_loading(world):
    write(world.root, "m")
    world.loader.start_errors["m"] = RuntimeError("can't start new thread")
    with pytest.raises(RuntimeError):
        world.manager.load("m")
    assert world.index("m") == [("1", "UNAVAILABLE", UNEXPECTED)]
    assert world.loader.models[0].draining


@pytest.mark.parametrize("name", ["", ".", "..", "../m", "/m", "m/1", "m\\1", "m\0"])
def test_a_name_that_would_leave_the_repository_is_refused(name, world):
    write(world.root, "m")
    with pytest.raises(InvalidArgument, match=r"[Mm]odel name"):
        world.manager.load(name)
    with pytest.raises(InvalidArgument, match=r"[Mm]odel name"):
        world.manager.load(name, Override("{}", {"1/model.onnx": b""}))


@pytest.mark.parametrize("name", ["nope", "M", "m ", "x" * 100_000, "\N{SNOWMAN}", "\ud800"])
def test_a_name_that_is_in_no_repository_is_refused_and_forgotten(name, world):
    write(world.root, "m")
    with pytest.raises(Internal, match=r"failed to load .* failed to poll from model repository"):
        world.manager.load(name)
    assert world.manager.index() == [IndexEntry("m")]
    assert not world.manager._entries


def test_a_model_that_is_in_two_repositories_is_in_neither(make_world, tmp_path):
    other = tmp_path / "other"
    write(other, "m")
    world = make_world(others=(other,))
    write(world.root, "m")
    with pytest.raises(Internal, match="several model repositories"):
        world.manager.load("m")


@pytest.mark.parametrize("mode", ["none"])
def test_load_and_unload_are_refused_outside_explicit_mode(mode, make_world):
    world = make_world(mode=ControlMode(mode))
    write(world.root, "m")
    world.start()
    for call in (world.manager.load, world.manager.unload):
        with pytest.raises(Unavailable, match="explicit model load / unload is not allowed"):
            call("m")
    assert world.index("m") == READY


# --- overrides ---------------------------------------------------------------------------------------------------


def test_a_configuration_of_a_call_holds_until_the_next_plain_load(world):
    write(world.root, "m", config="max_batch_size: 4")
    world.manager.load("m", Override(json.dumps({"max_batch_size": "16"})))
    assert world.served("m").config.max_batch_size == 16
    world.manager.load("m", Override(json.dumps({"maxBatchSize": 32})))
    assert world.served("m").config.max_batch_size == 32
    world.manager.load("m")
    assert world.served("m").config.max_batch_size == 4


def test_after_unload_and_load_the_configuration_on_disk_counts_again(world):
    write(world.root, "m", config="max_batch_size: 4")
    world.manager.load("m", Override(json.dumps({"max_batch_size": 16})))
    world.manager.unload("m")
    world.manager.load("m")
    assert world.served("m").config.max_batch_size == 4


def test_a_bad_override_leaves_what_serves(world):
    write(world.root, "m")
    world.manager.load("m")
    model = world.served("m")
    for text in ("{", "[]", '{"nope": 1}', '{"max_batch_size": "x"}', "[" * 100_000):
        with pytest.raises(Internal, match="failed to load 'm', failed to poll from model repository"):
            world.manager.load("m", Override(text))
    assert world.served("m") is model
    assert world.index("m") == READY


def test_the_files_of_a_call_are_the_whole_directory_for_that_load(world, tmp_path):
    write(world.root, "m", (1, 2))
    files = {"7/model.onnx": b"x", "7/weights.bin": b"y"}
    world.manager.load("m", Override("{}", files))
    assert world.loader.files["m"] == ["7", "7/model.onnx", "7/weights.bin"]
    assert world.manager.served_versions("m") == [7]
    world.manager.load("m")
    assert world.manager.served_versions("m") == [2]


def test_the_files_of_a_call_make_a_model_that_is_in_no_repository(world):
    world.manager.load("new", Override("{}", {"1/model.onnx": b"x"}))
    assert world.index("new") == READY
    world.manager.unload("new")
    with pytest.raises(Internal, match="'new' is in no model repository"):
        world.manager.load("new")


def test_files_need_a_configuration_and_names_that_stay_inside(world):
    with pytest.raises(Internal, match=r"failed to load 'm', .* need its parameter 'config'"):
        world.manager.load("m", Override(None, {"1/model.onnx": b"x"}))
    for name in ("../x", "/x", "1/../../x", f"1/{'x' * 1000}", "1/\0", "1//", ""):
        with pytest.raises(Internal, match="failed to load 'm', failed to poll from model repository"):
            world.manager.load("m", Override("{}", {name: b"x"}))
    assert world.manager.index() == []


def test_the_files_of_a_call_are_gone_from_the_disk_afterwards(world, tmp_path, monkeypatch):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    world.manager.load("m", Override("{}", {"1/model.onnx": b"x"}))
    world.loader.errors["m"] = ModelLoadError("bad", model="m")
    with pytest.raises(InvalidArgument):
        world.manager.load("m", Override("{}", {"1/model.onnx": b"x"}))
    assert list(scratch.iterdir()) == []


# --- start, readiness, end ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "names", "loaded"),
    [("none", (), "abc"), ("explicit", (), ""), ("explicit", ("b",), "b"), ("explicit", ("*",), "abc")],
)
def test_the_control_mode_says_what_is_loaded_at_the_start(mode, names, loaded, make_world):
    world = make_world(mode=ControlMode(mode))
    for name in "abc":
        write(world.root, name)
    assert not world.manager.server_ready
    assert world.start(*names) == []
    assert "".join(sorted(name for name, _ in world.loader.loads)) == loaded
    assert world.manager.server_ready


@pytest.mark.parametrize("strict", [True, False])
def test_broken_models_at_the_start_are_named_and_the_others_serve(strict, make_world):
    errors = {"file": BackendError(7, "bad"), "bug": RuntimeError("secret")}
    world = make_world(FakeLoader(errors=errors), mode=ControlMode.NONE, strict_readiness=strict)
    for name in ("good", "file", "bug"):
        write(world.root, name)
    write(world.root, "text", config="nope: 1")
    (world.root / "empty").mkdir()
    assert world.start() == ["bug", "empty", "file", "text"]
    assert world.index("good") == READY
    reasons = {name: world.index(name)[0] for name in ("bug", "empty", "file", "text")}
    assert {state for _, state, _ in reasons.values()} == {"UNAVAILABLE"}
    assert reasons["bug"][2] == UNEXPECTED
    assert "at least one version" in reasons["empty"][2]
    assert reasons["file"][2] == "Internal: onnx runtime error 7: bad"
    assert "nope" in reasons["text"][2]
    assert world.manager.server_ready is not strict
    assert world.readiness[-1] == ("", not strict)


def test_a_name_to_load_at_the_start_that_is_not_there_is_reported(make_world):
    world = make_world()
    assert world.start("nope") == ["nope"]
    assert not world.manager.server_ready


def test_unloading_a_failed_model_makes_the_server_ready_again(world):
    write(world.root, "m")
    world.loader.errors["m"] = BackendError(7, "bad")
    with pytest.raises(InvalidArgument):
        world.manager.load("m")
    assert not world.manager.server_ready
    world.manager.unload("m")
    assert world.manager.server_ready
    assert world.readiness[-1] == ("", True)
    assert world.index("m") == UNLOADED


def test_no_further_model_is_loaded_once_the_server_is_to_end(make_world):
    asked = threading.Event()
    world = make_world(mode=ControlMode.NONE, load_threads=1)
    for name in "abc":
        write(world.root, name)
    gate = world.loader.held["a"] = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        start = pool.submit(world.manager.start, (), asked.is_set)
        world.loader.wait_for_load()
        asked.set()
        gate.set()
        assert start.result(PATIENCE_S) == []
    assert world.loader.loads == [("a", 1)]
    assert not world.manager.server_ready


def test_a_draining_server_is_not_ready_and_takes_no_control_calls(world):
    write(world.root, "m")
    world.manager.load("m")
    world.manager.drain()
    assert not world.manager.server_ready
    assert world.readiness[-2:] == [("", False), ("m", False)]
    for call in (world.manager.load, world.manager.unload):
        with pytest.raises(Unavailable, match="shutting down"):
            call("m")
    assert world.served("m").started  # what was accepted is still run


def test_a_load_that_ends_while_the_server_drains_brings_nobody_back(world, background):
    write(world.root, "m")
    gate = world.loader.held["m"] = threading.Event()
    load = background(world.manager.load, "m")
    world.loader.wait_for_load()
    world.manager.drain()
    gate.set()
    load.result(PATIENCE_S)
    assert not any(ready for _, ready in world.readiness[1:])


def test_the_stop_drains_every_model_and_waits_for_those_that_were_on_their_way_out(world, background):
    for name in ("a", "b", "leaving"):
        write(world.root, name)
        world.manager.load(name)
    leaving = world.served("leaving")
    leaving.finished.clear()
    world.manager.unload("leaving")
    assert not world.manager.stop(0.01)
    assert all(model.draining for model in world.loader.models)
    stop = background(world.manager.stop, PATIENCE_S)
    leaving.finished.set()
    assert stop.result(PATIENCE_S)


def test_the_stop_says_whose_requests_were_still_running_when_time_was_up(world, caplog):
    for name in ("stuck", "good"):
        write(world.root, name)
        world.manager.load(name)
    world.served("stuck").finished.clear()
    assert not world.manager.stop(0.01)
    assert [record.model for record in caplog.records if record.levelname == "WARNING"] == ["stuck"]
    world.served("stuck").finished.set()


# --- tries again -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("retries", "served"), [(0, False), (1, False), (2, True), (9, True)])
def test_a_version_that_fails_to_load_is_tried_again_as_often_as_was_asked_for(make_world, retries, served):
    loader = FailsAtFirst(2)
    world = make_world(loader, load_retries=retries)
    write(world.root, "m")
    assert world.start("m") == ([] if served else ["m"])
    assert world.index("m") == (
        READY if served else [("1", "UNAVAILABLE", "Internal: onnx runtime error 7: try again")]
    )
    assert len(loader.loads) == min(retries, 2) + 1


def test_what_is_written_wrong_is_not_tried_again(make_world):
    loader = FakeLoader(errors={"m": ConfigError("preferred size is too large", model="m")})
    world = make_world(loader, load_retries=5)
    write(world.root, "m")
    assert world.start("m") == ["m"]
    assert len(loader.loads) == 1


class FailsAtFirst(FakeLoader):
    """Fails the first so many loads."""

    def __init__(self, failures):
        super().__init__()
        self.failures = failures

    def __call__(self, directory, version, config, parts):
        self.errors = {"m": BackendError(7, "try again")} if len(self.loads) < self.failures else {}
        return super().__call__(directory, version, config, parts)
