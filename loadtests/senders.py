"""One kind of request each, sent by the project's client or by tritonclient: how it is made, and how it ended.

A sender is used by many greenlets at once, in a process where gevent has replaced what blocks. It retries nothing:
what a server refuses is to be seen. tritonclient's modules are imported where they are used, as each brings its own
dependencies.
"""

from __future__ import annotations

import importlib
import os
import uuid
from abc import ABC, abstractmethod
from collections import OrderedDict
from contextlib import ExitStack
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import gevent
from gevent.event import AsyncResult
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from loadtests.payloads import PayloadError
from loadtests.scenario import REST, SHARED_MEMORY, SLUICE, STREAM, UNARY
from sluice_client import Client, ClientError, ServerError
from sluice_client.load.latencies import CODES, OK
from sluice_client.settings import NO_RETRIES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from loadtests.payloads import Array, Payload
    from loadtests.scenario import Kind
    from sluice_client import SharedTensor

    Outputs = Callable[[str], Array | None]

NUMBERS: Final = {name: number for number, name in enumerate(CODES)}
UNKNOWN: Final = NUMBERS["UNKNOWN"]
HTTP_CODES: Final = {
    "400": "INVALID_ARGUMENT",
    "403": "PERMISSION_DENIED",
    "404": "NOT_FOUND",
    "429": "RESOURCE_EXHAUSTED",
    "499": "DEADLINE_EXCEEDED",
    "500": "INTERNAL",
    "501": "UNIMPLEMENTED",
    "503": "UNAVAILABLE",
    "504": "DEADLINE_EXCEEDED",
}
"""What an HTTP status says in gRPC's words; tritonclient calls a timeout of its own 499."""

NO_DEADLINE_S: Final = 60.0
"""For requests without a deadline: a run has to end. Also for the first one of each kind, which connects."""


class Late(Exception):
    """A request's deadline passed before its answer came."""


class Sender(ABC):
    """Sends the payloads of one kind of request by their index."""

    def __init__(self, kind: Kind, payloads: Sequence[Payload]) -> None:
        self.kind = kind
        self.payloads = payloads
        self.deadline_s = NO_DEADLINE_S if kind.deadline_ms is None else kind.deadline_ms / 1e3

    @abstractmethod
    def call(self, index: int, deadline_s: float) -> Outputs:
        """Send a payload and wait for its answer; gives what returns an output by name. Raises the client's errors."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""

    def send(self, index: int) -> int:
        """Send a payload; gives the gRPC status number that it ended with."""
        try:
            self.call(index, self.deadline_s)
        except ServerError as error:
            return NUMBERS[error.code]
        except Late:
            return NUMBERS["DEADLINE_EXCEEDED"]
        except InferenceServerException as error:
            return triton_code(error)
        except (ClientError, OSError):
            return UNKNOWN
        return OK

    def check(self, index: int) -> None:
        """Send a payload, without its deadline, and hold the answer against the golden one.

        Raises PayloadError, and the client's errors.
        """
        outputs, payload = self.call(index, NO_DEADLINE_S), self.payloads[index]
        payload.check({name: outputs(name) for name in payload.answer}, self.kind.model)


def triton_code(error: InferenceServerException) -> int:
    """The gRPC status number in an error of tritonclient, which has it as text, or an HTTP status."""
    status = str(error.status() or "").removeprefix("StatusCode.")
    return NUMBERS.get(HTTP_CODES.get(status, status), UNKNOWN)


class SluiceUnary(Sender):
    """ModelInfer with the project's client."""

    def __init__(self, kind: Kind, payloads: Sequence[Payload], address: str) -> None:
        super().__init__(kind, payloads)
        self._client = Client(address, retry=NO_RETRIES)

    def call(self, index: int, deadline_s: float) -> Outputs:
        """As `Sender`."""
        result = self._client.infer(
            self.kind.model, self.payloads[index].inputs, priority=self.kind.priority, deadline_s=deadline_s
        )
        return result.outputs.get

    def close(self) -> None:
        """As `Sender`."""
        self._client.close()


