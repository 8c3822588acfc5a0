"""tritonclient's shared memory utilities as they are, with all four of its clients, and with streams."""

from __future__ import annotations

import asyncio
import queue
import uuid
from contextlib import contextmanager

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio
from tritonclient.utils import InferenceServerException, serialize_byte_tensor, shared_memory

from support import models
from support.fakes import PATIENCE_S

pytestmark = pytest.mark.usefixtures("no_errors_logged")

SHAPE = (3, 16)
A = np.arange(48, dtype=np.int32).reshape(SHAPE)
B = np.full(SHAPE, 7, np.int32)
SIZE_BYTES = A.nbytes


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    path = tmp_path_factory.mktemp("models")
    models.write_model(path, "simple", models.sum_and_difference(), max_batch_size=8)
    models.write_model(path, "text", models.identity("BYTES", ("N", 2)), max_batch_size=8)
    return path


@pytest.fixture
def server(start_server, repository):
    return start_server(repository, allow_client_shm=True, metrics=None)


@pytest.fixture
def client(server):
    with triton.InferenceServerClient(server.target) as made:
        yield made


@contextmanager
def created(name, size_bytes):
    """A region of the client's own; its key is in `_shm_key`."""
    handle = shared_memory.create_shared_memory_region(name, f"/sluice-test-{uuid.uuid4().hex}", size_bytes)
    try:
        yield handle
    finally:
        shared_memory.destroy_shared_memory_region(handle)


@pytest.fixture
def handles():
    """A region of the two inputs, and one for the two outputs."""
    with created("in", 2 * SIZE_BYTES) as inputs, created("out", 2 * SIZE_BYTES) as outputs:
        shared_memory.set_shared_memory_region(inputs, [A, B])
        yield inputs, outputs


def registrations(handles):
    """The arguments of `register_system_shared_memory`."""
    return [(name, handle._shm_key, 2 * SIZE_BYTES) for name, handle in zip(("in", "out"), handles, strict=True)]


