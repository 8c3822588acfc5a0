"""What an ensemble's configuration may say: on its own, and towards the models of its steps."""

from __future__ import annotations

import pytest

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.repository.autocomplete import normalize
from sluice_server.repository.config import parse_text
from sluice_server.repository.ensembles import check_parts, check_uploaded, part_names
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.parts import Dependencies, MissingPart, PartState, load_order
from support import models

PORTS = models.port("input", "X") + models.port("output", "Y")
CHAIN = [models.step("a", {"X": "X"}, {"Y": "between"}), models.step("b", {"X": "between"}, {"Y": "Y"})]


def config(
    ports: str = PORTS, steps: list[str] | None = None, *, more: str = "", max_batch_size: int = 8, of: str = ""
) -> ModelConfig:
    """An ensemble E as written."""
    scheduling = f"ensemble_scheduling {{ {of} {' '.join(CHAIN if steps is None else steps)} }}"
    return parse_text(f'platform: "ensemble" max_batch_size: {max_batch_size} {ports} {scheduling} {more}', "")


def test_the_reported_configuration_has_neither_instances_nor_optimization() -> None:
    found = normalize(config(), name="E")
    assert (found.name, found.platform, found.backend) == ("E", "ensemble", "")
    assert not found.instance_group
    assert not found.HasField("optimization")
    assert not found.default_model_filename
    assert found.version_policy.latest.num_versions == 1
    assert normalize(found, name="E") == found
    assert part_names(found) == ("a", "b")


@pytest.mark.parametrize(
    ("more", "field"),
    [
        ("instance_group { count: 1 }", "instance_group"),
        ("optimization { }", "optimization"),
        ('model_warmup { name: "w" batch_size: 1 }', "model_warmup"),
        ('default_model_filename: "model.onnx"', "default_model_filename"),
        ('backend: "onnxruntime"', "backend"),
        ("response_cache { enable: true }", "response_cache.enable"),
        ('parameters { key: "slo_p99_ms" value { string_value: "5" } }', 'parameters["slo_p99_ms"]'),
    ],
)
def test_what_an_ensemble_cannot_have_is_refused_by_name(more: str, field: str) -> None:
    written = config()
    written.MergeFrom(parse_text(more, ""))
    with pytest.raises(ConfigError) as caught:
        normalize(written, name="E")
    assert field in str(caught.value)


def step(text: str) -> str:
    return f"step {{ {text} }}"


TAKES, MAKES = 'input_map { key: "X" value: "X" }', 'output_map { key: "Y" value: "Y" }'

BROKEN = [
    ({"ports": models.port("output", "Y")}, "input is missing"),
    ({"ports": models.port("input", "X")}, "output is missing"),
    ({"steps": []}, "ensemble_scheduling.step must have 1 to 1024 steps, and has 0"),
    ({"steps": [CHAIN[0]] * 1025}, "and has 1025"),
    ({"steps": [step(f"{TAKES} {MAKES}")]}, "ensemble_scheduling.step[0].model_name is missing"),
    ({"steps": [step(f'model_name: "a" {MAKES}')]}, "ensemble_scheduling.step[0].input_map is missing"),
    ({"steps": [step(f'model_name: "a" {TAKES}')]}, "ensemble_scheduling.step[0].output_map is missing"),
    ({"steps": [step(f'model_name: "E" {TAKES} {MAKES}')]}, "step[0].model_name is the ensemble itself"),
    ({"steps": [step(f'model_name: "a" model_version: -2 {TAKES} {MAKES}')]}, "step[0].model_version is -2"),
    ({"steps": [models.step("a", {"X": ""}, {"Y": "Y"})]}, 'step[0].input_map["X"] leads to no tensor'),
    ({"steps": [models.step("a", {"X": "X"}, {"": "Y"})]}, 'step[0].output_map[""] leads to no tensor'),
    ({"steps": [CHAIN[0]]}, "ensemble output 'Y' is not written by any step"),
    ({"more": 'name: "F"'}, "name is 'F', but must equal"),
]


