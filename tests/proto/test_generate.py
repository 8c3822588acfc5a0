"""The committed modules are what generate.py writes, and its --check notices when they are not."""

import shutil
import subprocess
import sys
from pathlib import Path

import sluice_proto

PACKAGE = Path(sluice_proto.__file__).parent
SCRIPT = PACKAGE.parent / "generate.py"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_committed_modules_are_up_to_date():
    assert (PACKAGE / "grpc_service_pb2.py").exists()
    result = run("--check")
    assert (result.returncode, result.stderr) == (0, "")


def test_check_names_a_changed_and_a_missing_file_and_generating_mends_both(tmp_path):
    for path in PACKAGE.glob("*_pb2.py*"):
        shutil.copy(path, tmp_path)
    with (tmp_path / "model_config_pb2.py").open("a") as file:
        file.write("# touched by hand\n")
    (tmp_path / "grpc_service_pb2.pyi").unlink()

    stale = run("--check", "--folder", tmp_path)
    assert stale.returncode == 1
    assert "out of date: grpc_service_pb2.pyi, model_config_pb2.py;" in stale.stderr

    assert run("--folder", tmp_path).returncode == 0
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        path.name: path.read_text() for path in PACKAGE.glob("*_pb2.py*")
    }
