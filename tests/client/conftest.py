"""Fixtures of the client's tests: running fake servers, and clients of both kinds."""

import socket
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from drivers import Blocking, Loop
from fake_server import FakeServer

from sluice_client import AsyncClient, Client


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.stop()


@pytest.fixture(params=["sync", "async"])
def make_client(request: pytest.FixtureRequest, loop: Loop) -> Iterator[Callable[..., Any]]:
    """Makes clients of the kind that the test runs for, and closes them."""
    made: list[Any] = []

    def make(*args: Any, **kwargs: Any) -> Any:
        made.append(
            Client(*args, **kwargs) if request.param == "sync" else Blocking(AsyncClient(*args, **kwargs), loop)
        )
        return made[-1]

    yield make
    for client in made:
        client.close()


@pytest.fixture
def make_server() -> Iterator[Callable[..., FakeServer]]:
    made: list[FakeServer] = []

    def make(*args: Any, **kwargs: Any) -> FakeServer:
        made.append(FakeServer(*args, **kwargs))
        return made[-1]

    yield make
    for server in made:
        server.stop()


@pytest.fixture
def server(make_server: Callable[..., FakeServer]) -> FakeServer:
    return make_server()


@pytest.fixture
def dead_address() -> Iterator[str]:
    """An address that refuses connections as long as the test runs."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{holder.getsockname()[1]}"
