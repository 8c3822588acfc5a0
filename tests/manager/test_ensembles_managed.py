"""Ensembles come, go and come back with their parts: traces of loads and unloads over a fake loader."""

from __future__ import annotations

import threading
from contextlib import suppress

import pytest
from manager_fakes import FakeLoader, World, write

from sluice_server.errors import BackendError, InvalidArgument, NotFound
from sluice_server.repository.manager import ControlMode, Override
from support import models
from support.fakes import PATIENCE_S, eventually

READY = [("1", "READY", "")]
UNLOADED = [("1", "UNAVAILABLE", "unloaded")]
PORTS = models.port("input", "X") + models.port("output", "Y")


def write_chain(root, name, *parts, more="", **how):
    """An ensemble of steps one after the other."""
    tensors = ["X", *(f"t{number}" for number in range(1, len(parts))), "Y"]
    steps = [
        models.step(part, {"X": takes}, {"Y": makes}, **how)
        for part, takes, makes in zip(parts, tensors, tensors[1:], strict=False)
    ]
    models.write_ensemble(root, name, PORTS, steps, more=more)


def gone(part, reason="unloaded", ensemble="E"):
    text = f"Invalid argument: ensemble '{ensemble}' depends on '{part}' which has no loaded version: {reason}"
    return [("1", "UNAVAILABLE", text)]


@pytest.fixture
def chain(world):
    """E of a and b, loaded."""
    write(world.root, "a")
    write(world.root, "b")
    write_chain(world.root, "E", "a", "b")
    world.manager.load("E")
    return world


def test_loading_an_ensemble_loads_its_parts_first(chain):
    assert chain.loader.loads == [("a", 1), ("b", 1), ("E", 1)]
    assert [chain.index(name) for name in ("a", "b", "E")] == [READY] * 3
    assert chain.served("E").parts == (chain.served("a"), chain.served("b"))
    chain.manager.load("E")
    assert len(chain.loader.loads) == 3, "nothing has changed"


def test_unloading_a_part_takes_the_ensemble_down_and_loading_it_brings_it_back(chain):
    old = chain.served("E")
    chain.manager.unload("b")
    assert chain.index("E")[0][1] == "UNAVAILABLE"
    eventually(lambda: chain.index("b") == UNLOADED, "b is unloaded")
    assert chain.index("E") == gone("b")
    assert old.draining
    with pytest.raises(NotFound, match="'E' has no available versions"):
        chain.served("E")
    assert chain.manager.server_ready, "somebody wanted that"
    assert ("E", False) in chain.readiness
    chain.manager.load("b")
    assert chain.index("E") == READY
    assert chain.served("E").parts == (chain.served("a"), chain.served("b"))
    assert chain.readiness[-2:] == [("E", True), ("", True)]


def test_an_ensemble_that_was_unloaded_stays_away_when_its_parts_come_and_go(chain):
    chain.manager.unload("E")
    eventually(lambda: chain.index("E") == UNLOADED, "E is unloaded")
    chain.manager.unload("b")
    chain.manager.load("b")
    assert chain.index("E") == UNLOADED
    assert chain.index("a") == READY


def test_a_part_that_is_replaced_is_drained_behind_the_ensemble_on_it(chain):
    old, old_part = chain.served("E"), chain.served("b")
    old.finished.clear()  # a request is between its steps
    (chain.root / "b" / "1" / "model.onnx").write_bytes(b"newer")
    chain.manager.load("b")
    assert chain.served("b") is not old_part
    assert chain.served("E").parts == (chain.served("a"), chain.served("b"))
    assert old.draining
    assert not old_part.draining, "the request in flight still needs it"
    old.finished.set()
    eventually(lambda: old_part.draining, "the part goes behind the ensemble")
    assert not chain.served("a").draining
    assert chain.index("E") == READY


