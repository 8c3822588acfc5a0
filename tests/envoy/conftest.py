"""A server behind Envoy that tests share, and what starts others."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import pytest
from edges import Edge, edge_of, need_envoy, serving, socket_folder

from support import models

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from support.server import RunningServer

    StartEdge = Callable[..., Edge]
    StartReplica = Callable[..., RunningServer]


@pytest.fixture(scope="session")
def shared_edge(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Edge]:
    """One server on a Unix socket behind Envoy, with the models `echo` and `sums`, which tests leave as they are."""
    need_envoy()
    repository = tmp_path_factory.mktemp("behind-envoy")
    models.write_model(repository, "echo", models.identity(dims=("N", 1)), max_batch_size=8)
    models.write_model(repository, "wide", models.identity(dims=("N", "M")), max_batch_size=8)
    with (
        socket_folder() as sockets,
        serving(repository, transport, f"unix:{sockets}/grpc.sock") as server,
        edge_of(server) as edge,
    ):
        yield edge


@pytest.fixture
def edge(shared_edge: Edge, no_errors_logged: None) -> Edge:
    """The shared one, whose server has logged no error at the end."""
    return shared_edge


@pytest.fixture
def start_replica(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartReplica]:
    """Start servers of the model `echo`, each with a repository and a Unix socket of its own."""
    need_envoy()
    with ExitStack() as stack:
        sockets = stack.enter_context(socket_folder())

        def start(write: Callable[[Path], object] | None = None, address: str = "", **changes: object) -> RunningServer:
            repository = tmp_path_factory.mktemp("replica")
            if write is None:
                models.write_model(repository, "echo", models.identity(dims=("N", 1)), max_batch_size=8)
            else:
                write(repository)
            changes.setdefault("http", None)
            place = address or f"unix:{sockets}/{repository.name}.sock"
            return stack.enter_context(serving(repository, transport, place, **changes))

        yield start


@pytest.fixture
def start_edge(start_replica: StartReplica, no_errors_logged: None) -> Iterator[StartEdge]:
    """Put Envoy in front of servers: `start_edge(*servers, **fields of Variant)`."""
    with ExitStack() as stack:
        yield lambda *servers, **changes: stack.enter_context(edge_of(*servers, **changes))
