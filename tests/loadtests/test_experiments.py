"""The parts about promises under load: that each can keep and break its promise, and that what they read is real."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from loadtests import burst, coalesce, overload, processes, server_traces, steps, timed
from loadtests.coalesce import Coalesce
from loadtests.experiment import Experiment, Figure, Outcome, Place, Promise, at_random, open_load
from loadtests.h2load import LoadError
from loadtests.models import generate
from loadtests.neighbours import FLAGS, MODELS, OTHERS, write
from loadtests.ort_loop import session_options
from loadtests.overload import REFUSED, refused_ms
from loadtests.peers import probe
from loadtests.plan import EXPERIMENTS, PARTS, Plan
from loadtests.record import Record, from_json, to_json
from loadtests.scheduling import to_findings, to_goals
from loadtests.server_traces import Trace
from loadtests.steps import SLO_S, Trial, pick
from loadtests.timed import Times
from sluice_client import Client
from sluice_client.load.latencies import OK, Records

pytestmark = pytest.mark.timed

ITERATIONS_PER_MS = 100.0
"""About a tenth of this machine's, so that runs take a tenth of their time: nothing here depends on how long."""

QUICK, SLOW = Figure("sluice", "latency", "ms"), Figure("a baseline", "latency", "ms")


def place(folder: Path, transport: str = "auto") -> Place:
    return Place(folder, transport, ITERATIONS_PER_MS, measure_s=0.5)


# --- Rounds to figures and goals


def test_rounds_become_figures_and_goals() -> None:
    """Of whatever kind the numbers are, the record of them is one that JSON can hold."""
    outcomes = [Outcome({QUICK: value, SLOW: np.float64(2 * value)}) for value in (1, 3, 2)]
    findings = to_findings("a case", outcomes)
    assert [(each.who, each.figure, each.unit, each.rounds) for each in findings] == [
        ("sluice", "latency", "ms", (1.0, 3.0, 2.0)),
        ("a baseline", "latency", "ms", (2.0, 6.0, 4.0)),
    ]
    met, missed = to_goals(
        [Promise("quick", QUICK, 2.0, at_least=False), Promise("slow", SLOW, 5.0, at_least=True)], outcomes
    )
    assert (met.is_met, met.value.median, met.generator_was_limit) == (True, 2.0, False)
    assert (missed.is_met, missed.value.median) == (False, 4.0)
    record = Record(findings=tuple(findings), goals=(met, missed))
    assert from_json(json.loads(json.dumps(to_json(record)))) == record


@pytest.mark.parametrize(("problems", "was_limit"), [(["late", "", ""], False), (["late", "late", ""], True)])
def test_a_generator_that_was_the_limit_in_most_rounds_is_told(problems: list[str], was_limit: bool) -> None:
    outcomes = [Outcome({QUICK: 1.0}, problem) for problem in problems]
    (goal,) = to_goals([Promise("quick", QUICK, 2.0, at_least=False)], outcomes)
    assert goal.generator_was_limit is was_limit


def test_every_experiment_is_a_part_of_the_plan_with_promises_of_its_own() -> None:
    assert set(EXPERIMENTS) < set(PARTS)
    assert set(EXPERIMENTS) < set(Plan().parts)
    texts = [promise.text for kind in EXPERIMENTS.values() for promise in kind.promises]
    assert len(set(texts)) == len(texts) > len(EXPERIMENTS)


@pytest.mark.parametrize("kind", EXPERIMENTS.values(), ids=EXPERIMENTS)
def test_each_promise_is_kept_at_its_limit_and_broken_beyond(kind: type[Experiment]) -> None:
    for promise in kind.promises:
        beyond = promise.limit - 0.01 if promise.at_least else promise.limit + 0.01
        (kept,) = to_goals([promise], [Outcome({promise.figure: promise.limit})])
        (broken,) = to_goals([promise], [Outcome({promise.figure: beyond})])
        assert (kept.is_met, broken.is_met) == (True, False)


# --- What they read


def test_of_the_static_settings_the_one_with_the_most_answers_within_the_objective_is_the_best() -> None:
    small, large, late = Trial(4, 200.0, 0.1), Trial(8, 300.0, SLO_S), Trial(16, 400.0, SLO_S + 0.001)
    assert pick([small, large, late]) is large
    later = Trial(24, 500.0, 1.0)
    assert pick([later, late]) is late
    assert pick([Trial(1, 0.0, float("nan")), late]) is late
    with pytest.raises(LoadError, match="no static setting answered"):
        pick([Trial(1, 0.0, float("nan"))])


def test_what_the_server_did_before_it_knew_its_run_times_is_left_out() -> None:
    first, early, other = Trace("objective", 5, 6, 7), Trace("objective", 10**9, 6, 7), Trace("static", 9 * 10**9, 6, 7)
    late = Trace("objective", 2 * 10**9, None, 7)
    assert overload.settled([early, first, other, late], after_s=1.5) == [late]


def test_times_of_refusals_are_from_the_real_sending_on() -> None:
    records = Records.of([0.0, 1.0, 2.0], [0.5, 1.5, 2.5], [0.502, 1.9, 2.501], [REFUSED, OK, REFUSED])
    assert refused_ms(records) == pytest.approx([2.0, 1.0])


