"""Captures a load on our own server and replays it: on time, without a difference, and with a regression found.

The digits MLP is served with `--capture-file` and gets Poisson arrivals. What was captured is sent again to the same
model, in rounds, and to one of whose weights one is 1 % larger. Exit codes: 0 the goals are met, 1 one is missed.
"""

import argparse
import itertools
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from deploy.processes import ServerFailed
from loadtests import processes
from loadtests.models import DEMO_DIGITS
from loadtests.results import Goal
from loadtests.table import render_goals
from sluice_batching.arrivals import Constant, arrivals, exponential
from sluice_client.load.open_loop import Run, Sender, run_precisely, send_at
from sluice_client.replay.report import as_text
from sluice_client.replay.sending import replay
from sluice_client.replay.verdict import Verdict, judge, recorded
from sluice_proto.capture import Capture, read_capture
from sluice_proto.grpc_service_pb2 import ModelInferRequest
from sluice_server.transport.choice import TransportChoice

MODEL = "digits_mlp"
GAP_ERROR_MS = 5.0
DEADLINE_S = 30.0
SEED = 6


def main(argv: Sequence[str] | None = None) -> int:
    """Capture, replay twice, print both reports and the goals; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.replay_check", description=__doc__, allow_abbrev=False)
    parser.add_argument("--requests", type=int, default=1000, help="(%(default)s)")
    parser.add_argument("--rate", type=float, default=500.0, help="requests a second (%(default)g)")
    parser.add_argument(
        "--rounds", type=int, default=3, help="on the same version, of which medians count (%(default)s)"
    )
    parser.add_argument("--transport", choices=[*TransportChoice], default=TransportChoice.AUTO)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        try:
            goals = check(Path(folder), args.requests, args.rate, args.transport, args.rounds)
        except ServerFailed as error:
            print(f"replay_check: {error}", file=sys.stderr)
            return 1
    return conclude(goals)


def conclude(goals: Sequence[Goal]) -> int:
    """Print the goals; the exit code."""
    print(render_goals(goals))
    return int(not all(goal.is_met for goal in goals))


def check(scratch: Path, requests: int, rate_per_s: float, transport: str, rounds: int) -> list[Goal]:
    """The goals, measured in `scratch`, an empty folder."""
    repository = scratch / "models"
    shutil.copytree(DEMO_DIGITS, repository / MODEL)
    file = scratch / "capture"
    with processes.sluice(repository, scratch, transport, f"--capture-file={file}") as server:
        sent = _load(server.address, requests, rate_per_s)
    assert sent.records.outcomes == {"OK": requests}, sent.records.outcomes
    capture = read_capture(file)
    same = _replayed(capture, repository, scratch, transport, rounds)
    _spoil(repository / MODEL / "1" / "model.onnx")
    spoiled = _replayed(capture, repository, scratch, transport, 1)
    captured = (len(capture.requests) / requests,)
    gaps_ms = tuple(verdict.replayed.gap_error_p99_s * 1e3 for verdict in same)
    differ, found = (tuple(len(verdict.differing) for verdict in verdicts) for verdicts in (same, spoiled))
    return [
        Goal("share of the requests that is in the file", captured, 1, at_least=True),
        Goal("gaps between requests, p99 of their error in ms", gaps_ms, GAP_ERROR_MS, at_least=False),
        Goal("different answers of the same version", differ, 0, at_least=False),
        Goal("different answers of a spoiled model", found, 1, at_least=True),
    ]


def _load(address: str, requests: int, rate_per_s: float) -> Run:
    with np.load(DEMO_DIGITS / "golden.npz") as golden:
        rows = golden["X"]
    messages = []
    for row in rows[:requests]:
        message = ModelInferRequest(model_name=MODEL, raw_input_contents=[row.tobytes()])
        message.inputs.add(name="X", datatype="FP32", shape=(1, len(row)))
        messages.append(message.SerializeToString())
    times_s = list(itertools.islice(arrivals(Constant(rate_per_s), exponential(SEED)), requests))

    async def load() -> Run:
        async with Sender(address, messages, deadline_s=DEADLINE_S) as sender:
            return await send_at(times_s, sender)

    return run_precisely(load())


def _replayed(capture: Capture, repository: Path, scratch: Path, transport: str, rounds: int) -> list[Verdict]:
    verdicts = []
    with processes.sluice(repository, scratch, transport) as server:
        for _ in range(rounds):
            replayed = run_precisely(replay(capture, server.address, speed=1.0, deadline_s=DEADLINE_S))
            verdicts.append(judge(capture.requests, recorded(capture), replayed))
            print(as_text(verdicts[-1], capture), end="\n\n", flush=True)
    return verdicts


def _spoil(file: Path) -> None:
    """Make one weight 1 % larger, that of the largest magnitude."""
    model = onnx.load(file)
    weights = max(model.graph.initializer, key=lambda tensor: len(tensor.dims) == 2)
    values = numpy_helper.to_array(weights).copy()
    values[np.unravel_index(np.abs(values).argmax(), values.shape)] *= np.float32(1.01)
    weights.CopyFrom(numpy_helper.from_array(values, weights.name))
    onnx.save(model, file)


if __name__ == "__main__":
    sys.exit(main())
