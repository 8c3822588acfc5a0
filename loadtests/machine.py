"""Says where a benchmark ran: a figure without its machine and versions is worth little."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version

from loadtests.procfs import PROC, cpu_model, total_bytes

PACKAGES = ("sluice", "sluice-native", "grpcio", "onnxruntime", "protobuf", "numpy")

QUIET_LOAD = 0.5
"""Runnable processes on average, before we start; above it, others take part in what is measured."""


def host() -> dict[str, str]:
    """Facts by name, in the order to print them, of the machine and the packages."""
    return {
        "processor": cpu_model((PROC / "cpuinfo").read_text()),
        "cores": f"{len(os.sched_getaffinity(0))} usable of {os.cpu_count()}",
        "load": f"{_load():.2f} on average over the last minute, before the start",
        "memory": f"{total_bytes((PROC / 'meminfo').read_text()) / 2**30:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}, Python {platform.python_version()}",
        "packages": ", ".join(f"{name} {_version(name)}" for name in PACKAGES),
    }


def versions() -> dict[str, str]:
    """The packages that take part."""
    return {name: _version(name) for name in PACKAGES}


def is_quiet() -> bool:
    """Whether nothing else seems to run here."""
    return _load() <= QUIET_LOAD


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"


def _load() -> float:
    return os.getloadavg()[0]
