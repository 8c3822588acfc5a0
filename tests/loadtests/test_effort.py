"""What a generator spends is told of real processes: one that works, one that sleeps, one that never ends."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from loadtests import effort
from loadtests.effort import Effort, is_limit
from loadtests.procfs import total_bytes, waited_s

BUSY = "import time\nwhile time.process_time() < 0.5: pass\nprint('done')"
WAITS = "import threading; threading.Event().wait(0.5)"


def test_a_process_that_works_is_busy_or_waits_for_a_cpu() -> None:
    done, spent = effort.run([sys.executable, "-c", BUSY], timeout_s=60)
    assert (done.returncode, done.stdout) == (0, "done\n")
    assert 0.5 <= spent.cpu_s < 5
    # On a machine that others use too, the rest of its time is waiting; the last look at it is some 50 ms old.
    assert spent.busy + spent.waiting > 0.6


def test_a_process_that_waits_is_idle() -> None:
    done, spent = effort.run([sys.executable, "-c", WAITS], timeout_s=60)
    assert done.returncode == 0
    assert spent.cpu_s < spent.elapsed_s
    assert spent.elapsed_s >= 0.5
    assert not is_limit(spent.cpu_s / spent.elapsed_s / 10, 0)


def test_what_takes_too_long_is_ended() -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        effort.run([sys.executable, "-c", "import threading; threading.Event().wait()"], timeout_s=0.2)


def test_an_error_and_its_text_come_back() -> None:
    done, _ = effort.run([sys.executable, "-c", "raise SystemExit('wrong')"], timeout_s=60)
    assert (done.returncode, done.stderr) == (1, "wrong\n")


def test_shares_are_of_all_threads() -> None:
    spent = Effort(cpu_s=1.5, waited_s=0.5, elapsed_s=1.0, threads=2)
    assert (spent.busy, spent.waiting) == (0.75, 0.25)
    assert is_limit(spent.busy, spent.waiting)


@pytest.mark.parametrize(("busy", "waiting"), [(0.89, 0.0), (math.nan, 0.9), (0.9, math.nan)])
def test_below_nine_tenths_or_unknown_a_generator_is_no_limit(busy: float, waiting: float) -> None:
    assert not is_limit(busy, waiting)


def test_waiting_and_memory_are_read_from_proc() -> None:
    assert waited_s("182493 6121000000 2\n") == 6.121
    assert total_bytes("MemTotal:       2048 kB\nMemFree:  1 kB\n") == 2 << 20
    with pytest.raises(ValueError, match="MemTotal"):
        total_bytes("MemFree: 1 kB\n")
