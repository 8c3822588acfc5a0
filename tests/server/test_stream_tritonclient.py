"""The streaming APIs of tritonclient as it is, blocking and asyncio."""

from __future__ import annotations

import asyncio
import queue
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from sluice_server.observability.statistics import Outcome
from support import models
from support.fakes import PATIENCE_S, eventually, held

if TYPE_CHECKING:
    from support.server import RunningServer

COUNT = 200

pytestmark = pytest.mark.usefixtures("no_errors_logged")


@pytest.fixture
def server(start_server, repository) -> RunningServer:
    for name in ("echo", "other"):
        models.write_model(repository, name, models.identity(dims=("N", 1)), max_batch_size=16)
    return start_server(repository, http=None, metrics=None)


class Answers:
    """What the callback of a stream was given, in order."""

    def __init__(self) -> None:
        self._answers: queue.SimpleQueue[tuple[triton.InferResult | None, InferenceServerException | None]]
        self._answers = queue.SimpleQueue()

    def __call__(self, result: triton.InferResult | None, error: InferenceServerException | None) -> None:
        self._answers.put((result, error))

    def result(self) -> triton.InferResult:
        result, error = self._answers.get(timeout=PATIENCE_S)
        assert error is None, error
        assert result is not None
        return result

    def error(self) -> InferenceServerException:
        result, error = self._answers.get(timeout=PATIENCE_S)
        assert result is None
        assert error is not None
        return error

    def empty(self) -> bool:
        return self._answers.empty()


def inputs_of(value: int) -> list[triton.InferInput]:
    tensor = triton.InferInput("X", [1, 1], "FP32")
    tensor.set_data_from_numpy(np.array([[value]], np.float32))
    return [tensor]


def told(result: triton.InferResult) -> tuple[str, float]:
    return result.get_response().id, result.as_numpy("Y").item()


def test_the_blocking_client_gets_its_answers_in_order(server):
    answers = Answers()
    with triton.InferenceServerClient(server.target) as client:
        client.start_stream(answers)
        for value in range(COUNT):
            client.async_stream_infer(("echo", "other")[value % 2], inputs_of(value), request_id=str(value))
        client.stop_stream()
        assert [told(answers.result()) for _ in range(COUNT)] == [(str(value), value) for value in range(COUNT)]
        assert answers.empty()


def test_the_blocking_client_hears_of_an_error_in_between_and_goes_on(server):
    answers = Answers()
    with triton.InferenceServerClient(server.target) as client:
        client.start_stream(answers)
        for value, name in enumerate(("echo", "nope", "echo")):
            client.async_stream_infer(name, inputs_of(value), request_id=str(value))
        assert told(answers.result()) == ("0", 0)
        error = answers.error()
        assert "'nope' is not found" in error.message()
        assert error.status() is None
        assert told(answers.result()) == ("2", 2)
        client.stop_stream()


def test_the_blocking_client_gets_an_error_as_a_status_when_it_says_so(server):
    answers = Answers()
    with triton.InferenceServerClient(server.target) as client:
        client.start_stream(answers, headers={"triton_grpc_error": "true"})
        for value, name in enumerate(("echo", "nope")):
            client.async_stream_infer(name, inputs_of(value))
        assert told(answers.result()) == ("", 0)
        assert answers.error().status() == "StatusCode.NOT_FOUND"
        with pytest.raises(InferenceServerException, match="no longer in valid state"):
            client.async_stream_infer("echo", inputs_of(2))
        client.stop_stream()


def test_the_blocking_client_sees_the_mark_of_the_last_answer(server):
    answers = Answers()
    with triton.InferenceServerClient(server.target) as client:
        client.start_stream(answers)
        client.async_stream_infer("echo", inputs_of(5), enable_empty_final_response=True)
        assert answers.result().get_response().parameters["triton_final_response"].bool_param
        client.stop_stream()


def test_the_blocking_client_cancels_what_waits(server):
    answers = Answers()
    model = server.model("echo")
    with triton.InferenceServerClient(server.target) as client, held(model) as session:
        client.start_stream(answers)
        client.async_stream_infer("echo", inputs_of(0))
        session.wait_for_runs(1)
        for value in range(1, 6):
            client.async_stream_infer("echo", inputs_of(value))
        eventually(lambda: len(model.queue) == 5, "five requests wait")
        client.stop_stream(cancel_requests=True)
        assert "cancel" in answers.error().message().lower()
        eventually(lambda: len(model.queue) == 0, "nothing waits")
    # The five, and the one that was running if its run could still be ended.
    assert model.statistics.snapshot().outcomes[Outcome.CANCELLED] in {5, 6}


def test_the_blocking_client_keeps_the_time_limit_of_its_stream(server):
    answers = Answers()
    with triton.InferenceServerClient(server.target) as client, held(server.model("echo")) as session:
        client.start_stream(answers, stream_timeout=0.3)
        client.async_stream_infer("echo", inputs_of(0))
        session.wait_for_runs(1)
        assert answers.error().status() == "StatusCode.DEADLINE_EXCEEDED"
        client.stop_stream()


def test_the_asyncio_client_gets_its_answers_and_errors_in_order(server):
    async def requests():
        for value in range(COUNT):
            name = "nope" if value % 50 == 49 else ("echo", "other")[value % 2]
            yield {"model_name": name, "inputs": inputs_of(value), "request_id": str(value)}

    async def talk() -> list[tuple[str, float] | str]:
        async with triton_aio.InferenceServerClient(server.target) as client:
            return [
                told(result) if error is None else error.message()
                async for result, error in client.stream_infer(requests())
            ]

    got = asyncio.run(talk())
    assert len(got) == COUNT
    for value, answer in enumerate(got):
        assert answer == (str(value), value) or (value % 50 == 49 and "'nope' is not found" in answer)


def test_the_asyncio_client_leaves_in_the_middle(server):
    async def talk() -> None:
        sent = asyncio.Event()

        async def requests():
            yield {"model_name": "echo", "inputs": inputs_of(0)}
            await sent.wait()

        async with triton_aio.InferenceServerClient(server.target) as client:
            answers = client.stream_infer(requests())
            result, error = await anext(answers)
            assert (told(result), error) == (("", 0), None)
            assert answers.cancel()
            sent.set()
            # The loop must live until the stream has ended on the client's side too.
            with pytest.raises(asyncio.CancelledError):
                await anext(answers)
            while len(server.server._dispatcher._infer_streams):
                assert await client.is_server_live()

    asyncio.run(asyncio.wait_for(talk(), PATIENCE_S))