@pytest.mark.parametrize(("what", "error"), BROKEN)
def test_each_thing_that_can_be_written_wrongly_has_its_error(what: dict, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        normalize(config(**what), name="E")
    assert error in str(caught.value)


def test_only_an_ensemble_has_a_graph_and_it_needs_one() -> None:
    written = config()
    written.platform = "onnxruntime_onnx"
    with pytest.raises(ConfigError, match="ensemble_scheduling cannot be set for a model whose platform is 'onnxr"):
        normalize(written, name="E")
    with pytest.raises(ConfigError, match="input is missing"):
        normalize(parse_text('platform: "ensemble"', ""), name="E")
    written.platform = ""
    assert normalize(written, name="E").platform == "ensemble"


# --- towards the parts ---------------------------------------------------------------------------------------------


def part(name: str, inputs: str = "", outputs: str = "", max_batch_size: int = 8, more: str = "") -> ModelConfig:
    """A completed configuration of a step's model."""
    text = inputs or models.port("input", "X")
    text += outputs or models.port("output", "Y")
    return parse_text(f'name: "{name}" max_batch_size: {max_batch_size} {text} {more}', "")


def x(*dims: int, **how: str) -> str:
    return models.port("input", "X", dims, **how)


def y(*dims: int, **how: str) -> str:
    return models.port("output", "Y", dims, **how)


def test_parts_that_fit_are_taken() -> None:
    check_parts(normalize(config(), name="E"), [part("a"), part("b")])
    # Open dimensions fit any, and larger batches smaller ones.
    check_parts(normalize(config(), name="E"), [part("a", outputs=y(-1)), part("b", x(-1), max_batch_size=64)])


UNFIT = [
    ([part("a"), part("b", max_batch_size=4)], "ensemble 'E' allows maximum batch size 8, but it contains model 'b'"),
    (
        [part("a", models.port("input", "Z")), part("b")],
        "mapped to non-existing input 'X' in model 'a', which has Z",
    ),
    ([part("a"), part("b", outputs=models.port("output", "Z"))], "is mapped from non-existing output 'Y' in model 'b'"),
    (
        [part("a", x(4) + models.port("input", "B")), part("b")],
        "input 'B' in model 'a' is not mapped to any ensemble tensors, in step 0",
    ),
    (
        [part("a", outputs=y(4, datatype="INT64")), part("b")],
        "ensemble tensor 'between': inconsistent data type: INT64 is inferred from model 'a' while FP32 is inferred",
    ),
    ([part("a", x(4, datatype="INT32")), part("b")], "'X': inconsistent data type: FP32 is inferred from model 'E'"),
    (
        [part("a", outputs=y(5)), part("b")],
        "'between': inconsistent shape: [-1,5] is inferred from model 'a' while [-1,4] is inferred from model 'b'",
    ),
    ([part("a"), part("b", outputs=y(4, 1))], "'Y': inconsistent shape: [-1,4] is inferred from model 'E'"),
    ([part("a"), part("b", more="sequence_batching { }")], "model 'b' has sequence_batching, which is not implemented"),
]


@pytest.mark.parametrize(("parts", "error"), UNFIT)
def test_each_part_that_does_not_fit_has_its_error(parts: list[ModelConfig], error: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        check_parts(normalize(config(), name="E"), parts)
    assert error in str(caught.value)
    assert "ensemble 'E'" in str(caught.value)


def test_models_with_and_without_a_batch_dimension_go_together_when_whole_shapes_can_be_equal() -> None:
    written = normalize(config(), name="E")
    check_parts(written, [part("a", x(-1, 4), y(-1, 4), max_batch_size=0), part("b")])
    check_parts(written, [part("a", max_batch_size=0), part("b")])
    with pytest.raises(ModelLoadError, match="inconsistent shape"):
        check_parts(written, [part("a", x(2, 2, 4), y(4), max_batch_size=0), part("b")])


def test_an_optional_input_needs_one_that_is_optional_too() -> None:
    ports = models.port("input", "X", more="optional: true") + models.port("output", "Y")
    written = normalize(config(ports, max_batch_size=0), name="E")
    optional = part("a", x(4, more="optional: true"), max_batch_size=0)
    check_parts(written, [optional, part("b", max_batch_size=0)])
    with pytest.raises(ModelLoadError, match="input 'X' is optional, but input 'X' in model 'a' is not"):
        check_parts(written, [part("a", max_batch_size=0), part("b", max_batch_size=0)])


def test_label_files_of_an_ensemble_do_not_come_with_a_load_call() -> None:
    ports = models.port("input", "X") + models.port("output", "Y", more='label_filename: "labels.txt"')
    with pytest.raises(ConfigError, match=r"output\[0\].label_filename is 'labels.txt'"):
        check_uploaded(config(ports), "E")
    check_uploaded(config(), "E")


# --- who is made of whom -------------------------------------------------------------------------------------------


def test_a_step_gets_the_version_that_it_names_or_the_latest() -> None:
    state = PartState({1: "first", 3: "third"})
    assert state.choose("E", "p", None) == "third"
    assert state.choose("E", "p", 1) == "first"
    with pytest.raises(MissingPart, match="'E' depends on 'p' whose required version 2 is not loaded: it has 1, 3"):
        state.choose("E", "p", 2)
    nothing: PartState[str] = PartState({}, "unloaded", is_wanted=True)
    with pytest.raises(MissingPart, match="'E' depends on 'p' which has no loaded version: unloaded") as caught:
        nothing.choose("E", "p", None)
    assert caught.value.is_wanted


def test_dependents_come_each_behind_its_own_parts() -> None:
    known = Dependencies({"outer": ("inner", "a"), "inner": ("a", "b"), "other": ("c",), "top": ("outer",)})
    assert known.dependents("b") == ["inner", "outer", "top"]
    assert known.dependents("a") == ["inner", "outer", "top"]
    assert known.dependents("c") == ["other"]
    assert known.dependents("top") == []


def test_no_ensemble_contains_itself() -> None:
    known = Dependencies({"a": ("b", "x"), "b": ("c",)})
    known.check_cycle("c", ["x", "y"])
    with pytest.raises(ModelLoadError, match="ensemble 'c' contains itself: c -> a -> b -> c"):
        known.check_cycle("c", ["x", "a"])


def test_parts_are_loaded_before_what_they_are_parts_of() -> None:
    parts = {"top": ["mid", "leaf"], "mid": ["leaf", "other"], "circle": ["circle2"], "circle2": ["circle"]}
    assert load_order(["top"], lambda name: parts.get(name, ())) == ["leaf", "other", "mid", "top"]
    assert sorted(load_order(["circle"], lambda name: parts.get(name, ()))) == ["circle", "circle2"]
    chain = {str(n): [str(n + 1)] for n in range(5000)}
    assert load_order(["0"], lambda name: chain.get(name, ()))[0] == "5000"
