"""CPUs read from cgroup files with known content, and their division among instances and threads."""

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_server.execution.parameters import BadOption
from sluice_server.execution.threads import ThreadPlan, available_cpus, plan_threads


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_without_cgroups_the_affinity_counts(tmp_path: Path) -> None:
    assert available_cpus(tmp_path, affinity=6) == 6


def test_the_real_host_gives_at_least_one_cpu_and_no_more_than_the_affinity() -> None:
    assert 1 <= available_cpus() <= len(os.sched_getaffinity(0))


def test_the_quota_of_cgroup_version_2_counts(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/pod/app\n", "sys/fs/cgroup/pod/app/cpu.max": "300000 100000\n"})
    assert available_cpus(root, affinity=8) == 3


def test_an_ancestor_s_smaller_quota_counts(tmp_path: Path) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "0::/pod/app\n",
            "sys/fs/cgroup/pod/app/cpu.max": "max 100000\n",
            "sys/fs/cgroup/pod/cpu.max": "200000 100000\n",
        },
    )
    assert available_cpus(root, affinity=8) == 2


def test_in_a_container_the_quota_is_at_the_mount_itself(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "400000 100000\n"})
    assert available_cpus(root, affinity=8) == 4


@pytest.mark.parametrize("mount", ["cpu,cpuacct", "cpu"])
def test_the_quota_of_cgroup_version_1_counts(tmp_path: Path, mount: str) -> None:
    root = write(
        tmp_path,
        {
            "proc/self/cgroup": "9:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/\n",
            # The path of the host is not visible in the container, only its own part of the tree.
            f"sys/fs/cgroup/{mount}/cpu.cfs_quota_us": "250000\n",
            f"sys/fs/cgroup/{mount}/cpu.cfs_period_us": "100000\n",
        },
    )
    assert available_cpus(root, affinity=8) == 2


@pytest.mark.parametrize(("quota", "cpus"), [("50000 100000", 1), ("150000 100000", 1), ("290000 100000", 2)])
def test_a_fractional_quota_is_rounded_down_but_never_to_zero(tmp_path: Path, quota: str, cpus: int) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": quota})
    assert available_cpus(root, affinity=8) == cpus


@pytest.mark.parametrize("text", ["max 100000", "-1", "", "garbage here", "100000 0"])
def test_what_is_no_quota_limits_nothing(tmp_path: Path, text: str) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/../x\n1:cpu:/\nbroken\n", "sys/fs/cgroup/cpu.max": text})
    write(root, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000"})
    assert available_cpus(root, affinity=8) == 8


def test_a_quota_above_the_affinity_gives_no_more_cpus(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "6400000 100000"})
    assert available_cpus(root, affinity=2) == 2


def test_cpus_are_divided_among_the_instances() -> None:
    assert plan_threads(2, {}, 8) == ThreadPlan(2, 4, 1)
    assert plan_threads(3, {}, 8) == ThreadPlan(3, 2, 1)


def test_more_instances_than_cpus_are_cut_and_the_plan_says_so() -> None:
    plan = plan_threads(5, {}, 2)
    assert (plan.instances, plan.intra_op_threads) == (2, 1)
    assert plan.reasons == (
        "2 of the 5 instances asked for: the process may use 2 CPUs, and each instance runs on 1 thread",
    )


def test_asked_for_threads_are_kept_and_instances_give_way() -> None:
    plan = plan_threads(4, {"intra_op_thread_count": "4"}, 8)
    assert (plan.instances, plan.intra_op_threads) == (2, 4)
    assert len(plan.reasons) == 1


def test_threads_give_way_when_one_instance_is_left() -> None:
    plan = plan_threads(2, {"intra_op_num_threads": "16"}, 4)
    assert (plan.instances, plan.intra_op_threads) == (1, 4)
    assert plan.reasons[1] == "4 of the 16 intra-op threads asked for: the process may use 4 CPUs"


def test_a_count_of_zero_is_not_asked_for() -> None:
    assert plan_threads(2, {"intra_op_thread_count": "0", "inter_op_thread_count": "0"}, 4) == ThreadPlan(2, 2, 1)


def test_inter_op_threads_do_not_count_unless_operators_run_in_parallel() -> None:
    assert plan_threads(2, {"inter_op_thread_count": "9"}, 4) == ThreadPlan(2, 2, 9)


def test_in_parallel_mode_both_kinds_of_threads_share_the_cpus() -> None:
    assert plan_threads(2, {"execution_mode": "1"}, 8) == ThreadPlan(2, 1, 4)
    assert plan_threads(1, {"execution_mode": "ORT_PARALLEL", "inter_op_thread_count": "2"}, 8) == ThreadPlan(1, 4, 2)


def test_instances_on_a_gpu_are_not_limited_by_cpus() -> None:
    assert plan_threads(5, {}, 2, on_gpu=True) == ThreadPlan(5, 1, 1)


@pytest.mark.parametrize("value", ["-1", "two", "1.5", "", "99999999999999999999", "1_0"])
def test_a_count_that_is_none_is_refused_with_model_key_and_value(value: str) -> None:
    with pytest.raises(BadOption) as caught:
        plan_threads(1, {"intra_op_thread_count": value}, 2, model="digits")
    assert str(caught.value) == (
        f"model 'digits': parameter 'intra_op_thread_count' is '{value}', expected a whole number from 0 to 4096"
    )


def test_two_names_for_one_count_must_agree() -> None:
    assert plan_threads(1, {"intra_op_thread_count": "1", "intra_op_num_threads": "1"}, 4).intra_op_threads == 1
    with pytest.raises(BadOption, match="the same as 'intra_op_thread_count', which is '1'"):
        plan_threads(1, {"intra_op_thread_count": "1", "intra_op_num_threads": "2"}, 4)


@given(
    instances=st.integers(1, 40),
    cpus=st.integers(1, 64),
    intra=st.none() | st.integers(0, 80),
    inter=st.none() | st.integers(0, 80),
    parallel=st.booleans(),
)
def test_a_model_never_uses_more_than_the_cpus(
    instances: int, cpus: int, intra: int | None, inter: int | None, parallel: bool
) -> None:
    parameters = {"execution_mode": str(int(parallel))}
    if intra is not None:
        parameters["intra_op_thread_count"] = str(intra)
    if inter is not None:
        parameters["inter_op_thread_count"] = str(inter)
    plan = plan_threads(instances, parameters, cpus)
    counted_inter = plan.inter_op_threads if parallel else 1
    assert 1 <= plan.instances <= instances
    assert plan.instances * plan.intra_op_threads * counted_inter <= cpus
    assert plan.intra_op_threads == intra or not intra or plan.instances == 1
    changed = plan.instances < instances or (intra or 0) > plan.intra_op_threads
    assert bool(plan.reasons) >= changed
