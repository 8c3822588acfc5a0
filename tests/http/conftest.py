"""A server with HTTP and metrics listeners, and the two questions that tests ask of them."""

from __future__ import annotations

import http.client
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.server import CALL_TIMEOUT_S, LOOPBACK, RunningServer

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


class Answer(NamedTuple):
    """An HTTP answer; `body` is decoded when it is JSON."""

    status: int
    body: Any
    headers: Mapping[str, str]


def ask(port: int, method: str, path: str, body: bytes | None = None) -> Answer:
    """One request on a connection of its own; redirects are not followed."""
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=CALL_TIMEOUT_S)
    try:
        connection.request(method, path, body)
        response = connection.getresponse()
        data = response.read()
        headers = dict(response.getheaders())
    finally:
        connection.close()
    is_json = headers.get("content-type", "").startswith("application/json")
    return Answer(response.status, json.loads(data) if is_json else data, headers)


@pytest.fixture
def rest() -> Callable[..., Answer]:
    """Ask a server's REST port: `rest(server, method, path)`."""
    return lambda server, method, path, body=None: ask(server.server.http_port, method, path, body)


@pytest.fixture
def scrape() -> Callable[[RunningServer], Samples]:
    """All samples of a server's metrics endpoint, by name and labels, as Prometheus reads them."""

    def read(server: RunningServer) -> Samples:
        answer = ask(server.server.metrics_port, "GET", "/metrics")
        assert answer.status == 200
        text = answer.body.decode()
        samples: Samples = {}
        for family in text_string_to_metric_families(text):
            assert family.documentation
            for sample in family.samples:
                # The parser appends _total to the counters that have other names; Triton's have.
                as_written = f"# TYPE {sample.name} " in text or family.type != "counter"
                name = sample.name if as_written else sample.name.removesuffix("_total")
                key = name, frozenset(sample.labels.items())
                assert key not in samples
                samples[key] = sample.value
        return samples

    return read