class SluiceStream(Sender):
    """ModelStreamInfer with the project's client: all requests are in one stream, which is opened anew if it ends.

    The deadline is told to nobody: it ends the waiting here.
    """

    def __init__(self, kind: Kind, payloads: Sequence[Payload], address: str) -> None:
        super().__init__(kind, payloads)
        self._client = Client(address, retry=NO_RETRIES)
        self._stream = self._client.stream()

    def call(self, index: int, deadline_s: float) -> Outputs:
        """As `Sender`."""
        if not self._stream.is_open:
            self._stream = self._client.stream()
        result = self._stream.infer(
            self.kind.model, self.payloads[index].inputs, priority=self.kind.priority, deadline_s=deadline_s
        )
        return result.outputs.get

    def close(self) -> None:
        """As `Sender`."""
        self._stream.close(0.0)
        self._client.close()


class SharedMemorySender(Sender):
    """ModelInfer with tensors in system shared memory.

    One region holds the inputs of all payloads, another a slot of outputs for each request that may be open. A request
    that was given up may still write into its slot: nobody reads outputs while others are open.
    """

    def __init__(self, kind: Kind, payloads: Sequence[Payload], max_in_flight: int) -> None:
        super().__init__(kind, payloads)
        self._slot_bytes = answer_bytes(kind, payloads)
        self._all_slots_bytes = self._slot_bytes * max_in_flight
        self._free = list(range(max_in_flight))

    def call(self, index: int, deadline_s: float) -> Outputs:
        """As `Sender`; the outputs are to be read before the next call."""
        slot = self._free.pop()
        try:
            return self._call_with(index, self._offsets(index, slot), deadline_s)
        finally:
            self._free.append(slot)

    @abstractmethod
    def _call_with(self, index: int, offsets: Mapping[str, int], deadline_s: float) -> Outputs:
        """As `call`, with the outputs at these offsets of their region."""

    def _offsets(self, index: int, slot: int) -> dict[str, int]:
        found, offset = {}, slot * self._slot_bytes
        for name, array in self.payloads[index].answer.items():
            found[name] = offset
            offset += array.nbytes
        return found


class SluiceShared(SharedMemorySender):
    """By the project's client."""

    def __init__(self, kind: Kind, payloads: Sequence[Payload], address: str, max_in_flight: int) -> None:
        super().__init__(kind, payloads, max_in_flight)
        with ExitStack() as opened:
            self._client = opened.enter_context(Client(address, retry=NO_RETRIES))
            self._inputs = self._place_inputs(opened)
            self._outputs = opened.enter_context(self._client.shared_memory(self._all_slots_bytes))
            self._opened = opened.pop_all()

    def _call_with(self, index: int, offsets: Mapping[str, int], deadline_s: float) -> Outputs:
        answer = self.payloads[index].answer
        result = self._client.infer(
            self.kind.model,
            self._inputs[index],
            outputs={name: self._outputs.room(answer[name].nbytes, offset) for name, offset in offsets.items()},
            priority=self.kind.priority,
            deadline_s=deadline_s,
        )
        return result.outputs.get

    def close(self) -> None:
        """As `Sender`."""
        self._opened.close()

    def _place_inputs(self, opened: ExitStack) -> list[dict[str, SharedTensor]]:
        arrays = [payload.inputs for payload in self.payloads]
        size_bytes = sum(array.nbytes for each in arrays for array in each.values())
        memory = opened.enter_context(self._client.shared_memory(size_bytes))
        placed: list[dict[str, SharedTensor]] = []
        offset = 0
        for each in arrays:
            placed.append({})
            for name, array in each.items():
                tensor = placed[-1][name] = memory.write(array, offset)
                offset = tensor.end
        return placed


