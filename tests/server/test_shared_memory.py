"""Shared memory on every transport: what is answered and refused, and clients that cut and remove their objects."""

from __future__ import annotations

import re
from contextlib import ExitStack
from functools import partial

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.execution.shared_memory import RegionTable
from sluice_server.protocol.dispatch import Dispatcher
from sluice_server.protocol.rpcs import ServerIdentity, path_of, rpc_table
from sluice_server.protocol.shared_memory import SharedMemory
from sluice_server.security.control import ControlPolicy
from sluice_server.status import Code, StatusMapper
from support import models
from support.fakes import RecordingCall, eventually, held
from support.requests import answer_arrays, infer_request, parameter
from support.shared_memory import Object, put_into_region

ROW_BYTES = 64
"""Of a row of the model `simple`: 16 INT32."""

INVALID, NOT_FOUND, INTERNAL = (
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.INTERNAL,
)
A, B = np.arange(16, dtype=np.int32), np.full(16, 7, np.int32)


@pytest.fixture
def server(sharing_server, no_errors_logged):
    """A server that lets clients share memory, without regions, and that still answers when the test is over."""
    yield sharing_server
    sharing_server.call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest())
    ones = np.ones((1, 16), np.int32)
    answer = answer_arrays(sharing_server.infer(infer_request("simple", {"INPUT0": ones, "INPUT1": ones})))
    np.testing.assert_array_equal(answer["OUTPUT0"], ones * 2)


@pytest.fixture
def shm():
    """Two rows of input, and behind them room for two rows of output."""
    with Object(4 * ROW_BYTES) as made:
        made.put(A)
        made.put(B, ROW_BYTES)
        yield made


@pytest.fixture
def region(server, shm):
    """The object's name as a region; whatever a test does with it, nobody keeps it open."""
    server.call("SystemSharedMemoryRegister", shm.registration("r"))
    yield "r"
    server.call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name="r"))
    eventually(lambda: not shm.times_open(), "the object is closed")


def request(request_id: str = "") -> pb.ModelInferRequest:
    """INPUT0 and INPUT1 and both outputs of `simple`, in the rows of region r."""
    made = pb.ModelInferRequest(model_name="simple", id=request_id)
    for place, name in enumerate(("INPUT0", "INPUT1")):
        tensor = made.inputs.add(name=name, datatype="INT32", shape=[1, 16])
        put_into_region(tensor, "r", ROW_BYTES, place * ROW_BYTES)
    for place, name in enumerate(("OUTPUT0", "OUTPUT1"), 2):
        put_into_region(made.outputs.add(name=name), "r", ROW_BYTES, place * ROW_BYTES)
    return made


def outputs_of(shm: Object) -> list[np.ndarray]:
    return [np.frombuffer(shm.get(place * ROW_BYTES, ROW_BYTES), np.int32) for place in (2, 3)]


def check_outputs(shm: Object) -> None:
    np.testing.assert_array_equal(outputs_of(shm), [A + B, A - B])


def test_tensors_are_taken_from_regions_and_put_there(server, shm, region):
    answer = server.infer(request("7"))
    check_outputs(shm)
    assert answer.id == "7"
    assert [(output.name, list(output.shape), len(output.parameters)) for output in answer.outputs] == [
        ("OUTPUT0", [1, 16], 0),
        ("OUTPUT1", [1, 16], 0),
    ]
    assert list(answer.raw_output_contents) == [b"", b""]


def test_shared_and_inline_tensors_mix(server, shm, region):
    mixed = request()
    mixed.inputs[0].parameters.clear()
    mixed.raw_input_contents.append((A * 2).tobytes())
    mixed.outputs[1].parameters.clear()
    answer = server.infer(mixed)
    assert [len(raw) for raw in answer.raw_output_contents] == [0, ROW_BYTES]
    np.testing.assert_array_equal(np.frombuffer(answer.raw_output_contents[1], np.int32), A * 2 - B)
    np.testing.assert_array_equal(outputs_of(shm)[0], A * 2 + B)


