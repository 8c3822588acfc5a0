"""`preserve_ordering`: answers leave in the order of the requests, on several instances whose runs end in another."""

from __future__ import annotations

import queue
import threading
import time
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest

from sluice_batching import NO_DEADLINE
from sluice_server.errors import BackendError
from sluice_server.execution.ordering import OrderedModel
from sluice_server.execution.request import InferRequest
from sluice_server.execution.response_cache import ResponseCache
from sluice_server.execution.threads import available_cpus
from sluice_server.observability.statistics import Outcome
from sluice_server.status import Code, Status
from support import models
from support.fakes import PATIENCE_S, EchoSession, RecordingCall, eventually, served_model
from support.requests import answer_arrays, infer_request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice_server.execution.instance import Runnable
    from sluice_server.execution.model import ServedModel

SOON_NS = 100_000_000
"""A deadline that comes while a test waits for it."""

needs_two_instances = pytest.mark.skipif(available_cpus() < 2, reason="one CPU runs one instance")


class PickySession:
    """Holds the runs of chosen values until each is let go; `running` are the values of the runs that are held."""

    def __init__(self, session: Runnable, held: Sequence[int], *, bad: Sequence[int] = ()) -> None:
        self._session = session
        self._gates = {value: threading.Event() for value in held}
        self._bad = set(bad)
        self.running: list[int] = []

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        values = feeds["X"].ravel().tolist()
        for value in values:
            if value in self._gates:
                self.running.append(value)
                assert self._gates[value].wait(PATIENCE_S), f"the run of {value} was not let go"
        if self._bad & set(values):
            raise BackendError(1, f"the model fails on one of {values}")
        return self._session.run(output_names, feeds)

    def wait_for(self, value: int) -> None:
        eventually(lambda: value in self.running, f"{value} runs")

    def let_go(self, *values: int) -> None:
        for value in values or self._gates:
            self._gates[value].set()


class Ends:
    """The ends of calls in the order in which they came, by number."""

    def __init__(self) -> None:
        self._ended: queue.SimpleQueue[tuple[int, Code]] = queue.SimpleQueue()
        self.seen: list[tuple[int, Code]] = []

    def call(self, number: int, deadline_ns: int = NO_DEADLINE) -> RecordingCall:
        ends = self._ended

        class NumberedCall(RecordingCall):
            def _end(self, status: Status, payload: bytes) -> None:
                if not self.ends:
                    ends.put((number, status.code))
                super()._end(status, payload)

        return NumberedCall(b"message", deadline_ns=deadline_ns)

    def take(self, count: int) -> list[tuple[int, Code]]:
        got = [self._ended.get(timeout=PATIENCE_S) for _ in range(count)]
        self.seen += got
        return got

    def numbers(self, count: int) -> list[int]:
        got = self.take(count)
        assert {code for _, code in got} <= {Code.OK}, got
        return [number for number, _ in got]

    def none_came(self) -> bool:
        return self._ended.empty()


