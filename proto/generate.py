"""Generates sluice_proto's *_pb2 modules and their type stubs from the .proto files beside this script.

    python proto/generate.py            write them
    python proto/generate.py --check    exit 1 and name the files, if the committed ones are out of date

What protoc writes is changed in three points: imports name the package, the modules register in the package's own
descriptor pool (pool.py says why), and the stubs get the annotations that strict checking wants.
"""

import argparse
import importlib.resources
import re
import sys
import tempfile
from pathlib import Path

from grpc_tools import protoc

HERE = Path(__file__).resolve().parent
PACKAGE = HERE / "sluice_proto"
PROTO_FILES = ("grpc_service.proto", "model_config.proto")

# Each pattern must match at least once over all files, so that a new protoc cannot silently escape a change.
REWRITES = (
    (re.compile(r"^import (\w+_pb2) as (\w+)$", re.MULTILINE), r"from sluice_proto import \1 as \2"),
    (
        re.compile(r"^from google\.protobuf import descriptor_pool as _descriptor_pool$", re.MULTILINE),
        "from sluice_proto.pool import POOL as _POOL",
    ),
    (re.compile(r"_descriptor_pool\.Default\(\)"), "_POOL"),
    (re.compile(r"(BuildTopDescriptorsAndMessages\(DESCRIPTOR, ')(\w+_pb2')"), r"\1sluice_proto.\2"),
    (
        re.compile(r"^from typing import ClassVar as _ClassVar", re.MULTILINE),
        r"from typing import Any as _Any, ClassVar as _ClassVar",
    ),
    (re.compile(r"\b_Mapping\]"), "_Mapping[str, _Any]]"),
    (re.compile(r"\*\*kwargs\)"), "**kwargs: _Any)"),
)


def generate() -> dict[str, str]:
    """Returns the text of every generated file by its name; raises RuntimeError if protoc or a rewrite fails."""
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["protoc", f"-I{HERE}", f"-I{well_known}", f"--python_out={folder}", f"--pyi_out={folder}"]
        if protoc.main([*arguments, *PROTO_FILES]) != 0:
            raise RuntimeError("protoc failed; its message is above")
        texts = {path.name: path.read_text(encoding="utf-8") for path in sorted(Path(folder).iterdir())}
    for pattern, replacement in REWRITES:
        changed = {name: pattern.sub(replacement, text) for name, text in texts.items()}
        if changed == texts:
            raise RuntimeError(f"nothing in protoc's output matches {pattern.pattern!r}: look at what it writes now")
        texts = changed
    return texts


def differing(texts: dict[str, str], folder: Path) -> list[str]:
    """Returns the names of those files of `texts` that are missing in `folder` or have another content there."""
    return [
        name
        for name, text in texts.items()
        if not (folder / name).exists() or (folder / name).read_text(encoding="utf-8") != text
    ]


def main(arguments: list[str]) -> int:
    """Writes or checks the generated files and returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate sluice_proto's protobuf modules.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a committed file is out of date")
    parser.add_argument(
        "--folder", type=Path, default=PACKAGE, help="where the generated files are (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    texts = generate()
    names = differing(texts, options.folder)
    if options.check:
        if names:
            sys.stderr.write(f"out of date: {', '.join(names)}; run: python proto/generate.py\n")
        return 1 if names else 0
    for name in names:
        (options.folder / name).write_text(texts[name], encoding="utf-8")
    sys.stderr.write(f"{len(texts)} files, {len(names)} changed\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
