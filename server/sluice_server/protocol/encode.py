"""From the outputs of a batch to the bytes of its ModelInferResponses, as parts that a transport need not join.

A response is an id, everything but the tensors (`head`), and each raw tensor behind its own field prefix; protobuf
allows fields in any order. For one model the head depends on the shapes of the outputs only, so that it is made once
for each combination of shapes and kept. An output of numbers is cut as bytes: the rows of one request are a slice of
it. Elements of BYTES have no fixed size, so these outputs are cut as arrays.
"""

from __future__ import annotations

from abc import abstractmethod
from itertools import accumulate, repeat
from typing import TYPE_CHECKING, TypeAlias

from sluice_proto import tensors, wire
from sluice_proto.grpc_service_pb2 import ModelInferResponse
from sluice_server.execution.shared_memory import write_outputs

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    import numpy as np
    from typing_extensions import Buffer

    from sluice_server.execution.request import InferRequest
    from sluice_server.execution.shared_memory import Window
    from sluice_server.protocol.interface import ModelInterface

Raw: TypeAlias = "bytes | memoryview | np.ndarray"
"""A raw tensor; its len() is its size in bytes. All are buffers; numpy's stubs know of that from Python 3.12 on."""

HEADS_MAX = 1024
"""Kept heads per model: more than the batch sizes in use; a model whose every answer has a new shape stays bounded."""

_ID_FIELD = ModelInferResponse.DESCRIPTOR.fields_by_name["id"].number
_RAW_FIELD = ModelInferResponse.DESCRIPTOR.fields_by_name["raw_output_contents"].number


class Encoder:
    """Encodes the answers of one model version; used by all of its instance threads at once."""

    __slots__ = ("_has_other_shapes", "_has_text", "_heads", "_interface")

    def __init__(self, interface: ModelInterface) -> None:
        self._interface = interface
        self._has_other_shapes = interface.reshapes_outputs
        self._has_text = any(not output.dtype.itemsize for output in interface.outputs.values())
        self._heads: dict[tuple[object, ...], bytes] = {}

    def __call__(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[Buffer]]:
        """The parts of each answer, in the order of the batch.

        `arrays` are the outputs that the batch asks for, with the rows of all its requests in order; those of a batch
        of one are its own, whatever their shapes. A BYTES array has elements of `bytes`.
        """
        names = batch[0].output_names
        if self._has_other_shapes:
            arrays = self._interface.to_client(names, arrays)
        first = batch[0]
        if first.classes is not None or (first.shared is not None and first.shared.outputs):
            payloads = self._encode_each(batch, arrays)
            return [answer_of(request, payload) for request, payload in zip(batch, payloads, strict=True)]
        if len(batch) == 1:
            return [self._encode_one(names, batch[0].id, arrays)]
        rows = [request.rows for request in batch]
        same_sizes = not self._has_text and rows.count(rows[0]) == len(rows)
        # Each column is one part of all answers.
        columns: list[Iterable[Buffer]] = []
        if any(ids := [request.id for request in batch]):
            columns.append([_id_field(request_id) for request_id in ids])
        shapes = [array.shape[1:] for array in arrays]
        heads = {each: self._head(names, [(each, *shape) for shape in shapes]) for each in set(rows)}
        columns.append([heads[each] for each in rows])
        for name, array in zip(names, arrays, strict=True):
            raws = self._cut(name, array, rows)
            columns += (_raw_prefixes(raws, same_sizes=same_sizes), raws)  # type: ignore[arg-type] # as `Raw` says
        return [list(parts) for parts in zip(*columns, strict=True)]

    def _encode_one(self, names: tuple[str, ...], request_id: str, arrays: Sequence[np.ndarray]) -> list[Buffer]:
        parts: list[Buffer] = [_id_field(request_id)] if request_id else []
        parts.append(self._head(names, [array.shape for array in arrays]))
        for array in arrays:
            raw = tensors.to_buffer(array)
            parts += (wire.length_delimited(_RAW_FIELD, len(raw)), raw)  # type: ignore[arg-type] # as `Raw` says
        return parts

    def payloads(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[Buffer]]:
        """What `answer_of` makes each answer of, for the same arguments as a call: all tensors in it, and no id.

        The parts are the head, and for each output a prefix and the raw tensor.
        """
        if self._has_other_shapes:
            arrays = self._interface.to_client(batch[0].output_names, arrays)
        return self._encode_each(batch, arrays)

    def _encode_each(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[Buffer]]:
        """As `payloads`, one after the other: with classes in place of values, where a request asks for them."""
        payloads = []
        start = 0
        for request in batch:
            own = arrays
            if len(batch) > 1:
                own = [array[start : start + request.rows] for array in arrays]
                start += request.rows
            names, classes = request.output_names, request.classes or {}
            if classes:
                own = [
                    classes[name].of(each) if name in classes else each for name, each in zip(names, own, strict=True)
                ]
            parts: list[Buffer] = [self._head(names, [array.shape for array in own], classes)]
            for raw in map(tensors.to_buffer, own):
                parts += (wire.length_delimited(_RAW_FIELD, len(raw)), raw)  # type: ignore[arg-type] # as `Raw` says
            payloads.append(parts)
        return payloads

    def _cut(self, name: str, array: np.ndarray, rows: Sequence[int]) -> list[Raw]:
        """The raw tensors of one output, for each request its own."""
        stops = list(accumulate(rows))
        bounds = zip([0, *stops], stops, strict=False)
        if not self._interface.outputs[name].dtype.itemsize:
            return [tensors.to_buffer(array[start:stop]) for start, stop in bounds]
        data = tensors.to_buffer(array)
        row_bytes = len(data) // stops[-1]
        flat = data if isinstance(data, bytes) else memoryview(data)  # type: ignore[arg-type] # as `Raw` says
        return [flat[start * row_bytes : stop * row_bytes] for start, stop in bounds]

    def _head(
        self, names: tuple[str, ...], shapes: Sequence[tuple[int, ...]], classified: Collection[str] = ()
    ) -> bytes:
        """The answer without its id and its raw tensors; `classified` are outputs that have classes for values."""
        key = (names, *shapes, *classified)
        head = self._heads.get(key)
        if head is None:
            interface = self._interface
            response = ModelInferResponse(model_name=interface.name, model_version=interface.version)
            for name, shape in zip(names, shapes, strict=True):
                datatype = "BYTES" if name in classified else interface.outputs[name].dtype.name
                response.outputs.add(name=name, datatype=datatype, shape=shape)
            if len(self._heads) >= HEADS_MAX:
                self._heads.clear()
            head = self._heads[key] = response.SerializeToString()
        return head


