"""The `sluice` command and its `infer` and `status`: output, exit status, and a reason for whatever goes wrong."""

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from fake_server import FakeServer

from sluice_client import InvalidRequest, TensorMetadata, cli, inputs

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `sluice COMMAND --endpoint <the fake server> ...`; gives exit status, stdout and stderr."""

    def run(command: str, *arguments: str) -> tuple[int, str, str]:
        exit_status = cli.main([command, "--endpoint", server.address, *arguments])
        captured = capsys.readouterr()
        return exit_status, captured.out, captured.err

    return run


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, cli.COMMANDS_GROUP)


def interrupted(argv: list[str]) -> int:
    """Be interrupted."""
    raise KeyboardInterrupt


INSTALLED = [
    entry("infer", "sluice_client.cli:infer"),
    entry("serve", "package_that_is_missing.cli:serve"),
    entry("stop", "test_client_cli:interrupted"),
]


def test_help_lists_the_commands_and_those_that_need_the_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"], INSTALLED) == 0
    out = capsys.readouterr().out
    assert "  infer     Send one request to a model and print its outputs.\n" in out
    assert "  serve     not installed: install the server with pip install 'sluice[server]'\n" in out


def test_help_lists_every_command_that_the_distribution_installs(capsys: pytest.CaptureFixture[str]) -> None:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    commands = pyproject["project"]["entry-points"][cli.COMMANDS_GROUP]
    assert {"check", "infer", "load", "serve", "status"} <= set(commands)
    assert cli.main(["--help"], [entry(*each) for each in commands.items()]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.startswith("  ")] == sorted(commands)
    assert (
        "  load      Load a model at a rate, whatever it answers, or find the highest rate that keeps objectives."
        in lines
    )


def test_no_command_is_wrong_usage_and_prints_the_help_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([], INSTALLED) == 2
    assert capsys.readouterr().err.startswith("usage: sluice COMMAND")


def test_an_unknown_command_names_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sevre"], INSTALLED) == 2
    assert capsys.readouterr().err == "sluice: no command 'sevre'; there are infer, serve, stop (sluice --help)\n"


def test_a_command_whose_package_is_missing_names_the_extra(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve"], INSTALLED) == 1
    assert capsys.readouterr().err == (
        "sluice serve needs the Python package 'package_that_is_missing': "
        "install the server with pip install 'sluice[server]'\n"
    )


def test_an_interrupt_ends_a_command_quietly() -> None:
    assert cli.main(["stop"], INSTALLED) == 130


def test_a_reader_that_leaves_early_gets_no_traceback() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    script = "import sys, sluice_client.cli; sys.exit(sluice_client.cli.main(['--version']))"
    run = subprocess.run([sys.executable, "-c", script], stdout=write_end, stderr=subprocess.PIPE, check=False)
    os.close(write_end)
    assert (run.returncode, run.stderr) == (1, b"")


def test_the_version_is_the_distributions(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["sluice", "--version"])
    assert cli.main() == 0
    assert capsys.readouterr().out.startswith("sluice 0.")


def test_infer_sends_json_in_the_models_datatype_and_prints_the_outputs(run: Run, server: FakeServer) -> None:
    exit_status, out, err = run("infer", "identity", "--input", "X=[[1, 2, 3]]", "--output", "X")
    assert (exit_status, err) == (0, "")
    assert server.seen[-1].request.inputs[0].datatype == "FP32"
    assert out.startswith("identity version 1, ")
    assert out.endswith("\nX  float32[1, 3]\n[[1. 2. 3.]]\n")


def test_infer_reads_npy_and_npz_files_without_asking_for_metadata(
    run: Run, server: FakeServer, tmp_path: Path
) -> None:
    np.save(tmp_path / "x.npy", np.array([1.5]))
    np.savez(tmp_path / "all.npz", first=np.array([2], np.int8))
    exit_status, out, _ = run(
        "infer", "identity", "--input", f"X={tmp_path}/x.npy", "--input", f"I=@{tmp_path}/all.npz:first", "--json"
    )
    assert exit_status == 0
    assert [seen.rpc for seen in server.seen] == ["ModelInfer"]
    answer = json.loads(out)
    assert answer["outputs"] == {
        "X": {"dtype": "float64", "shape": [1], "data": [1.5]},
        "I": {"dtype": "int8", "shape": [1], "data": [2]},
    }
    assert (answer["model_name"], answer["model_version"]) == ("identity", "1")


def test_infer_fills_the_inputs_that_are_not_given(run: Run) -> None:
    exit_status, out, _ = run(
        "infer", "identity", "--input", 'S=["a", "b"]', "--fill", "zeros", "--shape", "X=2,3", "--json"
    )
    assert exit_status == 0
    outputs = json.loads(out)["outputs"]
    assert outputs["S"]["data"] == ["a", "b"]
    assert outputs["X"] == {"dtype": "float32", "shape": [2, 3], "data": [[0.0] * 3] * 2}


@pytest.mark.parametrize(
    ("arguments", "exit_status", "reason"),
    [
        (["nope", "--input", "X=[1]"], 1, "NOT_FOUND: model 'nope' is not found"),
        (["identity", "--input", "X"], 2, "'X' is not NAME=VALUE"),
        (["identity", "--input", "X=[1]", "--input", "X=[2]"], 2, "gives 'X' twice"),
        (["identity", "--input", "Y=[1]"], 2, "no such input; it has S, X"),
        (["identity", "--input", "X=[1"], 2, "neither a .npy file nor JSON"),
        (["identity", "--input", "X=/nowhere/x.npy"], 2, "No such file"),
        (["identity", "--input", "X=@/nowhere/x.npz:a"], 2, "No such file"),
        (["identity", "--input", "X=@x.npy"], 2, "write @file.npz:key"),
        (["identity", "--input", "X=@x:y"], 2, "write @file.npz:key"),
        (["identity", "--fill", "zeros", "--shape", "X=a"], 2, "write whole numbers"),
        (["identity", "--fill", "zeros", "--shape", "Z=1"], 2, "--shape Z: this input is not made by --fill"),
        (["identity", "--deadline", "0"], 2, "a deadline must be above 0"),
        (["identity", "--tls-ca", "/nowhere/ca.pem"], 2, "No such file"),
        (["identity", "--fill", "ones"], 2, "invalid choice: 'ones'"),
        ([], 2, "the following arguments are required: MODEL"),
    ],
)
def test_infer_says_what_is_wrong(run: Run, arguments: list[str], exit_status: int, reason: str) -> None:
    got, out, err = run("infer", *arguments)
    assert (got, out) == (exit_status, "")
    assert reason in err
    assert "Traceback" not in err


def test_help_of_a_command_is_no_error(run: Run) -> None:
    exit_status, out, _ = run("infer", "--help")
    assert exit_status == 0
    assert "--input NAME=VALUE" in out


def test_status_shows_models_and_what_they_did(run: Run) -> None:
    exit_status, out, err = run("status")
    head, titles, *rows = out.splitlines()
    assert (exit_status, err) == (0, "")
    assert head.endswith(": ready, fake 1.2.3")
    assert (
        " ".join(titles.split()) == "model version state requests failed mean batch queue ms compute ms total ms reason"
    )
    assert [" ".join(row.split()) for row in rows] == [
        "broken 1 UNAVAILABLE its file is cut off",
        "identity 1 READY 6 0 3.0 0.5 1.0 2.0",
        "idle not loaded",
    ]


def test_status_of_an_endpoint_that_is_down_or_not_ready_is_a_failure(run: Run, server: FakeServer) -> None:
    server.ready = False
    exit_status, out, _ = run("status", "--json")
    assert exit_status == 1
    assert json.loads(out)["ready"] is False
    server.stop()
    exit_status, out, _ = run("status", "--deadline", "1")
    assert exit_status == 1
    assert ": not reachable\n  UNAVAILABLE: failed to connect" in out


def test_status_shows_each_endpoint(make_server: Callable[..., FakeServer], run: Run, server: FakeServer) -> None:
    other = make_server(ready=False)
    exit_status, out, _ = run("status", "--endpoint", other.address)
    assert exit_status == 1
    heads = [line for line in out.splitlines() if not line.startswith(" ")]
    assert heads == [f"{server.address}: ready, fake 1.2.3", f"{other.address}: live, not ready, fake 1.2.3"]


@pytest.mark.parametrize(
    ("datatype", "text", "expected"),
    [
        ("FP32", "1.5", np.array(1.5, np.float32)),
        ("BOOL", "[true, false]", np.array([True, False])),
        ("BOOL", "[1, 0]", np.array([True, False])),
        ("UINT64", "[18446744073709551615]", np.array([2**64 - 1], np.uint64)),
        ("INT8", "[]", np.array([], np.int8)),
        ("BF16", "[0.5]", np.array([0.5], ml_dtypes.bfloat16)),
        ("FP16", "[NaN, -Infinity]", np.array([np.nan, -np.inf], np.float16)),
        ("BYTES", '["é"]', np.array(["é"])),
    ],
)
def test_json_becomes_an_array_of_the_models_datatype(datatype: str, text: str, expected: np.ndarray) -> None:
    array = inputs.read_input("X", text, {"X": TensorMetadata("X", datatype, (-1,))})
    assert array.dtype == expected.dtype
    np.testing.assert_array_equal(array, expected)


@pytest.mark.parametrize(
    ("datatype", "text", "reason"),
    [
        ("INT8", "[128]", "do not fit into INT8"),
        ("INT32", "[1.5]", "do not fit into INT32"),
        ("INT64", "[NaN]", "do not fit into INT64"),
        ("FP16", "[1e6]", "do not fit into FP16"),
        ("BOOL", "[2]", "do not fit into BOOL"),
        ("FP32", '["1"]', "needs numbers"),
        ("FP32", "[[1], [1, 2]]", "not an array of FP32"),
        ("INT64", "[36893488147419103232]", "needs numbers"),
        ("FP33", "[1]", "unknown datatype 'FP33'"),
    ],
)
def test_json_that_does_not_fit_the_datatype_is_refused(datatype: str, text: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        inputs.read_input("X", text, {"X": TensorMetadata("X", datatype, (-1,))})


def test_files_that_are_not_plain_arrays_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.npy").write_bytes(b"text")
    (tmp_path / "bad.npz").write_bytes(b"text")
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    np.save(tmp_path / "one.npy", np.ones(1))
    (tmp_path / "one.npz").write_bytes((tmp_path / "one.npy").read_bytes())
    np.savez(tmp_path / "two.npz", a=np.ones(1), b=np.ones(1))
    for text, reason in [
        (f"{tmp_path}/bad.npy", "not a .npy file"),
        (f"{tmp_path}/objects.npy", "not a .npy file of plain values"),
        (f"@{tmp_path}/bad.npz:a", "not a .npz file"),
        (f"@{tmp_path}/empty.npz:a", "not a .npz file"),
        (f"@{tmp_path}/one.npz:a", "holds one array and no names"),
        (f"@{tmp_path}/two.npz:c", "holds no array 'c'; it has a, b"),
    ]:
        with pytest.raises(InvalidRequest, match=reason):
            inputs.read_input("X", text, {})


@pytest.mark.parametrize(
    ("datatype", "how"), [(t, how) for t in ("FP32", "BF16", "INT32", "BOOL", "BYTES") for how in ("zeros", "random")]
)
def test_filled_inputs_have_the_models_shape_and_datatype(datatype: str, how: str) -> None:
    array = inputs.fill(TensorMetadata("X", datatype, (-1, 2)), how, None)
    again = inputs.fill(TensorMetadata("X", datatype, (-1, 2)), how, None)
    assert array.shape == (1, 2)
    assert array.dtype == inputs.tensors.BY_NAME[datatype].numpy
    assert array.tolist() == again.tolist()


@pytest.mark.parametrize(
    ("shape", "given", "reason"),
    [((-1, -1), None, r"open shape \[-1, -1\]: say which, --shape X=1,1"), ((3,), (2**40,), "more than one message")],
)
def test_a_shape_that_cannot_be_filled_is_refused(
    shape: tuple[int, ...], given: tuple[int, ...] | None, reason: str
) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        inputs.fill(TensorMetadata("X", "FP32", shape), "zeros", given)


def test_a_scalar_input_is_filled_as_one() -> None:
    assert inputs.fill(TensorMetadata("X", "INT64", ()), "zeros", None).shape == ()


def test_every_value_has_a_form_in_strict_json() -> None:
    floats = np.array([[1.5, np.nan], [np.inf, -np.inf]], np.float32)
    assert inputs.json_value(floats) == [[1.5, "NaN"], ["Infinity", "-Infinity"]]
    assert inputs.json_value(np.array([b"a", b"\xff"], object)) == ["a", "\\xff"]
    assert inputs.json_value(np.array([True])) == [True]
    assert inputs.json_value(np.array([2**64 - 1], np.uint64)) == [2**64 - 1]
    assert inputs.json_value(np.array([0.5], ml_dtypes.bfloat16)) == [0.5]
    assert inputs.json_value(np.array(np.nan)) == "NaN"
