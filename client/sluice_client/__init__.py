"""Python client for Sluice and other servers of the Triton gRPC protocol, blocking and for asyncio."""

from importlib.metadata import version

from sluice_client.aio import AsyncClient
from sluice_client.aio_stream import AsyncInferStream
from sluice_client.client import Client
from sluice_client.errors import (
    Aborted,
    AlreadyExists,
    Cancelled,
    ClientClosed,
    ClientError,
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    Internal,
    InvalidArgument,
    InvalidRequest,
    InvalidResponse,
    NotFound,
    NotReady,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    ServerError,
    Unauthenticated,
    Unavailable,
    Unimplemented,
    Unknown,
)
from sluice_client.flow import Timing
from sluice_client.results import (
    BatchStatistics,
    Duration,
    ModelIndex,
    ModelMetadata,
    ModelStatistics,
    Result,
    ServerMetadata,
    TensorMetadata,
)
from sluice_client.settings import RetryPolicy, Tls
from sluice_client.shared_memory import SharedMemory, SharedRoom, SharedTensor
from sluice_client.stream import InferStream

__version__ = version("sluice")

__all__ = [
    "Aborted",
    "AlreadyExists",
    "AsyncClient",
    "AsyncInferStream",
    "BatchStatistics",
    "Cancelled",
    "Client",
    "ClientClosed",
    "ClientError",
    "DataLoss",
    "DeadlineExceeded",
    "Duration",
    "FailedPrecondition",
    "InferStream",
    "Internal",
    "InvalidArgument",
    "InvalidRequest",
    "InvalidResponse",
    "ModelIndex",
    "ModelMetadata",
    "ModelStatistics",
    "NotFound",
    "NotReady",
    "OutOfRange",
    "PermissionDenied",
    "ResourceExhausted",
    "Result",
    "RetryPolicy",
    "ServerError",
    "ServerMetadata",
    "SharedMemory",
    "SharedRoom",
    "SharedTensor",
    "TensorMetadata",
    "Timing",
    "Tls",
    "Unauthenticated",
    "Unavailable",
    "Unimplemented",
    "Unknown",
    "__version__",
]
