"""Threads beside the event loop of HTTP: as many at a time as were asked for, and only for large bodies."""

from __future__ import annotations

import asyncio
import gzip
import http.client
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from sluice_server.http.server import HttpListener, HttpServer
from support import models
from support.fakes import PATIENCE_S, eventually
from support.rest import HEAD_LENGTH, request
from support.server import LOOPBACK

DATA = np.arange(200_000, dtype=np.float32).tobytes()
TEXT = json.dumps(
    {
        "inputs": [
            {
                "name": "X",
                "shape": [1, 200_000],
                "datatype": "FP32",
                "parameters": {"binary_data_size": len(DATA)},
            }
        ]
    }
).encode()


class Blocking:
    """An application each of whose requests holds one worker until `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.running = self.most = 0
        self._lock = threading.Lock()

    async def __call__(self, scope, receive, send) -> None:
        await asyncio.to_thread(self._work)
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"0")]})
        await send({"type": "http.response.body", "body": b""})

    def _work(self) -> None:
        with self._lock:
            self.running += 1
            self.most = max(self.most, self.running)
        assert self.go.wait(PATIENCE_S)
        with self._lock:
            self.running -= 1


def status_of(port: int) -> int:
    connection = http.client.HTTPConnection(LOOPBACK, port, timeout=PATIENCE_S)
    try:
        connection.request("GET", "/")
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.mark.parametrize("workers", [1, 3])
def test_as_many_work_at_a_time_as_were_asked_for(workers):
    app = Blocking()
    listener = HttpListener(app, LOOPBACK, 0)
    server = HttpServer([listener], workers)
    server.start()
    with ThreadPoolExecutor(workers + 2) as clients:
        try:
            answers = [clients.submit(status_of, listener.port) for _ in range(workers + 2)]
            eventually(lambda: app.running == workers, "all workers are held")
        finally:
            app.go.set()
        assert [answer.result(PATIENCE_S) for answer in answers] == [200] * (workers + 2)
    server.stop()
    assert app.most == workers


def test_the_flag_reaches_large_bodies_and_small_ones_need_no_worker(start_server, repository):
    models.write_model(repository, "open", models.identity(dims=("N", "W")), max_batch_size=8)
    before = set(threading.enumerate())
    server = start_server(repository, metrics=None, http_workers=1)

    def workers() -> list[str]:
        return [thread.name for thread in set(threading.enumerate()) - before if thread.name.startswith("http-worker")]

    assert request(server, "GET", "/v2").status == 200
    assert workers() == []
    packed = gzip.compress(TEXT + DATA, 1)
    headers = {"content-encoding": "gzip", "accept-encoding": "gzip", HEAD_LENGTH: str(len(TEXT))}
    with ThreadPoolExecutor(4) as clients:
        answers = [clients.submit(request, server, "POST", "/v2/models/open/infer", packed, headers) for _ in range(4)]
        assert [answer.result(PATIENCE_S).status for answer in answers] == [200] * 4
    assert len(workers()) == 1