def test_inputs_alone_may_be_shared_and_outputs_alone(server, shm, region):
    only_inputs = request()
    del only_inputs.outputs[:]
    answer = answer_arrays(server.infer(only_inputs))
    np.testing.assert_array_equal(answer["OUTPUT1"], [A - B])
    only_outputs = infer_request("simple", {"INPUT0": A[None] * 3, "INPUT1": B[None]})
    only_outputs.outputs.MergeFrom(request().outputs)
    server.infer(only_outputs)
    np.testing.assert_array_equal(outputs_of(shm), [A * 3 + B, A * 3 - B])


def test_a_batch_of_requests_in_shared_memory_and_inline_gets_each_its_own(server, shm, region):
    """Held until all of them wait, so that those that can are run together."""
    with ExitStack() as stack:
        objects = [stack.enter_context(Object(4 * ROW_BYTES)) for _ in range(6)]
        messages = []
        for number, own in enumerate(objects):
            own.put(A * number)
            own.put(B, ROW_BYTES)
            server.call("SystemSharedMemoryRegister", own.registration(f"r{number}"))
            message = request(str(number))
            for item in (*message.inputs, *message.outputs):
                item.parameters["shared_memory_region"].string_param = f"r{number}"
            messages.append(message)
        with held(server.model("simple")) as session:
            calls = [server.begin("ModelInfer", request())]
            session.wait_for_runs(1)
            calls += [server.begin("ModelInfer", message) for message in messages]
            inline = server.begin("ModelInfer", infer_request("simple", {"INPUT0": A[None], "INPUT1": B[None]}))
            eventually(lambda: len(server.model("simple").queue) == 7, "all requests wait")
            objects[3].cut(ROW_BYTES)
            session.release()
            answers = [call.exception() or call.result() for call in calls]
            np.testing.assert_array_equal(answer_arrays(inline.result())["OUTPUT0"], [A + B])
        assert [getattr(answer, "id", None) for answer in answers] == ["", "0", "1", "2", None, "4", "5"]
        assert answers[4].code() is INVALID
        assert "'r3'" in answers[4].details()
        for number, own in enumerate(objects):
            if number != 3:
                np.testing.assert_array_equal(outputs_of(own), [A * number + B, A * number - B])


def test_bytes_come_and_go_in_wire_form(server, shm, region):
    data = b"\3\0\0\0a\0b\0\0\0\0"
    shm.put(data)
    message = pb.ModelInferRequest(model_name="text")
    put_into_region(message.inputs.add(name="X", datatype="BYTES", shape=[1, 2]), "r", len(data))
    put_into_region(message.outputs.add(name="Y"), "r", 100, 128)
    answer = server.infer(message)
    assert list(answer.raw_output_contents) == [b""]
    assert (list(answer.outputs[0].shape), answer.outputs[0].datatype) == ([1, 2], "BYTES")
    assert shm.get(128, len(data)) == data


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"\1\0\0\0a", "expected 2 string elements for inference input 'X' for model 'text', got 1"),
        (
            b"\0\0\0\0" * 3,
            "unexpected number of string elements 3 for inference input 'X' for model 'text', expecting 2",
        ),
        (b"\0\0\0\0\0\0", "incomplete string length indicator for inference input 'X' for model 'text'"),
        (b"\0\0\0\0\5\0\0\0ab", "incomplete string data for inference input 'X'"),
    ],
)
def test_bytes_that_are_not_the_shapes_elements_are_refused_as_they_are_inline(server, shm, region, data, text):
    shm.put(data)
    message = pb.ModelInferRequest(model_name="text", id="7")
    put_into_region(message.inputs.add(name="X", datatype="BYTES", shape=[1, 2]), "r", len(data))
    code, details = server.refusal("ModelInfer", message)
    assert code is INVALID
    assert details.startswith(f"[request id: 7] {text}")


def test_a_model_without_batches_and_a_tensor_without_elements(server, shm, region):
    for shape in ([2, 8], [0, 3], [16, 1]):
        message = pb.ModelInferRequest(model_name="any")
        size_bytes = 4 * shape[0] * shape[1]
        put_into_region(message.inputs.add(name="X", datatype="FP32", shape=shape), "r", size_bytes)
        put_into_region(message.outputs.add(name="Y"), "r", size_bytes, 128)
        assert list(server.infer(message).outputs[0].shape) == shape
        assert shm.get(128, size_bytes) == shm.get(0, size_bytes)


