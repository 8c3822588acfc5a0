"""Shared memory with both clients on real servers of both transports, alone and in streams; and what is refused."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from drivers import WAIT_S
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sluice_client import (
    Client,
    ClientClosed,
    Internal,
    InvalidRequest,
    InvalidResponse,
    NotFound,
    SharedMemory,
    SharedTensor,
    Unavailable,
    Unimplemented,
    operations,
)
from sluice_client.shared_memory import DIRECTORY
from sluice_proto import grpc_service_pb2 as pb
from sluice_proto import tensors
from sluice_proto.errors import BytesElementCount, BytesTruncatedBody
from support import models
from support.fakes import held

pytestmark = pytest.mark.usefixtures("no_errors_logged")

A, B = np.arange(16, dtype=np.int32)[None], np.full((1, 16), 7, np.int32)
ROW_BYTES = A.nbytes


def objects() -> list[str]:
    """The shared memory objects of this process's clients that are there now."""
    return [path.name for path in DIRECTORY.glob(f"sluice-{os.getpid()}-*")]


@pytest.fixture
def nothing_left():
    """Fail when a test leaves an object behind."""
    before = objects()
    yield
    assert objects() == before


@pytest.fixture
def server(sharing_server, nothing_left):
    yield sharing_server
    assert not regions(sharing_server)


def regions(server: Any) -> dict[str, Any]:
    return dict(server.call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()).regions)


def test_inputs_and_outputs_go_by_reference_alone_and_in_a_stream(server, make_client):
    client = make_client(server.target)
    with client.shared_memory(4 * ROW_BYTES) as memory, client.stream() as stream:
        assert set(regions(server)) == {memory.name}
        first = memory.write(A)
        inputs = {"INPUT0": first, "INPUT1": memory.write(B, first.end)}
        outputs = {"OUTPUT0": memory.room(ROW_BYTES, 2 * ROW_BYTES), "OUTPUT1": memory.room(ROW_BYTES, 3 * ROW_BYTES)}
        for way in (client, stream):
            result = way.infer("simple", inputs, outputs=outputs)
            np.testing.assert_array_equal(result["OUTPUT0"], A + B)
            np.testing.assert_array_equal(result["OUTPUT1"], A - B)
            assert not result["OUTPUT0"].flags.writeable
        kept = result["OUTPUT0"].copy()
        memory.write(A * 2)
        client.infer("simple", inputs, outputs=outputs)
        np.testing.assert_array_equal(result["OUTPUT0"], A * 2 + B)
    np.testing.assert_array_equal(kept, A + B)
    # A view keeps the memory, though nothing else does.
    np.testing.assert_array_equal(result["OUTPUT0"], A * 2 + B)


def test_shared_and_inline_tensors_mix(server, make_client):
    client = make_client(server.target)
    with client.shared_memory(2 * ROW_BYTES) as memory:
        inputs = {"INPUT0": A, "INPUT1": memory.write(B)}
        outputs = {"OUTPUT1": None, "OUTPUT0": memory.room(ROW_BYTES, ROW_BYTES)}
        mixed = client.infer("simple", inputs, outputs=outputs)
        assert list(mixed) == ["OUTPUT1", "OUTPUT0"]
        np.testing.assert_array_equal(mixed["OUTPUT0"], A + B)
        np.testing.assert_array_equal(mixed["OUTPUT1"], A - B)
        named = client.infer("simple", inputs, outputs=["OUTPUT1"])
        np.testing.assert_array_equal(named["OUTPUT1"], A - B)
        assert list(named) == ["OUTPUT1"]


def test_the_server_takes_what_is_there_and_puts_its_answer_there(server, make_client):
    client = make_client(server.target)
    with client.shared_memory(2 * ROW_BYTES) as memory:
        inputs = {"INPUT0": memory.write(A), "INPUT1": memory.write(B)}  # the second over the first
        result = client.infer("simple", inputs, outputs={"OUTPUT0": memory.room(ROW_BYTES, ROW_BYTES)})
        np.testing.assert_array_equal(result["OUTPUT0"], B + B)
        assert memory.bytes_at(ROW_BYTES, ROW_BYTES) == (B + B).tobytes()


def test_many_callers_have_a_place_each(server, make_client):
    client = make_client(server.target)
    with client.shared_memory(8 * 3 * ROW_BYTES) as memory, client.stream() as stream, ThreadPoolExecutor(8) as pool:

        def ask(slot: int) -> list[int]:
            sums = []
            for number in range(slot, slot + 20):
                x = memory.write(np.full((1, 16), number, np.int32), slot * 3 * ROW_BYTES)
                y = memory.write(B, x.end)
                way = stream if number % 2 else client
                rooms = {"OUTPUT0": memory.room(ROW_BYTES, y.end)}
                sums.append(int(way.infer("simple", {"INPUT0": x, "INPUT1": y}, outputs=rooms)["OUTPUT0"][0, 3]))
            return sums

        told = list(pool.map(ask, range(8)))
    assert told == [[number + 7 for number in range(slot, slot + 20)] for slot in range(8)]


