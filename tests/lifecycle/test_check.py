"""`sluice check`: what it says of good, broken and non-batchable models, and the status that it ends with."""

from __future__ import annotations

import pytest

from sluice_server.cli import check
from support import mixing_models, models


@pytest.fixture
def checked(repository, capsys):
    """Run `sluice check` on the repository: its status, and each model's lines."""

    def run(*flags: str) -> tuple[int, dict[str, list[str]]]:
        code = check([str(repository), *flags])
        output = capsys.readouterr()
        assert output.err == ""
        head, *paragraphs = output.out.split("\n\n")
        assert "this process may use" in head
        assert "CPUExecutionProvider" in head
        by_model = {}
        for paragraph in paragraphs:
            name, *lines = paragraph.splitlines()
            by_model[name] = [line.strip() for line in lines]
        return code, by_model

    return run


def is_said(lines: list[str], *facts: str) -> bool:
    """Whether one of the lines has all of the facts."""
    return any(all(fact in line for fact in facts) for line in lines)


def test_a_model_without_a_configuration_is_completed_and_each_decision_explained(repository, checked):
    models.write_model(repository, "m", models.identity())
    (repository / "m" / "config.pbtxt").unlink()
    code, said = checked()
    assert code == 0
    lines = said["m"]
    assert lines[0] == "version 1"
    assert is_said(lines, "no config.pbtxt")
    assert is_said(lines, "batchable", "max_batch_size 4", "set by auto-complete")
    assert is_said(lines, "dynamic_batching: added by auto-complete")
    assert is_said(lines, "input 'X'", "FP32 [4]", "filled in from the model file")
    assert is_said(lines, "runs on CPUExecutionProvider")
    assert is_said(lines, "instance(s)", "intra-op thread(s)")


def test_a_model_that_cannot_batch_says_which_tensor_keeps_it_from_that(repository, checked):
    models.write_model(repository, "fixed", models.identity(dims=(1, 4)))
    code, said = checked()
    assert code == 0
    assert is_said(said["fixed"], "not batchable", "'X'")
    assert is_said(said["fixed"], "dynamic_batching: none")


@pytest.mark.parametrize(
    ("parameter", "value", "line"),
    [
        ("split_requests", "true", "split_requests: requests of more than 4 rows are queued in parts"),
        ("merge_requests", "false", "merge_requests: each request is its own execution"),
    ],
)
def test_a_model_with_a_parameter_about_its_requests_says_so_and_no_other(repository, checked, parameter, value, line):
    more = f'parameters {{ key: "{parameter}" value {{ string_value: "{value}" }} }}'
    models.write_model(repository, "with", models.identity(), max_batch_size=4, more=more)
    models.write_model(repository, "without", models.identity(), max_batch_size=4)
    code, said = checked()
    assert code == 0
    assert is_said(said["with"], line)
    assert not is_said(said["without"], parameter)


def test_broken_models_are_marked_and_the_others_still_checked(repository, checked):
    models.write_model(repository, "good", models.identity(), max_batch_size=8)
    file = models.write_model(repository, "bad_file", models.identity()) / "1" / "model.onnx"
    file.write_bytes(b"no model")
    text = models.write_model(repository, "bad_text", models.identity()) / "config.pbtxt"
    text.write_text("no_such_field: 1")
    models.write_model(repository, "fixed", models.identity(dims=(1, 4)), max_batch_size=2)
    (repository / "empty").mkdir()
    code, said = checked()
    assert code == 1
    assert list(said) == ["bad_file", "bad_text", "empty", "fixed", "good"]
    assert is_said(said["bad_file"], "BROKEN", "onnx runtime error")
    assert is_said(said["bad_text"], "BROKEN", "no_such_field", "1:1")
    assert is_said(said["empty"], "BROKEN", "no version")
    assert is_said(said["fixed"], "BROKEN", "'X'", "first dimension must be -1")
    assert not is_said(said["good"], "BROKEN")


def test_only_the_versions_that_would_be_loaded_are_checked(repository, checked):
    directory = models.write_model(repository, "m", models.identity(), max_batch_size=8)
    (directory / "2").mkdir()
    (directory / "2" / "model.onnx").write_bytes(models.identity())
    assert [line for line in checked()[1]["m"] if line.startswith("version ")] == ["version 2"]
    with (directory / "config.pbtxt").open("a") as config:
        config.write("version_policy { all {} }")
    assert [line for line in checked()[1]["m"] if line.startswith("version ")] == ["version 1", "version 2"]


def test_one_model_can_be_chosen_by_name(repository, checked):
    for name in ("a", "b", "c"):
        models.write_model(repository, name, models.identity(), max_batch_size=8)
    assert list(checked("--model", "c", "--model=a")[1]) == ["c", "a"]
    code, said = checked("--model=nope")
    assert code == 1
    assert is_said(said["nope"], "BROKEN", "no model repository")


def test_a_missing_provider_is_an_error_or_a_fallback(repository, checked):
    models.write_model(
        repository,
        "accelerated",
        models.identity(),
        max_batch_size=8,
        more='optimization { execution_accelerators { cpu_execution_accelerator { name: "openvino" } } }',
    )
    code, said = checked()
    assert code == 1
    assert is_said(said["accelerated"], "BROKEN", "OpenVINO")
    code, said = checked("--allow-provider-fallback")
    assert code == 0
    assert is_said(said["accelerated"], "fallback: ", "OpenVINO")


def test_without_auto_complete_a_model_needs_its_configuration(repository, checked):
    models.write_model(repository, "m", models.identity())
    (repository / "m" / "config.pbtxt").unlink()
    code, said = checked("--disable-auto-complete-config")
    assert code == 1
    assert is_said(said["m"], "BROKEN")


def test_a_repository_that_is_not_there_is_one_line_on_standard_error(tmp_path, capsys):
    assert check([str(tmp_path / "nope")]) == 1
    output = capsys.readouterr()
    assert output.err.startswith("sluice check: directory ")
    assert output.err.count("\n") == 1
    assert "Traceback" not in output.out


def test_what_is_known_of_rows_that_share_batches_is_said(repository, checked):
    models.write_model(repository, "apart", models.identity(), max_batch_size=8)
    models.write_model(repository, "mixed", mixing_models.mean_over_rows(), max_batch_size=8)
    models.write_model(repository, "alone", mixing_models.mean_over_rows(), max_batch_size=8, batching=False)
    code, said = checked()
    assert code == 0
    assert is_said(said["apart"], "batch proof: safe: 4 made-up rows")
    assert is_said(said["mixed"], "batch proof: unsafe: rows give other outputs beside others than alone")
    assert is_said(said["mixed"], "dynamic batching is off, each request is its own execution", "batch_proof")
    assert not is_said(said["alone"], "batch proof")
    assert not is_said(said["apart"], "dynamic batching is off")
