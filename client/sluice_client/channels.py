"""What both drivers need from grpcio: channels, their options and credentials, and a failed call as a plain value."""

import threading
from collections.abc import Iterable, Sequence
from typing import Any, Final

import grpc

from sluice_client.endpoints import Endpoint
from sluice_client.errors import ClientClosed
from sluice_client.retries import Failure, Origin
from sluice_client.settings import MAX_MESSAGE_BYTES, Tls
from sluice_client.trailers import pushback

METHOD_PREFIX: Final = "/inference.GRPCInferenceService/"
STREAM_INFER: Final = "ModelStreamInfer"  # the one RPC that is a stream

ChannelOptions = tuple[tuple[str, Any], ...]

# How gRPC begins the status text of a call that never got a connection. Not an API: where a later release words it
# differently, the call counts as sent, so that less is repeated and never more.
_CONNECT_TEXTS: Final = ("failed to connect to all addresses", "errors resolving ", "DNS resolution failed")

_COMMON: Final[ChannelOptions] = (
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_retries", 0),  # the policy of retries.py is the only one
    ("grpc.use_local_subchannel_pool", 1),  # a client's connections are its own: closing it closes them
    ("grpc.initial_reconnect_backoff_ms", 100),  # a restarted server is found at once; gRPC's own default is 1 s
    ("grpc.max_reconnect_backoff_ms", 2_000),  # and one that was away for long within seconds, not two minutes
    ("grpc.min_reconnect_backoff_ms", 5_000),  # also how long a connection may take to come up; the default is 20 s
)


def options_for(endpoint: Endpoint, tls: Tls | None, extra: ChannelOptions) -> ChannelOptions:
    """The channel options for this endpoint; `extra` comes last and so wins."""
    options = _COMMON
    if endpoint.spread:
        options += (("grpc.lb_policy_name", "round_robin"),)
    if endpoint.secure and tls is not None and tls.server_name:
        options += (("grpc.ssl_target_name_override", tls.server_name),)
    return options + extra


def credentials_for(tls: Tls | None) -> grpc.ChannelCredentials:
    """The credentials of a secure endpoint."""
    tls = tls or Tls()
    return grpc.ssl_channel_credentials(tls.root_certificates, tls.private_key, tls.certificate_chain)


def failure(code: grpc.StatusCode, message: str | None, trailers: Iterable[tuple[str, str | bytes]] | None) -> Failure:
    """A failed call as a value."""
    text = message or ""
    unconnected = code is grpc.StatusCode.UNAVAILABLE and text.startswith(_CONNECT_TEXTS)
    pushback_ns, forbidden = pushback(trailers or ())
    return Failure(code.name, text, Origin.CONNECT if unconnected else Origin.CALL, pushback_ns, forbidden)


class Channels:
    """One channel for each endpoint, made at its first call, and the callables of its RPCs.

    `grpcio` is the module `grpc` or `grpc.aio`. `_lock` guards `_channels` and `_callables`, and setting `closed`; a
    callable that is there already is read without it.
    """

    def __init__(self, grpcio: Any, endpoints: Sequence[Endpoint], tls: Tls | None, extra: ChannelOptions) -> None:
        self._grpcio = grpcio
        self._endpoints = endpoints
        self._tls = tls
        self._extra = extra
        self._lock = threading.Lock()
        self._channels: dict[int, Any] = {}
        self._callables: dict[tuple[int, str], Any] = {}
        self.closed = threading.Event()

    @property
    def is_closed(self) -> bool:
        """Whether close() was called."""
        return self.closed.is_set()

    def callable(self, endpoint: int, rpc: str) -> Any:
        """What calls this RPC with bytes and returns bytes, or iterators of them. Raises ClientClosed."""
        found = self._callables.get((endpoint, rpc))
        if found is None or self.is_closed:
            found = self._make_callable(endpoint, rpc)
        return found

    def close(self) -> list[Any]:
        """Give out no more callables; returns the channels for the caller to close."""
        with self._lock:
            self.closed.set()
            channels = list(self._channels.values())
            self._channels.clear()
            self._callables.clear()
            return channels

    def _make_callable(self, endpoint: int, rpc: str) -> Any:
        with self._lock:
            if self.is_closed:
                raise ClientClosed("the client is closed; make a new one")
            if endpoint not in self._channels:
                self._channels[endpoint] = self._open(self._endpoints[endpoint])
            channel = self._channels[endpoint]
            made = (channel.stream_stream if rpc == STREAM_INFER else channel.unary_unary)(METHOD_PREFIX + rpc)
            self._callables[endpoint, rpc] = made
            return made

    def _open(self, endpoint: Endpoint) -> Any:
        options = options_for(endpoint, self._tls, self._extra)
        if endpoint.secure:
            return self._grpcio.secure_channel(endpoint.target, credentials_for(self._tls), options)
        return self._grpcio.insecure_channel(endpoint.target, options)
