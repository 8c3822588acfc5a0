"""Bytes that are no message, on every RPC, and messages that are spoiled at random: refused by name, never a crash."""

from __future__ import annotations

import struct
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice_proto.grpc_service_pb2 import InferParameter, ModelInferRequest
from sluice_proto.tensors import BY_NAME
from sluice_server.protocol.dispatch import INFER, Dispatcher
from sluice_server.protocol.rpcs import SERVICE, ServerIdentity, path_of, rpc_table
from sluice_server.security.control import ControlPolicy
from sluice_server.status import Code, StatusMapper
from support.fakes import RecordingCall
from support.requests import infer_request

UNARY = sorted(method.name for method in SERVICE.methods if not method.client_streaming)

SPLIT_SIZE = 64 * 1024
"""Raw data of this size makes a message whose tensors are cut out before it is parsed."""

NOT_MESSAGES = {
    "a tag cut off": b"\x80",
    "a length without its bytes": b"\x0a\x05ab",
    "a length of gigabytes": b"\x0a\xff\xff\xff\xff\x07",
    "a number that never ends": b"\x08" + b"\xff" * 20,
    "field number 0": b"\x02\x00",
    "the end of a group": b"\x0c",
    "a group that never ends": b"\x0b" * 200,
    "ones": b"\xff" * 64,
    "text that is not UTF-8": b"\x0a\x02\xff\xfe",
}

# What a request may be refused with; UNKNOWN and INTERNAL would be a crash, or the model's fault.
HONEST = {Code.OK, Code.INVALID_ARGUMENT, Code.NOT_FOUND, Code.UNIMPLEMENTED, Code.DEADLINE_EXCEEDED}


def accepts_text(method: str) -> bool:
    """Whether field 1 of the method's request is text."""
    return method not in {"ServerLive", "ServerReady", "ServerMetadata"}


@pytest.mark.parametrize("what", NOT_MESSAGES)
@pytest.mark.parametrize("method", UNARY)
def test_bytes_that_are_no_message_are_refused(method, what, refused):
    if what in ("text that is not UTF-8", "a length of gigabytes") and not accepts_text(method):
        return
    message = refused(NOT_MESSAGES[what], grpc.StatusCode.INVALID_ARGUMENT, method)
    assert f"{len(NOT_MESSAGES[what])} bytes of the request are not a {method}" in message


def test_a_method_that_does_not_exist_is_unimplemented(server):
    method = server.channel.unary_unary("/inference.GRPCInferenceService/Nope")
    with pytest.raises(grpc.RpcError) as caught:
        method(b"", timeout=10)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("raw_bytes", [64, SPLIT_SIZE])
def test_every_truncation_of_a_request_is_refused(raw_bytes, server):
    request = infer_request("simple", {name: np.ones((1, 16), np.int32) for name in ("INPUT0", "INPUT1")})
    request.raw_input_contents[1] = b"\0" * raw_bytes
    whole = request.SerializeToString()
    head = len(whole) - raw_bytes
    cuts = [*range(1, min(len(whole), head + 64)), len(whole) - 1]
    for cut in cuts:
        code, message = server.refusal("ModelInfer", whole[:cut])
        assert code in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}, (cut, message)


def test_random_bytes_over_the_wire_end_in_an_honest_status(server):
    random = np.random.default_rng(7)
    good = infer_request("simple", {name: np.ones((1, 16), np.int32) for name in ("INPUT0", "INPUT1")})
    whole = good.SerializeToString()
    messages = [random.bytes(int(random.integers(0, 300))) for _ in range(100)]
    for _ in range(200):
        spoiled = bytearray(whole)
        for position in random.integers(0, len(whole), 3):
            spoiled[position] = random.integers(0, 256)
        messages.append(bytes(spoiled))
    for message in messages:
        call = server.begin("ModelInfer", message)
        assert Code(call.code().value[0]) in HONEST, (message, call.details())


# --- Hypothesis, against the dispatcher itself


@pytest.fixture(scope="module")
def dispatcher(shared_server):
    """A dispatcher of its own over the models of the shared server."""
    manager = shared_server.server.manager
    rpcs = rpc_table(manager, ServerIdentity("triton", "0"), ControlPolicy(allow_any=False))
    with ThreadPoolExecutor(1) as pool:
        yield Dispatcher(manager, rpcs, StatusMapper(), pool)


EDGES = [0, 1, -1, 2, 8, 9, 16, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63), 2**63 // 4]
MODELS = ["simple", "flat", "text", "half", "any", "bias", "picky"]
NAMES = ["INPUT0", "INPUT1", "X", "B", "INDEX", "Y", "OUTPUT0", "OUTPUT1", "", "NOPE"]

