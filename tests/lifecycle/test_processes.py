"""The life of a server as a process: ready, asked to end, drained, ended; and how fast when something does not end."""

from __future__ import annotations

import signal
import time

import grpc
import numpy as np
import pytest
from heavy import slow_to_load

from sluice_proto import grpc_service_pb2 as pb
from sluice_server.transport.choice import TransportChoice
from support import models
from support.fakes import PATIENCE_S, eventually
from support.processes import Addresses, seconds_since, serve
from support.requests import answer_arrays, infer_request
from support.server import SERVICE

FOR_EVER = 2_000_000_000  # iterations of the slow model: half an hour
A_MOMENT = 1_000_000  # about a second


@pytest.fixture
def slow_models(repository):
    """`moment` takes about a second for each request, `ever` takes for ever; both run one request at a time."""
    models.write_model(repository, "moment", models.slow(A_MOMENT))
    models.write_model(repository, "ever", models.slow(FOR_EVER))
    return f"--model-repository={repository}"


def begin(channel: grpc.Channel, model: str, value: float) -> grpc.Future:
    """An inference call in progress."""
    request = infer_request(model, {"X": np.array([[value]], np.float32)})
    call = channel.unary_unary(
        f"/{SERVICE.full_name}/ModelInfer", response_deserializer=pb.ModelInferResponse.FromString
    )
    return call.future(request.SerializeToString(), timeout=4 * PATIENCE_S)


def begin_two(channel: grpc.Channel, server: Addresses, model: str) -> list[grpc.Future]:
    """Two requests of which the first one runs, as the other one waits."""
    calls = [begin(channel, model, 1), begin(channel, model, 2)]
    server.wait_for_pending(model, 1)
    return calls


def live_code(channel: grpc.Channel) -> grpc.StatusCode:
    """How a call ends that costs the server next to nothing."""
    live = channel.unary_unary(f"/{SERVICE.full_name}/ServerLive")
    return live.future(pb.ServerLiveRequest().SerializeToString(), timeout=PATIENCE_S).code()


def code_of_late_call(channel: grpc.Channel, transport: str) -> grpc.StatusCode:
    """How a call ends that comes while the server drains. C core cancels those that cross its GOAWAY on the way."""
    code = begin(channel, "moment", 3).code()
    until_s = time.monotonic() + PATIENCE_S
    while transport == TransportChoice.GRPCIO and code is grpc.StatusCode.CANCELLED and time.monotonic() < until_s:
        code = begin(channel, "moment", 3).code()
    return code


def test_a_server_says_where_it_is_and_answers_what_it_accepted_after_it_was_asked_to_end(transport, slow_models):
    with serve(f"--transport={transport}", slow_models) as process:
        ready = process.wait_for("server is serving")
        assert ready["ready"] is True
        server = Addresses(ready)
        assert server.grpc.startswith("127.0.0.1:")
        assert server.http_status("/v2/health/ready") == 200
        with grpc.insecure_channel(server.grpc) as client, grpc.insecure_channel(server.grpc) as newcomer:
            calls = begin_two(client, server, "moment")
            process.signal(signal.SIGTERM)
            eventually(lambda: server.http_status("/v2/health/ready") == 400, "it says that it is not ready")
            assert server.http_status("/v2/health/live") == 200
            # It stops listening after it has said so; what comes in between is answered as ever.
            eventually(lambda: live_code(newcomer) is not grpc.StatusCode.OK, "it takes no more calls")
            for channel in (client, newcomer):
                assert code_of_late_call(channel, transport) is grpc.StatusCode.UNAVAILABLE
            assert [answer_arrays(call.result())["Y"].item() for call in calls] == [1, 2]
        assert process.wait() == 0
        assert process.messages()[-1] == "server has stopped"
        assert process.records[-1]["all_answered"] is True
        assert not [record for record in process.records if record["level"] != "INFO" or "exception" in record]


