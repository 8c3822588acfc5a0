"""Both clients against a real gRPC server: every call, every kind of failure, cancellation and closing."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from drivers import WAIT_S, Loop
from fake_server import DroppingProxy, FakeServer, Fault

import sluice_client
from sluice_client import (
    AsyncClient,
    Client,
    ClientClosed,
    DeadlineExceeded,
    InvalidRequest,
    InvalidResponse,
    NotFound,
    NotReady,
    ResourceExhausted,
    RetryPolicy,
    ServerError,
    Unavailable,
)
from sluice_client.channels import Channels
from sluice_client.errors import BY_CODE

X = {"X": np.arange(6, dtype=np.float32).reshape(2, 3)}
BUSY = Fault(grpc.StatusCode.UNAVAILABLE, "busy")
FAST = RetryPolicy(initial_backoff_s=0.001)

MakeClient = Callable[..., Any]
MakeServer = Callable[..., FakeServer]


def test_inference_gives_arrays_and_how_it_went(make_client: MakeClient, server: FakeServer) -> None:
    client = make_client(server.address)
    result = client.infer("identity", X | {"S": np.array(["a", "b"])}, outputs=["X"], request_id="r1")
    assert list(result) == ["X"]
    np.testing.assert_array_equal(result["X"], X["X"])
    assert (result.model_name, result.model_version, result.id, result.parameters) == (
        "identity",
        "1",
        "r1",
        {"note": "fake"},
    )
    assert (result.timing.attempts, result.timing.endpoint) == (1, server.address)
    assert 0 < result.timing.total_s < WAIT_S


def test_every_question_has_its_answer(make_client: MakeClient, server: FakeServer) -> None:
    client = make_client(server.address)
    assert client.server_live()
    assert client.server_ready()
    assert client.model_ready("identity")
    assert not client.model_ready("nope")
    assert client.server_metadata() == sluice_client.ServerMetadata("fake", "1.2.3", ("statistics",))
    metadata = client.model_metadata("identity")
    assert (metadata.name, metadata.versions, metadata.platform) == ("identity", ("1",), "onnxruntime_onnx")
    assert metadata.inputs[0] == sluice_client.TensorMetadata("X", "FP32", (-1, 3))
    assert client.model_config("identity").max_batch_size == 8
    (statistics,) = client.statistics("identity")
    assert (statistics.mean_batch_rows, statistics.success.mean_ms, statistics.fail.mean_ms) == (3.0, 2.0, 0.0)
    assert statistics.batches[0].compute_infer.mean_ms == 1.0
    assert [model.name for model in client.repository_index()] == ["broken", "identity", "idle"]
    assert client.repository_index(ready_only=True) == (sluice_client.ModelIndex("identity", "1", "READY", ""),)


def test_loading_and_unloading_reach_the_server_with_a_long_deadline(
    make_client: MakeClient, server: FakeServer
) -> None:
    client = make_client(server.address, deadline_s=1.0)
    client.load_model("m", config={"max_batch_size": 4}, files={"1/model.onnx": b"x"})
    client.unload_model("m", deadline_s=20.0)
    load, unload = server.seen
    assert set(load.request.parameters) == {"config", "file:1/model.onnx"}
    assert load.time_remaining_s > 500
    assert 10 < unload.time_remaining_s < 21


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_each_status_is_its_own_exception(make_client: MakeClient, server: FakeServer, code: grpc.StatusCode) -> None:
    server.faults.append(Fault(code, "because"))
    client = make_client(server.address, retry=RetryPolicy(max_attempts=1))
    with pytest.raises(ServerError) as caught:
        client.infer("identity", X)
    assert type(caught.value) is BY_CODE[code.name]
    assert (caught.value.message, caught.value.model, caught.value.endpoint) == ("because", "identity", server.address)


def test_every_call_carries_a_deadline_and_the_metadata(make_client: MakeClient, server: FakeServer) -> None:
    client = make_client(server.address, metadata={"authorization": "Bearer t"})
    client.infer("identity", X)
    client.server_live(deadline_s=5.0, metadata=[("x-trace", "1"), ("raw-bin", b"\0\xff")])
    first, second = server.seen
    assert 25 < first.time_remaining_s < 31
    assert second.time_remaining_s < 6
    assert first.metadata["authorization"] == second.metadata["authorization"] == "Bearer t"
    assert (second.metadata["x-trace"], second.metadata["raw-bin"]) == ("1", b"\0\xff")


def test_unavailable_is_retried_and_the_attempts_are_counted(make_client: MakeClient, server: FakeServer) -> None:
    server.faults.extend([BUSY, BUSY])
    assert make_client(server.address, retry=FAST).infer("identity", X).timing.attempts == 3
    assert server.count("ModelInfer") == 3


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.load_model("m"),
        lambda client: client.unload_model("m"),
        lambda client: client.infer("identity", X, parameters={"sequence_id": 7}),
    ],
    ids=["load", "unload", "sequence"],
)
def test_what_changes_the_server_is_sent_once(
    make_client: MakeClient, server: FakeServer, call: Callable[[Any], None]
) -> None:
    server.faults.append(BUSY)
    with pytest.raises(Unavailable, match="busy"):
        call(make_client(server.address, retry=FAST))
    assert len(server.seen) == 1


def test_a_full_server_is_asked_again_only_when_it_says_when(make_client: MakeClient, server: FakeServer) -> None:
    full = grpc.StatusCode.RESOURCE_EXHAUSTED
    server.faults.append(Fault(full, "queue is full", (("grpc-retry-pushback-ms", "1"),)))
    client = make_client(server.address)
    assert client.infer("identity", X).timing.attempts == 2
    server.faults.append(Fault(full, "queue is full"))
    with pytest.raises(ResourceExhausted) as caught:
        client.infer("identity", X)
    assert caught.value.retry_after_s is None
    server.faults.append(Fault(full, "queue is full", (("grpc-retry-pushback-ms", "60000"),)))
    with pytest.raises(ResourceExhausted) as caught:
        client.infer("identity", X)
    assert caught.value.retry_after_s == 60.0


def test_a_connection_cut_in_the_middle_of_a_call_is_retried_on_a_new_one(
    make_client: MakeClient, server: FakeServer
) -> None:
    proxy = DroppingProxy(server.address, drops=1)
    client = make_client(proxy.address, retry=FAST)
    try:
        np.testing.assert_array_equal(client.infer("identity", X)["X"], X["X"])
        assert (proxy.dropped, server.count("ModelInfer")) == (1, 1)
    finally:
        client.close()
        proxy.close()


def test_calls_are_spread_over_all_endpoints(make_client: MakeClient, make_server: MakeServer) -> None:
    servers = [make_server() for _ in range(3)]
    client = make_client([server.address for server in servers])
    for _ in range(9):
        client.infer("identity", X)
    assert [server.count("ModelInfer") for server in servers] == [3, 3, 3]


def test_a_dead_endpoint_costs_no_call_and_is_then_avoided(
    make_client: MakeClient, server: FakeServer, dead_address: str
) -> None:
    client = make_client([dead_address, server.address], retry=RetryPolicy(max_attempts=1), random=lambda: 0.0)
    assert [client.infer("identity", X).timing.attempts for _ in range(3)] == [2, 1, 1]
    assert repr(client).endswith("; 1 of 2 healthy>")


def test_a_server_that_stops_is_left_and_found_again_when_it_is_back(
    make_client: MakeClient, make_server: MakeServer
) -> None:
    first, second = make_server(), make_server()
    skipped_ns = [0]
    client = make_client(
        [first.address, second.address], random=lambda: 0.0, clock_ns=lambda: time.monotonic_ns() + skipped_ns[0]
    )
    first.stop()
    assert {client.infer("identity", X).timing.endpoint for _ in range(4)} == {second.address}
    again = make_server(first.address)
    client.wait_until_ready(WAIT_S, endpoint=first.address)
    skipped_ns[0] = 60_000_000_000
    assert {client.infer("identity", X).timing.endpoint for _ in range(4)} == {again.address, second.address}


def test_one_endpoint_can_be_named_and_control_calls_must(make_client: MakeClient, make_server: MakeServer) -> None:
    servers = [make_server(), make_server()]
    client = make_client([server.address for server in servers])
    for _ in range(3):
        client.server_live(endpoint=servers[1].address)
    client.load_model("m", endpoint=servers[0].address)
    assert [len(server.seen) for server in servers] == [1, 3]
    with pytest.raises(InvalidRequest, match="say which with endpoint="):
        client.unload_model("m")
    with pytest.raises(InvalidRequest, match="is not one of this client's endpoints"):
        client.server_live(endpoint="elsewhere:1")


def test_the_deadline_ends_a_call_that_the_server_does_not_answer(make_client: MakeClient, server: FakeServer) -> None:
    with pytest.raises(DeadlineExceeded) as caught:
        make_client(server.address).infer("silent", X, deadline_s=0.2)
    assert (caught.value.model, caught.value.attempts) == ("silent", 1)
    assert server.cancelled.wait(WAIT_S)


def test_nobody_there_is_unavailable_and_says_where(make_client: MakeClient, dead_address: str) -> None:
    client = make_client(dead_address, retry=FAST)
    with pytest.raises(Unavailable, match="failed to connect") as caught:
        client.server_live()
    assert (caught.value.endpoint, caught.value.attempts) == (dead_address, 4)


def test_a_name_that_does_not_resolve_is_unavailable(make_client: MakeClient) -> None:
    with pytest.raises(Unavailable) as caught:
        make_client("host.invalid:8001", retry=FAST).load_model("m")
    assert caught.value.attempts == 1


def test_a_unix_socket_is_an_endpoint(make_client: MakeClient, make_server: MakeServer, tmp_path: Path) -> None:
    server = make_server(f"unix://{tmp_path}/s.sock")
    assert make_client(server.address).infer("identity", X).timing.endpoint == server.address


def test_a_dns_endpoint_spreads_over_its_addresses(make_client: MakeClient, server: FakeServer) -> None:
    address = "dns:///localhost:" + server.address.rpartition(":")[2]
    assert make_client(address).infer("identity", X).timing.endpoint == address


def test_an_answer_that_is_no_message_is_an_invalid_response(make_client: MakeClient, server: FakeServer) -> None:
    server.answers["ModelInfer"] = b"\xff\xff"
    with pytest.raises(InvalidResponse, match="not a ModelInferResponse"):
        make_client(server.address).infer("identity", X)


def test_waiting_for_ready_ends_when_the_server_turns_ready(make_client: MakeClient, server: FakeServer) -> None:
    server.ready = False

    def turn_ready(_: Any) -> None:
        server.ready = server.count("ModelReady") >= 3

    server.on_call = turn_ready
    make_client(server.address).wait_until_ready(WAIT_S, "identity")
    assert server.count("ModelReady") == 3


def test_waiting_for_ready_gives_up_in_time(make_client: MakeClient, server: FakeServer, dead_address: str) -> None:
    with pytest.raises(NotReady, match=r"model 'nope' was not ready within 0\.1 s"):
        make_client(server.address).wait_until_ready(0.1, "nope")
    with pytest.raises(NotReady, match="UNAVAILABLE: failed to connect"):
        make_client(dead_address).wait_until_ready(0.1)


def test_large_tensors_pass(make_client: MakeClient, server: FakeServer) -> None:
    large = np.arange(4_000_000, dtype=np.float64)
    np.testing.assert_array_equal(make_client(server.address).infer("identity", {"X": large})["X"], large)


def test_concurrent_callers_get_their_own_answers(make_client: MakeClient, server: FakeServer) -> None:
    client = make_client(server.address)

    def ask(number: int) -> float:
        return float(client.infer("identity", {"X": np.array([number], np.float32)})["X"][0])

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(200))) == list(range(200))


def test_closing_ends_calls_in_flight_and_refuses_new_ones(make_client: MakeClient, server: FakeServer) -> None:
    client = make_client(server.address)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.infer, "silent", X)
        assert server.entered.wait(WAIT_S)
        client.close()
        with pytest.raises(ClientClosed):
            call.result(WAIT_S)
    assert server.cancelled.wait(WAIT_S)
    client.close()
    with pytest.raises(ClientClosed):
        client.server_live()
    assert repr(client).endswith(f"Client {server.address}; closed>")


def test_closing_ends_a_pause_between_attempts(server: FakeServer) -> None:
    called = threading.Event()
    server.on_call = lambda _: called.set()
    server.faults.append(Fault(grpc.StatusCode.UNAVAILABLE, "busy", (("grpc-retry-pushback-ms", "20000"),)))
    client = Client(server.address)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.infer, "identity", X)
        assert called.wait(WAIT_S)
        client.close()
        with pytest.raises(ClientClosed):
            call.result(WAIT_S)


class ClosedInBetween(Channels):
    """Channels that are closed by another thread just when a call has got its callable."""

    def callable(self, endpoint: int, rpc: str) -> Any:
        found = super().callable(endpoint, rpc)
        for channel in self.close():
            channel.close()
        return found


def test_a_call_that_closing_overtakes_is_told_so(server: FakeServer) -> None:
    client = Client(server.address)
    client._channels = ClosedInBetween(grpc, client._endpoints, None, ())
    with pytest.raises(ClientClosed, match="before the call"):
        client.server_live()


def test_a_context_manager_closes_its_client(loop: Loop, server: FakeServer) -> None:
    with Client(server.address) as client:
        assert client.server_live()
    assert repr(client).endswith("closed>")

    async def use() -> str:
        async with AsyncClient(server.address) as client:
            assert await client.server_live()
        return repr(client)

    assert loop.run(use()).endswith("closed>")


def test_cancelling_a_task_cancels_its_call_and_not_its_neighbour(loop: Loop, server: FakeServer) -> None:
    async def scenario() -> float:
        async with AsyncClient(server.address) as client:
            lost = asyncio.create_task(client.infer("silent", X))
            await asyncio.to_thread(server.entered.wait, WAIT_S)
            kept = asyncio.create_task(client.infer("identity", X))
            lost.cancel()
            with pytest.raises(asyncio.CancelledError):
                await lost
            await asyncio.to_thread(server.cancelled.wait, WAIT_S)
            return float((await kept)["X"][1, 2])

    assert loop.run(scenario()) == 5.0
    assert server.cancelled.is_set()


def test_an_interrupt_from_the_keyboard_cancels_the_call(server: FakeServer) -> None:
    def interrupt() -> None:
        assert server.entered.wait(WAIT_S)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    with Client(server.address) as client:
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            client.infer("silent", X)
        thread.join()
        assert server.cancelled.wait(WAIT_S)
        assert client.server_live()


def test_an_unknown_argument_is_a_type_error(server: FakeServer) -> None:
    with Client(server.address) as client, pytest.raises(TypeError, match="dedline_s"):
        client.server_live(dedline_s=1.0)


def test_an_unknown_model_is_not_found_and_not_retried(make_client: MakeClient, server: FakeServer) -> None:
    with pytest.raises(NotFound, match="model 'nope' is not found"):
        make_client(server.address).infer("nope", X)
    assert len(server.seen) == 1
