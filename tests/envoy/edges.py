"""Servers in this process behind a real Envoy, clients that come through it, and what its log says of their calls."""

from __future__ import annotations

import http.client
import json
import os
import tempfile
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest

from deploy.envoy.bootstrap import Upstream, Variant
from deploy.envoy.sidecar import SidecarError, find, sidecar
from support.fakes import eventually
from support.requests import infer_request
from support.rest import RawAnswer
from support.server import CALL_TIMEOUT_S, CHANNEL_OPTIONS, SERVICE, RunningServer, running, server_settings

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from deploy.envoy.sidecar import Sidecar
    from sluice_proto import grpc_service_pb2 as pb


def need_envoy() -> None:
    """Skip the test, with the reason, where there is no Envoy; with CI=true that is a failure."""
    try:
        find()
    except SidecarError as error:
        if os.environ.get("CI") == "true":
            pytest.fail(f"CI=true: {error}")
        pytest.skip(str(error))


@contextmanager
def socket_folder() -> Iterator[Path]:
    """A folder whose name is short enough for sockets in it."""
    with tempfile.TemporaryDirectory(prefix="sl-") as name:
        yield Path(name)


@contextmanager
def serving(repository: Path, transport: str, address: str, **changes: Any) -> Iterator[RunningServer]:
    """A server at this gRPC address, with REST at a free port; `changes` as of `server_settings`."""
    environ = changes.pop("environ", None)
    settings = server_settings(repository, metrics=None, **changes)
    with running(replace(settings, grpc=replace(settings.grpc, address=address)), transport, environ) as server:
        yield server


class Edge:
    """Envoy in front of servers. `through` calls the first of them, or whichever Envoy takes, by way of Envoy."""

    def __init__(self, servers: list[RunningServer], envoy: Sidecar, log: Path, channel: grpc.Channel) -> None:
        self.servers = servers
        self.envoy = envoy
        self.through = RunningServer(servers[0].server, channel)
        self._log = log

    @property
    def server(self) -> RunningServer:
        """The only server."""
        (server,) = self.servers
        return server

    def http(
        self, verb: str, path: str, body: bytes = b"", headers: Mapping[str, str] | None = None, address: str = ""
    ) -> RawAnswer:
        """One request over HTTP/1.1."""
        connection = http.client.HTTPConnection(address or self.envoy.address, timeout=CALL_TIMEOUT_S)
        try:
            connection.request(verb, path, body, dict(headers or {}))
            answer = connection.getresponse()
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return RawAnswer(answer.status, answer.read(), headers)
        finally:
            connection.close()

    def post_json(self, path: str, message: Any) -> RawAnswer:
        return self.http("POST", path, json.dumps(message).encode(), {"content-type": "application/json"})

    def logged(self, **fields: Any) -> list[dict[str, Any]]:
        """The records of the access log with these values; waits for the first one."""
        found: list[dict[str, Any]] = []

        def look() -> bool:
            lines = self._log.read_text().splitlines() if self._log.exists() else []
            records = [json.loads(line) for line in lines]
            found[:] = [one for one in records if fields.items() <= one.items()]
            return bool(found)

        eventually(look, f"the access log has {fields}")
        return found


@contextmanager
def edge_of(*servers: RunningServer, channel: Any = None, **changes: Any) -> Iterator[Edge]:
    """Envoy in front of these servers; `changes` are fields of Variant, `channel` makes one of an address."""
    with ExitStack() as stack:
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "access.log"
        upstreams = tuple(
            Upstream(server.target, f"127.0.0.1:{port}" if (port := server.server.http_port) else "")
            for server in servers
        )
        envoy = stack.enter_context(sidecar(Variant(upstreams, access_log=str(log), **changes)))
        make = channel or (lambda address: grpc.insecure_channel(address, CHANNEL_OPTIONS))
        with make(envoy.address) as opened:
            yield Edge(list(servers), envoy, log, opened)


def echo(value: float, **how: Any) -> pb.ModelInferRequest:
    """A request to the model `echo`, which gives the value back."""
    return infer_request("echo", {"X": np.array([[value]], np.float32)}, **how)


def call_with(
    edge: Edge, method: str, message: Any, *metadata: tuple[str, str], timeout_s: float | None = CALL_TIMEOUT_S
) -> grpc.Future:
    """A unary call in progress, with metadata; `timeout_s` None is no deadline."""
    call = edge.through.channel.unary_unary(f"/{SERVICE.full_name}/{method}")
    return call.future(message.SerializeToString(), metadata=metadata, timeout=timeout_s)


def trailers(call: grpc.Future) -> dict[str, Any]:
    return {one.key: one.value for one in call.trailing_metadata()}
