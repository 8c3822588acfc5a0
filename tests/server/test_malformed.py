"""Bytes that are no message, on every RPC, and messages that are spoiled at random: refused by name, never a crash."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from sluice_server.protocol.rpcs import SERVICE
from sluice_server.status import Code
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
