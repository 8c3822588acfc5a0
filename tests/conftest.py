"""Fixtures of all tests: the transports, one after the other, and servers that are stopped at the end of a test."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from sluice_batching import ExpiryTimer
from sluice_server.execution.cuda_driver import find_driver
from support import models
from support.server import TRANSPORTS, RunningServer, need, running, server_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    StartServer = Callable[..., RunningServer]

# deploy and loadtests are run from the root of the repository, and never installed.
sys.path.append(str(Path(__file__).resolve().parents[1]))

# How long an example takes says more about the machine than about the example.
settings.register_profile("any machine", deadline=None)
settings.load_profile("any machine")


@pytest.fixture(autouse=True, scope="session")
def _caches_of_our_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing is kept in the caches of the user who runs the tests, nor read from there; processes inherit it."""
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(params=TRANSPORTS, scope="session")
def transport(request: pytest.FixtureRequest) -> str:
    """Every transport by name: a test that asks for it, or for a server, runs once on each."""
    name: str = request.param
    need(name)
    return name


@pytest.fixture
def start_server(transport: str) -> Iterator[StartServer]:
    """Start servers: `start_server(repository, ..., models={...}, **fields of ServerSettings)`."""
    with ExitStack() as stack:

        def start(
            *repositories: Path, environ: dict[str, str] | None = None, find_cuda: Any = find_driver, **changes: Any
        ) -> RunningServer:
            settings = server_settings(*repositories, **changes)
            return stack.enter_context(running(settings, transport, environ, find_cuda))

        yield start


@pytest.fixture(scope="module")
def sharing_server(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server that lets clients share memory, with models of two inputs, of texts and of any shape."""
    repository = tmp_path_factory.mktemp("sharing")
    models.write_model(repository, "simple", models.sum_and_difference(), max_batch_size=8)
    models.write_model(repository, "text", models.identity("BYTES", ("N", 2)), max_batch_size=8)
    models.write_model(repository, "any", models.identity("FP32", ("A", "B")))
    with running(server_settings(repository, allow_client_shm=True, http=None, metrics=None), transport) as server:
        yield server


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """An empty model repository."""
    path = tmp_path / "models"
    path.mkdir()
    return path


@pytest.fixture
def timer() -> Iterator[ExpiryTimer]:
    """A running timer for the queues of models that are made by hand."""
    timer = ExpiryTimer()
    yield timer
    timer.stop()


@pytest.fixture
def no_errors_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fail the test when anything was logged at level ERROR or with a stack trace."""
    yield
    bad = [
        record.getMessage()
        for record in caplog.get_records("call")
        if record.levelno >= logging.ERROR or record.exc_info is not None
    ]
    assert not bad, bad