def spoiled(spoil) -> pb.ModelInferRequest:
    message = request()
    spoil(message)
    return message


def changed(item: str, **values: object) -> pb.ModelInferRequest:
    """The request with parameters of one input or output changed, or, for None, removed."""
    message = request()
    tensor = {each.name: each for each in (*message.inputs, *message.outputs)}[item]
    for key, value in values.items():
        if value is None:
            del tensor.parameters[f"shared_memory_{key}"]
        else:
            tensor.parameters[f"shared_memory_{key}"].CopyFrom(parameter(value))
    return message


BOTH = [("INPUT0", "input tensor 'INPUT0'"), ("OUTPUT1", "output 'OUTPUT1'")]
REFUSED = [
    *((changed(name, **values), code, (text, *((where,) if tells_where else ())))
      for name, where in BOTH
      for values, code, text, tells_where in (
          ({"region": "nope"}, NOT_FOUND, "Unable to find shared memory region: 'nope'", False),
          ({"region": 5}, INVALID, "invalid value type for 'shared_memory_region' parameter", True),
          ({"byte_size": None}, INVALID,
           "'shared_memory_byte_size' must be specified along with 'shared_memory_region' parameter", True),
          ({"byte_size": "64"}, INVALID, "invalid value type for 'shared_memory_byte_size' parameter", True),
          ({"byte_size": -1}, INVALID, "invalid value for 'shared_memory_byte_size' parameter", True),
          ({"offset": "0"}, INVALID, "invalid value type for 'shared_memory_offset' parameter", True),
          ({"offset": -1}, INVALID, "invalid value for 'shared_memory_offset' parameter", True),
          ({"offset": 256}, INVALID, "Invalid offset for shared memory region: 'r'", False),
          ({"offset": 1 << 62}, INVALID, "Invalid offset for shared memory region: 'r'", False),
          ({"offset": 193}, INVALID, "Invalid offset + byte size for shared memory region: 'r'", False),
          ({"byte_size": (1 << 63) - 1}, INVALID, "Invalid offset + byte size for shared memory region: 'r'", False),
      )),
    (changed("INPUT0", byte_size=60), INVALID, ("[request id: <id_unknown>] ", "byte size mismatch", "64", "60")),
    (changed("INPUT0", byte_size=68), INVALID, ("byte size mismatch", "'INPUT0'", "64", "68")),
    (changed("OUTPUT0", byte_size=32), INTERNAL,
     ("shared memory size specified with the request for output 'OUTPUT0' (32 bytes) should be at least 64 bytes",)),
    (changed("OUTPUT0", offset=160), INVALID, ("'OUTPUT0' and 'OUTPUT1' overlap in shared memory",)),
    (spoiled(lambda r: r.inputs[1].contents.int_contents.append(1)), INVALID,
     ("unexpected 'content' provided when using shared memory for input tensor 'INPUT1' for model 'simple'",)),
    (spoiled(lambda r: r.outputs[0].parameters["classification"].CopyFrom(parameter(1))), INVALID,
     ("output 'OUTPUT0' has both 'classification' and 'shared_memory_region'",)),
    (spoiled(lambda r: setattr(r.inputs[0], "datatype", "FP32")), INVALID, ("data-type is 'FP32'",)),
    (spoiled(lambda r: r.inputs[0].shape.__setitem__(1, 8)), INVALID, ("unexpected shape for input 'INPUT0'",)),
    (spoiled(lambda r: r.inputs[0].shape.__setitem__(0, 1 << 40)), INVALID, ("batch size",)),
    (spoiled(lambda r: setattr(r.outputs[1], "name", "OUTPUT0")), INVALID, ("output 'OUTPUT0' already exists",)),
    (spoiled(lambda r: setattr(r.outputs[1], "name", "NOPE")), INVALID, ("unexpected inference output 'NOPE'",)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "code", "texts"), REFUSED)