def test_a_new_part_that_does_not_fit_takes_the_ensemble_down_with_the_reason(chain):
    chain.loader.errors["E"] = InvalidArgument("it does not fit")
    (chain.root / "b" / "1" / "model.onnx").write_bytes(b"newer")
    chain.manager.load("b")
    assert chain.index("b") == READY
    assert chain.index("E") == [("1", "UNAVAILABLE", "Invalid argument: it does not fit")]
    assert not chain.manager.server_ready
    chain.loader.errors.clear()
    (chain.root / "b" / "1" / "model.onnx").write_bytes(b"newest")
    chain.manager.load("b")
    assert chain.index("E") == READY


def test_a_part_that_fails_to_load_is_the_reason_of_the_ensemble(world):
    write(world.root, "a")
    write(world.root, "b")
    write_chain(world.root, "E", "a", "b")
    world.loader.errors["b"] = BackendError(7, "broken")
    with pytest.raises(InvalidArgument, match=r"load failed for model 'E': version 1 is at UNAVAILABLE .*broken"):
        world.manager.load("E")
    assert world.index("E") == gone("b", "Internal: onnx runtime error 7: broken")
    assert not world.manager.server_ready
    world.loader.errors.clear()
    world.manager.load("b")
    assert world.index("E") == READY
    assert world.manager.server_ready


def test_a_part_that_fails_to_reload_leaves_the_ensemble_on_the_old_one(chain):
    ensemble = chain.served("E")
    chain.loader.errors["b"] = BackendError(7, "broken")
    (chain.root / "b" / "1" / "model.onnx").write_bytes(b"newer")
    with pytest.raises(InvalidArgument):
        chain.manager.load("b")
    assert chain.served("E") is ensemble


def test_an_ensemble_whose_new_configuration_fails_goes_on_and_follows_its_old_parts(chain):
    ensemble = chain.served("E")
    write_chain(chain.root, "E", "a", "nowhere")
    with pytest.raises(InvalidArgument, match="depends on 'nowhere' which has no loaded version"):
        chain.manager.load("E")
    assert chain.served("E") is ensemble
    chain.manager.unload("b")
    assert chain.index("E")[0][1] == "UNAVAILABLE"


def test_versions_of_parts_are_the_latest_or_what_the_step_names(world):
    write(world.root, "a", (1, 2), "version_policy { all {} }")
    write_chain(world.root, "E", "a")
    write_chain(world.root, "F", "a", more="")
    models.write_ensemble(world.root, "G", PORTS, [models.step("a", {"X": "X"}, {"Y": "Y"}, "model_version: 1")])
    models.write_ensemble(world.root, "H", PORTS, [models.step("a", {"X": "X"}, {"Y": "Y"}, "model_version: 3")])
    for name in ("E", "G"):
        world.manager.load(name)
    assert world.served("E").parts == (world.served("a", "2"),)
    assert world.served("G").parts == (world.served("a", "1"),)
    with pytest.raises(InvalidArgument, match="'H' depends on 'a' whose required version 3 is not loaded: it has 1, 2"):
        world.manager.load("H")
    write(world.root, "a", (3,))
    world.manager.load("a")
    assert world.index("H") == READY
    assert world.served("E").parts == (world.served("a", "3"),)


def test_ensembles_of_ensembles_follow_their_parts_in_order(world):
    write(world.root, "a")
    write_chain(world.root, "inner", "a")
    write_chain(world.root, "outer", "inner", "a")
    world.manager.load("outer")
    assert [name for name, _ in world.loader.loads] == ["a", "inner", "outer"]
    world.manager.unload("a")
    eventually(lambda: world.index("a") == UNLOADED, "a is unloaded")
    assert world.index("inner") == gone("a", ensemble="inner")
    assert world.index("outer")[0][1] == "UNAVAILABLE"
    assert world.manager.server_ready
    world.manager.load("a")
    assert world.index("inner") == world.index("outer") == READY
    assert world.served("outer").parts == (world.served("inner"), world.served("a"))


