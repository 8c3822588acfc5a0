"""The seam between an ensemble and its parts: places, lists, bugs of a part, and that nothing leads in a circle."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from sluice_batching import NO_DEADLINE, QueueFull, QueuePolicy
from sluice_proto.model_config_pb2 import DataType, ModelConfig
from sluice_server.dataflow import Graph, Step
from sluice_server.errors import InvalidArgument
from sluice_server.execution.ensemble import EnsembleModel, EnsembleRun, Part
from sluice_server.execution.gate import Gate
from sluice_server.execution.inlets import Inlet, Tensor, conform
from sluice_server.execution.request import InferRequest
from sluice_server.execution.step import ArraysCall, StepCall
from sluice_server.observability.statistics import FailureReason, ModelStatistics
from sluice_server.protocol.encode import Encoder
from sluice_server.protocol.interface import ModelInterface
from sluice_server.status import OK, Code, StatusMapper
from support.fakes import EchoSession, RecordingCall, eventually, held, served_model

X = np.array([[7]], np.int64)


def request(call: RecordingCall | None = None, deadline_ns: int = NO_DEADLINE, rows: int = 1) -> InferRequest:
    call = RecordingCall(b"message") if call is None else call
    return InferRequest(call, "", {"X": np.repeat(X, rows, 0)}, ("Y",), rows, ("Y",), deadline_ns)


def interface(name: str = "E") -> tuple[ModelConfig, ModelInterface]:
    config = ModelConfig(name=name, max_batch_size=8)
    config.input.add(name="X", data_type=DataType.TYPE_INT64, dims=[1])
    config.output.add(name="Y", data_type=DataType.TYPE_INT64, dims=[1])
    return config, ModelInterface.of(config, 1)


@pytest.fixture
def make_ensemble(timer):
    """An ensemble of two steps, one after the other, each on a model that echoes; both are started."""
    started = []

    def make(places: int = 0, **options) -> EnsembleModel:
        models = [served_model(EchoSession(), timer, name, **options) for name in ("first", "second")]
        graph = Graph([Step({"X": "X"}, {"Y": "between"}), Step({"X": "between"}, {"Y": "Y"})], ["X"], ["Y"])
        parts = []
        for model, step in zip(models, graph.steps, strict=True):
            inlets = tuple(Inlet(model.interface, name, tensor) for name, tensor in step.takes.items())
            assert model.answers_in_arrays()
            gate = Gate(places, QueuePolicy(max_batch_rows=8)) if places else None
            parts.append(Part(model, inlets, dict(step.makes), ArraysCall, gate))
        config, made = interface()
        ensemble = EnsembleModel(config, made, graph, parts, Encoder(made), ModelStatistics(), StatusMapper(), timer)
        started.extend([ensemble, *models])
        for each in (ensemble, *models):
            each.start()
        return ensemble

    yield make
    for each in started:
        each.drain()
        assert each.join(20.0)


def test_a_list_of_requests_goes_from_step_to_step_as_a_list(make_ensemble):
    ensemble = make_ensemble()
    first, second = ensemble.parts
    with held(first) as session:
        calls = [RecordingCall(b"message") for _ in range(4)]
        assert ensemble.submit([request(calls[0])]) == []
        session.wait_for_runs(1)
        assert ensemble.submit([request(call) for call in calls[1:]]) == []
        assert len(first.queue) == 3
        session.release()
        assert [call.wait()[0] for call in calls] == [OK] * 4
    assert first.statistics.snapshot().execution_count == 2
    assert second.statistics.snapshot().execution_count <= 2
    assert ensemble.statistics.snapshot().execution_count == 4


def test_a_lone_request_is_run_by_the_thread_that_brought_it(make_ensemble):
    ensemble = make_ensemble()
    first, second = ensemble.parts
    for model in (first, second):
        model._common_session = EchoSession()
        eventually(lambda model=model: model.queue._idle_takers == 1, "its instance waits")
    call = RecordingCall(b"message")
    late, work = ensemble.submit_one(request(call))
    assert late == []
    assert work is not None
    assert not call.ends
    with held(first) as session:
        work()
        assert call.ends[0][0] is OK, "both steps have run here"
        assert session.runs == []
    assert (first.queue._lent, second.queue._lent) == (0, 0)


def test_an_ensemble_that_drains_gives_back_what_comes_and_finishes_what_it_has(make_ensemble):
    ensemble = make_ensemble()
    with held(ensemble.parts[1]) as session:
        call = RecordingCall(b"message")
        ensemble.submit([request(call)])
        session.wait_for_runs(1)
        ensemble.drain()
        late = request()
        assert ensemble.submit([late]) == [late]
        assert ensemble.submit_one(late) == ([late], None)
        assert not ensemble.join(0.0)
        session.release()
        assert ensemble.join(20.0)
    assert call.ends[0][0] is OK
    assert ensemble.cancel(late) is False


def test_a_bug_of_a_part_ends_the_request_with_an_id_and_not_with_its_text(make_ensemble, monkeypatch):
    ensemble = make_ensemble()

    def fails(requests):
        raise RuntimeError("secret")

    monkeypatch.setattr(ensemble.parts[1], "submit", fails)
    call = RecordingCall(b"message")
    ensemble.submit([request(call)])
    status, _ = call.wait()
    assert status.code is Code.INTERNAL
    assert status.message.startswith("in ensemble 'E', internal error; the server's log has the details")
    eventually(lambda: ensemble.join(0.0) if ensemble._draining else not ensemble._runs, "nothing is in flight")


def test_a_part_that_ends_first_refuses_the_step_as_unavailable(make_ensemble):
    ensemble = make_ensemble()
    ensemble.parts[1].drain()
    call = RecordingCall(b"message")
    ensemble.submit([request(call)])
    status, _ = call.wait()
    assert (status.code, status.message) == (
        Code.UNAVAILABLE,
        "in ensemble 'E', model 'second' is not ready: it is being unloaded",
    )
    assert ensemble.statistics.snapshot().failures[FailureReason.OTHER] == 1


def test_a_request_ends_once_whoever_ends_it(make_ensemble):
    ensemble = make_ensemble()
    with held(ensemble.parts[0]) as session:
        call = RecordingCall(b"message")
        asked = request(call)
        ensemble.submit([asked])
        session.wait_for_runs(1)
        assert ensemble.cancel(asked)
        assert not ensemble.cancel(asked)
        session.release()
        eventually(lambda: ensemble.parts[0].statistics.snapshot().success.count == 1, "the run has ended")
    assert call.ends == []
    assert ensemble.parts[1].statistics.snapshot().execution_count == 0
    assert ensemble.statistics.snapshot().failures[FailureReason.CANCELED] == 1


@pytest.mark.parametrize("places", [0, 1])
def test_nothing_of_a_request_is_left_for_the_collector(make_ensemble, places):
    ensemble = make_ensemble(places)
    calls = [RecordingCall(b"message") for _ in range(20)]
    gc.collect()
    gc.disable()
    try:
        ensemble.submit([request(call) for call in calls])
        for call in calls:
            call.wait()
            call.on_cancel = None  # as a transport does at the end of a call
        with held(ensemble.parts[1]) as session:
            left = request(RecordingCall(b"message"))
            ensemble.submit([left])
            session.wait_for_runs(1)
            ensemble.cancel(left)
            left.call.on_cancel = None
        del left

        def alive() -> int:
            return sum(isinstance(item, StepCall | EnsembleRun | InferRequest) for item in gc.get_objects())

        eventually(lambda: alive() == 0, "all of it is freed")
    finally:
        gc.enable()


# --- places --------------------------------------------------------------------------------------------------------


def test_places_are_taken_in_the_order_of_arrival():
    gate = Gate(2, QueuePolicy(max_batch_rows=8, max_queue_rows=3))
    requests = [request() for _ in range(6)]
    assert [gate.enter(each) for each in requests[:5]] == [(True, None)] * 2 + [(False, None)] * 3
    entered, error = gate.enter(requests[5])
    assert not entered
    assert isinstance(error, QueueFull)
    assert gate.cancel(requests[3])
    assert not gate.cancel(requests[0]), "it has a place"
    assert gate.leave() == ([requests[2]], [])
    assert gate.leave() == ([requests[4]], [])
    assert gate.leave() == ([], [])
    assert gate.enter(requests[5]) == (True, None)


def test_who_waited_too_long_gets_no_place():
    now_ns = [0]
    gate = Gate(1, QueuePolicy(max_batch_rows=8), lambda: now_ns[0])
    hurried, patient = request(deadline_ns=10), request()
    assert gate.enter(request()) == (True, None)
    gate.enter(hurried)
    gate.enter(patient)
    now_ns[0] = 10
    assert gate.leave() == ([patient], [hurried])


# --- tensors between models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "rows", "dims", "batches", "result"),
    [
        ((3, 4), 3, (4,), True, (3, 4)),
        ((4,), 0, (4,), False, (4,)),
        ((4,), 0, (4,), True, (1, 4)),
        ((3, 4), 0, (4,), True, (3, 4)),
        ((1, 4), 1, (4,), False, (4,)),
        ((1, 4), 1, (-1, 4), False, (1, 4)),
        ((3, 4), 3, (4,), False, (3, 4)),
    ],
)
def test_a_batch_dimension_is_put_on_or_off_where_the_dims_say_so(shape, rows, dims, batches, result):
    assert conform(Tensor(np.zeros(shape), rows), dims, batches=batches).shape == result


def test_rows_that_a_part_does_not_take_are_refused():
    inlet = Inlet(interface("part")[1], "X", "t")
    inlet.check_rows(8, 0)
    refused = [(9, 0, "batch-size must be <= 8"), (0, 0, "got 0"), (2, 3, "does not match other inputs")]
    for rows, others, text in refused:
        with pytest.raises(InvalidArgument, match=text):
            inlet.check_rows(rows, others)
    with pytest.raises(InvalidArgument, match=r"input 'X' for model 'part'. Expected \[-1,1\], got \[2,2\]"):
        inlet.fit(Tensor(np.zeros((2, 2), np.int64), 2))