def test_runs_that_began_after_their_deadline_are_counted_and_what_never_ran_is_not() -> None:
    deadline_ns = int(burst.DEADLINE_S * 1e9)
    traces = [Trace("a", 5, 5 + deadline_ns, 9), Trace("a", 5, 6 + deadline_ns, 9), Trace("b", 5, None, 9)]
    assert burst.started_late(traces) == {"a": 1}


def test_traces_are_read_with_the_start_of_a_run_where_there_was_one(tmp_path: Path) -> None:
    file = tmp_path / "traces.json"
    entries = [
        {"id": 1, "model_name": "a", "model_version": 1},
        {"id": 1, "timestamps": [{"name": "GRPC_WAITREAD_END", "ns": 5}, {"name": "COMPUTE_START", "ns": 7},
                                 {"name": "REQUEST_END", "ns": 9}]},
        {"id": 2, "model_name": "b", "model_version": 1},
        {"id": 2, "timestamps": [{"name": "GRPC_WAITREAD_END", "ns": 6}, {"name": "REQUEST_END", "ns": 8}]},
    ]  # fmt: skip
    file.write_text(json.dumps(entries))
    assert list(server_traces.read(file)) == [Trace("a", 5, 7, 9), Trace("b", 6, None, 8)]


def test_a_real_server_traces_every_request_of_an_open_load(tmp_path: Path, transport: str) -> None:
    here = place(tmp_path, transport)
    here.write("model", Times(1), "max_batch_size: 1")
    traces = tmp_path / "traces.json"
    with processes.sluice(here.repository, tmp_path, transport, *server_traces.flags(traces)) as server:
        run = open_load(server.address, timed.request("model"), [0.0, 0.01, 0.02], 30.0)
        with pytest.raises(Exception, match="is not found"):
            probe(server.address, timed.request("unknown"))
    assert run.records.outcomes == {"OK": 3}
    found = [trace for trace in server_traces.read(traces) if trace.model == "model"]
    assert len(found) == 4  # one to connect
    for trace in found:
        assert trace.started_ns is not None
        assert trace.received_ns <= trace.started_ns <= trace.ended_ns


def test_a_model_counts_more_for_each_row_and_leaves_its_input_as_it_is() -> None:
    session = onnxruntime.InferenceSession(timed.build(10, 5), session_options(1), providers=["CPUExecutionProvider"])
    rows = np.arange(3, dtype=np.float32).reshape(3, 1)
    (answer,) = session.run(None, {"X": rows})
    assert np.array_equal(answer, rows)
    assert Times(10, 5).run_ms(4) == 30
    assert Times(10, 5).rows_per_s(4) == pytest.approx(4 / 0.03)
    assert timed.calibrate() > 0


def test_arrivals_at_random_are_the_same_each_time_and_end_in_time() -> None:
    times = at_random(100, 2.0)
    assert times == at_random(100, 2.0)
    assert 150 < len(times) < 250
    assert 0 < times[0] < times[-1] < 2.0


# --- From end to end, as short as it gets: what they measure, not how fast it is here


def test_equal_calls_run_once_with_a_cache_and_each_without(tmp_path: Path) -> None:
    figures = Coalesce(place(tmp_path)).measure().figures
    assert figures[coalesce.EXECUTIONS] == 1
    assert figures[coalesce.PLAIN_EXECUTIONS] == coalesce.REQUESTS
    assert figures[coalesce.LAST] > 0


@pytest.mark.long
def test_in_bursts_no_run_starts_after_its_deadline(tmp_path: Path) -> None:
    figures = burst.Burst(place(tmp_path)).measure().figures
    assert figures[burst.LATE_AT_ONCE] == figures[burst.LATE_IN_TURN] == 0
    assert figures[burst.RATIO] == figures[burst.IN_TURN] / max(1, figures[burst.FIFO_IN_TURN])


@pytest.mark.long
@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load (nghttp2-client) is not installed")
def test_under_overload_there_are_answers_and_refusals(tmp_path: Path) -> None:
    figures = overload.Overload(place(tmp_path)).measure().figures
    assert figures[overload.CAPACITY] > 0
    assert figures[overload.P99] > 0
    assert figures[overload.REFUSAL] > 0
    assert figures[overload.REFUSAL_CLIENT_P50] <= figures[overload.REFUSAL_CLIENT_P99]


@pytest.mark.long
def test_steps_find_the_best_of_the_grid_and_measure_every_step(tmp_path: Path) -> None:
    figures = steps.Steps(place(tmp_path)).measure().figures
    assert figures[steps.SIZE] in steps.GRID
    assert figures[steps.AT_FULL] > 0
    worst_ms = max(figures[steps.P99[step]] for step in steps.STEPS)
    assert figures[steps.P99_WORST] == pytest.approx(worst_ms / SLO_S / 1e3)


def test_the_neighbours_all_load_and_the_model_between_them_is_the_same(tmp_path: Path, transport: str) -> None:
    model = generate("identity", tmp_path / "models")
    repository = write(tmp_path / "neighbours", tmp_path / "models")
    with processes.sluice(repository, tmp_path, transport, *FLAGS) as server:
        assert model.is_answered_by(probe(server.address, model.request))
        with Client(server.address) as client:
            ready = {each.name for each in client.repository_index(ready_only=True)}
    assert ready >= {"identity", *MODELS, *OTHERS}
    ours, theirs = (folder / "identity" / "config.pbtxt" for folder in (tmp_path / "models", repository))
    assert ours.read_text() == theirs.read_text()