def test_no_ensemble_is_a_part_of_itself(world):
    write(world.root, "a")
    write_chain(world.root, "E", "a", "F")
    write_chain(world.root, "F", "E")
    with pytest.raises(InvalidArgument, match="ensemble 'E' contains itself: E -> F -> E"):
        world.manager.load("E")
    # A part that becomes an ensemble of what it is a part of.
    write_chain(world.root, "G", "a")
    world.manager.load("G")
    (world.root / "a" / "1" / "model.onnx").unlink()
    write_chain(world.root, "a", "G")
    with pytest.raises(InvalidArgument, match="ensemble 'a' contains itself: a -> G -> a"):
        world.manager.load("a")
    assert world.index("G") == READY


def test_a_part_that_changes_while_its_ensemble_is_loaded_is_followed_afterwards(world):
    write(world.root, "a")
    write_chain(world.root, "E", "a")
    world.manager.load("a")
    old = world.served("a")
    gate = world.loader.held["E"] = threading.Event()
    loads = [threading.Thread(target=world.manager.load, args=("E",))]
    loads[0].start()
    eventually(lambda: ("E", 1) in world.loader.loads, "E is bound to the first a")
    (world.root / "a" / "1" / "model.onnx").write_bytes(b"newer")
    loads.append(threading.Thread(target=world.manager.load, args=("a",)))
    loads[1].start()
    eventually(lambda: world.served("a") is not old, "the second a is served")
    assert not old.draining
    gate.set()
    for load in loads:
        load.join(PATIENCE_S)
    assert world.served("E").parts == (world.served("a"),)
    eventually(lambda: old.draining, "nobody needs the first one any more")


def test_unload_dependents_unloads_the_parts_that_came_along(world):
    for name in ("a", "b", "c", "d"):
        write(world.root, name)
    write_chain(world.root, "E", "a", "b", "c")
    write_chain(world.root, "F", "b", "d")
    world.manager.load("c")  # somebody wants it for itself
    world.manager.load("E")
    world.manager.load("F")
    world.manager.unload("E", with_parts=True)
    eventually(lambda: world.index("a") == UNLOADED, "a came along")
    assert world.index("E")[0][1] != "READY"
    assert [world.index(name) for name in ("b", "c", "d", "F")] == [READY] * 4
    world.manager.unload("F", with_parts=True)
    for name in ("b", "d"):
        eventually(lambda name=name: world.index(name) == UNLOADED, "it came along")
    assert world.index("c") == READY


def test_without_unload_dependents_the_parts_stay(chain):
    chain.manager.unload("E")
    assert chain.index("a") == chain.index("b") == READY


def test_an_override_of_an_ensemble_loads_the_parts_that_it_names(chain):
    write(chain.root, "c")
    config = (
        '{"platform": "ensemble", "max_batch_size": 8, "input": [{"name": "X", "data_type": "TYPE_FP32", "dims": [4]}],'
        ' "output": [{"name": "Y", "data_type": "TYPE_FP32", "dims": [4]}], "ensemble_scheduling": {"step":'
        ' [{"model_name": "c", "input_map": {"X": "X"}, "output_map": {"Y": "Y"}}]}}'
    )
    chain.manager.load("E", Override(config=config))
    assert chain.served("E").parts == (chain.served("c"),)
    chain.manager.unload("c")
    chain.manager.load("c")
    assert chain.served("E").parts == (chain.served("c"),), "it is still the override"
    chain.manager.load("E")
    assert chain.served("E").parts == (chain.served("a"), chain.served("b"))


def test_a_part_that_a_load_call_brought_along_is_not_replaced_by_loading_the_ensemble(world):
    write(world.root, "a")
    write_chain(world.root, "E", "a")
    world.manager.load("a", Override(config='{"max_batch_size": 3}'))
    part = world.served("a")
    world.manager.load("E")
    assert world.served("a") is part


