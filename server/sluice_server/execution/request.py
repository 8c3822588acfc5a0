"""One inference request between its decoding and its answer: what the queue orders and an instance runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_batching import NEVER_QUEUED, Request

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    import numpy as np
    from typing_extensions import Buffer

    from sluice_server.execution.response_cache import Fingerprint
    from sluice_server.execution.served import Served
    from sluice_server.execution.shared_memory import SharedTensor, SharedTensors
    from sluice_server.protocol.classification import Classes
    from sluice_server.transport.call import Call


class InferRequest(Request):
    """A validated request. `arrays` are read-only views over the received message, by the graph's input names.

    Each array has the model's own shape, the batch dimension included when the model batches. `output_names` are
    the outputs to compute and return, in the order of the answer. `shared` is what it has in shared memory: inputs that
    are not in `arrays`, and where outputs go; None for nothing. `classes`, by the names of outputs, are what is
    returned in place of their values; None for no output. `model` is the version that last got it.

    Only a version with a response cache sets `fingerprint`, what the answer is found by; None: nobody else may have it.
    And `payload`, the answer as others get it, when this request's own leaves tensors in shared memory.
    """

    __slots__ = ("arrays", "call", "classes", "fingerprint", "id", "model", "output_names", "payload", "shared")

    model: Served
    fingerprint: Fingerprint | None
    payload: list[Buffer]

    def __init__(
        self,
        call: Call,
        request_id: str,
        arrays: dict[str, np.ndarray],
        output_names: tuple[str, ...],
        rows: int,
        key: Hashable,
        deadline_ns: int,
        shared: SharedTensors | None = None,
        classes: Mapping[str, Classes] | None = None,
    ) -> None:
        # The parent's fields are set here: calling its `__init__` takes 0.2 us, a tenth of decoding.
        self.rows = rows
        self.size_bytes = len(call.message)
        self.key = key
        self.deadline_ns = deadline_ns
        self.enqueued_ns = 0
        self.queue_order = NEVER_QUEUED
        self.call = call
        self.id = request_id
        self.arrays = arrays
        self.output_names = output_names
        self.classes = classes
        self.shared = shared
        if shared is not None:
            # Read when it runs, into memory that the bound of the queue is to cover as well.
            self.size_bytes += shared.input_bytes

    @property
    def inputs(self) -> Mapping[str, np.ndarray | SharedTensor]:
        """All inputs by name, of which those in shared memory are not read, but have a shape too."""
        return self.arrays if self.shared is None else {**self.arrays, **self.shared.inputs}

    def cancel(self) -> None:
        """Take the request out of its model's queue if it still waits there: its client has left."""
        self.model.cancel(self)


class PrioritizedRequest(InferRequest):
    """A request to a model whose queue has priorities or timeouts: `priority` and `timeout_ns` are what it asks for."""

    __slots__ = ("priority", "timeout_ns")

    def ask(self, priority: int, timeout_ns: int) -> PrioritizedRequest:
        """Set what it asks for, 0 for nothing; gives the request."""
        self.priority = priority
        self.timeout_ns = timeout_ns
        return self
