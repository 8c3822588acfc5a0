"""The demo: serve the demo models, send the test digits through the client, and say how well and how fast it went.

`python deploy/demo.py` needs the `dev` or `server` extra. The server runs in a process of its own, on a free port, and
is ended by SIGTERM. Exit codes: 0 done, 1 when the server does not start, its answers are not scikit-learn's, or it
does not end well.
"""

import asyncio
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sluice_client import AsyncClient, NotReady

MODELS = Path(__file__).resolve().parent / "models"
MODEL = "digits_mlp"

# Enough for batches to form, and what a small service has in flight on a busy day.
IN_FLIGHT = 64

# One pass over the digits takes a fraction of a second, too short for a rate that means something.
PASSES = 5

START_TIMEOUT_S = 60.0

# What was accepted gets 30 seconds after SIGTERM by default; nothing is left by then.
STOP_TIMEOUT_S = 40.0


@dataclass(frozen=True)
class Outcome:
    """The predicted digits [rows], and what it took to get them."""

    predictions: NDArray[np.int64]
    requests_per_s: float
    mean_batch_rows: float


def main() -> int:
    """Run the demo and give the exit code."""
    with np.load(MODELS / MODEL / "golden.npz") as golden:
        digits, labels, reference = golden["X"], golden["labels"], golden["predictions"]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        endpoint = f"localhost:{listener.getsockname()[1]}"
    print(f"starting the server on {endpoint} with the models of {MODELS}", flush=True)
    with serving(endpoint) as server:
        try:
            outcome = asyncio.run(classify(endpoint, server, digits))
        except NotReady as error:
            print(f"the server does not start: {error}", file=sys.stderr)
            return 1
    same = int((outcome.predictions == reference).sum())
    print(
        f"\n{MODEL}: {len(digits)} test digits, {PASSES} times, {IN_FLIGHT} requests in flight, one row each",
        f"accuracy              {(outcome.predictions == labels).mean():.4f}",
        f"as scikit-learn says  {same} of {len(digits)}",
        f"requests/s            {outcome.requests_per_s:,.0f}",
        f"mean batch            {outcome.mean_batch_rows:.1f} rows",
        f"server's exit code    {server.returncode}",
        sep="\n",
    )
    return int(same < len(digits) or server.returncode != 0)


@contextmanager
def serving(endpoint: str) -> Iterator["subprocess.Popen[bytes]"]:
    """`sluice serve` with the demo models while the block runs; its log goes to our standard error."""
    program = Path(sysconfig.get_path("scripts")) / "sluice"
    host, _, port = endpoint.partition(":")
    listeners = (f"--grpc-address={host}", f"--grpc-port={port}", "--allow-http=false", "--allow-metrics=false")
    server = subprocess.Popen([program, "serve", f"--model-repository={MODELS}", *listeners])  # noqa: S603 - our own
    try:
        yield server
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


async def classify(endpoint: str, server: "subprocess.Popen[bytes]", digits: NDArray[np.float32]) -> Outcome:
    """Send each digit as a request of its own, `IN_FLIGHT` at a time, `PASSES` times."""
    rows = [digits[number : number + 1] for number in range(len(digits))]
    predictions = np.full(len(rows), -1)
    work = iter([*enumerate(rows)] * PASSES)
    async with AsyncClient(endpoint) as client:
        await wait_until_ready(client, server)

        async def caller() -> None:
            for number, row in work:
                result = await client.infer(MODEL, {"X": row})
                predictions[number] = result["probabilities"].argmax()

        started_s = time.perf_counter()
        async with asyncio.TaskGroup() as callers:
            for _ in range(IN_FLIGHT):
                callers.create_task(caller())
        elapsed_s = time.perf_counter() - started_s
        (statistics,) = await client.statistics(MODEL)
    return Outcome(predictions, len(rows) * PASSES / elapsed_s, statistics.mean_batch_rows)


async def wait_until_ready(client: AsyncClient, server: "subprocess.Popen[bytes]") -> None:
    """Return when the server answers; NotReady when it takes too long or has ended, which its log explains."""
    until_s = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return await client.wait_until_ready(1.0)
        except NotReady:
            if server.poll() is not None or time.monotonic() > until_s:
                raise


if __name__ == "__main__":
    sys.exit(main())
