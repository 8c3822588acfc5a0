"""The wire format of the inference protocol: generated messages, and tensors between numpy and the wire."""

__all__ = ["POOL", "grpc_service_pb2", "model_config_pb2"]

from sluice_proto import grpc_service_pb2, model_config_pb2
from sluice_proto.pool import POOL
