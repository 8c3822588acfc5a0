"""ModelInfer requests from arrays, and arrays from the answers, by the project's own messages."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sluice_proto.grpc_service_pb2 import InferParameter, ModelInferRequest, ModelInferResponse
from sluice_proto.tensors import BY_NAME, of_array, set_contents, to_buffer, view


def infer_request(
    model: str,
    inputs: Mapping[str, np.ndarray],
    *,
    version: str = "",
    outputs: Sequence[str] = (),
    request_id: str = "",
    parameters: Mapping[str, Any] | None = None,
    typed: bool = False,
) -> ModelInferRequest:
    """A valid request, which a test may then spoil. `typed` puts the data into `contents` and not into raw form."""
    request = ModelInferRequest(model_name=model, model_version=version, id=request_id)
    for name, array in inputs.items():
        tensor = request.inputs.add(name=name, datatype=of_array(array).name, shape=array.shape)
        if typed:
            set_contents(tensor.contents, array)
        else:
            request.raw_input_contents.append(bytes(to_buffer(array)))
    for name in outputs:
        request.outputs.add(name=name)
    for key, value in (parameters or {}).items():
        request.parameters[key].CopyFrom(parameter(value))
    return request


def parameter(value: bool | str | float) -> InferParameter:
    """A parameter whose kind is that of the Python value."""
    match value:
        case bool():
            return InferParameter(bool_param=value)
        case int():
            return InferParameter(int64_param=value)
        case str():
            return InferParameter(string_param=value)
        case float():
            return InferParameter(double_param=value)


def answer_arrays(response: ModelInferResponse) -> dict[str, np.ndarray]:
    """The outputs of an answer by name, in its order."""
    return {
        output.name: view(BY_NAME[output.datatype], tuple(output.shape), raw)
        for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
