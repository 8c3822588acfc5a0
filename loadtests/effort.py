"""What a load generator spends: its CPU time, how long it waited for a CPU, and whether it was what limited the load.

A generator that is hardly ever idle, busy or waiting for a core that others use, has answers waiting for it: what it
measures then is itself. Linux counts both for each thread (/proc/PID/task/TID/schedstat).
"""

import resource
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

from loadtests.procfs import PROC, waited_s

LIMIT = 0.9
"""From this share of its time busy or waiting for a CPU on, a generator is taken for the limit of what it measured."""

LOOK_S = 0.05
"""How often a running generator's threads are looked at: the last look is all that is known of their waiting."""


@dataclass(frozen=True, slots=True)
class Effort:
    """One run of a generator: CPU seconds, seconds ready to run without a CPU, of how many seconds on how many threads.

    `threads` are those that make the load; one that only waits for them is not counted.
    """

    cpu_s: float
    waited_s: float
    elapsed_s: float
    threads: int = 1

    @property
    def busy(self) -> float:
        """The share of its time in which it ran."""
        return self.cpu_s / (self.elapsed_s * self.threads)

    @property
    def waiting(self) -> float:
        """The share of its time in which it could have run, and others had the CPU."""
        return self.waited_s / (self.elapsed_s * self.threads)


def is_limit(busy: float, waiting: float) -> bool:
    """Whether a generator with these shares was the bottleneck; NaN (not measured) is no evidence."""
    return busy + waiting >= LIMIT


def run(
    command: Sequence[str], timeout_s: float, threads: int = 1, env: Mapping[str, str] | None = None
) -> tuple[subprocess.CompletedProcess[str], Effort]:
    """Run a command, output as text, and tell what its process spent. TimeoutExpired when it takes too long."""
    began_s, cpu_began_s = perf_counter(), _children_cpu_s()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        watch = _Watch(process.pid)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            raise
        finally:
            watched_s = watch.stop()
    done = subprocess.CompletedProcess(command, process.returncode, out, err)
    return done, Effort(_children_cpu_s() - cpu_began_s, watched_s, perf_counter() - began_s, threads)


class _Watch:
    """Adds up how long the threads of a process have waited for a CPU."""

    def __init__(self, pid: int) -> None:
        self._tasks = PROC / str(pid) / "task"
        self._waited_s: dict[str, float] = {}
        self._over = Event()
        self._thread = Thread(target=self._look, name="effort-watch", daemon=True)
        self._thread.start()

    def stop(self) -> float:
        """Seconds in all, up to the last look."""
        self._over.set()
        self._thread.join()
        return sum(self._waited_s.values())

    def _look(self) -> None:
        while not self._over.wait(LOOK_S):
            try:
                tasks = list(self._tasks.iterdir())
            except FileNotFoundError:
                return
            for task in tasks:
                self._note(task / "schedstat")

    def _note(self, schedstat: Path) -> None:
        try:
            self._waited_s[schedstat.parent.name] = waited_s(schedstat.read_text())
        except (FileNotFoundError, ProcessLookupError):
            return  # this thread has ended since


def _children_cpu_s() -> float:
    """CPU time of the child processes that have ended and been waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
