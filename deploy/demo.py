"""The demo: serve the demo models, send the test digits through the client, and say how well and how fast it went.

`python -m deploy.demo` needs the `dev` or `server` extra. The server runs in a process of its own, on a free port, and
is ended by SIGTERM. Exit codes: 0 done, 1 when the server does not start, its answers are not scikit-learn's, or it
does not end well.
"""

import asyncio
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deploy.processes import LOOPBACK, SLUICE, ServerFailed, free_port, running
from sluice_client import AsyncClient

MODELS = Path(__file__).resolve().parent / "models"
MODEL = "digits_mlp"

# Enough for batches to form, and what a small service has in flight on a busy day.
IN_FLIGHT = 64

# One pass over the digits takes a fraction of a second, too short for a rate that means something.
PASSES = 5


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
    port = free_port()
    endpoint = f"{LOOPBACK}:{port}"
    listeners = (f"--grpc-address={LOOPBACK}", f"--grpc-port={port}", "--allow-http=false", "--allow-metrics=false")
    print(f"starting the server on {endpoint} with the models of {MODELS}", flush=True)
    try:
        with running([str(SLUICE), "serve", f"--model-repository={MODELS}", *listeners], port) as server:
            outcome = asyncio.run(classify(endpoint, digits))
    except ServerFailed as error:
        print(error, file=sys.stderr)
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


async def classify(endpoint: str, digits: NDArray[np.float32]) -> Outcome:
    """Send each digit as a request of its own, `IN_FLIGHT` at a time, `PASSES` times."""
    rows = [digits[number : number + 1] for number in range(len(digits))]
    predictions = np.full(len(rows), -1)
    work = iter([*enumerate(rows)] * PASSES)
    async with AsyncClient(endpoint) as client:

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


if __name__ == "__main__":
    sys.exit(main())
