"""grpc.health.v1 as a client sees it: Check and Watch, of the server, of the service and of each model."""

from __future__ import annotations

import queue
import threading
import time
from itertools import pairwise
from typing import TYPE_CHECKING

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.protocol.health import WATCH, Health
from sluice_server.repository.manager import ControlMode
from sluice_server.status import OK, Code
from support import models
from support.fakes import PATIENCE_S, RecordingStream, eventually
from support.server import SERVICE, RunningServer, running, server_settings

if TYPE_CHECKING:
    from collections.abc import Iterator

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
UNKNOWN = health_pb2.HealthCheckResponse.SERVICE_UNKNOWN

pytestmark = pytest.mark.usefixtures("no_errors_logged")


class Watcher:
    """A watch on a channel of its own, read by a thread; `next` gives each status that it sends."""

    def __init__(self, target: str, service: str) -> None:
        self._statuses: queue.SimpleQueue[int | grpc.StatusCode] = queue.SimpleQueue()
        self._channel = grpc.insecure_channel(target)
        request = health_pb2.HealthCheckRequest(service=service)
        self._call = health_pb2_grpc.HealthStub(self._channel).Watch(request)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for response in self._call:
                self._statuses.put(response.status)
        except grpc.RpcError:
            pass
        self._statuses.put(self._call.code())

    def next(self) -> int | grpc.StatusCode:
        """The next status, or the code that the watch ended with."""
        return self._statuses.get(timeout=PATIENCE_S)

    def leave(self) -> None:
        self._call.cancel()
        self._thread.join()
        self._channel.close()


@pytest.fixture
def server(start_server, repository) -> RunningServer:
    models.write_model(repository, "good", models.identity(), max_batch_size=8)
    models.write_model(repository, "other", models.identity(), max_batch_size=8)
    explicit = {"control_mode": ControlMode.EXPLICIT, "load_models": ("good",)}
    return start_server(repository, models=explicit, http=None, metrics=None)


@pytest.fixture
def watch(server) -> Iterator[type[Watcher]]:
    watchers = []

    def start(service: str) -> Watcher:
        watchers.append(Watcher(server.target, service))
        return watchers[-1]

    yield start
    for watcher in watchers:
        watcher.leave()


def check(server: RunningServer, service: str) -> int:
    request = health_pb2.HealthCheckRequest(service=service)
    status: int = health_pb2_grpc.HealthStub(server.channel).Check(request, timeout=PATIENCE_S).status
    return status


