"""Server reflection for the services that are served, from the project's own descriptor pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

from sluice_proto import grpc_service_pb2, model_config_pb2

if TYPE_CHECKING:
    import grpc.aio

_FILES = (model_config_pb2, grpc_service_pb2, health_pb2, reflection_pb2)


def add_reflection(server: grpc.aio.Server, service: str) -> None:
    """Let clients such as grpcurl list `service`, health and reflection itself, and read their descriptors.

    The files come from two pools (ours is private, the libraries' is the default one), so they are put into a third.
    """
    pool = DescriptorPool()
    for module in _FILES:
        pool.AddSerializedFile(module.DESCRIPTOR.serialized_pb)  # type: ignore[no-untyped-call]
    health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection((service, health, reflection.SERVICE_NAME), server, pool)
