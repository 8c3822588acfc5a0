"""The wire format of the inference protocol: generated messages, and tensors between numpy and the wire."""

__all__ = [
    "POOL",
    "BytesElementCount",
    "BytesError",
    "BytesTruncatedBody",
    "BytesTruncatedLength",
    "ContentsError",
    "InvalidShape",
    "NoContentsField",
    "ProtoError",
    "SeveralContentsFields",
    "SizeMismatch",
    "TensorError",
    "UnsupportedArray",
    "UnsupportedElement",
    "WireError",
    "WrongContentsField",
    "errors",
    "grpc_service_pb2",
    "model_config_pb2",
    "tensors",
    "wire",
]

from sluice_proto import errors, grpc_service_pb2, model_config_pb2, tensors, wire
from sluice_proto.errors import (
    BytesElementCount,
    BytesError,
    BytesTruncatedBody,
    BytesTruncatedLength,
    ContentsError,
    InvalidShape,
    NoContentsField,
    ProtoError,
    SeveralContentsFields,
    SizeMismatch,
    TensorError,
    UnsupportedArray,
    UnsupportedElement,
    WireError,
    WrongContentsField,
)
from sluice_proto.pool import POOL
