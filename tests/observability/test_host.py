"""What is read from /proc, on files with known content and once on the real ones."""

import os
from pathlib import Path

import pytest

from sluice_server.observability.host import HostReader, HostUsage

# user nice system idle iowait irq softirq steal guest guest_nice
CPU_LINE = "cpu  {user} 0 100 700 100 0 0 0 50 0\ncpu0 1 1 1 1 1 1 1 1 1 1\nintr 1\n"
MEMINFO = "MemTotal:        1000 kB\nMemFree:          100 kB\nMemAvailable:     400 kB\nHugePages_Total:       0\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "self").mkdir()
    (tmp_path / "stat").write_text(CPU_LINE.format(user=100))
    (tmp_path / "meminfo").write_text(MEMINFO)
    fields = ["S", *("0" for _ in range(10)), "150", "50", *("0" for _ in range(8)), "7", "0"]
    (tmp_path / "self" / "stat").write_text(f"4711 (a ) name) {' '.join(fields)}\n")
    return tmp_path


def read(reader: HostReader) -> HostUsage:
    usage = reader.read()
    assert usage is not None
    return usage


def test_memory_that_is_not_available_is_used(proc: Path) -> None:
    usage = read(HostReader(proc))
    assert (usage.memory_total_bytes, usage.memory_used_bytes) == (1000 * 1024, 600 * 1024)


def test_the_process_is_read_from_behind_its_name(proc: Path) -> None:
    usage = read(HostReader(proc))
    assert usage.process_cpu_s == 200 / os.sysconf("SC_CLK_TCK")
    assert usage.process_resident_bytes == 7 * os.sysconf("SC_PAGE_SIZE")


def test_utilisation_is_the_busy_share_since_the_last_reading(proc: Path) -> None:
    reader = HostReader(proc)
    (proc / "stat").write_text("cpu 400 0 100 1400 100 0 0 0 350 0\n")
    assert read(reader).cpu_utilization == 0.3


def test_a_second_reading_within_one_tick_repeats_the_last_utilisation(proc: Path) -> None:
    reader = HostReader(proc)
    (proc / "stat").write_text("cpu 600 0 100 1200 100 0 0 0 0 0\n")
    assert [read(reader).cpu_utilization, read(reader).cpu_utilization] == [0.5, 0.5]


def test_a_reading_is_given_again_until_its_interval_is_over(proc: Path) -> None:
    now_ns = 0
    reader = HostReader(proc, interval_ns=1000, clock=lambda: now_ns)
    first = read(reader)
    (proc / "meminfo").write_text(MEMINFO.replace("400", "300"))
    now_ns = 999
    assert read(reader) is first
    now_ns = 1000
    assert read(reader).memory_used_bytes == 700 * 1024
    (proc / "meminfo").write_text(MEMINFO)
    now_ns = 1999
    assert read(reader).memory_used_bytes == 700 * 1024


@pytest.mark.parametrize("name", ["stat", "meminfo", "self/stat"])
@pytest.mark.parametrize("content", [None, "", "cpu x\nMemTotal: 1 kB\n"])
def test_without_a_readable_proc_there_is_no_reading(proc: Path, name: str, content: str | None) -> None:
    if content is None:
        (proc / name).unlink()
    else:
        (proc / name).write_text(content)
    assert HostReader(proc).read() is None


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this operating system has no /proc")
def test_the_real_proc_can_be_read() -> None:
    usage = read(HostReader())
    assert 0.0 <= usage.cpu_utilization <= 1.0
    assert 0 < usage.process_resident_bytes < usage.memory_total_bytes
    assert 0 < usage.memory_used_bytes < usage.memory_total_bytes
    assert usage.process_cpu_s > 0