def test_bytes_go_in_wire_form_and_room_may_be_larger(server, make_client):
    client = make_client(server.target)
    texts = np.array([["abc", "é"], ["", "a long one, longer than the rest"]])
    with client.shared_memory(256) as memory:
        memory.write(np.full(256, 255, np.uint8))  # what was there before is not taken for elements
        x = memory.write(texts)
        for texts_now in (texts, texts[:1]):
            x = memory.write(texts_now)
            result = client.infer("text", {"X": x}, outputs={"Y": memory.room(100, 128)})
            expected = [[text.encode() for text in row] for row in texts_now]
            assert result["Y"].tolist() == expected
        with pytest.raises(Internal, match=r"specified with the request for output 'Y' \(8 bytes\) should be at least"):
            client.infer("text", {"X": x}, outputs={"Y": memory.room(8, 128)})


@pytest.mark.parametrize("shape", [(2, 8), (0, 3), (1, 1)])
def test_shapes_of_any_size_with_no_elements_too(server, make_client, shape):
    client = make_client(server.target)
    array = np.random.default_rng(1).random(shape, np.float32)
    with client.shared_memory(128) as memory:
        result = client.infer("any", {"X": memory.write(array)}, outputs={"Y": memory.room(array.nbytes, 64)})
        np.testing.assert_array_equal(result["Y"], array)


def test_a_server_that_shares_no_memory_says_what_to_do(start_server, repository, make_client, nothing_left):
    models.write_model(repository, "echo", models.identity())
    server = start_server(repository, http=None, metrics=None)
    manager = make_client(server.target).shared_memory(64)
    with pytest.raises(Unimplemented, match="shared memory is off on this server: start it with --allow-client-shm"):
        manager.__enter__()


def test_a_server_that_is_not_there_is_unavailable(make_client, dead_address, nothing_left):
    with pytest.raises(Unavailable):
        make_client(dead_address).shared_memory(64).__enter__()


def test_an_exception_in_the_block_ends_the_region_too(server, make_client):
    with pytest.raises(ZeroDivisionError), make_client(server.target).shared_memory(64):
        raise ZeroDivisionError


def test_a_client_that_was_closed_in_the_block_leaves_no_object_behind(sharing_server, nothing_left):
    client = Client(sharing_server.target)
    manager = client.shared_memory(64)
    manager.__enter__()
    client.close()
    with pytest.raises(ClientClosed):
        manager.__exit__(None, None, None)
    (name,) = regions(sharing_server)
    sharing_server.call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name=name))


def test_memory_that_was_closed_is_refused_here(server, make_client):
    client = make_client(server.target)
    with client.shared_memory(4 * ROW_BYTES) as memory:
        x, room = memory.write(A), memory.room(ROW_BYTES)
    assert repr(memory).endswith("; closed>")
    for use in (
        lambda: memory.write(A),
        lambda: memory.room(1),
        lambda: client.infer("simple", {"INPUT0": x, "INPUT1": B}),
        lambda: client.infer("simple", {"INPUT0": A, "INPUT1": B}, outputs={"OUTPUT0": room}),
    ):
        with pytest.raises(InvalidRequest, match="was closed; a request cannot use it any more"):
            use()
    memory.close()


def test_an_answer_whose_memory_is_closed_by_then_is_an_error(server, make_client):
    client = make_client(server.target)
    with held(server.model("simple")) as session, ThreadPoolExecutor(1) as pool, client.stream() as stream:
        with client.shared_memory(ROW_BYTES) as memory:
            outputs = {"OUTPUT0": memory.room(ROW_BYTES)}
            call = pool.submit(stream.infer, "simple", {"INPUT0": A, "INPUT1": B}, outputs=outputs)
            session.wait_for_runs(1)
        session.release()
        with pytest.raises(NotFound, match="has vanished"):
            call.result(WAIT_S)


def test_requests_go_where_their_memory_is_known(server, start_server, repository, make_client):
    models.write_model(repository, "simple", models.sum_and_difference(), max_batch_size=8)
    other = start_server(repository, allow_client_shm=True, http=None, metrics=None)
    client = make_client([other.target, server.target])
    with pytest.raises(InvalidRequest, match="2 endpoints, and this call changes one server: say which with endpoint="):
        client.shared_memory(64).__enter__()
    with client.shared_memory(ROW_BYTES, endpoint=server.target) as memory:
        inputs = {"INPUT0": memory.write(A), "INPUT1": B}
        assert {client.infer("simple", inputs).timing.endpoint for _ in range(4)} == {server.target}
        elsewhere = f"registered at {server.target}, and the request would go to {other.target}"
        with pytest.raises(InvalidRequest, match=elsewhere):
            client.infer("simple", inputs, endpoint=other.target)
        with client.stream(endpoint=other.target) as stream, pytest.raises(InvalidRequest, match=elsewhere):
            stream.infer("simple", inputs)
        with client.shared_memory(ROW_BYTES, endpoint=other.target) as second:
            inputs["INPUT1"] = second.write(B)
            with pytest.raises(InvalidRequest, match=r"registered at several servers, .*; one has to know all"):
                client.infer("simple", inputs)


