"""The seam between an ensemble and its parts: the call of one step, whose answer is arrays and stays in the process.

A part takes a step's request as any other. Its runner encodes answers as bytes; where an ensemble asked for it at load
(`Served.answers_in_arrays`), `HandOver` stands in place of the encoder and gives a step the rows of the outputs
themselves. A part that keeps answers as bytes, which the response cache does, has them decoded again.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

from sluice_proto.grpc_service_pb2 import ModelInferResponse
from sluice_proto.tensors import BY_NAME, view
from sluice_server.transport.call import Call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from typing_extensions import Buffer

    from sluice_server.execution.gate import Gate
    from sluice_server.execution.request import InferRequest
    from sluice_server.protocol.interface import ModelInterface
    from sluice_server.status import Status
    from sluice_server.transport.call import Metadata


class StepOwner(Protocol):
    """What hears of the end of a step, once, from any thread."""

    def succeeded(self, call: StepCall, request: InferRequest, arrays: Sequence[np.ndarray]) -> None:
        """The outputs that the step's request asked for, in its order, as the part's clients see them."""

    def failed(self, call: StepCall, status: Status) -> None:
        """Why there are none."""

    def status_of(self, error: Exception) -> Status:
        """What a client gets to see of an error."""


class StepCall(Call):
    """A call without a transport: that of `request`, for the step `number`. `pending` is the same until it has ended.

    `started_ns` and `compute_ns` are what its run told. `gate` is where its place is, or where it waits for one when it
    `has_place` not; None when it needs none.
    """

    __slots__ = ("_owner", "compute_ns", "gate", "has_place", "number", "pending", "started_ns")

    # Who listens to `describe` learns when the run began and what it took.
    sampled = True
    metadata: Metadata = ()
    peer = "ensemble"
    peer_names: tuple[str, ...] = ()

    def __init__(self, owner: StepOwner, number: int, deadline_ns: int, gate: Gate | None) -> None:
        self.method = "ensemble step"
        self.message = b""
        self.received_ns = time.monotonic_ns()
        self.deadline_ns = deadline_ns
        self.on_cancel = None
        self.number = number
        self.gate = gate
        self.has_place = False
        self.pending: InferRequest | None = None
        self.started_ns: int | None = None
        self.compute_ns = (0, 0, 0)
        self._owner: StepOwner | None = owner

    @property
    def request(self) -> InferRequest:
        """The step's request, which has not ended."""
        assert self.pending is not None, "the step has ended"
        return self.pending

    def describe(self, **facts: Any) -> None:
        """Keep what is told of the run: when it began, and its three compute times."""
        if "started_ns" in facts:
            self.started_ns = facts["started_ns"]
            self.compute_ns = (facts["compute_input_ns"], facts["compute_infer_ns"], facts["compute_output_ns"])

    @abstractmethod
    def arrays_of(self, parts: Sequence[Buffer]) -> Sequence[np.ndarray]:
        """The outputs, of what the part answers with."""

    def reply(self, parts: Sequence[Buffer]) -> None:
        """Hand the outputs to the ensemble."""
        request, arrays = self.pending, self.arrays_of(parts)
        owner = self.close()
        if owner is not None and request is not None:
            owner.succeeded(self, request, arrays)

    def fail(self, status: Status) -> None:
        """Tell the ensemble."""
        owner = self.close()
        if owner is not None:
            owner.failed(self, status)

    def refuse(self, error: Exception) -> None:
        """Fail a step that its part has not taken."""
        if self._owner is not None:
            self.fail(self._owner.status_of(error))

    def close(self) -> StepOwner | None:
        """End the call: gives who is to hear of it, the first time. Nothing leads in a circle any more."""
        owner, self._owner = self._owner, None
        self.on_cancel = self.pending = None
        return owner


class ArraysCall(StepCall):
    """A step of a part that answers in arrays."""

    __slots__ = ()

    def arrays_of(self, parts: Sequence[Any]) -> Sequence[np.ndarray]:
        """They are the outputs."""
        return parts


class BytesCall(StepCall):
    """A step of a part whose answers are bytes."""

    __slots__ = ()

    def arrays_of(self, parts: Sequence[Buffer]) -> Sequence[np.ndarray]:
        """Views over the response, in the order of the outputs asked for, which is that of the answer."""
        response = ModelInferResponse.FromString(b"".join(parts))
        return [
            view(BY_NAME[output.datatype], tuple(output.shape), raw)
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        ]


class HandOver:
    """An encoder that gives the steps of ensembles their rows of the outputs, and encodes for everybody else.

    A batch is either all steps or none: their keys differ.
    """

    __slots__ = ("_encode", "_interface")

    def __init__(
        self,
        encode: Callable[[Sequence[InferRequest], Sequence[np.ndarray]], list[list[Any]]],
        interface: ModelInterface,
    ) -> None:
        self._encode = encode
        self._interface = interface

    def __call__(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[Any]]:
        """The outputs of each request, in the order of the batch: arrays for steps, else the parts of messages."""
        first = batch[0]
        if not isinstance(first.call, StepCall):
            return self._encode(batch, arrays)
        if self._interface.reshapes_outputs:
            arrays = self._interface.to_client(first.output_names, arrays)
        if len(batch) == 1:
            return [list(arrays)]
        answers = []
        start = 0
        for request in batch:
            stop = start + request.rows
            answers.append([array[start:stop] for array in arrays])
            start = stop
        return answers
