"""Reads what a process has used, and what the machine is, from the text of /proc."""

import os
from pathlib import Path

PROC = Path("/proc")

TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_ticks(stat: str) -> int:
    """User and system time of all threads, also ended ones, in clock ticks, from the text of /proc/PID/stat (proc(5)).

    The second field is the program's name in parentheses, which may itself hold spaces and parentheses.
    """
    fields = stat.rpartition(")")[2].split()
    # The state, field 3 of proc(5), is now the first one; utime and stime are fields 14 and 15.
    return int(fields[11]) + int(fields[12])


def rss_bytes(status: str) -> int:
    """Resident memory from the text of /proc/PID/status."""
    for line in status.splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no VmRSS line: the process has ended, or is a kernel thread")


def waited_s(schedstat: str) -> float:
    """Seconds that a thread was ready to run and had no CPU, from the text of /proc/PID/task/TID/schedstat.

    Its three numbers are nanoseconds on a CPU, nanoseconds waiting for one, and time slices (sched-stats in Linux'
    documentation).
    """
    return int(schedstat.split()[1]) / 1e9


def total_bytes(meminfo: str) -> int:
    """The machine's memory from the text of /proc/meminfo."""
    for line in meminfo.splitlines():
        if line.startswith("MemTotal:"):
            return int(line.split()[1]) * 1024
    raise ValueError("no MemTotal line")


def cpu_model(cpuinfo: str) -> str:
    """The processor's name from the text of /proc/cpuinfo, which has none on some architectures."""
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return "unknown processor"


def read_cpu_s(pid: int) -> float:
    """CPU seconds that this process has used so far."""
    return cpu_ticks((PROC / str(pid) / "stat").read_text()) / TICKS_PER_S


def read_rss_bytes(pid: int) -> int:
    """Resident memory of this process now."""
    return rss_bytes((PROC / str(pid) / "status").read_text())