def test_what_is_still_running_when_the_exit_timeout_is_over_does_not_hold_the_end(transport, slow_models):
    with serve(f"--transport={transport}", slow_models, "--exit-timeout-secs=1") as process:
        server = Addresses(process.wait_for("server is serving"))
        with grpc.insecure_channel(server.grpc) as client:
            calls = begin_two(client, server, "ever")
            begun_s = time.monotonic()
            process.signal(signal.SIGTERM)
            assert [call.code() for call in calls] == [grpc.StatusCode.UNAVAILABLE] * 2
            assert "shut down" in calls[0].details()
            assert seconds_since(begun_s) >= 1
        assert process.wait() == 0
        assert seconds_since(begun_s) < PATIENCE_S
        warnings = [record for record in process.records if record["level"] != "INFO"]
        told = [(record["message"], record["model"]) for record in warnings]
        # The native transport tells of calls that it ends, and a run whose clients have all been told is ended too.
        still_running = [("requests were still running when time was up", "ever")]
        assert told == ([] if transport == TransportChoice.NATIVE else still_running)
        assert process.records[-1]["all_answered"] is False


def test_a_lone_request_that_is_still_running_does_not_hold_the_end_either(transport, slow_models):
    with serve(f"--transport={transport}", slow_models, "--exit-timeout-secs=1") as process:
        server = Addresses(process.wait_for("server is serving"))
        with grpc.insecure_channel(server.grpc) as client:
            lone = begin(client, "ever", 1)
            # Taken after it: the lone one runs by then, on a thread of the native transport's own.
            assert live_code(client) is grpc.StatusCode.OK
            process.signal(signal.SIGTERM)
            assert lone.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait() == 0
        assert process.records[-1]["all_answered"] is False


def test_a_second_signal_ends_the_process_at_once(transport, slow_models):
    with serve(f"--transport={transport}", slow_models, "--exit-timeout-secs=3600") as process:
        server = Addresses(process.wait_for("server is serving"))
        with grpc.insecure_channel(server.grpc) as client:
            begin_two(client, server, "ever")
            process.signal(signal.SIGINT)
            eventually(lambda: server.http_status("/v2/health/ready") == 400, "the first signal has arrived")
            process.signal(signal.SIGTERM)
            assert process.wait() == 128 + signal.SIGTERM
    assert "server has stopped" not in process.messages()


def test_a_signal_while_models_load_ends_the_process_after_the_load_under_way(transport, repository):
    models.write_model(repository, "a", models.identity())
    models.write_model(repository, "b", slow_to_load(20))
    for number in range(20):
        models.write_model(repository, f"c{number}", slow_to_load(20))
    with serve(
        f"--transport={transport}", f"--model-repository={repository}", "--model-load-thread-count=1"
    ) as process:
        process.wait_for("model is ready")
        process.signal(signal.SIGTERM)
        assert process.wait() == 0
    loaded = [record["model"] for record in process.records if record["message"] == "model is ready"]
    assert loaded in (["a"], ["a", "b"])
    assert "server is serving" not in process.messages()
    assert process.messages()[-1] == "server has stopped"


def test_a_load_call_that_takes_too_long_does_not_hold_the_end(transport, repository):
    models.write_model(repository, "heavy", slow_to_load(5000))
    flags = ("--model-control-mode=explicit", "--exit-timeout-secs=0")
    with serve(f"--transport={transport}", f"--model-repository={repository}", *flags) as process:
        server = Addresses(process.wait_for("server is serving"))
        with grpc.insecure_channel(server.grpc) as client:
            load = client.unary_unary(f"/{SERVICE.full_name}/RepositoryModelLoad").future(
                pb.RepositoryModelLoadRequest(model_name="heavy").SerializeToString()
            )
            index = client.unary_unary(
                f"/{SERVICE.full_name}/RepositoryIndex", response_deserializer=pb.RepositoryIndexResponse.FromString
            )
            eventually(lambda: index(b"").models[0].state == "LOADING", "the load is under way")
            begun_s = time.monotonic()
            process.signal(signal.SIGTERM)
            assert load.code() is grpc.StatusCode.UNAVAILABLE
        assert process.wait() == 0
        assert seconds_since(begun_s) < PATIENCE_S
