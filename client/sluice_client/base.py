"""What the sync and the asyncio client share: the constructor, the arguments of a call, and how they look in a log."""

import random as random_module
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Final, TypedDict, TypeVar

from sluice_client import operations
from sluice_client.channels import Channels
from sluice_client.endpoints import parse_endpoints
from sluice_client.errors import InvalidRequest
from sluice_client.exchange import StreamOptions, check_memory
from sluice_client.flow import CallOptions, Flow, Flows, Metadata, Operation, check_deadline
from sluice_client.operations import Inference
from sluice_client.results import Result
from sluice_client.settings import DEFAULT_DEADLINE_S, RetryPolicy, Tls
from sluice_client.shared_memory import SharedMemory

T = TypeVar("T")
MetadataLike = Mapping[str, str | bytes] | Iterable[tuple[str, str | bytes]]

_METADATA_KEY: Final = re.compile(r"[0-9a-z_.-]+")
_METADATA_TEXT: Final = re.compile(r"[\x20-\x7e]*")


class CallArguments(TypedDict, total=False):
    """The arguments that every call takes; each may be left out.

    `deadline_s`: seconds that the call may take, retries included. `metadata`: gRPC metadata besides the client's.
    `endpoint`: one of the client's endpoints, as it was given, to ask that server and no other.
    """

    deadline_s: float | None
    metadata: MetadataLike | None
    endpoint: str | None


class BaseClient:
    """The parts of a client that do no I/O.

    `endpoints`: one server or several, in any form that endpoints.py lists; calls are spread over the healthy ones.
    `deadline_s`: the deadline of a call that names none. `tls`: TLS for all endpoints. `retry`: what is retried
    (RetryPolicy(max_attempts=1) for nothing). `metadata`: sent with each call. `channel_options`: more gRPC channel
    arguments. `clock_ns` and `random`: for tests. Raises InvalidRequest when one of them cannot be used.
    """

    _grpcio: ClassVar[Any]  # the module that makes the channels: `grpc` or `grpc.aio`

    def __init__(
        self,
        endpoints: str | Sequence[str] = "localhost:8001",
        *,
        deadline_s: float = DEFAULT_DEADLINE_S,
        tls: Tls | None = None,
        retry: RetryPolicy | None = None,
        metadata: MetadataLike | None = None,
        channel_options: Iterable[tuple[str, Any]] = (),
        clock_ns: Callable[[], int] = time.monotonic_ns,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        check_deadline(deadline_s)
        self._endpoints = parse_endpoints(endpoints, tls=tls is not None)
        self._deadline_s = deadline_s
        self._metadata = read_metadata(metadata)
        self._channels = Channels(self._grpcio, self._endpoints, tls, tuple(channel_options))
        self._flows = Flows(self._endpoints, retry or RetryPolicy(), clock_ns, random)
        self._streams: set[Any] = set()  # the open ones of asyncio, whose channels need not end them when they close

    def __repr__(self) -> str:
        where = ", ".join(map(str, self._endpoints))
        state = "closed" if self._channels.is_closed else f"{self._flows.healthy()} of {len(self._endpoints)} healthy"
        return f"<{type(self).__name__} {where}; {state}>"

    @property
    def endpoints(self) -> tuple[str, ...]:
        """The endpoints as they were given."""
        return tuple(endpoint.text for endpoint in self._endpoints)

    def _call(
        self,
        operation: Operation[T],
        deadline_s: float | None = None,
        metadata: MetadataLike | None = None,
        endpoint: str | None = None,
    ) -> Flow[T]:
        """The flow of one call, its arguments checked; these are the CallArguments."""
        options = CallOptions(
            self._deadline_s if deadline_s is None else deadline_s,
            self._metadata + read_metadata(metadata),
            self._endpoint_number(endpoint),
        )
        return self._flows.call(operation, options)

    def _control(self, operation: Operation[T], call: CallArguments, deadline_s: float) -> Flow[T]:
        """The flow of a call that changes a server, which must be a certain one."""
        if len(self._endpoints) > 1 and call.get("endpoint") is None:
            raise InvalidRequest(
                f"this client has {len(self._endpoints)} endpoints, and this call changes one server: "
                "say which with endpoint="
            )
        if call.get("deadline_s") is None:
            call["deadline_s"] = deadline_s
        return self._call(operation, **call)

    def _infer(self, inference: Inference, call: CallArguments) -> Flow[Result]:
        """The flow of an inference, which goes where its shared memory is known."""
        if inference.endpoint:
            endpoint = call.get("endpoint")
            if endpoint is None:
                call["endpoint"] = inference.endpoint
            else:
                check_memory(inference, endpoint)
        return self._call(inference, **call)

    def _register(self, memory: SharedMemory, call: CallArguments) -> Flow[None]:
        return self._control(operations.register_memory(memory), call, self._deadline_s)

    def _unregister(self, memory: SharedMemory, call: CallArguments) -> Flow[None]:
        return self._control(operations.unregister_memory(memory), call, self._deadline_s)

    def _new_memory(self, size_bytes: int, call: CallArguments) -> SharedMemory:
        return SharedMemory(size_bytes, call.get("endpoint") or self.endpoints[0])

    def _stream_options(
        self, deadline_s: float | None = None, metadata: MetadataLike | None = None, endpoint: str | None = None
    ) -> StreamOptions:
        """What holds for a stream, its arguments checked; these are the CallArguments."""
        if deadline_s is not None:
            check_deadline(deadline_s)
        pairs = self._metadata + read_metadata(metadata)
        return StreamOptions(deadline_s, pairs, self._endpoint_number(endpoint), self._deadline_s)

    def _wait(
        self, timeout_s: float, model: str | None, version: str, metadata: MetadataLike | None, endpoint: str | None
    ) -> Flow[None]:
        operation = operations.server_ready() if model is None else operations.model_ready(model, version)
        what = "the server" if model is None else f"model {model!r}"
        metadata_pairs = self._metadata + read_metadata(metadata)
        return self._flows.wait_until_ready(what, operation, timeout_s, metadata_pairs, self._endpoint_number(endpoint))

    def _endpoint_number(self, endpoint: str | None) -> int | None:
        if endpoint is None:
            return None
        if endpoint not in self.endpoints:
            raise InvalidRequest(f"{endpoint!r} is not one of this client's endpoints: {', '.join(self.endpoints)}")
        return self.endpoints.index(endpoint)


def read_metadata(metadata: MetadataLike | None) -> Metadata:
    """gRPC metadata as pairs. InvalidRequest for a key or a value that gRPC would not send."""
    pairs = metadata.items() if isinstance(metadata, Mapping) else metadata or ()
    checked = []
    for key, value in pairs:
        if not isinstance(key, str) or not _METADATA_KEY.fullmatch(key) or key.startswith("grpc-"):
            raise InvalidRequest(
                f"metadata key {key!r}: use lower-case letters, digits, '-', '_' and '.'; 'grpc-' is taken"
            )
        if key.endswith("-bin"):
            if not isinstance(value, bytes):
                raise InvalidRequest(f"metadata {key!r} ends in -bin, so its value must be bytes")
        elif not isinstance(value, str) or not _METADATA_TEXT.fullmatch(value):
            raise InvalidRequest(
                f"metadata {key!r} must be a str of printable ASCII; a key that ends in -bin has bytes"
            )
        checked.append((key, value))
    return tuple(checked)