class TritonUnary(Sender):
    """ModelInfer with tritonclient; its inputs are made once."""

    def __init__(self, kind: Kind, payloads: Sequence[Payload], address: str) -> None:
        super().__init__(kind, payloads)
        self._grpc: Any = importlib.import_module("tritonclient.grpc")
        self._client = self._grpc.InferenceServerClient(address)
        self._inputs = [triton_inputs(self._grpc, payload.inputs) for payload in payloads]

    def call(self, index: int, deadline_s: float) -> Outputs:
        """As `Sender`."""
        outputs: Outputs = self._client.infer(
            self.kind.model, self._inputs[index], priority=self.kind.priority, client_timeout=deadline_s
        ).as_numpy
        return outputs

    def close(self) -> None:
        """As `Sender`."""
        self._client.close()


class TritonStream(Sender):
    """ModelStreamInfer with tritonclient: all requests are messages of one stream, which is opened anew if it ends.

    Errors come without the id of their request. Answers of a stream come in the order of their requests, so an error
    ends the oldest request. The deadline is told to nobody: it ends the waiting here.
    """

    def __init__(self, kind: Kind, payloads: Sequence[Payload], address: str) -> None:
        super().__init__(kind, payloads)
        self._grpc: Any = importlib.import_module("tritonclient.grpc")
        self._client = self._grpc.InferenceServerClient(address)
        self._inputs = [triton_inputs(self._grpc, payload.inputs) for payload in payloads]
        self._numbers = count()
        self._waiting: OrderedDict[str, AsyncResult[Any]] = OrderedDict()
        self._client.start_stream(self._ended)

    def call(self, index: int, deadline_s: float) -> Outputs:
        """As `Sender`."""
        request_id = str(next(self._numbers))
        waiting: AsyncResult[Any] = AsyncResult()
        self._waiting[request_id] = waiting
        self._client.async_stream_infer(
            self.kind.model, self._inputs[index], request_id=request_id, priority=self.kind.priority
        )
        try:
            outputs: Outputs = waiting.get(timeout=deadline_s).as_numpy
        except gevent.Timeout:
            raise Late from None
        return outputs

    def close(self) -> None:
        """As `Sender`."""
        self._client.stop_stream(cancel_requests=True)
        self._client.close()

    def _ended(self, result: Any, error: InferenceServerException | None) -> None:
        if error is None:
            # A request that was given up stays, as its answer has its turn: nobody looks at that.
            self._waiting.pop(result.get_response().id).set(result)
        elif error.status() is None:
            self._waiting.popitem(last=False)[1].set_exception(error)
        else:
            waiting, self._waiting = self._waiting, OrderedDict()
            for each in waiting.values():
                each.set_exception(error)
            gevent.spawn(self._reopen)

    def _reopen(self) -> None:
        self._client.stop_stream(cancel_requests=True)
        self._client.start_stream(self._ended)


class TritonRest(Sender):
    """POST .../infer with tritonclient, tensors in binary; the deadline is told to nobody: it ends the waiting here."""

    def __init__(self, kind: Kind, payloads: Sequence[Payload], address: str, max_in_flight: int) -> None:
        super().__init__(kind, payloads)
        self._http: Any = importlib.import_module("tritonclient.http")
        self._client = self._http.InferenceServerClient(
            address, concurrency=max_in_flight, network_timeout=NO_DEADLINE_S
        )
        self._inputs = [triton_inputs(self._http, payload.inputs) for payload in payloads]

    def call(self, index: int, deadline_s: float) -> Outputs:
        """As `Sender`."""
        with gevent.Timeout(deadline_s, Late):
            outputs: Outputs = self._client.infer(
                self.kind.model, self._inputs[index], priority=self.kind.priority
            ).as_numpy
        return outputs

    def close(self) -> None:
        """As `Sender`."""
        self._client.close()