ints = st.sampled_from(EDGES) | st.integers(-(2**63), 2**63 - 1)
names = st.sampled_from(NAMES) | st.text(max_size=4)
shapes = st.lists(st.sampled_from([1, 2, 4, 16]) | ints, max_size=4)
raws = (
    st.sampled_from([0, 4, 8, 16, 64, 128]).map(bytes)
    | st.binary(max_size=80)
    | st.lists(st.binary(max_size=5), max_size=4).map(
        lambda items: b"".join(struct.pack("<I", len(item)) + item for item in items)
    )
)
parameters = st.one_of(
    st.builds(InferParameter, int64_param=ints),
    st.builds(InferParameter, bool_param=st.booleans()),
    st.builds(InferParameter, string_param=st.text(max_size=5)),
    st.builds(InferParameter, uint64_param=st.integers(0, 2**64 - 1)),
    st.just(InferParameter()),
)
keys = st.sampled_from(
    ["timeout", "priority", "sequence_id", "sequence_start", "triton_x", "x", "shared_memory_region"]
)
contents = st.fixed_dictionaries(
    {},
    optional={
        "int_contents": st.lists(st.integers(-(2**31), 2**31 - 1), max_size=17),
        "int64_contents": st.lists(ints, max_size=17),
        "fp32_contents": st.lists(st.floats(width=32), max_size=17),
        "bytes_contents": st.lists(st.binary(max_size=5), max_size=3),
    },
)
tensors = st.builds(
    ModelInferRequest.InferInputTensor,
    name=names,
    datatype=st.sampled_from([*BY_NAME, "", "INT31"]),
    shape=shapes,
    parameters=st.dictionaries(keys, parameters, max_size=1),
    contents=st.none() | contents.map(lambda fields: fields or None),
)
outputs = st.builds(
    ModelInferRequest.InferRequestedOutputTensor, name=names, parameters=st.dictionaries(keys, parameters, max_size=1)
)
requests = st.builds(
    ModelInferRequest,
    model_name=st.sampled_from(MODELS) | st.text(max_size=3),
    model_version=st.sampled_from(["", "1", "2", "x", "-1", "0"]),
    id=st.text(max_size=5),
    parameters=st.dictionaries(keys, parameters, max_size=2),
    inputs=st.lists(tensors, max_size=3),
    outputs=st.lists(outputs, max_size=2),
    raw_input_contents=st.lists(raws, max_size=3),
)


@st.composite
def spoiled_requests(draw: st.DrawFn) -> ModelInferRequest:
    """A valid request of which one to three things have been changed."""
    request = draw(st.sampled_from(VALID))()
    for _ in range(draw(st.integers(1, 3))):
        tensor = request.inputs[draw(st.integers(0, len(request.inputs) - 1))]
        match draw(st.integers(0, 7)):
            case 0:
                tensor.shape[:] = draw(shapes)
            case 1 if tensor.shape:
                tensor.shape[draw(st.integers(0, len(tensor.shape) - 1))] = draw(ints)
            case 2:
                tensor.datatype = draw(st.sampled_from([*BY_NAME, ""]))
            case 3:
                tensor.name = draw(names)
            case 4 if request.raw_input_contents:
                request.raw_input_contents[draw(st.integers(0, len(request.raw_input_contents) - 1))] = draw(raws)
            case 5:
                request.parameters[draw(keys)].CopyFrom(draw(parameters))
            case 6:
                tensor.CopyFrom(draw(tensors))
            case _:
                request.outputs.append(draw(outputs))
    return request


VALID = [
    lambda: infer_request("simple", {name: np.ones((2, 16), np.int32) for name in ("INPUT0", "INPUT1")}),
    lambda: infer_request("simple", {name: np.ones((1, 16), np.int32) for name in ("INPUT0", "INPUT1")}, typed=True),
    lambda: infer_request("flat", {name: np.ones(16, np.int32) for name in ("INPUT0", "INPUT1")}),
    lambda: infer_request("text", {"X": np.array([[b"one", b"two"]], object)}),
    lambda: infer_request("half", {"X": np.ones((1, 2), np.float16)}),
    lambda: infer_request("any", {"X": np.ones((2, 3), np.float32)}),
    lambda: infer_request("bias", {"X": np.ones(2, np.float32)}),
    lambda: infer_request("picky", {"INDEX": np.ones((3, 1), np.int64)}),
]

volume = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def end_of(dispatcher: Dispatcher, message: bytes, path: str = INFER) -> tuple[Code, str]:
    """How a call ends, which it must do exactly once."""
    call = RecordingCall(message, path)
    dispatcher([call])
    status, _ = call.wait()
    assert len(call.ends) == 1
    return status.code, status.message


@volume
@given(request=requests | spoiled_requests(), surplus_bytes=st.sampled_from([0, SPLIT_SIZE]))
def test_any_request_ends_in_an_honest_status(request, surplus_bytes, dispatcher, no_errors_logged):
    if surplus_bytes:
        request.raw_input_contents.append(bytes(surplus_bytes))
    code, message = end_of(dispatcher, request.SerializeToString())
    # A valid request may hold an index that the model has no value for: that is the model's own failure.
    assert code in HONEST or message.startswith("onnx runtime error"), message


@volume
@given(message=st.binary(max_size=200))
def test_any_bytes_end_in_an_honest_status(message, dispatcher, no_errors_logged):
    code, text = end_of(dispatcher, message)
    assert code in HONEST, text


@volume
@given(
    valid=st.sampled_from(VALID),
    edits=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), min_size=1, max_size=4),
    surplus_bytes=st.sampled_from([0, SPLIT_SIZE]),
)
def test_any_changed_bytes_end_in_an_honest_status(valid, edits, surplus_bytes, dispatcher, no_errors_logged):
    message = bytearray(valid().SerializeToString())
    changeable = len(message)
    if surplus_bytes:
        message += ModelInferRequest(raw_input_contents=[bytes(surplus_bytes)]).SerializeToString()
    for position, value in edits:
        message[position % changeable] = value
    code, text = end_of(dispatcher, bytes(message))
    assert code in HONEST or text.startswith("onnx runtime error"), text


@volume
@given(message=st.binary(max_size=100), method=st.sampled_from(UNARY))
def test_any_bytes_to_any_rpc_end_in_an_honest_status(message, method, dispatcher, no_errors_logged):
    code, text = end_of(dispatcher, message, path_of(method))
    # Load and unload are not allowed on this server, whatever the model.
    assert code in HONEST | {Code.UNAVAILABLE}, text
