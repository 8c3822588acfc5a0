"""The request of a model many times in each ModelStreamInfer: what is measured next to the same in unary calls.

h2load is the generator of both, and what it posts in a stream is a body of many messages. All of them leave at once,
and the next call follows when the last of their answers and the status have come. So with 16 messages in each of 2
streams at most 32 requests are in flight, where unary calls in 2 x 16 have 32 at any time: fewer on average, and never
more. A call is still paid for, once for 16 requests; a stream that stays open pays for none.

What the ratio of the two holds is all that a call costs, on both sides of the socket: fewer frames also spare the
generator work, as they do any client, and where it shares the machine's cores with the server, as here, this counts.
Its CPU time and the server's are in the table next to the rates.
"""

import math
from dataclasses import replace
from pathlib import Path

import grpc

from loadtests import h2load
from loadtests.h2load import Load, LoadError, Measured
from loadtests.models import BenchModel
from loadtests.peers import SERVICE, STREAM, SluiceMeasurement
from loadtests.processes import ServerProcess
from sluice_proto.grpc_service_pb2 import ModelStreamInferResponse

METHOD = f"{SERVICE}/ModelStreamInfer"


class StreamMeasurement(SluiceMeasurement):
    """Our server with one stream at a time on each connection; the streams of its load are the messages of a call."""

    def __init__(self, model: BenchModel, server: ServerProcess, load: Load, scratch: Path) -> None:
        super().__init__(STREAM, model, server, load, scratch)

    def ask(self) -> bytes:
        """The answer to one request."""
        with grpc.insecure_channel(self._server.address) as channel:
            (reply,) = channel.stream_stream(f"/{METHOD}")(iter([self.model.request]), timeout=30)
            return bytes(reply)

    def load_with(self, reply: bytes, requests: int) -> Measured:
        """Send so many; how long one of them takes is not known, as h2load looks at whole calls."""
        messages = self._load.streams
        one = h2load.grpc_request(METHOD, self.model.request, len(reply))
        request = replace(one, body=one.body * messages, answer_bytes=one.answer_bytes * messages)
        load = Load(self._load.connections, 1)
        done = h2load.run(self._server.address, request, load, requests // messages, self._scratch)
        return Measured(requests, done.requests_per_s * messages, math.nan, math.nan, done.effort)

    def check_reply(self, reply: bytes) -> None:
        """The model's answer, within that of a stream."""
        message = ModelStreamInferResponse.FromString(reply)
        if message.error_message:
            raise LoadError(f"the stream was answered with an error: {message.error_message}")
        super().check_reply(message.infer_response.SerializeToString())
