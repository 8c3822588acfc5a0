"""Bodies made up of the members that there are: whatever they say, they become a message or an error for the client."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.any_rest_heads import HEADS
from sluice_proto.grpc_service_pb2 import ModelInferRequest
from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.errors import SluiceError
from sluice_server.protocol.decode import ParsedRequest
from sluice_server.protocol.interface import ModelInterface
from sluice_server.protocol.rest_infer import InferRequests


def interface() -> ModelInterface:
    config = ModelConfig(name="m", max_batch_size=8)
    config.input.add(name="X", data_type="TYPE_FP32", dims=[4])
    config.output.add(name="Y", data_type="TYPE_FP32", dims=[4])
    return ModelInterface.of(config, 1)


INTERFACE = interface()


def read(requests: InferRequests, body: bytes, head_length: str | None) -> bytes | str:
    """The message of a body, which then is a valid one, or the error."""
    try:
        message, _ = requests.read(INTERFACE, "", body, head_length)
    except SluiceError as error:
        return str(error)
    ParsedRequest(message)
    return message


@settings(max_examples=1500)
@given(HEADS, st.binary(max_size=40), st.one_of(st.none(), st.integers(-2, 2)))
def test_any_head_becomes_a_message_or_an_error_and_the_same_again(head, tail, off):
    text = json.dumps(head).encode()
    length = None if off is None else str(len(text) + off)
    requests = InferRequests()
    body = text + (b"" if off is None else tail)
    first = read(requests, body, length)
    assert read(requests, body, length) == first  # when its head is known, too


@settings(max_examples=500)
@given(st.binary(max_size=60), st.sampled_from([None, "0", "1", "7"]))
def test_any_bytes_do_too(body, length):
    read(InferRequests(), body, length)


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
@given(values=st.lists(st.floats(width=32), min_size=1, max_size=8))
def test_json_numbers_arrive_bit_for_bit(datatype, values):
    head = {"inputs": [{"name": "X", "shape": [len(values)], "datatype": datatype, "data": values}]}
    message, _ = InferRequests().read(INTERFACE, "", json.dumps(head).encode(), None)
    (raw,) = ModelInferRequest.FromString(message).raw_input_contents
    wanted = np.array(values, {"FP32": np.float32, "FP64": np.float64}[datatype])
    np.testing.assert_array_equal(np.frombuffer(raw, wanted.dtype), wanted)
