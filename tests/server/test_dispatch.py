"""The dispatcher between transport and models: reloads are followed, bugs end one call, a server that ends says so."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sluice_batching import ExpiryTimer
from sluice_proto import grpc_service_pb2 as pb
from sluice_server.errors import DeadlineExceeded, NotFound, ResourceExhausted, SluiceError
from sluice_server.observability.statistics import Outcome
from sluice_server.protocol.dispatch import INFER, RELOADS_FOLLOWED_MAX, STREAM_INFER, Dispatcher
from sluice_server.protocol.rpcs import Rpc, path_of
from sluice_server.status import OK, Code, StatusMapper
from support.fakes import EchoSession, RecordingCall, RecordingStream, eventually, served_model
from support.requests import answer_arrays, infer_request

if TYPE_CHECKING:
    from sluice_server.execution.model import ServedModel


class Reloading:
    """A manager whose model is another one at each look-up, as when reloads come between look-up and queue."""

    def __init__(self, *models: ServedModel) -> None:
        self._models = list(models)

    def find(self, name: str, version: str) -> ServedModel:
        if name != "fake":
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        return self._models.pop(0) if len(self._models) > 1 else self._models[0]


@pytest.fixture
def pool():
    with ThreadPoolExecutor(1) as pool:
        yield pool


def draining(timer: ExpiryTimer) -> ServedModel:
    model = served_model(EchoSession(), timer)
    model.drain()
    return model


def infer_call(value: int) -> RecordingCall:
    return RecordingCall(infer_request("fake", {"X": np.array([[value]], np.int64)}).SerializeToString())


def broken(_request, _call):
    raise ZeroDivisionError("a secret")


def live(_request, _call):
    return pb.ServerLiveResponse(live=True)


def test_a_request_follows_its_model_through_reloads(timer, pool, no_errors_logged):
    last = served_model(EchoSession(), timer)
    last.start()
    old = [draining(timer) for _ in range(RELOADS_FOLLOWED_MAX)]
    dispatcher = Dispatcher(Reloading(*old, last), {}, StatusMapper(), pool)
    call = infer_call(5)
    dispatcher([call])
    status, payload = call.wait()
    assert status.code is Code.OK
    assert answer_arrays(pb.ModelInferResponse.FromString(payload))["Y"].item() == 5
    assert sum(model.statistics.outcomes()[Outcome.OK] for model in old) == 0
    last.drain()
    assert last.join(20.0)


def test_a_request_does_not_follow_for_ever(timer, pool, no_errors_logged):
    model = draining(timer)
    call = infer_call(5)
    Dispatcher(Reloading(model), {}, StatusMapper(), pool)([call])
    status, _ = call.wait()
    assert status.code is Code.UNAVAILABLE
    assert "'fake' is not ready" in status.message
    assert model.statistics.outcomes()[Outcome.UNAVAILABLE] == 1


def test_a_successor_checks_the_request_anew(timer, pool, no_errors_logged):
    other = served_model(EchoSession(), timer, max_batch_rows=0)
    call = infer_call(5)
    Dispatcher(Reloading(draining(timer), other), {}, StatusMapper(), pool)([call])
    status, _ = call.wait()
    assert status.code is Code.INVALID_ARGUMENT
    assert "unexpected shape" in status.message


@pytest.mark.parametrize("slow", [False, True])
def test_a_bug_in_one_rpc_ends_one_call_of_the_list(slow, timer, pool, caplog):
    rpcs = {
        path_of("ModelReady"): Rpc(pb.ModelReadyRequest, broken, slow=slow),
        path_of("ServerLive"): Rpc(pb.ServerLiveRequest, live),
    }
    calls = [RecordingCall(b"", path_of(method)) for method in ("ModelReady", "ServerLive", "Nope")]
    calls.append(RecordingCall(b"\xff"))
    Dispatcher(Reloading(), rpcs, StatusMapper(), pool)(calls)
    codes = [call.wait()[0].code for call in calls]
    assert codes == [Code.INTERNAL, Code.OK, Code.UNIMPLEMENTED, Code.INVALID_ARGUMENT]
    assert all(len(call.ends) == 1 for call in calls)
    (logged,) = [record for record in caplog.records if record.exc_info]
    assert logged.args[0] in calls[0].wait()[0].message
    assert "secret" not in calls[0].wait()[0].message


def test_a_bug_in_one_stream_ends_that_stream(timer, pool, caplog):
    def serve(message):
        if message.message == b"bad":
            raise ZeroDivisionError("a secret")
        message.stream.send((message.message,))

    bad, good = RecordingStream("/other.Service/Talk"), RecordingStream("/other.Service/Talk")
    dispatcher = Dispatcher(Reloading(), {}, StatusMapper(), pool, streams={"/other.Service/Talk": serve})
    dispatcher([bad.message(b"bad"), good.message(b"good")])
    assert (good.sent, good.ends) == ([b"good"], [])
    (status,) = bad.ends
    assert (bad.sent, status.code) == ([], Code.INTERNAL)
    assert "secret" not in status.message
    assert [record for record in caplog.records if record.exc_info]


def test_a_transport_is_told_of_every_method_by_its_path(timer, pool):
    rpcs = {"/other.Service/Ask": Rpc(pb.ServerLiveRequest, live)}
    dispatcher = Dispatcher(Reloading(), rpcs, StatusMapper(), pool, streams={"/other.Service/Talk": print})
    streams = {path for path, streams in dispatcher.methods.items() if streams}
    assert streams == {STREAM_INFER, "/other.Service/Talk"}
    assert {INFER, path_of("TraceSetting"), "/other.Service/Ask"} <= set(dispatcher.methods) - streams
    assert len(dispatcher.methods) == 22


def test_requests_of_a_stream_follow_their_model_through_a_reload_in_order(timer, pool, no_errors_logged):
    last = served_model(EchoSession(), timer)
    last.start()
    stream = RecordingStream()
    dispatcher = Dispatcher(Reloading(draining(timer), last), {}, StatusMapper(), pool)
    dispatcher([stream.message(infer_call(value).message) for value in range(3)] + [stream.message(None)])
    eventually(lambda: bool(stream.ends), "the stream has ended")
    answers = [pb.ModelStreamInferResponse.FromString(message).infer_response for message in stream.sent]
    assert [answer_arrays(answer)["Y"].item() for answer in answers] == [0, 1, 2]
    assert stream.ends == [OK]
    last.drain()
    assert last.join(20.0)


def test_a_slow_call_after_the_end_is_refused(timer, pool, no_errors_logged):
    pool.shutdown()
    call = RecordingCall(b"", path_of("RepositoryIndex"))
    rpcs = {path_of("RepositoryIndex"): Rpc(pb.RepositoryIndexRequest, broken, slow=True)}
    Dispatcher(Reloading(), rpcs, StatusMapper(), pool)([call])
    status, _ = call.wait()
    assert (status.code, status.message) == (Code.UNAVAILABLE, "the server is shutting down")


def test_every_expected_error_has_a_code_of_its_own(no_errors_logged):
    def below(kind: type) -> list[type]:
        return [each for child in kind.__subclasses__() for each in (child, *below(child))]

    for kind in below(SluiceError):
        assert StatusMapper()(kind.__new__(kind)).code not in {Code.OK, Code.UNKNOWN}


def test_triton_codes_differ_for_what_clients_may_try_again(no_errors_logged):
    errors = [ResourceExhausted("full"), DeadlineExceeded("late"), NotFound("gone")]
    exact, triton = StatusMapper(), StatusMapper(triton_codes=True)
    assert [exact(error).code for error in errors] == [
        Code.RESOURCE_EXHAUSTED,
        Code.DEADLINE_EXCEEDED,
        Code.NOT_FOUND,
    ]
    assert [triton(error).code for error in errors] == [Code.UNAVAILABLE, Code.UNAVAILABLE, Code.NOT_FOUND]
