"""Gets a real model with a state, the voice detector silero-vad: python get_silero.py FOLDER.

The model is in a wheel whose other contents need torch; nothing is installed: the file is FOLDER/silero_vad.onnx.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MEMBER = "silero_vad/data/silero_vad.onnx"
PINS = Path(__file__).with_name("silero.txt")


def main(folder: Path) -> None:
    """Downloads the pinned wheel and takes the model from it; exits with the reason when that fails."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        wheels = ["--no-deps", "--only-binary=:all:", "--require-hashes", "--requirement", str(PINS)]
        if subprocess.run([*pip, *wheels, "--dest", scratch]).returncode:
            sys.exit("pip could not get the wheel that silero-vad is in")
        (wheel,) = Path(scratch).glob("silero_vad-*.whl")
        place = folder / "silero_vad.onnx"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as packed, place.open("wb") as file:
            shutil.copyfileobj(packed, file)
    print(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute())