def test_a_request_that_is_wrong_about_shared_memory_is_refused(server, shm, region, message, code, texts):
    got, details = server.refusal("ModelInfer", message)
    assert got is code, details
    assert all(text in details for text in texts), details
    server.infer(request())
    check_outputs(shm)


def test_a_region_that_is_cut_is_an_error_and_is_of_use_when_it_is_whole_again(server, shm, region):
    server.infer(request())
    for left_bytes, what in ((3 * ROW_BYTES, "an output"), (ROW_BYTES, "an input"), (0, "all of it")):
        shm.cut(left_bytes)
        code, details = server.refusal("ModelInfer", request())
        assert code is INVALID, what
        assert f"'r' was registered with 256 bytes from offset 0 on, but its object '{shm.key}' was cut" in details
        assert len(shm.get()) == left_bytes
    shm.cut(shm.size_bytes)
    shm.put(np.concatenate([A, B]))
    server.infer(request())
    check_outputs(shm)


def test_a_region_whose_object_is_removed_is_an_error(server, shm, region):
    shm.unlink()
    code, details = server.refusal("ModelInfer", request())
    assert code is NOT_FOUND
    assert "'r' has vanished" in details
    assert server.call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest()).regions["r"].key == shm.key


@pytest.mark.parametrize("fault", ["cut", "removed"])
def test_what_happens_to_a_region_while_its_request_waits_is_an_error_too(server, shm, region, fault):
    with held(server.model("simple")) as session:
        blocker = server.begin("ModelInfer", infer_request("simple", {"INPUT0": A[None], "INPUT1": B[None]}))
        session.wait_for_runs(1)
        call = server.begin("ModelInfer", request())
        eventually(lambda: len(server.model("simple").queue) == 1, "the request waits")
        shm.cut(100) if fault == "cut" else shm.unlink()
        session.release()
        assert blocker.result()
        assert call.exception().code() is (INVALID if fault == "cut" else NOT_FOUND)


def test_what_happens_to_a_region_while_its_request_runs_is_an_error_too(server, shm, region):
    with held(server.model("simple")) as session:
        call = server.begin("ModelInfer", request())
        session.wait_for_runs(1)
        shm.cut(150)
        session.release()
        assert call.exception().code() is INVALID
        assert len(shm.get()) == 150


def test_a_region_is_of_use_to_its_requests_when_it_is_unregistered_before_they_run(server, shm, region):
    with held(server.model("simple")) as session:
        blocker = server.begin("ModelInfer", infer_request("simple", {"INPUT0": A[None], "INPUT1": B[None]}))
        session.wait_for_runs(1)
        call = server.begin("ModelInfer", request())
        eventually(lambda: len(server.model("simple").queue) == 1, "the request waits")
        server.call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name=region))
        session.release()
        assert blocker.result()
        assert call.result()
    check_outputs(shm)
    assert server.refusal("ModelInfer", request())[0] is NOT_FOUND


def test_bytes_in_shared_memory_count_for_the_bound_of_the_queue(start_server, repository):
    models.write_model(repository, "any", models.identity("FP32", ("A", "B")))
    server = start_server(repository, models={"queue_bytes": 4000}, allow_client_shm=True, http=None, metrics=None)
    with Object(8000) as shm:
        server.call("SystemSharedMemoryRegister", shm.registration("r"))
        message = pb.ModelInferRequest(model_name="any")
        put_into_region(message.inputs.add(name="X", datatype="FP32", shape=[1, 1000]), "r", 4000)
        code, details = server.refusal("ModelInfer", message)
        assert code is INVALID
        assert "never takes this" in details


def test_requests_of_a_stream_share_memory(server, shm, region):
    messages = [request("1"), changed("INPUT0", region="nope"), request("2")]
    heard = list(server.stream("ModelStreamInfer", iter(messages)))
    assert [each.infer_response.id for each in heard] == ["1", "", "2"]
    assert heard[1].error_message == "Unable to find shared memory region: 'nope'"
    check_outputs(shm)