@pytest.mark.parametrize("mode", [ControlMode.NONE, ControlMode.POLL])
def test_ensembles_start_behind_their_parts(mode, make_world):
    world = make_world(mode=mode)
    write(world.root, "z")
    write_chain(world.root, "B", "A", "z")
    write_chain(world.root, "A", "z")
    assert world.start() == []
    assert [name for name, _ in world.loader.loads] == ["z", "A", "B"]
    assert world.manager.server_ready


def test_a_broken_part_at_start_is_loaded_once_and_fails_its_ensemble(make_world):
    loader = FakeLoader(errors={"z": BackendError(7, "broken")})
    world = make_world(loader, mode=ControlMode.NONE)
    write(world.root, "z")
    write(world.root, "a")
    write_chain(world.root, "B", "a", "z")
    assert world.start() == ["B", "z"]
    assert sorted(loader.loads) == [("a", 1), ("z", 1)]
    assert world.index("B") == gone("z", "Internal: onnx runtime error 7: broken", "B")
    assert world.index("a") == READY


def test_the_models_to_load_at_start_come_with_their_parts(make_world):
    world = make_world()
    for name in ("a", "b", "c"):
        write(world.root, name)
    write_chain(world.root, "E", "a", "b")
    assert world.start("E", "b") == []
    assert sorted(name for name, _ in world.loader.loads) == ["E", "a", "b"]
    world.manager.unload("E", with_parts=True)
    eventually(lambda: world.index("a") == UNLOADED, "a came along")
    assert world.index("b") == READY


def test_poll_follows_parts_and_ensembles(make_world):
    world = make_world(mode=ControlMode.POLL)
    write(world.root, "a")
    write(world.root, "b")
    write_chain(world.root, "E", "a", "b")
    world.start()
    old = world.served("E")

    def look() -> None:
        for _ in range(3):
            world.manager.poll()

    (world.root / "b" / "1" / "model.onnx").write_bytes(b"newer")
    look()
    assert world.served("E") is not old
    assert world.served("E").parts == (world.served("a"), world.served("b"))
    (world.root / "b").rename(world.root / ".b")
    look()
    assert world.index("E")[0][1] == "UNAVAILABLE"
    (world.root / ".b").rename(world.root / "b")
    look()
    assert world.index("E") == READY
    write_chain(world.root, "E", "a")
    look()
    assert world.served("E").parts == (world.served("a"),)


def test_at_the_end_ensembles_are_drained_before_their_parts(chain):
    write_chain(chain.root, "outer", "E")
    chain.manager.load("outer")
    outer, inner, part = chain.served("outer"), chain.served("E"), chain.served("a")
    outer.finished.clear()
    done = threading.Thread(target=chain.manager.stop, args=(PATIENCE_S,))
    done.start()
    eventually(lambda: outer.draining, "the outermost goes first")
    assert not inner.draining
    assert not part.draining
    outer.finished.set()
    done.join(PATIENCE_S)
    assert inner.draining
    assert part.draining
    assert chain.manager.stop(0.0)


def test_loads_and_unloads_of_everything_at_once_leave_nothing_behind(make_world):
    world: World = make_world()
    world.start()
    for name in ("a", "b"):
        write(world.root, name)
    write_chain(world.root, "E", "a", "b")
    write_chain(world.root, "F", "E", "a")

    def churn(name: str) -> None:
        for _ in range(15):
            with suppress(InvalidArgument):  # a part was unloaded meanwhile
                world.manager.load(name)
            world.manager.unload(name, with_parts=name == "E")

    threads = [threading.Thread(target=churn, args=(name,)) for name in ("a", "b", "E", "F")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    for name in ("a", "b"):
        world.manager.load(name)
    world.manager.load("F")
    assert [world.index(name) for name in ("a", "b", "E", "F")] == [READY] * 4
    assert world.served("F").parts == (world.served("E"), world.served("a"))
    eventually(lambda: not world.manager._retiring, "all others have ended")
    used = {model for name in ("E", "F") for model in world.served(name).parts}
    assert set(world.manager._uses) == used
