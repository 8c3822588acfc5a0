"""From arrays to the bytes of a ModelInferResponse, as parts that a transport may send without joining them.

A response is everything but the tensors (`head`), the id, and then each raw tensor behind its own field prefix;
protobuf allows fields in any order. For one model the head depends on the shapes of the outputs only, so that it is
made once for each combination of shapes and kept.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_proto import tensors, wire
from sluice_proto.grpc_service_pb2 import ModelInferResponse

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from typing_extensions import Buffer

    from sluice_server.protocol.interface import ModelInterface

HEADS_MAX = 1024
"""Kept heads per model: more than the batch sizes in use; a model whose every answer has a new shape stays bounded."""

_ID_FIELD = ModelInferResponse.DESCRIPTOR.fields_by_name["id"].number
_RAW_FIELD = ModelInferResponse.DESCRIPTOR.fields_by_name["raw_output_contents"].number


class Encoder:
    """Encodes the answers of one model version; used by all of its instance threads at once."""

    __slots__ = ("_has_units", "_heads", "_interface")

    def __init__(self, interface: ModelInterface) -> None:
        self._interface = interface
        self._has_units = any(output.unit for output in interface.outputs.values())
        self._heads: dict[tuple[object, ...], bytes] = {}

    def __call__(self, request_id: str, names: tuple[str, ...], arrays: Sequence[np.ndarray]) -> list[Buffer]:
        """The parts of the answer with these outputs, in this order; a BYTES array has elements of `bytes`."""
        if self._has_units:
            arrays = [self._as_seen(name, array) for name, array in zip(names, arrays, strict=True)]
        key = (names, *(array.shape for array in arrays))
        head = self._heads.get(key)
        if head is None:
            head = self._make_head(key, names, arrays)
        parts: list[Buffer] = [head]
        if request_id:
            encoded_id = request_id.encode()
            parts += (wire.length_delimited(_ID_FIELD, len(encoded_id)), encoded_id)
        for array in arrays:
            data = tensors.to_buffer(array)
            parts.append(wire.length_delimited(_RAW_FIELD, len(data)))
            parts.append(data)  # type: ignore[arg-type] # numpy's stubs know buffers from Python 3.12 on
        return parts

    def _as_seen(self, name: str, array: np.ndarray) -> np.ndarray:
        output = self._interface.outputs[name]
        graph_rank = len(output.dims) - 1 + (self._interface.max_batch_rows > 0)
        return array.reshape((*array.shape, 1)) if output.unit and array.ndim == graph_rank else array

    def _make_head(self, key: tuple[object, ...], names: tuple[str, ...], arrays: Sequence[np.ndarray]) -> bytes:
        interface = self._interface
        response = ModelInferResponse(model_name=interface.name, model_version=interface.version)
        for name, array in zip(names, arrays, strict=True):
            response.outputs.add(name=name, datatype=interface.outputs[name].dtype.name, shape=array.shape)
        if len(self._heads) >= HEADS_MAX:
            self._heads.clear()
        head: bytes = response.SerializeToString()
        self._heads[key] = head
        return head
