"""Gets Triton's load generator perf_analyzer and the libraries that it needs: python get_perf_analyzer.py FOLDER.

The program is in an old wheel of tritonclient; one library is in a wheel too, the other in Debian's libb64-0d. Nothing
is installed: the files are FOLDER/bin/perf_analyzer and FOLDER/lib/*.so*.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MEMBERS = {
    "tritonclient": ("tritonclient-2.41.1.data/data/bin/perf_analyzer", "bin/perf_analyzer"),
    "nvidia_cuda_runtime_cu12": ("nvidia/cuda_runtime/lib/libcudart.so.12", "lib/libcudart.so.12"),
}
"""Of each wheel the one file that is needed, and where it goes."""

PINS = Path(__file__).with_name("perf_analyzer.txt")

BASE64_LIBRARY = "libb64.so.0d"
BASE64_PACKAGE = "libb64-0d"
UNPACK = f"apt-get -qq download {BASE64_PACKAGE} && dpkg -x {BASE64_PACKAGE}_*.deb unpacked"
"""Neither needs root."""


def main(folder: Path) -> None:
    """Gets all files, and runs the program to see that they fit this machine; exits with the reason if not."""
    for name in ("bin", "lib"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        get_from_wheels(folder, Path(scratch))
        get_base64_library(folder, Path(scratch))
    program = folder / "bin" / "perf_analyzer"
    environ = {**os.environ, "LD_LIBRARY_PATH": str(folder / "lib")}
    done = subprocess.run([program, "--version"], env=environ, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"perf_analyzer does not run on this machine: {done.stderr}")
    print(f"{(done.stdout + done.stderr).strip()}: LD_LIBRARY_PATH={folder / 'lib'} {program}")


def get_from_wheels(folder: Path, scratch: Path) -> None:
    """Downloads the pinned wheels and takes one file from each."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    wheels = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement", str(PINS)]
    if subprocess.run([*pip, *wheels, "--dest", str(scratch)]).returncode:
        sys.exit("pip could not get the wheels that perf_analyzer is in")
    for name, (member, place) in MEMBERS.items():
        (wheel,) = scratch.glob(f"{name}-*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(member) as packed, (folder / place).open("wb") as file:
            shutil.copyfileobj(packed, file)
    (folder / "bin" / "perf_analyzer").chmod(0o755)


def get_base64_library(folder: Path, scratch: Path) -> None:
    """Unpacks Debian's package, where the library is not installed."""
    try:
        ctypes.CDLL(BASE64_LIBRARY)
    except OSError:
        if subprocess.run(UNPACK, shell=True, cwd=scratch).returncode:
            sys.exit(f"apt-get cannot get {BASE64_LIBRARY}: install it yourself (Debian: apt install {BASE64_PACKAGE})")
        (found,) = scratch.glob(f"unpacked/usr/lib/*/{BASE64_LIBRARY}")
        shutil.copy(found, folder / "lib" / BASE64_LIBRARY)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