class Client:
    """Submits requests whose number is their value."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.ends = Ends()

    def ask(self, *numbers: int, life_ns: int | None = None) -> list[RecordingCall]:
        calls = []
        requests = []
        for number in numbers:
            deadline_ns = NO_DEADLINE if life_ns is None else time.monotonic_ns() + life_ns
            call = self.ends.call(number, deadline_ns)
            arrays = {"X": np.array([[number]], np.int64)}
            requests.append(InferRequest(call, "", arrays, ("Y",), 1, ("Y",), deadline_ns))
            calls.append(call)
        assert self.model.submit(requests) == []
        return calls


@pytest.fixture
def start(timer, no_errors_logged):
    """Start a model whose answers leave in order, with a client; requests are merged by no more than `rows`."""
    started: list[tuple[ServedModel, PickySession]] = []

    def make(session: PickySession, *, rows: int = 1, cache: ResponseCache | None = None, **policy: int) -> Client:
        policy = {"instances": 2, **policy}
        model = served_model(session, timer, max_batch_rows=rows, ordered=True, cache=cache, **policy)
        model.start()
        started.append((model, session))
        return Client(model)

    yield make
    for model, session in started:
        session.let_go()
        model.drain()
        assert model.join(PATIENCE_S)
        assert len(model._order._order) == 0, "nothing is left in the order"


def test_answers_leave_in_the_order_of_the_requests_though_runs_end_in_another(start):
    session = PickySession(EchoSession(), [0, 3])
    client = start(session)
    client.ask(0)
    session.wait_for(0)
    client.ask(1, 2, 3)
    session.wait_for(3)
    eventually(lambda: client.model.statistics.snapshot().execution_count == 2, "1 and 2 have run")
    client.ask(4)
    assert client.ends.none_came()
    session.let_go(0)
    assert client.ends.numbers(4 - 1) == [0, 1, 2]
    session.let_go(3)
    assert client.ends.numbers(2) == [3, 4]


def test_without_it_they_leave_as_they_are_ready(timer):
    session = PickySession(EchoSession(), [0])
    model = served_model(session, timer, max_batch_rows=1, instances=2)
    model.start()
    client = Client(model)
    client.ask(0)
    session.wait_for(0)
    client.ask(1, 2)
    assert client.ends.numbers(2) == [1, 2]
    session.let_go()
    assert client.ends.numbers(1) == [0]
    model.drain()
    assert model.join(PATIENCE_S)


def test_a_failed_run_is_answered_in_order_too_and_alone(start):
    session = PickySession(EchoSession(), [0], bad=[2])
    client = start(session, rows=8)
    client.ask(0)
    session.wait_for(0)
    client.ask(1, 2, 3)
    eventually(lambda: client.model.statistics.snapshot().outcomes[Outcome.BACKEND_ERROR] == 1, "2 has failed")
    assert client.ends.none_came()
    session.let_go()
    assert client.ends.take(4) == [(0, Code.OK), (1, Code.OK), (2, Code.INTERNAL), (3, Code.OK)]


def test_what_expires_is_answered_in_time_and_holds_up_nobody(start):
    session = PickySession(EchoSession(), [0, 1])
    client = start(session)
    client.ask(0)
    session.wait_for(0)
    client.ask(1)
    session.wait_for(1)
    client.ask(2, life_ns=SOON_NS)
    client.ask(3)
    assert client.ends.take(1) == [(2, Code.DEADLINE_EXCEEDED)]
    session.let_go(1)
    eventually(lambda: client.model.statistics.snapshot().execution_count == 2, "1 and 3 have run")
    assert client.ends.none_came()
    session.let_go(0)
    assert client.ends.numbers(3) == [0, 1, 3]


def test_who_is_refused_is_told_at_once(start):
    session = PickySession(EchoSession(), [0])
    client = start(session, instances=1, max_queue_rows=2)
    client.ask(0)
    session.wait_for(0)
    client.ask(1, 2, 3)
    assert client.ends.take(1) == [(3, Code.RESOURCE_EXHAUSTED)]
    session.let_go()
    assert client.ends.numbers(3) == [0, 1, 2]


@pytest.mark.parametrize("is_running", [True, False])
def test_a_client_that_leaves_holds_up_nobody(start, is_running):
    session = PickySession(EchoSession(), [0, 1])
    client = start(session)
    (running,) = client.ask(0)
    session.wait_for(0)
    client.ask(1)
    session.wait_for(1)
    (waiting,) = client.ask(2)
    client.ask(3)
    left = running if is_running else waiting
    left.on_cancel()
    session.let_go(1)
    assert is_running or client.ends.none_came()
    if is_running:
        assert client.ends.numbers(3) == [1, 2, 3]
    session.let_go(0)
    if not is_running:
        assert client.ends.numbers(3) == [0, 1, 3]


def test_hits_and_followers_of_the_response_cache_wait_for_their_turn(start):
    session = PickySession(EchoSession(), [0, 1])
    client = start(session, cache=ResponseCache(1 << 20))
    client.ask(7)
    assert client.ends.numbers(1) == [7]
    client.ask(0)
    session.wait_for(0)
    client.ask(7)
    client.ask(1)
    session.wait_for(1)
    client.ask(1)
    assert client.ends.none_came()
    session.let_go(1)
    eventually(lambda: client.model.statistics.snapshot().cache.hit.count == 2, "both are counted")
    assert client.ends.none_came()
    session.let_go(0)
    assert client.ends.numbers(4) == [0, 7, 1, 1]


def test_no_more_answers_are_held_than_requests_may_wait(start):
    session = PickySession(EchoSession(), [0])
    client = start(session, max_queue_rows=2)
    client.ask(0)
    session.wait_for(0)
    for number in (1, 2):
        client.ask(number)
        eventually(lambda number=number: client.model._order._order._held == number, "it is held")
    (refused,) = client.ask(3)
    assert client.ends.take(1) == [(3, Code.RESOURCE_EXHAUSTED)]
    assert "the queue is full: 2 of 2 answers are waiting" in refused.ends[0][0].message
    session.let_go()
    assert client.ends.numbers(3) == [0, 1, 2]


def test_requests_that_come_to_a_draining_version_leave_the_order(start):
    client = start(PickySession(EchoSession(), []))
    client.model.drain()
    request = InferRequest(client.ends.call(0), "", {"X": np.array([[0]], np.int64)}, ("Y",), 1, ("Y",), NO_DEADLINE)
    assert client.model.submit((request,)) == [request]
    assert client.model.submit_one(request) == ([request], None)
    assert len(client.model._order._order) == 0


def test_a_submission_that_breaks_leaves_nobody_in_the_order(start):
    client = start(PickySession(EchoSession(), []))
    request = InferRequest(client.ends.call(0), "", {"X": np.zeros((0, 1), np.int64)}, ("Y",), 0, ("Y",), NO_DEADLINE)
    with pytest.raises(ValueError, match="a request must have 1"):
        client.model.submit((request,))
    client.ask(1)
    assert client.ends.numbers(1) == [1]


def test_many_threads_bring_answers_and_each_list_is_answered_in_its_order(start):
    client = start(PickySession(EchoSession(), []), rows=4, instances=3)
    for first in range(0, 2000, 8):
        client.ask(*range(first, first + 8))
    assert client.ends.numbers(2000) == list(range(2000))


# --- Through a server


def ordered(scheduler: str = "preserve_ordering: true", **more: str) -> str:
    return f"dynamic_batching {{ {scheduler} }}" + more.get("more", "")


def hold(model: ServedModel, *values: int) -> PickySession:
    """Hold the runs of these values, on whichever instance."""
    session = PickySession(model._instances[0]._session, values)
    for instance in model._instances:
        instance._session = session
    model._common_session = None
    return session


def stream_of(server, make: Callable[[int], object], *numbers: int) -> list[grpc.Future]:
    return [server.begin("ModelInfer", make(number)) for number in numbers]


def number(value: int, model: str = "m", **more: object):
    return infer_request(model, {"X": np.array([[value]], np.int64)}, **more)


@needs_two_instances
@pytest.mark.parametrize("more", ["", 'parameters { key: "split_requests" value { string_value: "true" } }'])
def test_a_server_answers_in_order_and_says_so_of_the_model(start_server, repository, more, no_errors_logged):
    scheduler = ordered(more=more)
    models.write_model(
        repository, "m", models.identity("INT64", ("N", 1)), max_batch_size=1, instances=2, more=scheduler
    )
    server = start_server(repository, http=None, metrics=None)
    model = server.model("m")
    assert isinstance(model, OrderedModel)
    assert model.config.dynamic_batching.preserve_ordering
    session = hold(model, 0)
    first = server.begin("ModelInfer", number(0))
    session.wait_for(0)
    second = server.begin("ModelInfer", number(1))
    eventually(lambda: model.statistics.snapshot().execution_count == 1, "the second has run")
    with pytest.raises(grpc.FutureTimeoutError):
        second.result(timeout=0.1)
    session.let_go()
    assert [answer_arrays(call.result())["Y"].item() for call in (first, second)] == [0, 1]


@needs_two_instances
def test_a_large_request_has_one_place_for_all_of_its_parts(start_server, repository, no_errors_logged):
    split = 'parameters { key: "split_requests" value { string_value: "true" } }'
    model_file = models.identity("INT64", ("N", 1))
    models.write_model(repository, "m", model_file, max_batch_size=2, instances=2, more=ordered(more=split))
    server = start_server(repository, http=None, metrics=None)
    model = server.model("m")
    for leaves in (False, True):
        session = hold(model, 4)
        large = server.begin("ModelInfer", infer_request("m", {"X": np.arange(5, dtype=np.int64).reshape(5, 1)}))
        session.wait_for(4)
        small = server.begin("ModelInfer", number(9))
        with pytest.raises(grpc.FutureTimeoutError):
            small.result(timeout=0.1)
        if leaves:
            large.cancel()
            assert answer_arrays(small.result())["Y"].item() == 9
        session.let_go()
        if not leaves:
            assert answer_arrays(large.result())["Y"].ravel().tolist() == list(range(5))
            assert answer_arrays(small.result())["Y"].item() == 9


@needs_two_instances
def test_the_steps_of_an_ensemble_are_answered_in_order_and_none_waits_for_ever(
    start_server, repository, no_errors_logged
):
    model_file = models.identity("INT64", ("N", 1))
    models.write_model(repository, "m", model_file, max_batch_size=1, instances=2, more=ordered())
    (repository / "twice" / "1").mkdir(parents=True)
    (repository / "twice" / "config.pbtxt").write_text(
        """name: "twice" platform: "ensemble" max_batch_size: 1
        input { name: "X" data_type: TYPE_INT64 dims: [1] } output { name: "Y" data_type: TYPE_INT64 dims: [1] }
        ensemble_scheduling {
          step { model_name: "m" input_map { key: "X" value: "X" } output_map { key: "Y" value: "Z" } }
          step { model_name: "m" input_map { key: "X" value: "Z" } output_map { key: "Y" value: "Y" } }
        }"""
    )
    server = start_server(repository, http=None, metrics=None)
    calls = stream_of(server, lambda value: number(value, "twice"), *range(50))
    assert [answer_arrays(call.result())["Y"].item() for call in calls] == list(range(50))
    session = hold(server.model("m"), 0)
    calls = stream_of(server, lambda value: number(value, "twice"), *range(3))
    session.wait_for(0)
    session.let_go()
    assert [answer_arrays(call.result())["Y"].item() for call in calls] == [0, 1, 2]


def step(sequence: int, value: int, *, start: bool = False, end: bool = False):
    parameters = {"sequence_id": sequence, "sequence_start": start, "sequence_end": end}
    return infer_request("sums", {"INPUT": np.array([[value]], np.int64)}, parameters=parameters)


def test_sequences_are_answered_in_the_order_in_which_they_are_run_and_a_backlog_holds_up_nobody(
    start_server, repository, no_errors_logged
):
    strategy = "oldest { max_candidate_sequences: 1 preserve_ordering: true }"
    models.write_accumulator(repository, strategy=strategy, more="max_sequence_idle_microseconds: 3600000000")
    server = start_server(repository, http=None, metrics=None)
    model = server.model("sums")
    assert isinstance(model, OrderedModel)
    assert answer_arrays(server.infer(step(1, 1, start=True)))["OUTPUT"].item() == 1
    backlogged = server.begin("ModelInfer", step(2, 5, start=True, end=True))
    eventually(lambda: len(model.queue) == 1, "it waits for a slot")
    # Its request came first, but the sequence before it has to end before it can run.
    assert answer_arrays(server.infer(step(1, 1)))["OUTPUT"].item() == 2
    assert answer_arrays(server.infer(step(1, 1, end=True)))["OUTPUT"].item() == 3
    assert answer_arrays(backlogged.result())["OUTPUT"].item() == 5
    code, _ = server.refusal("ModelInfer", step(3, 1))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert len(model._order._order) == 0
