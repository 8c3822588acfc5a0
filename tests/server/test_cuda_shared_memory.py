"""CUDA shared memory of served models: over gRPC and REST with tritonclient, on a GPU or on the driver's functions."""

from __future__ import annotations

import base64
import subprocess
import sys

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton_grpc
import tritonclient.http as triton_http
from tritonclient.utils import InferenceServerException

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.execution.cuda_driver import LibCuda, find_driver
from support import models
from support.cuda import FakeCuda
from support.requests import infer_request
from support.server import LOOPBACK
from support.shared_memory import Object, put_into_region

A = np.arange(16, dtype=np.int32)[None]
B = np.ones((1, 16), np.int32)
SIZE = A.nbytes

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture
def library():
    return FakeCuda()


@pytest.fixture
def server(start_server, repository, library):
    models.write_model(repository, "simple", models.sum_and_difference(), max_batch_size=8)
    models.write_model(repository, "text", models.identity("BYTES", ("N", 2)), max_batch_size=8)
    driver = LibCuda(library)
    return start_server(repository, allow_client_shm=True, metrics=None, find_cuda=lambda: (driver, ""))


@pytest.fixture(params=["grpc", "http"])
def client(request, server):
    """tritonclient over either protocol, and the module of its tensors."""
    module, url = {
        "grpc": (triton_grpc, server.target),
        "http": (triton_http, f"{LOOPBACK}:{server.server.http_port}"),
    }[request.param]
    with module.InferenceServerClient(url) as client:
        yield client, module


def handle_of(exported):
    """As tritonclient's get_raw_handle gives it."""
    return base64.b64encode(exported.handle)


def status_of(client, name=""):
    """The regions by their names, whatever form they come in."""
    found = client.get_cuda_shared_memory_status(name)
    if isinstance(found, list):
        return {region["name"]: (region["device_id"], region["byte_size"]) for region in found}
    return {key: (region.device_id, region.byte_size) for key, region in found.regions.items()}


def shared_inputs(module, region):
    tensors = [module.InferInput(name, A.shape, "INT32") for name in ("INPUT0", "INPUT1")]
    for index, tensor in enumerate(tensors):
        tensor.set_shared_memory(region, SIZE, offset=index * SIZE)
    return tensors


def test_tensors_are_taken_from_a_gpu_and_put_there(client, library):
    client, module = client
    there, back = library.export(2 * SIZE, device=1), library.export(4 * SIZE, offset=SIZE)
    there.put(np.concatenate([A, B]).tobytes())
    client.register_cuda_shared_memory("in", handle_of(there), 1, 2 * SIZE)
    client.register_cuda_shared_memory("out", handle_of(back), 0, 2 * SIZE)
    assert status_of(client) == {"in": (1, 2 * SIZE), "out": (0, 2 * SIZE)}
    assert status_of(client, "in") == {"in": (1, 2 * SIZE)}
    outputs = [module.InferRequestedOutput("OUTPUT0"), module.InferRequestedOutput("OUTPUT1")]
    outputs[0].set_shared_memory("out", SIZE, offset=SIZE)
    answer = client.infer("simple", shared_inputs(module, "in"), outputs=outputs)
    assert back.get(SIZE, SIZE) == (A + B).tobytes()
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT1"), A - B)
    client.unregister_cuda_shared_memory("in")
    assert (there.times_open, status_of(client)) == (0, {"out": (0, 2 * SIZE)})
    with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'in'"):
        client.infer("simple", shared_inputs(module, "in"))
    client.unregister_cuda_shared_memory()
    assert library.times_open == 0


@pytest.mark.parametrize(
    ("device", "size_bytes", "text"),
    [
        (0, 65, "65 bytes are not a part of its memory"),
        (2, 64, "there is no device 2"),
        (1, 64, "cannot be opened on device 1: cuIpcOpenMemHandle_v2: CUDA_ERROR_INVALID_HANDLE"),
    ],
)
def test_what_cannot_be_registered_is_refused(device, size_bytes, text, client, library):
    client, _ = client
    exported = library.export(64)
    with pytest.raises(InferenceServerException, match=text) as refused:
        client.register_cuda_shared_memory("r", handle_of(exported), device, size_bytes)
    assert refused.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert (status_of(client), library.times_open) == ({}, 0)


def test_a_handle_of_another_size_and_a_known_name_are_refused(client, library):
    client, _ = client
    with pytest.raises(InferenceServerException, match="raw_handle has 6 bytes, and a CUDA IPC handle has 64"):
        client.register_cuda_shared_memory("r", base64.b64encode(b"handle"), 0, 64)
    exported = library.export(64)
    client.register_cuda_shared_memory("r", handle_of(exported), 0, 64)
    with pytest.raises(InferenceServerException, match="shared memory region 'r' already in manager"):
        client.register_cuda_shared_memory("r", handle_of(exported), 0, 64)
    with pytest.raises(InferenceServerException, match="Unable to find cuda shared memory region: 's'"):
        status_of(client, "s")
    assert status_of(client) == {"r": (0, 64)}


