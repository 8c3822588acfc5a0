"""What the benchmark reads from /proc."""

import os
import time

import pytest

from loadtests import procfs

STAT = (
    "4711 (a (odd) name) S 1 4711 4711 0 -1 4194304 900 0 0 0 250 33 7 8 20 0 5 0 100 1000000 2000 18446744073709551615"
)


def test_cpu_time_is_user_and_system_time_of_the_process_without_its_children() -> None:
    assert procfs.cpu_ticks(STAT) == 250 + 33


def test_resident_memory_is_read_in_bytes() -> None:
    assert procfs.rss_bytes("Name:\tsluice\nVmHWM:\t  9000 kB\nVmRSS:\t    4711 kB\nThreads:\t5\n") == 4711 * 1024


def test_a_process_without_memory_is_said_to_have_ended() -> None:
    with pytest.raises(ValueError, match="ended"):
        procfs.rss_bytes("Name:\tsluice\nState:\tZ (zombie)\n")


def test_the_processor_has_a_name_also_where_proc_has_none() -> None:
    assert procfs.cpu_model("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n") == "Some CPU @ 2 GHz"
    assert procfs.cpu_model("processor\t: 0\nBogoMIPS\t: 50.00\n") == "unknown processor"


def test_this_process_is_measured_as_python_measures_it() -> None:
    before_s, before_by_python_s = procfs.read_cpu_s(os.getpid()), time.process_time()
    while time.process_time() - before_by_python_s < 0.1:
        pass
    used_s = procfs.read_cpu_s(os.getpid()) - before_s

    # Both ends are rounded to a tick.
    assert used_s == pytest.approx(time.process_time() - before_by_python_s, abs=2.5 / procfs.TICKS_PER_S)
    assert procfs.read_rss_bytes(os.getpid()) > 2**20