@pytest.mark.parametrize(
    ("use", "problem"),
    [
        (lambda m: m.write([1.0]), "shared memory takes numpy arrays, got list"),
        (lambda m: m.write(np.ones(1, np.complex64)), "an array for shared memory: arrays of complex64"),
        (lambda m: m.write(np.zeros(65, np.uint8)), "65 bytes from offset 0 on do not fit into shared memory of 64"),
        (lambda m: m.write(np.zeros(8, np.uint8), 57), "8 bytes from offset 57 on do not fit"),
        (lambda m: m.write(np.zeros(8, np.uint8), -1), "an offset in shared memory is a whole number .*, got -1"),
        (lambda m: m.room(65), "65 bytes from offset 0 on do not fit"),
        (lambda m: m.room(True), "a size in shared memory is a whole number .*, got True"),
        (lambda m: m.room(4, 1.0), "an offset in shared memory is a whole number .*, got 1.0"),
    ],
)
def test_what_does_not_fit_is_refused_here(nothing_left, use, problem):
    with SharedMemory(64, "here:1") as memory, pytest.raises(InvalidRequest, match=problem):
        use(memory)


@pytest.mark.parametrize(
    ("size_bytes", "problem"),
    [
        (0, "the size of shared memory is a whole number of bytes, at least 1, got 0"),
        ("64", "the size of shared memory is a whole number of bytes, at least 1, got '64'"),
        (2**62, f"shared memory of {2**62} bytes cannot be made in /dev/shm: "),
        (2**64, f"shared memory of {2**64} bytes cannot be made in /dev/shm: "),
    ],
)
def test_a_size_that_the_system_has_not_is_refused(nothing_left, size_bytes, problem):
    with pytest.raises(InvalidRequest, match=problem):
        SharedMemory(size_bytes, "here:1")


def test_a_system_without_such_memory_says_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"cannot be made in .*nowhere: No such file or directory"):
        SharedMemory(64, "here:1", tmp_path / "nowhere")


def test_an_output_goes_to_a_room_or_into_the_answer():
    with pytest.raises(InvalidRequest, match="output 'Y': None or a SharedRoom says where it is to go, got int"):
        operations.infer("m", {}, outputs={"Y": 3})


FIXED = [np.bool_, np.uint8, np.int16, np.uint32, np.int64, np.float16, np.float32, np.float64, ml_dtypes.bfloat16]
ARRAYS = st.one_of(
    st.sampled_from(FIXED[:-1]).flatmap(lambda t: hnp.arrays(t, hnp.array_shapes(min_dims=0, min_side=0))),
    hnp.arrays(np.int16, hnp.array_shapes()).map(lambda array: array.astype(ml_dtypes.bfloat16)),
    st.lists(st.binary(max_size=5), max_size=5).map(lambda texts: np.array(texts, object)),
)


@given(arrays=st.lists(ARRAYS, max_size=4), gap=st.integers(0, 5))
def test_arrays_are_read_as_they_were_written_at_any_offset(arrays, gap):
    with SharedMemory(65_536, "here:1") as memory:
        memory.write(np.full(65_536, 255, np.uint8))
        placed: list[SharedTensor] = []
        offset = gap
        for array in arrays:
            placed.append(memory.write(array, offset))
            offset = placed[-1].end + gap
        for array, tensor in zip(arrays, placed, strict=True):
            dtype = tensors.BY_NAME[tensor.datatype]
            room = memory.room(tensor.size_bytes + gap, tensor.offset)
            back = room.read(dtype, tensor.shape)
            assert back.shape == array.shape
            assert back.tolist() == array.tolist() if dtype.name == "BYTES" else back.tobytes() == array.tobytes()
            assert room.end == tensor.end + gap


def test_an_answer_about_more_than_there_is_room_for_breaks_the_protocol():
    text = tensors.BY_NAME["BYTES"]
    with SharedMemory(64, "here:1") as memory:
        with pytest.raises(InvalidResponse, match=r"FP32 \[3\] takes 12 bytes, .* has 8"):
            memory.room(8).read(tensors.BY_NAME["FP32"], (3,))
        with pytest.raises(BytesElementCount):
            memory.room(8).read(text, (3,))
        memory.write(np.array([100], np.uint32))
        with pytest.raises(BytesTruncatedBody):
            memory.room(8).read(text, (1,))


def test_a_server_that_ignores_shared_memory_is_understood_all_the_same():
    answer = pb.ModelInferResponse(model_name="m", raw_output_contents=[A.tobytes()])
    answer.outputs.add(name="Y", datatype="INT32", shape=A.shape)
    with SharedMemory(ROW_BYTES, "here:1") as memory:
        outputs = operations.outputs_of(answer, {"Y": memory.room(ROW_BYTES)})
        np.testing.assert_array_equal(outputs["Y"], A)
        answer.raw_output_contents.pop()
        assert not operations.outputs_of(answer, {"Y": memory.room(ROW_BYTES)})["Y"].any()
