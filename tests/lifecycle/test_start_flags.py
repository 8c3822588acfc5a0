"""What start-up flags change of a whole server: which fronts there are, shared ports, threads at the intake."""

from __future__ import annotations

import signal
import threading
import urllib.request
from contextlib import ExitStack

import numpy as np
import pytest
import tritonclient.http as triton

from sluice_server.lifecycle import Server
from sluice_server.settings import HttpSettings
from sluice_server.transport import ListenError
from sluice_server.transport.options import TransportOptions
from support import models
from support.processes import serve
from support.requests import infer_request
from support.server import CALL_TIMEOUT_S, LOOPBACK, need, running, server_settings

ROWS = np.array([[1, 2, 3, 4]], np.float32)


@pytest.fixture
def echo(repository):
    """The repository, with a model that gives back what it gets."""
    models.write_model(repository, "echo", models.identity(), max_batch_size=8)
    return repository


@pytest.fixture
def started():
    """Start servers by their settings; without gRPC there is no RunningServer."""
    with ExitStack() as stack:

        def start(settings) -> Server:
            server = Server(settings, {})
            stack.callback(server.stop)
            server.start()
            return server

        yield start


def infer_over_rest(port: int) -> np.ndarray:
    with triton.InferenceServerClient(f"{LOOPBACK}:{port}", connection_timeout=CALL_TIMEOUT_S) as client:
        assert client.is_server_ready()
        given = triton.InferInput("X", list(ROWS.shape), "FP32").set_data_from_numpy(ROWS)
        return client.infer("echo", [given]).as_numpy("Y")


@pytest.mark.usefixtures("no_errors_logged")
def test_a_server_without_grpc_serves_rest_and_metrics(echo, started, caplog):
    caplog.set_level("INFO")
    before = set(threading.enumerate())
    server = started(server_settings(echo, grpc=None))
    assert np.array_equal(infer_over_rest(server.http_port), ROWS)
    with urllib.request.urlopen(f"http://{LOOPBACK}:{server.metrics_port}/metrics", timeout=CALL_TIMEOUT_S) as answer:
        text = answer.read().decode()
    assert 'nv_inference_request_success{model="echo",version="1"} 1\n' in text
    assert 'method="ModelInfer",code="OK"} 1\n' in text
    assert server.transport.endpoints == ()
    serving = next(record for record in caplog.records if record.message == "server is serving")
    assert (serving.transport, serving.grpc) == ("off", "off")
    assert not [
        thread for thread in set(threading.enumerate()) - before if thread.name.startswith(("native", "grpcio"))
    ]
    assert server.stop()


def test_servers_share_an_http_port_when_all_of_them_want_to(echo, started):
    first = started(server_settings(echo, grpc=None, http=HttpSettings(LOOPBACK, 0, reuse_port=True)))
    port = first.http_port
    second = started(server_settings(echo, grpc=None, http=HttpSettings(LOOPBACK, port, reuse_port=True)))
    assert second.http_port == port
    with pytest.raises(ListenError, match=f"{LOOPBACK}:{port} for HTTP"):
        started(server_settings(echo, grpc=None, http=HttpSettings(LOOPBACK, port)))
    assert first.stop()
    assert np.array_equal(infer_over_rest(port), ROWS)


@pytest.mark.parametrize("count", [1, 2, 5])
def test_as_many_threads_take_requests_as_were_asked_for(count, echo):
    need("native")
    options = TransportOptions(f"{LOOPBACK}:0", intake_threads=count)
    before = set(threading.enumerate())
    with running(server_settings(echo, grpc=options, http=None, metrics=None), "native") as server:
        names = sorted(thread.name for thread in set(threading.enumerate()) - before if "intake" in thread.name)
        assert names == [f"native-intake-{number}" for number in range(count)]
        request = infer_request("echo", {"X": ROWS})
        lone = [server.infer(request) for _ in range(20)]
        many = [server.begin("ModelInfer", request) for _ in range(50)]
        answers = [*lone, *(call.result() for call in many)]
    assert {answer.raw_output_contents[0] for answer in answers} == {ROWS.tobytes()}


def test_a_start_script_with_many_of_tritons_flags_serves(transport, echo, tmp_path):
    native = ("--grpc-infer-thread-count=4",) if transport == "native" else ()
    flags = (
        f"--model-repository={echo}",
        f"--transport={transport}",
        "--strict-model-config=false",
        "--model-load-retry-count=1",
        "--model-config-name=large",
        "--http-thread-count=4",
        "--reuse-http-port=true",
        "--metrics-interval-ms=1000",
        "--metrics-config=summary_latencies=true",
        "--metrics-config=summary_quantiles=0.5:0.05,0.9:0.01",
        "--allow-gpu-metrics=false",
        "--http-restricted-api=model-repository,trace:admin-key=admin-value",
        "--grpc-restricted-protocol=model-repository,trace:admin-key=admin-value",
        "--http-header-forward-pattern=x-.*",
        "--grpc-header-forward-pattern",
        "x-.*",
        "--trace-config=level=TIMESTAMPS",
        "--trace-config=rate=1",
        f"--trace-config=triton,file={tmp_path / 'trace.json'}",
        *native,
    )
    with serve(*flags) as server:
        serving = server.wait_for("server is serving")
        assert np.array_equal(infer_over_rest(serving["http"]), ROWS)
        server.signal(signal.SIGTERM)
        assert server.wait() == 0
