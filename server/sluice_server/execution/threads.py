"""How many CPUs the process may use, and how a model's instances and ONNX Runtime's threads share them.

The promise: the instances of a model times the threads that each of its runs uses never exceed the CPUs that the
process may use. ONNX Runtime's own default is every core of the host, spinning, which in a container with a quota
spends the quota in a fraction of each period and then stalls everything in the container.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path, PurePosixPath

from sluice_server.execution.parameters import pick, read_choice, read_int

INTRA_OP_KEYS = ("intra_op_thread_count", "intra_op_num_threads")
"""Triton's name and ONNX Runtime's own."""

INTER_OP_KEYS = ("inter_op_thread_count", "inter_op_num_threads")

EXECUTION_MODES = {"0": "ORT_SEQUENTIAL", "1": "ORT_PARALLEL"}
EXECUTION_MODES |= {name: name for name in EXECUTION_MODES.values()}

MAX_THREADS = 4096
"""More threads than any host has cores: a larger number is a slip of the hand."""


@dataclass(frozen=True, slots=True)
class ThreadPlan:
    """The threads of one model on one device; `reasons` says in words what was changed from what was asked, and why."""

    instances: int
    intra_op_threads: int
    inter_op_threads: int
    reasons: tuple[str, ...] = ()


def available_cpus(root: Path = Path("/"), affinity: int | None = None) -> int:
    """Give the CPUs that this process may use: the smaller of its affinity and its cgroups' quota, at least 1.

    A quota that is no whole number is rounded down. `root` is where /proc and /sys are looked for; `affinity` is
    counted when it is not given.
    """
    if affinity is None:
        affinity = len(os.sched_getaffinity(0))
    return max(1, min([affinity, *(int(quota) for quota in _quotas(root))]))


def plan_threads(
    requested_instances: int, parameters: Mapping[str, str], cpus: int, *, model: str = "", on_gpu: bool = False
) -> ThreadPlan:
    """Share `cpus` among the instances of a model.

    Thread counts that `parameters` ask for are kept as far as the promise allows: instances are taken away first,
    then threads. What is not asked for gets what is left over. A count of 0 means "not asked for". On a GPU the
    threads only wait for the device, so instances are not limited and one thread each is enough.
    Raises BadOption for a count that is no count.
    """
    intra = _read_count(model, parameters, INTRA_OP_KEYS)
    inter = _read_count(model, parameters, INTER_OP_KEYS)
    if on_gpu:
        return ThreadPlan(requested_instances, intra or 1, inter or 1)
    # Only the parallel mode runs several operators of one request at a time, so only there inter-op threads count.
    parallel = _is_parallel(model, parameters)
    kept_inter = min(inter or 1, cpus) if parallel else 1
    kept_intra = min(intra or 1, cpus // kept_inter)
    instances = max(1, min(requested_instances, cpus // (kept_intra * kept_inter)))
    spare = cpus // (instances * kept_intra * kept_inter)
    if parallel and not inter:
        kept_inter *= spare
    elif not intra:
        kept_intra *= spare
    reasons = (
        *_instances_reason(requested_instances, instances, kept_intra * kept_inter, cpus),
        *_threads_reason("intra-op", intra, kept_intra, cpus),
        *(_threads_reason("inter-op", inter, kept_inter, cpus) if parallel else ()),
    )
    return ThreadPlan(instances, kept_intra, kept_inter if parallel else inter or 1, reasons)


def _instances_reason(requested: int, instances: int, threads: int, cpus: int) -> Iterator[str]:
    if instances < requested:
        yield (
            f"{instances} of the {requested} instances asked for: the process may use {_count(cpus, 'CPU')}, "
            f"and each instance runs on {_count(threads, 'thread')}"
        )


def _threads_reason(kind: str, asked: int, kept: int, cpus: int) -> Iterator[str]:
    if asked > kept:
        yield f"{kept} of the {asked} {kind} threads asked for: the process may use {_count(cpus, 'CPU')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _read_count(model: str, parameters: Mapping[str, str], keys: tuple[str, ...]) -> int:
    found = pick(model, parameters, keys)
    return read_int(model, *found, low=0, high=MAX_THREADS) if found else 0


def _is_parallel(model: str, parameters: Mapping[str, str]) -> bool:
    mode = parameters.get("execution_mode", "0")
    return read_choice(model, "execution_mode", mode, EXECUTION_MODES) == "ORT_PARALLEL"


def _quotas(root: Path) -> Iterator[Fraction]:
    """Give the CPU quota of each cgroup that the process is in, the ancestors' too, in CPUs."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if hierarchy == "0":
            for mount in (mounts, mounts / "unified"):
                yield from (quota for group in _ancestry(mount, path) if (quota := _quota_v2(group)))
        elif "cpu" in controllers.split(","):
            for mount in {mounts / controllers, mounts / "cpu"}:
                yield from (quota for group in _ancestry(mount, path) if (quota := _quota_v1(group)))


def _ancestry(mount: Path, path: str) -> Iterator[Path]:
    """Give a cgroup's directory and its ancestors' up to the mount.

    In a container the path may be the host's while the mount shows only the container's part of the tree; the
    directories that are not there then read as no quota, and the mount itself has the container's.
    """
    parts = [part for part in PurePosixPath(path).parts if part not in ("/", "..")]
    for length in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:length])


def _quota_v2(group: Path) -> Fraction | None:
    quota, _, period = _read(group / "cpu.max").strip().partition(" ")
    return _fraction(quota, period)


def _quota_v1(group: Path) -> Fraction | None:
    return _fraction(_read(group / "cpu.cfs_quota_us").strip(), _read(group / "cpu.cfs_period_us").strip())


def _fraction(quota: str, period: str) -> Fraction | None:
    """Give quota / period, or None for no quota: `max` in version 2, -1 in version 1, or no such file."""
    if not quota.isdigit() or not period.isdigit() or int(period) == 0:
        return None
    return Fraction(int(quota), int(period))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