def arguments(library=triton):
    inputs = [library.InferInput(name, list(SHAPE), "INT32") for name in ("INPUT0", "INPUT1")]
    outputs = [library.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
    for place, (tensor, output) in enumerate(zip(inputs, outputs, strict=True)):
        tensor.set_shared_memory("in", SIZE_BYTES, offset=place * SIZE_BYTES)
        output.set_shared_memory("out", SIZE_BYTES, offset=place * SIZE_BYTES)
    return {"model_name": "simple", "inputs": inputs, "outputs": outputs}


def check_region(handle):
    """The outputs are in the region, which is zeros from then on."""
    for expected, place in ((A + B, 0), (A - B, 1)):
        got = shared_memory.get_contents_as_numpy(handle, np.int32, SHAPE, offset=place * SIZE_BYTES).copy()
        np.testing.assert_array_equal(got, expected)
    shared_memory.set_shared_memory_region(handle, [np.zeros_like(A), np.zeros_like(B)])


def check(handle, result):
    """The outputs are in the region, and not in the answer, which says what they are."""
    check_region(handle)
    for name in ("OUTPUT0", "OUTPUT1"):
        described = result.get_output(name)
        assert (list(described.shape), described.datatype) == (list(SHAPE), "INT32")
    assert not any(result.get_response().raw_output_contents)


def check_json(handle, result):
    """The same of an answer over HTTP."""
    check_region(handle)
    assert [
        (each["name"], each["shape"], each["datatype"], "data" in each) for each in result.get_response()["outputs"]
    ] == [(name, list(SHAPE), "INT32", False) for name in ("OUTPUT0", "OUTPUT1")]


def test_the_blocking_client_shares_memory(client, handles):
    client.unregister_system_shared_memory()
    for registration in registrations(handles):
        client.register_system_shared_memory(*registration)
    status = client.get_system_shared_memory_status(as_json=True)
    assert {name: (each["key"], each["byte_size"]) for name, each in status["regions"].items()} == {
        name: (key, str(size_bytes)) for name, key, size_bytes in registrations(handles)
    }
    check(handles[1], client.infer(**arguments()))
    answers: queue.SimpleQueue = queue.SimpleQueue()
    client.async_infer(**arguments(), callback=lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=PATIENCE_S)
    assert error is None
    check(handles[1], result)
    client.unregister_system_shared_memory("in")
    assert list(client.get_system_shared_memory_status().regions) == ["out"]
    with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'in'") as caught:
        client.infer(**arguments())
    assert caught.value.status() == "StatusCode.NOT_FOUND"
    client.unregister_system_shared_memory()
    assert not client.get_system_shared_memory_status().regions


def test_a_stream_of_the_blocking_client_shares_memory(client, handles):
    for registration in registrations(handles):
        client.register_system_shared_memory(*registration)
    answers: queue.SimpleQueue = queue.SimpleQueue()
    client.start_stream(lambda result, error: answers.put((result, error)))
    for number in range(20):
        client.async_stream_infer(**arguments(), request_id=str(number))
    client.stop_stream()
    told = [answers.get(timeout=PATIENCE_S) for _ in range(20)]
    assert [error for _, error in told] == [None] * 20
    assert [result.get_response().id for result, _ in told] == [str(number) for number in range(20)]
    check(handles[1], told[-1][0])


def test_the_asyncio_client_shares_memory(server, handles):
    async def talk():
        async with triton_aio.InferenceServerClient(server.target) as client:
            for registration in registrations(handles):
                await client.register_system_shared_memory(*registration)
            assert set((await client.get_system_shared_memory_status()).regions) == {"in", "out"}
            check(handles[1], await client.infer(**arguments()))

            async def requests():
                for number in range(20):
                    yield {**arguments(), "request_id": str(number)}

            told = [answer async for answer in client.stream_infer(requests())]
            assert [(result.get_response().id, error) for result, error in told] == [(str(n), None) for n in range(20)]
            check(handles[1], told[-1][0])
            await client.unregister_system_shared_memory()
            assert not (await client.get_system_shared_memory_status()).regions

    asyncio.run(talk())


def test_the_blocking_http_client_shares_memory(server, handles):
    with triton_http.InferenceServerClient(f"127.0.0.1:{server.server.http_port}") as client:
        for registration in registrations(handles):
            client.register_system_shared_memory(*registration)
        assert client.get_system_shared_memory_status("in") == [
            {"name": "in", "key": handles[0]._shm_key, "offset": 0, "byte_size": 2 * SIZE_BYTES}
        ]
        check_json(handles[1], client.infer(**arguments(triton_http)))
        client.unregister_system_shared_memory("in")
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'in'") as caught:
            client.infer(**arguments(triton_http))
        assert caught.value.status() == "404"
        client.unregister_system_shared_memory()
        assert client.get_system_shared_memory_status() == []
        assert client.get_cuda_shared_memory_status() == []


def test_the_asyncio_http_client_shares_memory(server, handles):
    async def talk():
        async with triton_http_aio.InferenceServerClient(f"127.0.0.1:{server.server.http_port}") as client:
            for registration in registrations(handles):
                await client.register_system_shared_memory(*registration)
            assert {each["name"] for each in await client.get_system_shared_memory_status()} == {"in", "out"}
            check_json(handles[1], await client.infer(**arguments(triton_http)))
            await client.unregister_system_shared_memory()
            assert await client.get_system_shared_memory_status() == []

    asyncio.run(talk())


def test_bytes_come_and_go_in_shared_memory(client):
    text = np.array([[b"some", b"text"], [b"", b"with a \0"]], np.object_)
    serialized = serialize_byte_tensor(text)
    size_bytes = len(serialized.item())
    with created("words", 2 * size_bytes) as handle:
        shared_memory.set_shared_memory_region(handle, [serialized])
        client.register_system_shared_memory("words", handle._shm_key, 2 * size_bytes)
        tensor, output = triton.InferInput("X", [2, 2], "BYTES"), triton.InferRequestedOutput("Y")
        tensor.set_shared_memory("words", size_bytes)
        output.set_shared_memory("words", size_bytes, offset=size_bytes)
        client.infer("text", [tensor], outputs=[output])
        got = shared_memory.get_contents_as_numpy(handle, np.object_, [2, 2], offset=size_bytes)
        np.testing.assert_array_equal(got, text)


def test_a_region_that_the_client_destroys_before_it_is_unregistered_is_an_error(client):
    with created("in", 2 * SIZE_BYTES) as gone:
        client.register_system_shared_memory("in", gone._shm_key, 2 * SIZE_BYTES)
        client.register_system_shared_memory("out", gone._shm_key, 2 * SIZE_BYTES)
    with pytest.raises(InferenceServerException, match="'in' has vanished") as caught:
        client.infer(**arguments())
    assert caught.value.status() == "StatusCode.NOT_FOUND"


def test_a_gpus_memory_is_refused(client):
    assert not client.get_cuda_shared_memory_status().regions
    client.unregister_cuda_shared_memory()
    with pytest.raises(InferenceServerException, match="GPUs not supported"):
        client.register_cuda_shared_memory("c", b"x" * 64, 0, 64)