def test_text_and_both_kinds_of_memory_in_one_request(server, library):
    data = b"\1\0\0\0a\2\0\0\0bc"
    exported = library.export(64)
    exported.put(data)
    register = pb.CudaSharedMemoryRegisterRequest(name="gpu", raw_handle=exported.handle, byte_size=64)
    server.call("CudaSharedMemoryRegister", register)
    with Object(64) as shm:
        server.call("SystemSharedMemoryRegister", shm.registration("system"))
        message = infer_request("text", {"X": np.array([[b"a", b"bc"]], object)}, outputs=["Y"])
        del message.raw_input_contents[:]
        put_into_region(message.inputs[0], "gpu", len(data))
        put_into_region(message.outputs[0], "system", 64)
        server.infer(message)
        assert shm.get(0, len(data)) == data
        put_into_region(message.outputs[0], "gpu", 5, offset=20)
        code, details = server.refusal("ModelInfer", message)
        assert code is grpc.StatusCode.INTERNAL
        assert "should be at least 11 bytes to hold the results" in details
        server.call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest())
    assert exported.get(20) == bytes(44)
    assert exported.times_open == 1


def test_the_extension_is_told_of_where_there_is_a_gpu(server, start_server, repository):
    def extensions_of(server):
        return list(server.call("ServerMetadata", pb.ServerMetadataRequest()).extensions)

    assert "cuda_shared_memory" in extensions_of(server)
    without = start_server(repository, allow_client_shm=True, metrics=None, find_cuda=lambda: (None, "no driver"))
    assert "cuda_shared_memory" not in extensions_of(without)
    message = pb.CudaSharedMemoryRegisterRequest(name="c", raw_handle=bytes(64), byte_size=64)
    code, details = without.refusal("CudaSharedMemoryRegister", message)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "'c', GPUs not supported" in details
    assert "(no driver)" in details


def test_no_driver_is_looked_for_where_memory_is_not_shared(start_server, repository):
    def fail():
        raise AssertionError("nobody may ask")

    server = start_server(repository, http=None, metrics=None, find_cuda=fail)
    refusal = server.refusal("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest())
    assert refusal[0] is grpc.StatusCode.UNIMPLEMENTED


CLIENT = """
import ctypes, sys
cuda = ctypes.CDLL("libcuda.so.1")
def call(name, *arguments):
    code = getattr(cuda, name)(*arguments)
    assert not code, (name, code)
size, value = 128, ctypes.c_int()
context, pointer, handle = ctypes.c_void_p(), ctypes.c_uint64(), (ctypes.c_ubyte * 64)()
call("cuInit", 0)
call("cuDeviceGet", ctypes.byref(value), 0)
call("cuDevicePrimaryCtxRetain", ctypes.byref(context), value)
call("cuCtxSetCurrent", context)
call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(size))
call("cuMemcpyHtoD_v2", pointer, bytes(range(size)), ctypes.c_size_t(size))
call("cuCtxSynchronize")
call("cuIpcGetMemHandle", handle, pointer)
print(bytes(handle).hex(), flush=True)
for line in sys.stdin:
    data = (ctypes.c_ubyte * size)()
    call("cuMemcpyDtoH_v2", data, pointer, ctypes.c_size_t(size))
    print(bytes(data).hex(), flush=True)
"""
"""A process that gives the handle of its memory on the first GPU, and tells what is there whenever it is asked."""


@pytest.mark.skipif(find_driver()[0] is None, reason=f"there is no GPU: {find_driver()[1]}")
def test_memory_of_a_real_gpu_is_shared_with_another_process(start_server, repository):
    models.write_model(repository, "echo", models.identity("UINT8", ("N", 64)), max_batch_size=8)
    server = start_server(repository, allow_client_shm=True, http=None, metrics=None)
    command = [sys.executable, "-c", CLIENT]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        handle = bytes.fromhex(other.stdout.readline())
        register = pb.CudaSharedMemoryRegisterRequest(name="gpu", raw_handle=handle, byte_size=128)
        server.call("CudaSharedMemoryRegister", register)
        message = infer_request("echo", {"X": np.zeros((1, 64), np.uint8)}, outputs=["Y"])
        del message.raw_input_contents[:]
        put_into_region(message.inputs[0], "gpu", 64)
        put_into_region(message.outputs[0], "gpu", 64, offset=64)
        server.infer(message)
        told, _ = other.communicate("?\n")
        assert bytes.fromhex(told) == bytes(range(64)) * 2
        server.call("CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest(name="gpu"))
