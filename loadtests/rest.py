"""The request of a model over REST with binary tensors: what is measured next to the same request over gRPC."""

import http.client
import json
from pathlib import Path

from loadtests import h2load
from loadtests.h2load import Load, LoadError
from loadtests.models import BenchModel
from loadtests.peers import REST, SluiceMeasurement
from loadtests.processes import ServerProcess
from sluice_proto.grpc_service_pb2 import ModelInferRequest, ModelInferResponse

HEAD_LENGTH = "Inference-Header-Content-Length"
"""Says how long the JSON before the binary tensors is."""


class RestMeasurement(SluiceMeasurement):
    """Our server's REST port, over HTTP/1.1 connections that are kept."""

    def __init__(self, model: BenchModel, server: ServerProcess, load: Load, scratch: Path) -> None:
        super().__init__(REST, model, server, load, scratch)
        message = ModelInferRequest.FromString(model.request)
        (tensor,), (data,) = message.inputs, message.raw_input_contents
        item = {"name": tensor.name, "shape": list(tensor.shape), "datatype": tensor.datatype}
        head = {
            "inputs": [{**item, "parameters": {"binary_data_size": len(data)}}],
            "parameters": {"binary_data_output": True},
        }
        text = json.dumps(head).encode()
        self._path = f"v2/models/{model.name}/infer"
        self._body = text + data
        self._head_length = len(text)

    def ask(self) -> bytes:
        """The body of one answer."""
        connection = http.client.HTTPConnection(self._server.http_address, timeout=30)
        connection.request("POST", f"/{self._path}", self._body, {HEAD_LENGTH: str(self._head_length)})
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        if answer.status != http.client.OK:
            raise LoadError(f"the server answered over REST with {answer.status}: {body!r}")
        return body

    def load_with(self, reply: bytes, requests: int) -> h2load.Measured:
        """Send so many requests."""
        headers = (f"{HEAD_LENGTH}: {self._head_length}",)
        request = h2load.Request(self._path, self._body, headers, len(reply), http1=True)
        return h2load.run(self._server.http_address, request, self._load, requests, self._scratch)

    def check_reply(self, reply: bytes) -> None:
        """The model's answer, whose tensor is behind the JSON."""
        told, end = json.JSONDecoder().raw_decode(reply.decode("latin-1"))
        (output,) = told["outputs"]
        message = ModelInferResponse(raw_output_contents=[reply[end:]])
        message.outputs.add(name=output["name"], datatype=output["datatype"], shape=output["shape"])
        super().check_reply(message.SerializeToString())
