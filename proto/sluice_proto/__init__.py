"""The wire format of the inference protocol: messages, tensors between numpy and the wire, and files of requests."""

__all__ = [
    "POOL",
    "BytesElementCount",
    "BytesError",
    "BytesTruncatedBody",
    "BytesTruncatedLength",
    "CaptureError",
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
    "capture",
    "errors",
    "grpc_service_pb2",
    "model_config_pb2",
    "tensors",
    "wire",
]

from sluice_proto import capture, errors, grpc_service_pb2, model_config_pb2, tensors, wire
from sluice_proto.errors import (
    BytesElementCount,
    BytesError,
    BytesTruncatedBody,
    BytesTruncatedLength,
    CaptureError,
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
