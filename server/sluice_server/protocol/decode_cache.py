"""Remembers the heads of valid requests: one with the head of an earlier one is neither parsed nor checked again.

protobuf's writers put fields in the order of their numbers, so the raw tensors, field 7, come last:

    model, version | id | parameters, inputs, outputs | tag, length, tensor | tag, length, tensor ...

A head is all of it but the id and the tensors. It is remembered with what `decode` made of it. A message of the same
length that has the same bytes in all of these places differs in nothing that a check looks at, so it is as valid, and
its tensors are at the same offsets. What makes that true:

* protobuf merges what the parts of a message say, so each part is to be valid on its own, and only the id's may hold an
  id. No tensor is in the head: the parts behind it are as many as there are tensors.
* Every check but one looks at the head and at the sizes of the tensors. The one is that of the elements of BYTES:
  requests with BYTES are never remembered, nor are those with typed contents.
* What a request has in shared memory may be gone the next time: such requests are never remembered. Nor are those for
  classes, which are few, and those of sequences, whose heads differ by the sequence.
* The checks depend on the model's interface. A head is known for one interface object; when the model that is served by
  this name has another one, the head is forgotten.
* An id is to be UTF-8. Only ASCII passes here; any other id is for the parser.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from google.protobuf.message import DecodeError

from sluice_proto import wire
from sluice_proto.grpc_service_pb2 import ModelInferRequest
from sluice_server.execution.request import InferRequest, PrioritizedRequest
from sluice_server.protocol import shared_memory
from sluice_server.protocol.decode import NS_PER_US, ParsedRequest, check_parameters, deadline_of, decode

if TYPE_CHECKING:
    from sluice_server.protocol.interface import ModelInterface
    from sluice_server.protocol.shared_memory import SharedMemory
    from sluice_server.transport.call import Call

KINDS_MAX = 1024
"""Kinds of messages, by length and model, of which heads are kept: more than the shapes and lengths of id in use. With
more all are forgotten, and those in use are soon known again."""

HEADS_PER_KIND_MAX = 4
"""Heads of one kind are tried one after the other, some 0.1 us each; the oldest makes room."""

HEAD_BYTES_MAX = 1024
"""A dozen tensors. With the other two it bounds what strangers can have remembered, to some megabytes."""

LEARNING_STRIDE = 17
"""Of the requests that are not known every 17th is learned, which takes about as long as decoding it: clients whose
heads are all different pay a few percent. A prime number, so that a simple rotation of requests hides none of them."""

_ID_FIELD = ModelInferRequest.ID_FIELD_NUMBER
_RAW_FIELD = ModelInferRequest.RAW_INPUT_CONTENTS_FIELD_NUMBER


class _Layout(NamedTuple):
    """Where what stands in a message: (offset, bytes) of the head's parts, the id's place, the tensors' offsets."""

    pieces: tuple[tuple[int, bytes], ...]
    id_start: int
    id_stop: int
    offsets: tuple[int, ...]


class KnownHead:
    """What the requests of one head have in common. Immutable; keeps neither the first one's call nor its message."""

    __slots__ = (
        "_id_start",
        "_id_stop",
        "_key",
        "_output_names",
        "_pieces",
        "_rows",
        "_tensors",
        "_timeout_us",
        "interface",
        "model_name",
        "model_version",
    )

    def __init__(
        self, layout: _Layout, parsed: ParsedRequest, interface: ModelInterface, request: InferRequest
    ) -> None:
        """`request` is what `decode` made of `parsed`."""
        self.interface = interface
        self.model_name = parsed.model_name
        self.model_version = parsed.model_version
        self._pieces, self._id_start, self._id_stop, offsets = layout
        self._tensors = tuple(
            (name, array.shape, array.dtype, offset)
            for (name, array), offset in zip(request.arrays.items(), offsets, strict=True)
        )
        self._output_names = request.output_names
        self._rows = request.rows
        self._key = request.key
        self._timeout_us = check_parameters(parsed.message.parameters).timeout_us

    def fits(self, data: bytes | memoryview) -> bool:
        """Whether a message of the right length has this head."""
        if isinstance(data, memoryview):
            return (
                all(data[offset : offset + len(piece)] == piece for offset, piece in self._pieces)
                and bytes(data[self._id_start : self._id_stop]).isascii()
            )
        for offset, piece in self._pieces:
            if not data.startswith(piece, offset):
                return False
        return not self._id_stop or data[self._id_start : self._id_stop].isascii()

    def request(self, call: Call) -> InferRequest:
        """What `decode` makes of a call whose message fits."""
        message = call.message
        arrays = {}
        for name, shape, dtype, offset in self._tensors:
            arrays[name] = np.ndarray(shape, dtype, message, offset)
        request_id = str(memoryview(message)[self._id_start : self._id_stop], "ascii") if self._id_stop else ""
        deadline_ns = deadline_of(call, self._timeout_us) if self._timeout_us else call.deadline_ns
        return InferRequest(call, request_id, arrays, self._output_names, self._rows, self._key, deadline_ns)


