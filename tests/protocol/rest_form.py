"""An inference request of gRPC as a client of REST would send it, its tensors binary."""

from __future__ import annotations

import json
import urllib.parse
from collections import deque
from typing import TYPE_CHECKING, Any

from sluice_server.protocol.shared_memory import REGION
from support.rest import HEAD_LENGTH, RawAnswer
from support.rest import request as send

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sluice_proto.grpc_service_pb2 import InferParameter, ModelInferRequest
    from support.server import RunningServer


def post(server: RunningServer, request: ModelInferRequest) -> RawAnswer:
    """Send a request over REST."""
    head, tail = body_of(request)
    return send(server, "POST", path_of(request), head + tail, {HEAD_LENGTH: str(len(head))})


def path_of(request: ModelInferRequest) -> str:
    """Where it is sent to."""
    path = f"/v2/models/{urllib.parse.quote(request.model_name, safe='')}"
    if request.model_version:
        path += f"/versions/{urllib.parse.quote(request.model_version, safe='')}"
    return f"{path}/infer"


def body_of(request: ModelInferRequest) -> tuple[bytes, bytes]:
    """Its JSON and the binary tensors, without the raw ones that no input takes."""
    raws = deque(request.raw_input_contents)
    taken = [raws.popleft() if raws and REGION not in tensor.parameters else None for tensor in request.inputs]
    return json.dumps(_head(request, taken)).encode(), b"".join(raw for raw in taken if raw is not None)


def _head(request: ModelInferRequest, raws: list[bytes | None]) -> dict[str, Any]:
    inputs = []
    for tensor, raw in zip(request.inputs, raws, strict=True):
        parameters = _parameters(tensor.parameters)
        if raw is not None:
            parameters["binary_data_size"] = len(raw)
        described = {"name": tensor.name, "shape": list(tensor.shape), "datatype": tensor.datatype}
        inputs.append({**described, "parameters": parameters})
    outputs = [{"name": output.name, "parameters": _parameters(output.parameters)} for output in request.outputs]
    head = {"id": request.id, "parameters": _parameters(request.parameters), "inputs": inputs}
    return {**head, "outputs": outputs} if outputs else head


def _parameters(parameters: Mapping[str, InferParameter]) -> dict[str, Any]:
    return {key: getattr(value, value.WhichOneof("parameter_choice") or "", None) for key, value in parameters.items()}
