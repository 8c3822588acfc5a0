"""Reads what a server did with each request from Triton's trace file, with times on its own clock."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


def flags(file: Path, rate: int = 1) -> list[str]:
    """What has the server trace one in so many requests."""
    return [f"--trace-config=triton,file={file}", f"--trace-config=rate={rate}", "--trace-config=level=TIMESTAMPS"]


@dataclass(frozen=True, slots=True)
class Trace:
    """One request: its model, when it had come, when its run started (None: it never ran) and when it ended."""

    model: str
    received_ns: int
    started_ns: int | None
    ended_ns: int


def read(file: Path) -> Iterator[Trace]:
    """The requests of a file that is complete: its server has ended."""
    models: dict[int, str] = {}
    for entry in json.loads(file.read_text()):
        if "model_name" in entry:
            models[entry["id"]] = entry["model_name"]
        elif "timestamps" in entry:
            times = {each["name"]: each["ns"] for each in entry["timestamps"]}
            received_ns = times["GRPC_WAITREAD_END"]
            yield Trace(models[entry["id"]], received_ns, times.get("COMPUTE_START"), times["REQUEST_END"])