class CuttingEncoder(Encoder):
    """Encodes the answers of batches whose outputs are not just the rows of the requests one behind the other."""

    __slots__ = ()

    @abstractmethod
    def apart(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        """Each request's own outputs, in the order of the batch; Internal when they are not as declared."""

    def __call__(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[Buffer]]:
        """The parts of each answer, in the order of the batch; raises what `apart` does."""
        each = zip(batch, self.apart(batch, arrays), strict=True)
        return [super(CuttingEncoder, self).__call__([request], own)[0] for request, own in each]

    def payloads(self, batch: Sequence[InferRequest], arrays: Sequence[np.ndarray]) -> list[list[Buffer]]:
        """As the encoder's, of the arrays that are cut."""
        each = zip(batch, self.apart(batch, arrays), strict=True)
        return [super(CuttingEncoder, self).payloads([request], own)[0] for request, own in each]


def answer_of(request: InferRequest, payload: bytes | Sequence[Buffer]) -> list[Buffer]:
    """A request's own answer: the payload with its id, and without the tensors that it has in shared memory.

    Those are written there first, all of them or none. The payload is one of `Encoder.payloads`, or its bytes.
    """
    parts: list[Buffer] = [_id_field(request.id)] if request.id else []
    if request.shared is not None and request.shared.outputs:
        payload = _placed(request.output_names, request.shared.outputs, payload)
    if isinstance(payload, bytes):
        parts.append(payload)
    else:
        parts += payload
    return parts


def _placed(
    names: tuple[str, ...], windows: Mapping[str, Window], payload: bytes | Sequence[Buffer]
) -> Sequence[Buffer]:
    """Write what has a window there, and leave it empty in the payload."""
    if isinstance(payload, bytes):
        response = ModelInferResponse.FromString(payload)
        raws: list[Buffer] = list(response.raw_output_contents)
        del response.raw_output_contents[:]
        head: Buffer = response.SerializeToString()
    else:
        head, raws = payload[0], list(payload[2::2])
    write_outputs(windows, {name: raw for name, raw in zip(names, raws, strict=True) if name in windows})
    parts = [head]
    for name, data in zip(names, raws, strict=True):
        raw = b"" if name in windows else data
        parts += (wire.length_delimited(_RAW_FIELD, len(raw)), raw)  # type: ignore[arg-type] # as `Raw` says
    return parts


def _id_field(request_id: str) -> bytes:
    encoded = request_id.encode()
    return wire.length_delimited(_ID_FIELD, len(encoded)) + encoded


def _raw_prefixes(raws: Sequence[Raw], *, same_sizes: bool) -> Iterable[bytes]:
    """What goes before each raw tensor."""
    if same_sizes:
        return repeat(wire.length_delimited(_RAW_FIELD, len(raws[0])), len(raws))
    return [wire.length_delimited(_RAW_FIELD, len(raw)) for raw in raws]
