"""Which sequence a request belongs to, from its parameters, with Triton's checks (compatibility, section 9)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_batching import Step
from sluice_server.errors import InvalidArgument

if TYPE_CHECKING:
    from sluice_proto.grpc_service_pb2 import ModelInferRequest
    from sluice_server.protocol.interface import ModelInterface

UINT64_MASK = (1 << 64) - 1
"""A sequence_id is unsigned, and its parameter is signed: a negative number stands for a large one, as in Triton."""

IDS_BELOW = {"UINT32": 1 << 32, "INT32": 1 << 31}
"""Numbers that a model of these types can be told of; in Triton two larger ones may look like one."""


def step_of(message: ModelInferRequest, interface: ModelInterface, rows: int) -> Step:
    """What a request with checked parameters is in its sequence; `InvalidArgument` when it cannot be part of one."""
    model = interface.name
    if rows != 1:
        raise InvalidArgument(
            f"inference request to model '{model}' must specify batch-size 1 due to requirements of sequence batcher,"
            f" got {rows}"
        )
    parameters = message.parameters
    sequence_id: int | str = 0
    if "sequence_id" in parameters:
        value = parameters["sequence_id"]
        is_text = value.WhichOneof("parameter_choice") == "string_param"
        sequence_id = value.string_param if is_text else value.int64_param & UINT64_MASK
    if not sequence_id:
        raise InvalidArgument(
            f"inference request to model '{model}' must specify a non-zero or non-empty correlation ID: set the"
            " parameter 'sequence_id'"
        )
    if interface.id_datatype:
        _check_id(sequence_id, interface, message.id)
    flags = {key: key in parameters and parameters[key].bool_param for key in ("sequence_start", "sequence_end")}
    return Step(sequence_id, start=flags["sequence_start"], end=flags["sequence_end"])


def _check_id(sequence_id: int | str, interface: ModelInterface, request_id: str) -> None:
    """Check that a model which wants to be told the id can be."""
    prefix = f"[request id: {request_id or '<id_unknown>'}] sequence batching control"
    wanted = interface.id_datatype
    if isinstance(sequence_id, str) != (wanted == "BYTES"):
        got = "BYTES" if isinstance(sequence_id, str) else "UINT64"
        raise InvalidArgument(
            f"{prefix} 'CORRID' data-type is '{got}', but model '{interface.name}' expects '{wanted}'"
        )
    if isinstance(sequence_id, int) and sequence_id >= IDS_BELOW.get(wanted, sequence_id + 1):
        raise InvalidArgument(
            f"{prefix} 'CORRID' is {sequence_id}, but model '{interface.name}' expects '{wanted}', which ends below"
            f" {IDS_BELOW[wanted]}"
        )