class TritonShared(SharedMemorySender):
    """By tritonclient."""

    def __init__(self, kind: Kind, payloads: Sequence[Payload], address: str, max_in_flight: int) -> None:
        super().__init__(kind, payloads, max_in_flight)
        self._grpc: Any = importlib.import_module("tritonclient.grpc")
        self._memory: Any = importlib.import_module("tritonclient.utils.shared_memory")
        self._client = self._grpc.InferenceServerClient(address)
        self._regions: dict[str, Any] = {}
        self._name = f"sluice-load-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._inputs = self._place_inputs()
        self._output_region = self._region("out", self._all_slots_bytes)

    def _call_with(self, index: int, offsets: Mapping[str, int], deadline_s: float) -> Outputs:
        answer = self.payloads[index].answer
        outputs = []
        for name, offset in offsets.items():
            output = self._grpc.InferRequestedOutput(name)
            output.set_shared_memory(self._output_region, answer[name].nbytes, offset)
            outputs.append(output)
        result = self._client.infer(
            self.kind.model,
            self._inputs[index],
            outputs=outputs,
            priority=self.kind.priority,
            client_timeout=deadline_s,
        )
        handle = self._regions[self._output_region]

        def read(name: str) -> Array | None:
            shape = tuple(result.get_output(name).shape)
            found: Array = self._memory.get_contents_as_numpy(handle, answer[name].dtype, shape, offsets[name])
            return found

        return read

    def close(self) -> None:
        """As `Sender`."""
        for name, handle in self._regions.items():
            self._client.unregister_system_shared_memory(name)
            self._memory.destroy_shared_memory_region(handle)
        self._client.close()

    def _region(self, what: str, size_bytes: int) -> str:
        name = f"{self._name}-{what}"
        self._regions[name] = self._memory.create_shared_memory_region(name, name, size_bytes, create_only=True)
        self._client.register_system_shared_memory(name, f"/{name}", size_bytes)
        return name

    def _place_inputs(self) -> list[list[Any]]:
        arrays = [list(payload.inputs.items()) for payload in self.payloads]
        region = self._region("in", sum(array.nbytes for each in arrays for _, array in each))
        placed, offset = [], 0
        for each in arrays:
            placed.append(triton_inputs(self._grpc, {}))
            for name, array in each:
                self._memory.set_shared_memory_region(self._regions[region], [array], offset)
                tensor = self._grpc.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
                tensor.set_shared_memory(region, array.nbytes, offset)
                placed[-1].append(tensor)
                offset += array.nbytes
        return placed


def answer_bytes(kind: Kind, payloads: Sequence[Payload]) -> int:
    """What the largest answer takes in shared memory. PayloadError when the golden sample has none."""
    largest = max(sum(array.nbytes for array in payload.answer.values()) for payload in payloads)
    if not largest:
        raise PayloadError(f"{kind.golden} has no array for any output of {kind.model!r}, which shared memory needs")
    return largest


def triton_inputs(module: Any, inputs: Mapping[str, Array]) -> list[Any]:
    """The arrays as InferInputs of tritonclient.grpc or tritonclient.http, with their data."""
    made = []
    for name, array in inputs.items():
        tensor = module.InferInput(name, array.shape, np_to_triton_dtype(array.dtype))
        tensor.set_data_from_numpy(array)
        made.append(tensor)
    return made


def open_sender(kind: Kind, payloads: Sequence[Payload], address: str, http_address: str, max_in_flight: int) -> Sender:
    """The sender for a kind of request. `address` is HOST:PORT of gRPC, `http_address` of REST."""
    if kind.protocol == UNARY:
        return (SluiceUnary if kind.client == SLUICE else TritonUnary)(kind, payloads, address)
    if kind.protocol == STREAM:
        return (SluiceStream if kind.client == SLUICE else TritonStream)(kind, payloads, address)
    if kind.protocol == SHARED_MEMORY:
        return (SluiceShared if kind.client == SLUICE else TritonShared)(kind, payloads, address, max_in_flight)
    assert kind.protocol == REST
    return TritonRest(kind, payloads, http_address, max_in_flight)
