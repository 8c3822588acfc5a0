"""Tensors that tritonclient writes are read here, and tensors written here are read by it, in one process."""

import ml_dtypes
import numpy as np
import pytest
from tritonclient.grpc import InferInput, InferResult
from tritonclient.grpc._utils import _get_inference_request
from tritonclient.grpc.service_pb2 import ModelInferResponse as TritonResponse

from sluice_proto.grpc_service_pb2 import ModelInferRequest, ModelInferResponse
from sluice_proto.tensors import BY_NAME, of_array, to_buffer, view
from sluice_proto.wire import length_delimited, split_raw

ARRAYS = {
    "BOOL": np.array([[True, False]]),
    "UINT8": np.array([[0, 255]], np.uint8),
    "UINT16": np.array([[0, 2**16 - 1]], np.uint16),
    "UINT32": np.array([[0, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 127]], np.int8),
    "INT16": np.array([[-(2**15), 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 2**63 - 1]], np.int64),
    "FP16": np.array([[1.5, np.inf]], np.float16),
    "FP32": np.array([[0.1, -np.inf]], np.float32),
    "FP64": np.array([[0.1, 5e-324]], np.float64),
    "BF16": np.array([[1.5, -2]], ml_dtypes.bfloat16),
    "BYTES": np.array([[b"\0\xff", b""]], object),
}
by_datatype = pytest.mark.parametrize("datatype", ARRAYS)


def triton_request(datatype: str) -> bytes:
    array = ARRAYS[datatype]
    tensor = InferInput("X", list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    request = _get_inference_request(
        model_name="m", inputs=[tensor], model_version="", request_id="7", outputs=None, sequence_id=0,
        sequence_start=False, sequence_end=False, priority=0, timeout=None, parameters=None,
    )  # fmt: skip
    return request.SerializeToString()


def test_every_datatype_is_tried():
    assert ARRAYS.keys() == BY_NAME.keys()
    assert {name: of_array(array).name for name, array in ARRAYS.items()} == {name: name for name in ARRAYS}


@by_datatype
def test_a_request_of_tritonclient_is_read(datatype):
    message = triton_request(datatype)
    head, (raw,) = split_raw(message)
    (tensor,) = ModelInferRequest.FromString(head).inputs
    array = view(BY_NAME[tensor.datatype], tensor.shape, raw)
    assert (tensor.name, array.dtype, array.tolist()) == ("X", ARRAYS[datatype].dtype, ARRAYS[datatype].tolist())
    assert ModelInferRequest.FromString(message).raw_input_contents[0] == raw


@by_datatype
def test_a_response_joined_from_parts_is_read_by_tritonclient(datatype):
    array = ARRAYS[datatype]
    response = ModelInferResponse(model_name="m", id="7")
    response.outputs.add(name="Y", datatype=datatype, shape=array.shape)
    data = to_buffer(array)
    prefix = length_delimited(ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER, len(data))
    message = b"".join([response.SerializeToString(), prefix, data])
    result = InferResult(TritonResponse.FromString(message)).as_numpy("Y")
    assert (result.shape, result.tolist()) == (array.shape, array.tolist())
