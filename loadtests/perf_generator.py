"""perf_analyzer, Triton's load generator, in the place of h2load: `make bench BENCH_FLAGS="--generator perf_analyzer"`.

It sends what it makes up for the model's inputs, as many requests at a time as the load has in flight, over connections
that it chooses itself; and it speaks to servers of the protocol only, so that a bare echo has no row then. Answers are
looked at before and after it, and the server's counters say how many there were.
"""

from loadtests.h2load import Load, LoadError, Measured
from loadtests.models import BenchModel
from loadtests.peers import Generator
from loadtests.perf_sweep import FEW_THREADS, STEADY, SweepFailed, analyze, find
from sluice_proto.grpc_service_pb2 import ModelInferRequest

NAME = "perf_analyzer"

WINDOWS = 3
"""What one run measures at least."""

WINDOW_MS_MIN = 100
"""In shorter ones it counts no request of slow models."""


def generate(address: str, model: BenchModel, load: Load, duration_s: float) -> Measured:
    """Load HOST:PORT for about so long; LoadError when it says that any request failed."""
    window_ms = max(WINDOW_MS_MIN, round(duration_s * 1000 / WINDOWS))
    run = analyze(command(address, model, load.in_flight, window_ms), "gRPC", load.in_flight)
    if run.errors or run.effort is None:
        raise LoadError(f"perf_analyzer failed on {model.name}: {'; '.join(run.errors)}")
    return Measured(None, run.inferences_per_s, run.p50_ms, run.p99_ms, run.effort)


GENERATOR = Generator(NAME, generate)


def describe() -> str:
    """What is said of it next to the machine."""
    return f"{NAME} with connections of its own"


def command(address: str, model: BenchModel, in_flight: int, window_ms: int) -> list[str]:
    """Its command line; LoadError when it is not there. The shapes are those of the model's own request, one row."""
    try:
        program = find()
    except SweepFailed as error:
        raise LoadError(str(error)) from error
    found = [program, "-i", "grpc", "-u", address, "-m", model.name, *STEADY, *FEW_THREADS]
    found += [f"--measurement-interval={window_ms}", f"--concurrency-range={in_flight}"]
    for tensor in ModelInferRequest.FromString(model.request).inputs:
        found += ["--shape", f"{tensor.name}:{','.join(map(str, tensor.shape[1:]))}"]
    return found
