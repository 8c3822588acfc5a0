"""The peer that shows what the model itself costs: a bare loop over ONNX Runtime's `run`, alone in its process.

It prints one JSON array with an object for each batch size that it was asked for.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime

from sluice_client.load.latencies import quantile

WARMUP_RUNS = 3
"""The first runs allocate memory and pick kernels; the third costs what the hundredth costs."""

SEED = 0


@dataclass(frozen=True, slots=True)
class LoopResult:
    """What the loop did with one batch size; `run_p50_ms` and `run_p99_ms` are the times of one batch."""

    batch_rows: int
    rows_per_s: float
    cpu_us_per_row: float
    run_p50_ms: float
    run_p99_ms: float


def open_session(model: Path, threads: int) -> onnxruntime.InferenceSession:
    """Load the model with ONNX Runtime's defaults, except for threads, which do not spin, as in the server."""
    return onnxruntime.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])


def session_options(threads: int) -> onnxruntime.SessionOptions:
    """Those of all sessions here."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def measure(session: onnxruntime.InferenceSession, batch_rows: int, duration_s: float) -> LoopResult:
    """Run the model again and again on one batch of random rows; its one input is [rows, columns] float32."""
    (spec,) = session.get_inputs()
    batch = np.random.default_rng(SEED).random((batch_rows, spec.shape[1]), np.float32)
    names, feeds = [output.name for output in session.get_outputs()], {spec.name: batch}
    for _ in range(WARMUP_RUNS):
        session.run(names, feeds)
    times_ns = []
    cpu_started_ns, started_ns = time.process_time_ns(), time.perf_counter_ns()
    now_ns, until_ns = started_ns, started_ns + int(duration_s * 1e9)
    while now_ns < until_ns:
        session.run(names, feeds)
        before_ns, now_ns = now_ns, time.perf_counter_ns()
        times_ns.append(now_ns - before_ns)
    cpu_ns = time.process_time_ns() - cpu_started_ns
    rows, times_ms = len(times_ns) * batch_rows, np.array(times_ns) / 1e6
    return LoopResult(
        batch_rows,
        rows_per_s=rows / (now_ns - started_ns) * 1e9,
        cpu_us_per_row=cpu_ns / 1e3 / rows,
        run_p50_ms=quantile(times_ms, 0.5),
        run_p99_ms=quantile(times_ms, 0.99),
    )


def main() -> None:
    """Measure each batch size and print the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--batch-rows", type=int, nargs="+", required=True)
    parser.add_argument("--seconds", type=float, required=True, help="for each batch size")
    args = parser.parse_args()
    session = open_session(args.model, args.threads)
    print(json.dumps([asdict(measure(session, rows, args.seconds)) for rows in args.batch_rows]))


if __name__ == "__main__":
    main()
