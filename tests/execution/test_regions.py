"""Regions of shared memory: what is registered, read and written, and that a client who cuts or removes its object is
told so."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice_proto.tensors import BY_NAME
from sluice_server.errors import AlreadyExists, Internal, InvalidArgument, NotFound, ResourceExhausted
from sluice_server.execution.shared_memory import (
    NAME_BYTES_MAX,
    RegionTable,
    SharedTensor,
    SharedTensors,
    SystemRegion,
    Window,
    gather,
    write_outputs,
)
from support.shared_memory import Object

FP32, BYTES = BY_NAME["FP32"], BY_NAME["BYTES"]


@pytest.fixture
def shm(tmp_path):
    with Object(64, tmp_path) as made:
        made.put(np.arange(16, dtype=np.float32))
        yield made


@pytest.fixture
def table(tmp_path) -> RegionTable:
    return RegionTable(tmp_path, regions_max=3, registered_bytes_max=100)


@pytest.fixture
def region(table, shm):
    """The object without its first 16 bytes."""
    table.register("r", shm.key, 16, 48)
    return table.find("r")


def refuse(error):
    return InvalidArgument(f"refused: {error}")


def tensor(window, *shape: int, dtype=FP32) -> SharedTensor:
    return SharedTensor(window, dtype, shape, refuse)


def test_a_region_is_entered_found_listed_and_forgotten(table, shm):
    table.register("a", shm.key, 0, 64)
    table.register("b", shm.key.removeprefix("/"), 60, 4)
    assert [(region.name, region.offset, region.size_bytes) for region in table.select(SystemRegion)] == [
        ("a", 0, 64),
        ("b", 60, 4),
    ]
    assert table.select(SystemRegion, "b") == [table.find("b")]
    table.unregister(SystemRegion, "a")
    table.unregister(SystemRegion, "a")
    assert [region.name for region in table.select(SystemRegion)] == ["b"]
    table.unregister(SystemRegion)
    assert table.select(SystemRegion) == []
    with pytest.raises(NotFound, match="Unable to find shared memory region: 'a'"):
        table.find("a")
    with pytest.raises(NotFound, match="Unable to find system shared memory region: 'a'"):
        table.select(SystemRegion, "a")


@pytest.mark.parametrize(
    "key",
    [
        "",
        "/",
        "///",
        "/a/b",
        "a/b",
        "../x",
        "/..",
        ".",
        "/.",
        "/../etc/passwd",
        "/a\0b",
        "\0",
        "/" + "x" * 256,
        "ä" * 128,
    ],
)
def test_a_key_that_is_no_name_of_an_object_is_refused(table, key):
    with pytest.raises(InvalidArgument, match="is no name of a shared memory object"):
        table.register("r", key, 0, 4)


@pytest.mark.parametrize("name", ["", "x" * (NAME_BYTES_MAX + 1), "ä" * (NAME_BYTES_MAX // 2 + 1)])
def test_a_region_has_a_name_of_bounded_length(table, shm, name):
    with pytest.raises(InvalidArgument, match="failed to register"):
        table.register(name, shm.key, 0, 4)


@given(key=st.text(st.sampled_from("/.a\0\\~ ä") | st.characters(codec="utf-8"), max_size=300))
@settings(max_examples=300)
def test_no_key_leads_out_of_the_directory(key, tmp_path_factory):
    directory = tmp_path_factory.getbasetemp() / "keys" / "inner"
    directory.mkdir(parents=True, exist_ok=True)
    (directory.parent / "a").write_bytes(b"outside")
    with pytest.raises((InvalidArgument, Internal), match="Unable to open shared memory region"):
        RegionTable(directory).register("r", key, 0, 1)


def test_what_is_no_object_is_not_opened(table, tmp_path, shm):
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(shm.path)
    for key, reason in {
        "/nothing": os.strerror(errno.ENOENT),
        "/directory": os.strerror(errno.EISDIR),
        "/pipe": "it is no shared memory object",
        "/link": os.strerror(errno.ELOOP),
    }.items():
        with pytest.raises(Internal, match=f"Unable to open shared memory region: '{key}': {reason}"):
            table.register("r", key, 0, 4)


@pytest.mark.parametrize(
    ("offset", "size_bytes"), [(0, 65), (64, 1), (1, 64), (0, 0), (64, 0), (1 << 63, 8), (8, 1 << 63), (1 << 64, 1)]
)
def test_a_range_that_is_not_in_the_object_is_refused(tmp_path, shm, offset, size_bytes):
    table = RegionTable(tmp_path, registered_bytes_max=1 << 70)
    with pytest.raises(
        InvalidArgument, match=f"failed to register shared memory region 'r': invalid args: {size_bytes}"
    ):
        table.register("r", shm.key, offset, size_bytes)
    assert table.select(SystemRegion) == []
    assert shm.times_open() == 0


def test_regions_and_their_bytes_are_bounded(table, shm):
    table.register("a", shm.key, 0, 40)
    with pytest.raises(AlreadyExists, match="shared memory region 'a' already in manager"):
        table.register("a", "/nothing", 0, 0)
    with pytest.raises(ResourceExhausted, match="with it 101 bytes would be registered, and 100 may be"):
        table.register("b", shm.key, 0, 61)
    table.register("b", shm.key, 0, 1)
    table.register("c", shm.key, 0, 1)
    with pytest.raises(ResourceExhausted, match="3 are registered"):
        table.register("d", shm.key, 0, 1)
    table.unregister(SystemRegion, "b")
    table.register("d", shm.key, 0, 1)


def test_a_tensor_is_read_where_it_is(region):
    read = tensor(region.window(8, 16), 2, 2).read()
    np.testing.assert_array_equal(read, [[6, 7], [8, 9]])
    assert read.dtype == np.float32
    assert tensor(region.window(8, 4)).read().shape == ()
    assert tensor(region.window(47, 0), 0, 3).read().shape == (0, 3)


@pytest.mark.parametrize("name", [name for name, dtype in BY_NAME.items() if dtype.itemsize])
def test_every_type_of_a_fixed_size_is_read_bit_for_bit(name, region, shm):
    read = tensor(region.window(0, 48), 48 // BY_NAME[name].itemsize, dtype=BY_NAME[name]).read()
    assert read.dtype == BY_NAME[name].numpy
    assert read.tobytes() == shm.get(16)


def test_rows_of_a_batch_are_read_behind_each_other(region):
    batch = [
        SharedTensors({"X": tensor(region.window(offset, 4 * rows), rows, 1)}, {})
        for offset, rows in ((4, 2), (0, 1), (40, 2))
    ]
    np.testing.assert_array_equal(gather("X", batch), [[5], [6], [4], [14], [15]])
    np.testing.assert_array_equal(gather("X", batch[:1]), [[5], [6]])
    assert [each.input_bytes for each in batch] == [8, 4, 8]


def test_bytes_are_read_as_elements(region, shm):
    shm.put(b"\3\0\0\0a\0b\0\0\0\0", 16)
    read = tensor(region.window(0, 11), 2, dtype=BYTES).read()
    assert read.tolist() == [b"a\0b", b""]
    batch = [SharedTensors({"X": tensor(region.window(0, 11), 2, dtype=BYTES)}, {})] * 2
    assert gather("X", batch).tolist() == [b"a\0b", b""] * 2
    with pytest.raises(InvalidArgument, match=r"refused: .*2"):
        tensor(region.window(0, 11), 3, dtype=BYTES).read()
    with pytest.raises(InvalidArgument, match="refused: "):
        tensor(region.window(0, 5), 1, dtype=BYTES).read()


@pytest.mark.parametrize(("offset", "size_bytes"), [(48, 0), (48, 1), (1 << 63, 1)])
def test_an_offset_behind_the_region_is_refused(region, offset, size_bytes):
    with pytest.raises(InvalidArgument, match="Invalid offset for shared memory region: 'r'"):
        region.window(offset, size_bytes)


@pytest.mark.parametrize(("offset", "size_bytes"), [(0, 49), (47, 2), (1, 1 << 63)])
def test_a_size_beyond_the_region_is_refused(region, offset, size_bytes):
    with pytest.raises(InvalidArgument, match=r"Invalid offset \+ byte size for shared memory region: 'r'"):
        region.window(offset, size_bytes)


@pytest.mark.parametrize("left_bytes", [0, 16, 63])
def test_an_object_that_was_cut_is_neither_read_nor_written_nor_made_larger(region, shm, left_bytes):
    window = region.window(0, 48)
    shm.cut(left_bytes)
    for touch in (
        lambda: region.window(0, 48),
        lambda: tensor(window, 12).read(),
        lambda: window.write(b"x" * 48),
        lambda: write_outputs({"Y": window}, {"Y": b"x" * 48}),
    ):
        with pytest.raises(InvalidArgument, match=f"'r'.* was cut and ends at byte {left_bytes} now"):
            touch()
    assert len(shm.get()) == left_bytes


def test_what_is_left_of_an_object_that_was_cut_is_of_use(region, shm):
    shm.cut(32)
    np.testing.assert_array_equal(tensor(region.window(0, 16), 4).read(), [4, 5, 6, 7])
    region.window(8, 8).write(b"12345678")
    assert shm.get(24) == b"12345678"


def test_an_object_that_is_cut_between_the_look_and_the_read_is_a_short_read(region, shm):
    """`check` is passed here, as it was in time; then it is up to what `preadv` gives."""

    class Late(Window):
        def check(self, size_bytes):
            super().check(size_bytes)
            shm.cut(20)

    with pytest.raises(InvalidArgument, match="was cut and ends at byte 20 now"):
        Late(*region.window(0, 48)).read_into(np.empty(48, np.uint8))


def test_an_object_that_was_removed_is_an_error_even_when_there_is_a_new_one_of_its_name(region, shm):
    window = region.window(0, 48)
    shm.unlink()
    for again in (False, True):
        if again:
            shm.path.write_bytes(b"new" * 100)
        for touch in (lambda: region.window(0, 4), lambda: tensor(window, 12).read(), lambda: window.write(b"x" * 48)):
            with pytest.raises(
                NotFound, match=r"Unable to find shared memory region: 'r' has vanished.* register it again"
            ):
                touch()
    assert shm.get() == b"new" * 100


def test_an_object_is_open_until_nobody_needs_it(table, shm):
    table.register("r", shm.key, 16, 48)
    assert shm.times_open() == 1
    window = table.find("r").window(0, 4)
    table.unregister(SystemRegion, "r")
    table.register("r", shm.key, 0, 4)
    assert shm.times_open() == 2
    np.testing.assert_array_equal(tensor(window, 1).read(), [4])
    del window
    assert shm.times_open() == 1
    table.unregister(SystemRegion)
    assert shm.times_open() == 0


def test_outputs_are_written_at_the_start_of_their_windows(region, shm):
    before = shm.get()
    write_outputs(
        {"A": region.window(4, 20), "B": region.window(24, 4)}, {"A": b"aaaa", "B": np.arange(4, dtype=np.uint8)}
    )
    assert shm.get() == before[:20] + b"aaaa" + before[24:40] + b"\0\1\2\3" + before[44:]


def test_an_output_that_does_not_fit_leaves_all_of_them_unwritten(region, shm):
    before = shm.get()
    with pytest.raises(Internal, match=r"output 'B' \(3 bytes\) should be at least 4 bytes to hold the results"):
        write_outputs({"A": region.window(4, 4), "B": region.window(8, 3)}, {"A": b"aaaa", "B": b"bbbb"})
    assert shm.get() == before


@pytest.mark.parametrize("places", [(0, 0), (0, 3), (3, 0)])
def test_outputs_that_overlap_leave_all_of_them_unwritten_whatever_their_regions_are_called(table, region, shm, places):
    table.register("same", shm.key, 0, 40)
    before = shm.get()
    windows = {"A": region.window(places[0], 8), "B": table.find("same").window(16 + places[1], 8)}
    with pytest.raises(InvalidArgument, match=r"outputs '[AB]' and '[AB]' overlap in shared memory"):
        write_outputs(windows, {"A": b"aaaa", "B": b"bbbb"})
    assert shm.get() == before


def test_only_what_is_written_can_overlap(region, shm):
    write_outputs({"A": region.window(0, 48), "B": region.window(4, 8), "C": region.window(5, 1)},
                  {"A": b"aaaa", "B": b"bb", "C": b""})  # fmt: skip
    assert shm.get(16, 6) == b"aaaabb"


REGISTER = """
import os, sys
from sluice_server.execution.shared_memory import RegionTable
if os.geteuid() == 0:  # whom no file is denied
    os.setuid(65534)
try:
    RegionTable().register("r", sys.argv[1], 0, 4)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_an_object_that_the_server_may_not_open_is_an_error():
    with Object(64) as shm:
        shm.path.chmod(0)
        done = subprocess.run([sys.executable, "-c", REGISTER, shm.key], capture_output=True, text=True, check=False)
        reason = os.strerror(errno.EACCES)
        assert done.stdout == f"Internal Unable to open shared memory region: '{shm.key}': {reason}\n", done.stderr
