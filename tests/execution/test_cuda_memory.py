"""Regions of a GPU's memory: opened, copied both ways and closed; on the driver's functions over host memory."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from sluice_proto.tensors import BY_NAME
from sluice_server.errors import AlreadyExists, Internal, InvalidArgument, NotFound, ResourceExhausted
from sluice_server.execution.cuda_driver import HANDLE_BYTES, LIBRARY, CudaError, LibCuda, find_driver
from sluice_server.execution.cuda_memory import CudaRegion, open_region
from sluice_server.execution.shared_memory import (
    RegionTable,
    SharedTensor,
    SharedTensors,
    SystemRegion,
    gather,
    write_outputs,
)
from support.cuda import INVALID_VALUE, UNKNOWN, FakeCuda
from support.shared_memory import Object

FP32 = BY_NAME["FP32"]


@pytest.fixture
def library():
    return FakeCuda()


@pytest.fixture
def driver(library):
    return LibCuda(library)


@pytest.fixture
def table(tmp_path):
    return RegionTable(tmp_path, regions_max=3, registered_bytes_max=1000)


def register(table, driver, name, exported, size_bytes, device=None):
    device = exported.device if device is None else device
    table.enter(name, size_bytes, lambda: open_region(driver, name, exported.handle, device, size_bytes))
    return table.find(name)


def tensor(window, *shape):
    return SharedTensor(window, FP32, shape, lambda error: InvalidArgument(str(error)))


def test_a_region_is_read_and_written_at_its_offsets(library, driver, table):
    exported = library.export(64, device=1)
    region = register(table, driver, "r", exported, 48)
    exported.put(np.arange(16, dtype=np.float32).tobytes())
    np.testing.assert_array_equal(tensor(region.window(8, 16), 2, 2).read(), [[2, 3], [4, 5]])
    region.window(40, 8).write(b"12345678")
    assert exported.get(36, 16) == np.float32(9).tobytes() + b"12345678" + np.float32(12).tobytes()
    region.window(0, 4).write(np.ones(4, np.uint8))
    assert exported.get(0, 4) == b"\1\1\1\1"


def test_a_handle_may_point_into_its_allocation_and_what_is_behind_it_counts(library, driver, table):
    exported = library.export(64, offset=40)
    exported.put(b"abcdefgh", 0)
    region = register(table, driver, "r", exported, 24)
    read = np.empty(8, np.uint8)
    region.window(0, 8).read_into(read)
    assert read.tobytes() == b"abcdefgh"
    with pytest.raises(InvalidArgument, match="25 bytes are not a part of its memory, which has 24 bytes"):
        register(table, driver, "s", exported, 25)
    assert exported.times_open == 1


def test_a_batch_is_gathered_from_both_kinds_of_memory(library, driver, table, tmp_path):
    exported = library.export(8)
    exported.put(np.array([1, 2], np.float32).tobytes())
    device = register(table, driver, "d", exported, 8)
    with Object(8, tmp_path) as shm:
        shm.put(np.array([3, 4], np.float32))
        table.register("s", shm.key, 0, 8)
        batch = [
            SharedTensors({"X": tensor(region.window(0, 8), 1, 2)}, {}) for region in (device, table.find("s"), device)
        ]
        np.testing.assert_array_equal(gather("X", batch), [[1, 2], [3, 4], [1, 2]])
        write_outputs({"A": device.window(0, 4), "B": table.find("s").window(0, 4)}, {"A": b"aaaa", "B": b"bbbb"})
        assert (exported.get(0, 4), shm.get(0, 4)) == (b"aaaa", b"bbbb")


def test_tensors_without_elements_touch_no_device(library, driver, table):
    region = register(table, driver, "r", library.export(8), 8)
    library.fails = {"cuMemcpyDtoH_v2": INVALID_VALUE, "cuMemcpyHtoD_v2": INVALID_VALUE}
    assert tensor(region.window(4, 0), 0, 3).read().shape == (0, 3)
    region.window(4, 0).write(b"")


def test_outputs_that_overlap_in_one_allocation_are_refused_whatever_its_regions_are_called(library, driver, table):
    exported, other = library.export(32), library.export(32)
    first, again = (register(table, driver, name, exported, 32) for name in ("a", "b"))
    elsewhere = register(table, driver, "c", other, 32)
    with pytest.raises(InvalidArgument, match="overlap in shared memory"):
        write_outputs({"A": first.window(0, 8), "B": again.window(4, 8)}, {"A": b"x" * 8, "B": b"y" * 8})
    assert exported.get() == bytes(32)
    write_outputs({"A": first.window(0, 8), "B": elsewhere.window(4, 8)}, {"A": b"x" * 8, "B": b"y" * 8})
    assert (exported.get(0, 8), other.get(4, 8)) == (b"x" * 8, b"y" * 8)


@pytest.mark.parametrize(("offset", "size_bytes"), [(48, 0), (0, 49), (47, 2)])
def test_nothing_outside_of_a_region_is_reached(offset, size_bytes, library, driver, table):
    region = register(table, driver, "r", library.export(64), 48)
    with pytest.raises(InvalidArgument, match="Invalid offset"):
        region.window(offset, size_bytes)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"device": 2}, "there is no device 2, the GPUs here are 0 to 1"),
        ({"device": -1}, "there is no device -1"),
        ({"device": 2**62}, "there is no device"),
        ({"handle": b"x" * 63}, "raw_handle has 63 bytes, and a CUDA IPC handle has 64"),
        ({"handle": b""}, "raw_handle has 0 bytes"),
        ({"size_bytes": 0}, "byte_size is 0"),
        ({"size_bytes": 65}, "65 bytes are not a part of its memory, which has 64 bytes"),
        ({"size_bytes": 2**64 - 1}, "are not a part of its memory"),
        ({"handle": b"x" * HANDLE_BYTES}, r"on device 0: cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_HANDLE \(inv"),
        ({"device": 1}, "its handle cannot be opened on device 1: cuIpcOpenMemHandle_v2"),
    ],
)
def test_what_cannot_be_registered_is_refused_and_left_closed(change, text, library, driver):
    exported = library.export(64)
    how = {"handle": exported.handle, "device": 0, "size_bytes": 64, **change}
    with pytest.raises(InvalidArgument, match=f"^failed to register CUDA shared memory region: 'r': .*{text}"):
        open_region(driver, "r", **how)
    assert library.times_open == 0


def test_a_name_is_of_one_kind_and_known_once(library, driver, table, tmp_path):
    exported = library.export(64)
    with Object(8, tmp_path) as shm:
        register(table, driver, "d", exported, 64)
        with pytest.raises(AlreadyExists, match="'d' already in manager"):
            register(table, driver, "d", exported, 64)
        with pytest.raises(AlreadyExists, match="'d' already in manager"):
            table.register("d", shm.key, 0, 8)
        table.register("s", shm.key, 0, 8)
        with pytest.raises(AlreadyExists, match="'s' already in manager"):
            register(table, driver, "s", exported, 64)
        assert [region.name for region in table.select(CudaRegion)] == ["d"]
        assert [region.name for region in table.select(SystemRegion)] == ["s"]
        with pytest.raises(NotFound, match="Unable to find cuda shared memory region: 's'"):
            table.select(CudaRegion, "s")
        table.unregister(CudaRegion, "s")
        table.unregister(SystemRegion)
        assert [region.name for region in table.select(CudaRegion, "d")] == ["d"]
        assert table.select(SystemRegion) == []
    assert exported.times_open == 1


def test_both_kinds_count_for_the_bounds(library, driver, table):
    exported = library.export(2000)
    with pytest.raises(ResourceExhausted, match="1001 bytes would be registered, and 1000 may be"):
        register(table, driver, "r", exported, 1001)
    for name in "abc":
        register(table, driver, name, exported, 10)
    with pytest.raises(ResourceExhausted, match="3 are registered, and no more are taken"):
        register(table, driver, "d", exported, 10)
    table.unregister(CudaRegion)
    assert library.times_open == 0


def test_memory_is_open_until_the_last_request_is_done_with_it(library, driver, table):
    exported = library.export(64)
    window = register(table, driver, "r", exported, 64).window(0, 8)
    table.unregister(CudaRegion, "r")
    with pytest.raises(NotFound):
        table.find("r")
    window.write(b"12345678")
    assert (exported.get(0, 8), exported.times_open) == (b"12345678", 1)
    del window
    assert exported.times_open == 0


def test_what_the_driver_fails_in_is_told(library, driver, table):
    region = register(table, driver, "r", library.export(8), 8)
    library.fails = {"cuMemcpyDtoH_v2": INVALID_VALUE}
    with pytest.raises(
        Internal, match=r"'r' cannot be read: cuMemcpyDtoH_v2: CUDA_ERROR_INVALID_VALUE \(invalid_value\)"
    ):
        tensor(region.window(0, 8), 2).read()
    library.fails = {"cuStreamSynchronize": UNKNOWN}
    with pytest.raises(Internal, match=r"'r' cannot be written: cuStreamSynchronize: error 999 \(error 999\)"):
        region.window(0, 8).write(b"x")
    library.fails = {}
    region.window(0, 8).write(b"x")


def test_a_handle_whose_size_is_not_known_is_closed(library, driver):
    exported = library.export(8)
    library.fails = {"cuMemGetAddressRange_v2": INVALID_VALUE}
    with pytest.raises(InvalidArgument, match="cuMemGetAddressRange_v2"):
        open_region(driver, "r", exported.handle, 0, 8)
    assert exported.times_open == 0


def test_memory_that_cannot_be_closed_is_logged(library, driver, table, caplog):
    register(table, driver, "r", library.export(8), 8)
    library.fails = {"cuIpcCloseMemHandle": INVALID_VALUE}
    table.unregister(CudaRegion)
    (record,) = caplog.records
    assert (record.levelname, record.message) == ("WARNING", "CUDA shared memory was not closed")
    assert "CUDA_ERROR_INVALID_VALUE" in record.reason


def test_each_thread_is_left_with_the_context_that_it_had(library, driver, table):
    region = register(table, driver, "r", library.export(8, device=1), 8)
    left = []

    def use():
        region.window(0, 8).write(b"12345678")
        left.extend(library._contexts)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert left == []
    library.fails = {"cuMemcpyHtoD_v2": INVALID_VALUE}
    with pytest.raises(Internal):
        region.window(0, 8).write(b"1")
    assert library._contexts == []


@pytest.mark.parametrize(
    ("library", "text"),
    [
        (FakeCuda(devices=0), "there is no GPU"),
        (object(), "cuInit is not in the driver: it is too old"),
    ],
)
def test_a_library_without_a_gpu_is_no_driver(library, text):
    with pytest.raises(CudaError, match=text):
        LibCuda(library)


def test_this_machine_has_a_driver_or_a_reason_why_not():
    driver, reason = find_driver()
    if driver is None:
        assert LIBRARY in reason or reason.startswith("cu")
    else:
        assert driver.devices > 0
        assert not reason