class KnownPrioritizedHead(KnownHead):
    """The same of a model whose queue decides what a priority and a timeout mean."""

    __slots__ = ("_priority", "_timeout_ns")

    def __init__(
        self, layout: _Layout, parsed: ParsedRequest, interface: ModelInterface, request: InferRequest
    ) -> None:
        super().__init__(layout, parsed, interface, request)
        self._priority, timeout_us = check_parameters(parsed.message.parameters)
        self._timeout_ns = timeout_us * NS_PER_US
        # It is no deadline here.
        self._timeout_us = 0

    def request(self, call: Call) -> InferRequest:
        """What `decode` makes of a call whose message fits."""
        plain = super().request(call)
        return PrioritizedRequest(
            call, plain.id, plain.arrays, plain.output_names, plain.rows, plain.key, call.deadline_ns
        ).ask(self._priority, self._timeout_ns)


class DecodeCache:
    """Parses and decodes requests, those with known heads by a few comparisons. For one thread: the intake's."""

    __slots__ = ("_heads", "_learning_stride", "_regions", "_unknown")

    def __init__(self, learning_stride: int = LEARNING_STRIDE, regions: SharedMemory = shared_memory.OFF) -> None:
        self._regions = regions
        self._learning_stride = learning_stride
        self._heads: dict[tuple[int, bytes], tuple[KnownHead, ...]] = {}
        self._unknown = 0

    def parse(self, message: Any) -> KnownHead | ParsedRequest:
        """Find the model that a message is for; `InvalidArgument` when it is not a ModelInferRequest."""
        data = message if type(message) is bytes else memoryview(message)
        heads = self._heads.get(_kind_of(data))
        if heads is not None:
            for head in heads:
                if head.fits(data):
                    return head
        return ParsedRequest(data)

    def decode(self, parsed: KnownHead | ParsedRequest, interface: ModelInterface, call: Call) -> InferRequest:
        """As `decode.decode`; `parsed` is what `parse` gave for the call's message."""
        if isinstance(parsed, KnownHead):
            if parsed.interface is interface:
                return parsed.request(call)
            self._heads.pop(_kind_of(memoryview(call.message)), None)
            parsed = ParsedRequest(call.message)
        request = decode(parsed, interface, call, self._regions)
        if request.shared is not None or request.classes is not None or interface.sequenced:
            return request
        if self._unknown % self._learning_stride == 0:
            self._learn(parsed, interface, request)
        self._unknown += 1
        return request

    def _learn(self, parsed: ParsedRequest, interface: ModelInterface, request: InferRequest) -> None:
        data = memoryview(request.call.message)
        layout = _layout_of(data, parsed, interface)
        if layout is None:
            return
        kind = _kind_of(data)
        if kind not in self._heads and len(self._heads) >= KINDS_MAX:
            self._heads.clear()
        earlier = self._heads.get(kind, ())
        known = KnownPrioritizedHead if interface.prioritizes else KnownHead
        self._heads[kind] = (known(layout, parsed, interface, request), *earlier[: HEADS_PER_KIND_MAX - 1])


def _kind_of(data: bytes | memoryview) -> tuple[int, bytes]:
    """What is cheap to read and tells most heads apart: the length, and the first field, which is the model's name.

    It is just some of the bytes when the name has 128 or more, or when something else comes first.
    """
    first = data[: data[1] + 2] if len(data) > 1 else b""
    return (len(data), first if isinstance(first, bytes) else bytes(first))


def _layout_of(data: memoryview, parsed: ParsedRequest, interface: ModelInterface) -> _Layout | None:
    """The layout of a valid message; None where it does not follow from the head, or where that is not certain."""
    message, raws = parsed.message, parsed.raws
    if len(raws) != len(message.inputs) or not all(
        interface.inputs[item.name].dtype.itemsize for item in message.inputs
    ):
        return None
    prefixes = [wire.length_delimited(_RAW_FIELD, len(raw)) for raw in raws]
    head_bytes = len(data) - sum(map(len, prefixes)) - sum(map(len, raws))
    if not 0 <= head_bytes <= HEAD_BYTES_MAX:
        return None
    request_id = message.id.encode()
    id_prefix = wire.length_delimited(_ID_FIELD, len(request_id)) if request_id else b""
    before, after = _cut(bytes(data[:head_bytes]), id_prefix + request_id)
    if not (_stands_alone(before) and _stands_alone(after)):
        return None
    # What is fixed, and behind each of it how much is not.
    parts = [(before + id_prefix, len(request_id)), (after, 0), *zip(prefixes, map(len, raws), strict=True)]
    pieces, holes = [], []
    offset = 0
    for fixed, hole_bytes in parts:
        pieces.append((offset, fixed))
        offset += len(fixed)
        holes.append(offset)
        offset += hole_bytes
    if any(data[offset : offset + len(piece)] != piece for offset, piece in pieces):
        return None
    id_start = holes[0] if request_id else 0
    return _Layout(_joined(pieces), id_start, id_start + len(request_id), tuple(holes[2:]))


def _cut(head: bytes, id_field: bytes) -> tuple[bytes, bytes]:
    """The parts of a head before and behind the id; all of it and nothing when there is no id."""
    before, _, after = head.partition(id_field) if id_field else (head, b"", b"")
    return before, after


def _stands_alone(part: bytes) -> bool:
    """Whether part of a message is whole fields without an id among them."""
    try:
        return not ModelInferRequest.FromString(part).id
    except DecodeError:
        return False


def _joined(pieces: list[tuple[int, bytes]]) -> tuple[tuple[int, bytes], ...]:
    """Pieces with those that follow each other directly made one, as each costs a comparison."""
    joined = [(0, b"")]
    for offset, piece in pieces:
        start, before = joined[-1]
        if start + len(before) == offset:
            joined[-1] = (start, before + piece)
        else:
            joined.append((offset, piece))
    return tuple(joined)
