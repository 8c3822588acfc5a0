"""Splitting a message against protobuf's own parser."""

from __future__ import annotations

from google.protobuf.message import DecodeError

from sluice_proto import WireError
from sluice_proto.grpc_service_pb2 import ModelInferRequest
from sluice_proto.wire import split_raw


def joined(message: bytes) -> ModelInferRequest:
    """What the two parts of a split message mean together."""
    head, raws = split_raw(message)
    request = ModelInferRequest.FromString(head)
    assert not request.raw_input_contents
    request.raw_input_contents.extend(bytes(raw) for raw in raws)
    return request


def agrees_with_parser(message: bytes) -> None:
    """protobuf's own parser is the judge, except that groups are refused."""
    try:
        parsed = ModelInferRequest.FromString(message)
    except DecodeError:
        parsed = None
    refusal, split = None, None
    try:
        split = joined(message)
    except (WireError, DecodeError) as error:
        refusal = error
    groups = isinstance(refusal, WireError) and "group" in refusal.reason
    assert parsed is None or groups or split == parsed
    assert not isinstance(refusal, WireError) or 0 <= refusal.offset <= len(message)
