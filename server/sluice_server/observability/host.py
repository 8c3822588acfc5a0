"""Reads from /proc what the machine and this process use; `metrics` shows it.

`HostReader` keeps one earlier reading, as utilisation is a difference; a lock guards it, so scrapes may overlap.
"""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_BYTES_PER_KIB = 1024
# Places of values in their /proc files, from proc(5). In /proc/self/stat they count from behind the command's name.
_STAT_IDLE = (3, 4)
_STAT_GUEST = 8
_SELF_UTIME, _SELF_STIME, _SELF_RSS = 11, 12, 21


@dataclass(frozen=True, slots=True)
class HostUsage:
    """One reading. `cpu_utilization` is 0..1 of all CPUs; `memory_used_bytes` is what is not available."""

    cpu_utilization: float
    memory_total_bytes: int
    memory_used_bytes: int
    process_cpu_s: float
    process_resident_bytes: int


class HostReader:
    """Reads usage under `root`, which has the layout of /proc.

    The first reading's utilisation counts from when the reader was made, later ones count from the reading before.
    """

    def __init__(
        self, root: Path = Path("/proc"), interval_ns: int = 0, *, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        """A reading is given again until it is `interval_ns` old."""
        self._root = root
        self._interval_ns = interval_ns
        self._clock = clock
        self._last: HostUsage | None = None
        self._read_ns = 0
        self._lock = threading.Lock()
        self._utilization = 0.0
        self._busy = self._total = 0
        self._read()

    def read(self) -> HostUsage | None:
        """Give the usage now, or None where there is no such /proc (another operating system, a hardened pod)."""
        now_ns = self._clock()
        last = self._last  # two scrapes at the same time may both read: neither waits for the other
        if last is None or now_ns - self._read_ns >= self._interval_ns:
            last = self._last = self._read()
            self._read_ns = now_ns
        return last

    def _read(self) -> HostUsage | None:
        try:
            memory_total_bytes, memory_used_bytes = self._memory()
            process_cpu_s, process_resident_bytes = self._process()
            utilization = self._cpu_utilization()
        except (OSError, ValueError, LookupError):
            return None
        return HostUsage(
            cpu_utilization=utilization,
            memory_total_bytes=memory_total_bytes,
            memory_used_bytes=memory_used_bytes,
            process_cpu_s=process_cpu_s,
            process_resident_bytes=process_resident_bytes,
        )

    def _cpu_utilization(self) -> float:
        busy, total = _cpu_ticks((self._root / "stat").read_text())
        with self._lock:
            elapsed = total - self._total
            # Two scrapes within one tick: the earlier value still stands.
            if elapsed > 0:
                self._utilization = min(1.0, max(0.0, (busy - self._busy) / elapsed))
                self._busy, self._total = busy, total
            return self._utilization

    def _memory(self) -> tuple[int, int]:
        fields = dict(line.split(":", 1) for line in (self._root / "meminfo").read_text().splitlines() if ":" in line)
        total, available = (int(fields[name].split()[0]) * _BYTES_PER_KIB for name in ("MemTotal", "MemAvailable"))
        return total, total - available

    def _process(self) -> tuple[float, int]:
        # The command's name stands in parentheses and may itself contain spaces and parentheses.
        fields = (self._root / "self" / "stat").read_text().rpartition(")")[2].split()
        ticks = int(fields[_SELF_UTIME]) + int(fields[_SELF_STIME])
        return ticks / os.sysconf("SC_CLK_TCK"), int(fields[_SELF_RSS]) * os.sysconf("SC_PAGE_SIZE")


def _cpu_ticks(stat: str) -> tuple[int, int]:
    """Busy and all ticks of all CPUs since boot; guest time is left out, as the kernel counts it as user time too."""
    first_line = stat.splitlines()[0]
    ticks = [int(text) for text in first_line.split()[1:]][:_STAT_GUEST]
    total = sum(ticks)
    return total - sum(ticks[place] for place in _STAT_IDLE), total
