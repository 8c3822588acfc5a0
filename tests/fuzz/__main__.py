"""Sends hundreds of thousands of inputs to the server's parts: `make fuzz`.

    python -m fuzz                          every target, with both engines
    python -m fuzz --only requests rest     these
    python -m fuzz --scale 0.01             a hundredth of the inputs
    python -m fuzz --replay requests FILE   one input that was saved

Of every input: it ends, in exactly one outcome, which is an answer or a refusal that is the client's to hear; nothing
crashes, hangs, or is logged as an error; good requests are still answered; memory stays flat.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import traceback
from pathlib import Path

from fuzz.runs import ENGINES, Result, run
from fuzz.subject import watched
from fuzz.targets import TARGETS

FINDINGS = Path(".fuzz")
"""Where inputs are saved that were no good."""

MODULE = "fuzz.targets"

INPUTS_MIN = 100

HEAD = f"{'target':<10}{'engine':<11}{'inputs':>8}{'seconds':>9}{'inputs/s':>10}{'RSS before':>12}{'after, MiB':>12}"


def main() -> int:
    """The command; 1 when an input was no good."""
    options = _parser().parse_args()
    if options.replay:
        return replay(*options.replay)
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1, 1 << 31)
    print(
        f"seed {seed} (--seed {seed} sends the same again), load average {os.getloadavg()[0]:.1f}\n\n{HEAD}", flush=True
    )
    results = []
    for name in options.only or TARGETS:
        target = TARGETS[name]
        for engine, inputs in zip(ENGINES, (target.bytes_inputs, target.built_inputs), strict=True):
            print(f"{name:<10}{engine:<11}", end="", flush=True)
            result = run(MODULE, name, engine, max(INPUTS_MIN, int(inputs * options.scale)), seed, FINDINGS)
            results.append(result)
            tell(name, result)
    failed = sum(bool(result.problem) for result in results)
    total, seconds = sum(result.inputs for result in results), sum(result.seconds for result in results)
    print(f"{'total':<21}{total:>8,}{seconds:>9.1f}   {'FAIL: ' + str(failed) if failed else 'PASS'}")
    return 1 if failed else 0


def tell(name: str, result: Result) -> None:
    """The rest of a run's line, or what it found."""
    if result.problem:
        print(f"{result.inputs:>8,}   FAIL: {result.problem}\n\nThe input is saved. Again, on its own:")
        print(f'  make fuzz FUZZ_FLAGS="--replay {name} {result.saved}"\n', flush=True)
        return
    rate = result.inputs / result.seconds
    before, after = (size / 2**20 for size in (result.rss_before, result.rss_after))
    print(f"{result.inputs:>8,}{result.seconds:>9.1f}{rate:>10,.0f}{before:>12.1f}{after:>12.1f}   PASS", flush=True)


def replay(name: str, path: str) -> int:
    """Send one input to a target that has seen nothing else."""
    with (
        tempfile.TemporaryDirectory(prefix="sluice-fuzz-") as scratch,
        TARGETS[name].open(Path(scratch)) as opened,
        watched(opened) as subject,
    ):
        try:
            subject.check(Path(path).read_bytes())
            subject.look()
        except Exception:
            traceback.print_exc()
            print("FAIL")
            return 1
    print("PASS: alone it is good. If it was not, what came before it counts: run the target with the same --seed.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=TARGETS, metavar="TARGET", help=f"of: {', '.join(TARGETS)}")
    parser.add_argument("--scale", type=float, default=1.0, help="times the usual number of inputs")
    parser.add_argument("--seed", type=int, help="of all that is random; another one each time by default")
    parser.add_argument("--replay", nargs=2, metavar=("TARGET", "FILE"), help="send one saved input")
    return parser


if __name__ == "__main__":
    sys.exit(main())
