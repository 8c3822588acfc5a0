"""One server for all tests that only ask it things, with a model for each thing that can be asked wrongly: fixtures."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from protocol.bad_requests import write_models
from support.requests import answer_arrays, infer_request
from support.server import RunningServer, running, server_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture(scope="session")
def shared_server(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    """A server with small models, which tests leave as they found it."""
    repository = tmp_path_factory.mktemp("shared")
    write_models(repository)
    with running(server_settings(repository), transport) as server:
        yield server


@pytest.fixture
def server(shared_server: RunningServer, no_errors_logged: None) -> Iterator[RunningServer]:
    """The shared server, which still answers when the test is over, and has logged no error."""
    yield shared_server
    check_alive(shared_server)


def check_alive(server: RunningServer) -> None:
    """Send a good request and look at the answer."""
    ones = np.ones((1, 16), np.int32)
    answer = answer_arrays(server.infer(infer_request("simple", {"INPUT0": ones * 3, "INPUT1": ones})))
    np.testing.assert_array_equal(answer["OUTPUT0"], ones * 4)
    np.testing.assert_array_equal(answer["OUTPUT1"], ones * 2)


@pytest.fixture
def refused(server: RunningServer) -> Callable[..., str]:
    """Check that a request is refused with a code; gives the message."""

    def check(request, code, method="ModelInfer"):
        got, message = server.refusal(method, request)
        assert got.name == code.name, f"{got.name}: {message}"
        return message

    return check