def status_of(server, name="") -> pb.SystemSharedMemoryStatusResponse:
    return server.call("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(name=name))


def test_regions_are_told_of(server, shm):
    ask = partial(status_of, server)
    for name, offset, size_bytes in (("a", 0, 10), ("b", 5, 251)):
        message = pb.SystemSharedMemoryRegisterRequest(name=name, key=shm.key, offset=offset, byte_size=size_bytes)
        server.call("SystemSharedMemoryRegister", message)
    told = {name: (each.name, each.key, each.offset, each.byte_size) for name, each in ask().regions.items()}
    assert told == {"a": ("a", shm.key, 0, 10), "b": ("b", shm.key, 5, 251)}
    assert list(ask("b").regions) == ["b"]
    refusal = server.refusal("SystemSharedMemoryStatus", pb.SystemSharedMemoryStatusRequest(name="c"))
    assert refusal == (NOT_FOUND, "Unable to find system shared memory region: 'c'")
    refusal = server.refusal("SystemSharedMemoryRegister", shm.registration("a"))
    assert refusal == (grpc.StatusCode.ALREADY_EXISTS, "shared memory region 'a' already in manager")
    server.call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name="c"))
    server.call("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest(name="a"))
    assert list(ask().regions) == ["b"]


@pytest.mark.parametrize(
    ("fields", "code", "text"),
    [
        ({"key": "/sluice-test-nothing"}, INTERNAL, "Unable to open shared memory region: '/sluice-test-nothing'"),
        ({"key": "/../etc/passwd"}, INVALID, "Unable to open shared memory region"),
        ({"byte_size": 257}, INVALID, "failed to register shared memory region 'r': invalid args"),
        ({"offset": 1}, INVALID, "failed to register shared memory region 'r': invalid args"),
        ({"offset": (1 << 64) - 1}, INVALID, "failed to register shared memory region 'r': invalid args"),
        ({"byte_size": 0}, INVALID, "failed to register shared memory region 'r': invalid args"),
        ({"byte_size": (1 << 64) - 1}, grpc.StatusCode.RESOURCE_EXHAUSTED, "18446744073709551615 bytes would be"),
        ({"name": ""}, INVALID, "failed to register shared memory region"),
    ],
)
def test_what_cannot_be_registered_is_refused(server, shm, fields, code, text):
    message = shm.registration("r")
    for name, value in fields.items():
        setattr(message, name, value)
    got, details = server.refusal("SystemSharedMemoryRegister", message)
    assert got is code, details
    assert text in details


def test_a_gpus_memory_is_refused_by_name(server):
    assert not server.call("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest()).regions
    server.call("CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest(name="c"))
    message = pb.CudaSharedMemoryRegisterRequest(name="c", raw_handle=b"x" * 64, byte_size=64)
    code, details = server.refusal("CudaSharedMemoryRegister", message)
    assert code is INVALID
    assert "failed to register CUDA shared memory region: 'c', GPUs not supported" in details
    refusal = server.refusal("CudaSharedMemoryStatus", pb.CudaSharedMemoryStatusRequest(name="c"))
    assert refusal == (NOT_FOUND, "Unable to find cuda shared memory region: 'c'")


METHODS = [f"{kind}SharedMemory{verb}" for kind in ("System", "Cuda") for verb in ("Status", "Register", "Unregister")]


def test_all_of_it_is_off_unless_it_is_allowed(start_server, repository, shm):
    models.write_model(repository, "simple", models.sum_and_difference(), max_batch_size=8)
    server = start_server(repository, http=None, metrics=None)
    assert "system_shared_memory" not in server.call("ServerMetadata", pb.ServerMetadataRequest()).extensions
    refusals = {method: server.refusal(method, b"") for method in METHODS}
    refusals["input tensor 'INPUT0'"] = server.refusal("ModelInfer", request())
    no_inputs = infer_request("simple", {"INPUT0": A[None], "INPUT1": B[None]})
    no_inputs.outputs.MergeFrom(request().outputs)
    refusals["output 'OUTPUT0'"] = server.refusal("ModelInfer", no_inputs)
    for what, (code, details) in refusals.items():
        assert code is grpc.StatusCode.UNIMPLEMENTED
        assert details.startswith(what)
        assert "--allow-client-shm" in details


def test_the_extension_is_told_of_where_it_is_allowed(server):
    assert "system_shared_memory" in server.call("ServerMetadata", pb.ServerMetadataRequest()).extensions


@pytest.mark.parametrize("allow_any", [False, True])
def test_clients_elsewhere_share_no_memory_unless_control_is_open_to_any(server, shm, allow_any):
    policy, inner = ControlPolicy(allow_any=allow_any), server.server
    regions = RegionTable()
    regions.register("r", shm.key, 0, shm.size_bytes)
    memory = SharedMemory(regions, policy)
    rpcs = rpc_table(inner.manager, ServerIdentity("triton", "1"), policy, memory)
    dispatcher = Dispatcher(inner.manager, rpcs, StatusMapper(), inner._slow_pool, regions=memory)
    messages = [("ModelInfer", request()), *((method, pb.SystemSharedMemoryStatusRequest()) for method in METHODS)]
    for method, message in messages:
        call = RecordingCall(message.SerializeToString(), path_of(method), peer="ipv4:10.0.0.1:1")
        dispatcher([call])
        status, _ = call.wait()
        assert (status.code is Code.PERMISSION_DENIED) is not allow_any, status
        if not allow_any:
            assert re.search(r"open to clients on the server's own machine only.*--allow-control=any", status.message)


EDGES = [0, 1, 4, 60, 64, 68, 100, 128, 192, 255, 256, 257, 1 << 31, 1 << 32, (1 << 63) - 1, -1, -(1 << 63)]
values = st.builds(pb.InferParameter, int64_param=st.sampled_from(EDGES) | st.integers(-(1 << 63), (1 << 63) - 1))
places = st.fixed_dictionaries(
    {
        "region": st.builds(pb.InferParameter, string_param=st.sampled_from(["whole", "end", "", "nope"])) | values,
        "byte_size": st.just(pb.InferParameter(int64_param=64)) | values,
    },
    optional={"offset": st.sampled_from([0, 64, 128]).map(lambda at: pb.InferParameter(int64_param=at)) | values},
)
HONEST = {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND}


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model=st.sampled_from(["simple", "text", "any"]),
    inputs=st.lists(places, min_size=1, max_size=2),
    outputs=st.lists(places, max_size=2),
    shape=st.lists(st.sampled_from([0, 1, 2, 16, 1 << 40]), max_size=3),
    data=st.binary(max_size=64),
    left_bytes=st.sampled_from([None, None, 0, 64, 200]),
)
def test_whatever_a_request_says_of_regions_and_whatever_is_in_them_ends_in_an_honest_status(
    model, inputs, outputs, shape, data, left_bytes, server
):
    names = {"simple": (["INPUT0", "INPUT1"], ["OUTPUT0", "OUTPUT1"])}.get(model, (["X"], ["Y"]))
    kind = {"simple": "INT32", "text": "BYTES", "any": "FP32"}[model]
    message = pb.ModelInferRequest(model_name=model)
    described = [message.inputs.add(name=name, datatype=kind, shape=shape) for name in names[0]]
    wanted = [message.outputs.add(name=name) for name, _ in zip(names[1], outputs, strict=False)]
    for item, place in [*zip(described, inputs, strict=False), *zip(wanted, outputs, strict=False)]:
        for key, value in place.items():
            item.parameters[f"shared_memory_{key}"].CopyFrom(value)
    with Object(256) as shm:
        shm.put(data)
        regions = RegionTable()
        regions.register("whole", shm.key, 0, 256)
        regions.register("end", shm.key, 128, 128)
        if left_bytes is not None:
            shm.cut(left_bytes)
        inner = server.server
        memory = SharedMemory(regions)
        dispatcher = Dispatcher(inner.manager, {}, StatusMapper(), inner._slow_pool, regions=memory)
        call = RecordingCall(message.SerializeToString())
        dispatcher([call])
        status, _ = call.wait()
        assert status.code in HONEST or "should be at least" in status.message or "is not UTF-8" in status.message, (
            status
        )
        assert len(shm.get()) == (256 if left_bytes is None else left_bytes)