def load(server: RunningServer, name: str) -> None:
    server.call("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name=name))


def unload(server: RunningServer, name: str) -> None:
    server.call("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name=name))


def test_the_server_the_service_and_each_loaded_model_are_serving(server):
    assert [check(server, name) for name in ("", SERVICE.full_name, "good")] == [SERVING] * 3


@pytest.mark.parametrize("name", ["other", "nope", "inference", "GRPCInferenceService", "good/1"])
def test_a_name_that_was_never_served_is_not_found(name, server):
    with pytest.raises(grpc.RpcError) as caught:
        check(server, name)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert f"'{name}'" in caught.value.details()


def test_a_check_follows_loads_and_unloads(server):
    load(server, "other")
    assert check(server, "other") == SERVING
    unload(server, "other")
    assert check(server, "other") == NOT_SERVING
    assert check(server, "") == SERVING


def test_a_watch_sees_a_model_come_go_and_come_again(server, watch):
    watcher = watch("other")
    assert watcher.next() == UNKNOWN
    for change, status in ((load, SERVING), (unload, NOT_SERVING), (load, SERVING)):
        change(server, "other")
        assert watcher.next() == status


def test_a_reload_is_not_seen_as_the_model_serves_all_the_time(server, watch, repository):
    watcher = watch("good")
    assert watcher.next() == SERVING
    (repository / "good" / "1" / "model.onnx").touch()
    load(server, "good")
    unload(server, "good")
    assert watcher.next() == NOT_SERVING


def test_a_watcher_that_leaves_does_not_take_the_others_with_it(server, watch):
    leaving, staying, elsewhere = watch("other"), watch("other"), watch("good")
    assert [watcher.next() for watcher in (leaving, staying, elsewhere)] == [UNKNOWN, UNKNOWN, SERVING]
    leaving.leave()
    load(server, "other")
    assert staying.next() == SERVING
    assert leaving.next() is grpc.StatusCode.CANCELLED
    unload(server, "good")
    assert elsewhere.next() == NOT_SERVING


def test_a_model_that_fails_makes_the_strictly_ready_server_not_serving(server, watch, repository):
    watcher = watch("")
    assert watcher.next() == SERVING
    path = repository / "other" / "1" / "model.onnx"
    good = path.read_bytes()
    path.write_bytes(b"nothing")
    with pytest.raises(grpc.RpcError):
        load(server, "other")
    assert watcher.next() == NOT_SERVING
    assert check(server, SERVICE.full_name) == NOT_SERVING
    path.write_bytes(good)
    load(server, "other")
    assert watcher.next() == SERVING


def test_the_end_of_the_server_is_seen_and_no_watch_holds_it(transport, repository):
    models.write_model(repository, "good", models.identity(), max_batch_size=8)
    settings = server_settings(repository, http=None, metrics=None, exit_timeout_s=2 * PATIENCE_S)
    with running(settings, transport) as server:
        watchers = [Watcher(server.target, name) for name in ("", SERVICE.full_name, "good", "nope")]
        assert [watcher.next() for watcher in watchers] == [SERVING, SERVING, SERVING, UNKNOWN]
        begun = time.monotonic()
    assert time.monotonic() - begun < PATIENCE_S
    assert [watcher.next() for watcher in watchers[:3]] == [NOT_SERVING] * 3
    assert [watcher.next() for watcher in watchers] == [grpc.StatusCode.OK] * 4
    for watcher in watchers:
        watcher.leave()


def test_every_watcher_of_a_name_hears_of_each_change(server, watch):
    watchers = [watch("other") for _ in range(3)]
    assert [watcher.next() for watcher in watchers] == [UNKNOWN] * 3
    for change, status in ((load, SERVING), (unload, NOT_SERVING)):
        change(server, "other")
        assert [watcher.next() for watcher in watchers] == [status] * 3


@pytest.mark.parametrize("messages", [[], [b"\xff"], [b"\xff", b""]])
def test_a_watch_needs_a_request_that_can_be_read(messages, server):
    call = server.channel.stream_stream("/grpc.health.v1.Health/Watch")
    with pytest.raises(grpc.RpcError) as caught:
        list(call(iter(messages), timeout=PATIENCE_S))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_watchers_that_have_left_are_forgotten(server, watch):
    for _ in range(5):
        watcher = watch("other")
        assert watcher.next() == UNKNOWN
        watcher.leave()
    eventually(lambda: not server.server._health._watches, "no watch is left")


def test_health_calls_are_counted_as_every_call_is(server, watch):
    check(server, "")
    watcher = watch("good")
    assert watcher.next() == SERVING
    watcher.leave()
    wanted = {("/grpc.health.v1.Health/Check", Code.OK): 1, ("/grpc.health.v1.Health/Watch", Code.CANCELLED): 1}
    eventually(lambda: server.server.transport.outcomes() == wanted, "both are counted")


def test_statuses_set_from_many_threads_are_seen_in_one_order_by_all():
    health, streams = Health(), [RecordingStream(WATCH) for _ in range(4)]
    request = health_pb2.HealthCheckRequest(service="model").SerializeToString()
    for stream in streams:
        health.watch(stream.message(request))
    begin = threading.Barrier(4)

    def change() -> None:
        begin.wait()
        for number in range(500):
            health.set_serving("model", serving=number % 2 == 0)

    threads = [threading.Thread(target=change) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    health.stop()
    statuses = [health_pb2.HealthCheckResponse.FromString(message).status for message in streams[0].sent]
    assert statuses[0] == UNKNOWN
    assert all(before != after for before, after in pairwise(statuses))
    assert all(stream.sent == streams[0].sent and stream.ends == [OK] for stream in streams)
