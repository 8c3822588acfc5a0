"""One run: a target, an engine, a number of inputs. A process of its own, as fuzzers end it when they like.

    python -m fuzz.child MODULE TARGET ENGINE INPUTS SEED DIRECTORY

MODULE has the table TARGETS. Engine `bytes` is atheris, which changes the bytes of the seeds and follows the coverage
of our packages; `structure` is Hypothesis with the target's strategy. The folder gets the run's files: progress, and
report.json when all inputs were good. Exit 1 with a traceback on a violation; then the input is in the progress.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from typing import NoReturn

    from fuzz.subject import Subject, Target

LOOK_EVERY = 1000
"""Inputs between two looks at whether all is well otherwise."""

WARM_UP = 5
"""A fifth of the inputs fills what is bounded (caches, pools of allocators, the fuzzer's own); from then on: flat."""

GROWTH_BYTES_MAX = 32 << 20
"""What the process may grow by after that, with the fuzzer's corpus in it: less than 300 bytes for an input that is
one of a hundred thousand, where a request that was kept has a thousand and more."""

ROUND_INPUTS = 250
"""Inputs of one run of Hypothesis, which keeps all that it has tried in memory."""

INPUT_BYTES_MAX = 4096
"""Of inputs that atheris makes: longer ones are slower, and no seed has a tenth."""

PLAIN_EVERY = 16
"""One change of so many is of any bytes where the target has a mutator of its own: an input has up to five changes."""

NO_TIMEOUT_S = 1_000_000
"""Atheris takes 0 for a second."""

INSTRUMENTED = ("sluice_proto", "sluice_server")
"""Packages whose coverage is followed, all but the modules of UNGUIDED."""

UNGUIDED = (
    "sluice_proto.grpc_service_pb2", "sluice_proto.model_config_pb2", "sluice_server.observability.statistics",
    "sluice_server.execution.session", "sluice_server.execution.instance",
)  # fmt: skip
"""What does not depend on the bytes of an input, or is on threads that would blur what an input covers."""


class Run:
    """Sends inputs to a subject, and ends the process behind the last one or at the first violation."""

    def __init__(self, subject: Subject, inputs: int, directory: Path) -> None:
        from fuzz.progress import Progress

        self._subject = subject
        self._inputs = inputs
        self._directory = directory
        self._progress = Progress(directory / "progress")
        self._began_ns = time.monotonic_ns()
        self._warm_bytes = 0
        self.count = 0

    def send(self, data: bytes) -> None:
        """One input; raises what is wrong with it."""
        self.count += 1
        self._progress.note(self.count, data)
        self._subject.check(data)
        if self.count % LOOK_EVERY == 0:
            self._subject.look()
        if self.count == self._inputs // WARM_UP:
            self._warm_bytes = memory_bytes()
        if self.count == self._inputs:
            self._finish()

    def _finish(self) -> NoReturn:
        self._subject.look()
        seconds = (time.monotonic_ns() - self._began_ns) / 1e9
        end_bytes = memory_bytes()
        growth = end_bytes - self._warm_bytes
        if growth > GROWTH_BYTES_MAX:
            raise AssertionError(f"memory is not flat: {growth >> 20} MiB more after a fifth of the inputs")
        report = {"inputs": self.count, "seconds": seconds, "rss_before": self._warm_bytes, "rss_after": end_bytes}
        (self._directory / "report.json").write_text(json.dumps(report))
        os._exit(0)  # neither fuzzer has a way to be told that it was enough


def memory_bytes() -> int:
    """What the process has in memory, without garbage; 0 where the system does not tell it."""
    from support.answering import status_bytes

    gc.collect()
    return status_bytes("VmRSS") if Path("/proc/self/status").exists() else 0


def structured(run: Run, target: Target, seed: int) -> None:
    """Have Hypothesis build the inputs. It ends with the smallest that fails as the last one that it sends."""
    import hypothesis

    for number in range(seed, sys.maxsize):
        decorate: Callable[[Any], Any] = hypothesis.settings(
            max_examples=ROUND_INPUTS,
            deadline=None,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        hypothesis.seed(number)(decorate(hypothesis.given(target.built)(run.send)))()


def from_bytes(run: Run, target: Target, seed: int, directory: Path) -> None:
    """Have atheris change the seeds."""
    import atheris

    corpus = directory / "corpus"
    corpus.mkdir()
    for number, data in enumerate(target.seeds()):
        (corpus / str(number)).write_bytes(data)
    handlers = [f"-handle_{signal}=0" for signal in ("abrt", "bus", "fpe", "ill", "segv", "int", "term", "xfsz")]
    options = [f"-seed={seed}", f"-max_len={INPUT_BYTES_MAX}", "-len_control=0", f"-artifact_prefix={directory}/"]
    limits = ["-rss_limit_mb=0", f"-timeout={NO_TIMEOUT_S}"]  # ours are stricter, and tell more

    def one(data: bytes) -> None:
        try:
            run.send(data)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)

    def mutate(data: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if mutator is None or not random.randrange(PLAIN_EVERY):
            return anyhow(data)
        return mutator(data, random, anyhow)[:max_size]

    def anyhow(data: bytes) -> bytes:
        changed: bytes = atheris.Mutate(data, INPUT_BYTES_MAX)
        return changed

    mutator = target.mutator
    atheris.Setup([sys.argv[0], *options, *limits, *handlers, str(corpus)], one, custom_mutator=mutate)
    atheris.Fuzz()


def load(module: str, name: str, engine: str) -> Target:
    """The target of this name; for `bytes` with our packages instrumented."""
    guided: AbstractContextManager[object] = nullcontext()
    if engine == "bytes":
        import atheris

        guided = atheris.instrument_imports(include=list(INSTRUMENTED), exclude=list(UNGUIDED))
    with guided:
        targets: dict[str, Target] = importlib.import_module(module).TARGETS
    return targets[name]


def main(module: str, name: str, engine: str, inputs: str, seed: str, place: str) -> None:
    """Run, and do not return unless something is wrong."""
    faulthandler.enable()
    target = load(module, name, engine)
    from fuzz.subject import watched

    directory = Path(place)
    with target.open(directory) as opened, watched(opened) as subject:
        run = Run(subject, int(inputs), directory)
        if engine == "bytes":
            from_bytes(run, target, int(seed), directory)
        else:
            structured(run, target, int(seed))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)  # threads of a server in the midst of something must not hold the end
