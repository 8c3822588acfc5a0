"""A version with a response cache on fakes: who runs, who follows, and that every request ends once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest

from sluice_batching import NO_DEADLINE
from sluice_proto.grpc_service_pb2 import ModelInferResponse
from sluice_server.errors import BackendError
from sluice_server.execution.model_cache import HIT_WORTH, LOADED_REQUESTS, LOOK_STRIDE, MISSES_MAX, WINDOW_NS, Worth
from sluice_server.execution.request import InferRequest
from sluice_server.execution.response_cache import ENTRY_BYTES, ResponseCache
from sluice_server.observability.statistics import Outcome
from sluice_server.status import Code
from support.fakes import EchoSession, HeldSession, RecordingCall, eventually, served_model
from support.requests import answer_arrays

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_server.execution.model import ServedModel

SOON_NS = 200_000_000
"""A deadline that comes while a test waits for it."""


class FailingSession:
    """Fails every run with an error of its own number."""

    def __init__(self) -> None:
        self.runs = 0

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        self.runs += 1
        raise BackendError(1, f"run {self.runs} failed")


@pytest.fixture
def session():
    session = HeldSession(EchoSession())
    yield session
    session.release()


@pytest.fixture
def start(timer, session, no_errors_logged):
    """Start a cached model on the held session, and end it."""
    started = []

    def make(cache: ResponseCache | None = None, **how) -> ServedModel:
        model = served_model(how.pop("session", session), timer, cache=cache or ResponseCache(1 << 20), **how)
        model.start()
        started.append(model)
        return model

    yield make
    session.release()
    for model in started:
        model.drain()
        assert model.join(20)


def ask(model: ServedModel, *values: int, request_id: str = "", life_ns: int | None = None) -> list[RecordingCall]:
    """Submit one list of requests of one row."""
    calls = []
    requests = []
    for value in values:
        deadline_ns = NO_DEADLINE if life_ns is None else time.monotonic_ns() + life_ns
        call = RecordingCall(b"message", deadline_ns=deadline_ns)
        arrays = {"X": np.array([[value]], np.int64)}
        requests.append(InferRequest(call, request_id, arrays, ("Y",), 1, ("Y",), deadline_ns))
        calls.append(call)
    assert model.submit(requests) == []
    return calls


def occupy(model: ServedModel, session: HeldSession) -> RecordingCall:
    """Let the only instance begin a run, so that what comes next waits."""
    (call,) = ask(model, -1)
    session.wait_for_runs(1)
    return call


def leave(call: RecordingCall) -> None:
    assert call.on_cancel is not None
    call.on_cancel()


def value_of(call: RecordingCall) -> int:
    status, payload = call.wait()
    assert status.code is Code.OK, status
    return answer_arrays(ModelInferResponse.FromString(payload))["Y"].item()


def code_of(call: RecordingCall) -> Code:
    return call.wait()[0].code


def outcomes(model: ServedModel) -> dict[Outcome, int]:
    return {name: count for name, count in model.statistics.snapshot().outcomes.items() if count}


def counts(model: ServedModel) -> tuple[int, int, int, int]:
    """Executions, hits, misses, and the hits that followed another."""
    snapshot = model.statistics.snapshot()
    assert snapshot.cache is not None
    return snapshot.execution_count, snapshot.cache.hit.count, snapshot.cache.miss.count, snapshot.cache.coalesced


def test_what_was_asked_before_is_answered_without_a_run(start, session):
    session.release()
    model = start()
    assert [value_of(call) for call in ask(model, 1, 2)] == [1, 2]
    again = ask(model, 2, 1, request_id="again")
    assert [len(call.ends) for call in again] == [1, 1], "answered before submit returned"
    assert [value_of(call) for call in again] == [2, 1]
    assert ModelInferResponse.FromString(again[0].ends[0][1]).id == "again"
    assert sum(len(feeds["X"]) for feeds in session.runs) == 2
    assert counts(model)[1:] == (2, 2, 0)
    snapshot = model.statistics.snapshot()
    assert (snapshot.success.count, snapshot.queue.count, snapshot.compute_infer.count) == (4, 4, 2)
    assert snapshot.inference_count == 2


def test_equal_requests_of_one_list_and_of_several_run_once(start, session):
    model = start()
    occupy(model, session)
    calls = ask(model, 7, 7, 8) + ask(model, 7) + ask(model, 8, 7)
    assert len(model.queue) == 2
    session.release()
    assert [value_of(call) for call in calls] == [7, 7, 8, 7, 8, 7]
    assert sum(len(feeds["X"]) for feeds in session.runs) == 3
    eventually(lambda: counts(model)[1:] == (4, 3, 4), "they are counted")
    assert outcomes(model) == {Outcome.OK: 7}


def test_an_equal_request_follows_a_run_that_has_begun(start, session):
    model = start()
    first = occupy(model, session)
    (second,) = ask(model, -1)
    session.release()
    assert value_of(first) == value_of(second) == -1
    assert len(session.runs) == 1


def test_the_work_of_a_leader_whose_client_leaves_goes_on_for_its_followers(start, session):
    model = start()
    occupy(model, session)
    leader, follower = ask(model, 7, 7)
    leave(leader)
    assert len(model.queue) == 1, "it keeps its place"
    session.release()
    assert value_of(follower) == 7
    eventually(lambda: outcomes(model) == {Outcome.OK: 3}, "each is counted once")


def test_work_that_nobody_waits_for_any_more_is_not_run(start, session):
    model = start()
    occupy(model, session)
    leader, first, second = ask(model, 7, 7, 7)
    for call in (first, leader, second):
        assert len(model.queue) == 1
        leave(call)
    assert len(model.queue) == 0
    (again,) = ask(model, 7)
    session.release()
    assert value_of(again) == 7
    assert outcomes(model)[Outcome.CANCELLED] == 3
    assert leader.ends == first.ends == second.ends == []


def test_a_follower_that_leaves_takes_nobody_with_it(start, session):
    model = start()
    occupy(model, session)
    leader, follower = ask(model, 7, 7)
    leave(follower)
    session.release()
    assert value_of(leader) == 7
    assert outcomes(model) == {Outcome.OK: 2, Outcome.CANCELLED: 1}


def test_whoever_leaves_after_the_end_changes_nothing(start, session):
    session.release()
    model = start()
    (leader,) = ask(model, 7)
    value_of(leader)
    (hit,) = ask(model, 7)
    for call in (leader, hit):
        leave(call)
    assert value_of(ask(model, 7)[0]) == 7
    assert outcomes(model) == {Outcome.OK: 3}


def test_a_leader_that_expires_is_succeeded_by_its_first_follower(start, session):
    model = start()
    occupy(model, session)
    (leader,) = ask(model, 7, life_ns=SOON_NS)
    (first,) = ask(model, 7, request_id="first")
    (second,) = ask(model, 7, request_id="second")
    assert code_of(leader) is Code.DEADLINE_EXCEEDED
    eventually(lambda: len(model.queue) == 1, "the first follower waits in its place")
    session.release()
    assert value_of(first) == value_of(second) == 7
    assert ModelInferResponse.FromString(first.ends[0][1]).id == "first"
    assert len(session.runs) == 2
    eventually(lambda: outcomes(model) == {Outcome.OK: 3, Outcome.QUEUE_TIMEOUT: 1}, "each is counted once")


def test_a_leader_that_has_left_and_expires_is_succeeded_too(start, session):
    model = start()
    occupy(model, session)
    (leader,) = ask(model, 7, life_ns=SOON_NS)
    (follower,) = ask(model, 7)
    leave(leader)
    assert code_of(leader) is Code.DEADLINE_EXCEEDED
    session.release()
    assert value_of(follower) == 7


def test_a_follower_keeps_its_own_deadline(start, session):
    model = start()
    occupy(model, session)
    (leader,) = ask(model, 7)
    (follower,) = ask(model, 7, life_ns=SOON_NS)
    assert code_of(follower) is Code.DEADLINE_EXCEEDED
    assert not leader.ends
    session.release()
    assert value_of(leader) == 7
    assert len(follower.ends) == 1


def test_the_last_follower_of_a_leader_that_has_left_takes_the_work_with_it_when_it_expires(start, session):
    model = start()
    occupy(model, session)
    (leader,) = ask(model, 7)
    (follower,) = ask(model, 7, life_ns=SOON_NS)
    leave(leader)
    assert code_of(follower) is Code.DEADLINE_EXCEEDED
    eventually(lambda: not len(model.queue), "the work is dropped")
    assert outcomes(model) == {Outcome.QUEUE_TIMEOUT: 1, Outcome.CANCELLED: 1}


def test_a_request_whose_deadline_is_over_when_it_comes_follows_nobody(start, session):
    model = start()
    occupy(model, session)
    (leader,) = ask(model, 7)
    (late,) = ask(model, 7, life_ns=-1)
    assert code_of(late) is Code.DEADLINE_EXCEEDED
    session.release()
    assert value_of(leader) == 7


def test_a_run_that_fails_fails_everybody_with_the_same_error(start, timer):
    failing = FailingSession()
    gate = HeldSession(failing)
    model = start(session=gate)
    (first,) = ask(model, -1)
    gate.wait_for_runs(1)
    calls = ask(model, 7, 7, 7)
    gate.release()
    assert {call.wait()[0] for call in calls} == {calls[0].wait()[0]}
    assert code_of(first) is Code.INTERNAL
    assert failing.runs == 2
    assert outcomes(model) == {Outcome.BACKEND_ERROR: 4}
    (again,) = ask(model, 7)
    assert again.wait()[0] != calls[0].wait()[0], "an error is not kept"


def test_a_full_queue_refuses_each_of_those_that_would_have_followed(start, session):
    model = start(max_queue_rows=1)
    occupy(model, session)
    (waiting,) = ask(model, 1)
    refused = ask(model, 7, 7)
    assert [code_of(call) for call in refused] == [Code.RESOURCE_EXHAUSTED] * 2
    (follower,) = ask(model, 1)
    (one_too_many,) = ask(model, 1)
    assert code_of(one_too_many) is Code.RESOURCE_EXHAUSTED, "followers are bounded like the queue"
    session.release()
    assert value_of(waiting) == value_of(follower) == 1
    assert outcomes(model) == {Outcome.OK: 3, Outcome.QUEUE_FULL: 3}


def test_a_version_that_drains_answers_its_followers_and_hands_newcomers_back(start, session):
    model = start()
    occupy(model, session)
    leader, follower = ask(model, 7, 7)
    model.drain()
    late = []
    for value in (7, 8):
        call = RecordingCall(b"message")
        request = InferRequest(call, "", {"X": np.array([[value]], np.int64)}, ("Y",), 1, ("Y",), NO_DEADLINE)
        late += model.submit([request])
        assert late[-1] is request
    assert model.submit_one(late[1]) == ([late[1]], None)
    session.release()
    assert value_of(leader) == value_of(follower) == 7


def test_a_follower_that_leads_on_in_a_version_that_drains_is_told_to_try_again(start, session):
    model = start()
    occupy(model, session)
    (leader,) = ask(model, 7, life_ns=SOON_NS)
    (follower,) = ask(model, 7)
    model.drain()
    assert code_of(leader) is Code.DEADLINE_EXCEEDED
    assert code_of(follower) is Code.UNAVAILABLE
    eventually(lambda: outcomes(model)[Outcome.UNAVAILABLE] == 1, "it is counted")


def test_what_a_version_has_kept_leaves_with_it_and_that_of_others_stays(start, session):
    session.release()
    cache = ResponseCache(1 << 20)
    leaving, staying = start(cache, name="leaving"), start(cache, name="staying")
    for model in (leaving, staying):
        for call in ask(model, *range(3)):
            value_of(call)
    eventually(lambda: cache.usage().entries == 6, "all are kept")
    leaving.drain()
    assert cache.usage().entries == 3
    assert [value_of(call) for call in ask(staying, 2)] == [2]
    assert counts(staying)[1] == 1


def test_a_run_that_ends_after_the_drain_is_not_kept(start, session):
    cache = ResponseCache(1 << 20)
    model = start(cache)
    call = occupy(model, session)
    model.drain()
    session.release()
    assert value_of(call) == -1
    assert model.join(20)
    assert cache.usage().entries == 0


def test_the_cache_is_bounded_and_forgets_what_was_used_longest_ago(start, session):
    session.release()
    cache = ResponseCache(2 * (ENTRY_BYTES + 100))
    model = start(cache)
    for value in (1, 2, 1, 3, 1, 2):
        value_of(ask(model, value)[0])
    assert [feeds["X"].item() for feeds in session.runs] == [1, 2, 3, 2]
    usage = cache.usage()
    assert (usage.entries, usage.evictions) == (2, 2)
    assert usage.size_bytes <= usage.max_bytes


def test_an_answer_that_is_larger_than_the_cache_is_not_kept(start, session):
    session.release()
    cache = ResponseCache(ENTRY_BYTES)
    model = start(cache)
    for _ in range(2):
        assert value_of(ask(model, 1)[0]) == 1
    assert len(session.runs) == 2
    assert cache.usage().entries == cache.usage().evictions == 0


def test_a_hash_that_always_collides_costs_hits_and_gives_no_wrong_answer(start, session):
    cache = ResponseCache(1 << 20, digest=lambda data, seed: bytes(16))
    model = start(cache)
    occupy(model, session)
    calls = ask(model, 1, 2, 1, -1, 2)
    session.release()
    assert [value_of(call) for call in calls] == [1, 2, 1, -1, 2]
    for value in (3, 3, 4, 3, -1):
        assert value_of(ask(model, value)[0]) == value
    assert outcomes(model) == {Outcome.OK: 11}
    assert counts(model)[1] >= 2, "what was asked last is found"


def test_a_bug_in_a_session_ends_followers_as_well(timer):
    class BrokenSession:
        def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
            raise ZeroDivisionError("a secret")

    gate = HeldSession(BrokenSession())
    model = served_model(gate, timer, cache=ResponseCache(1 << 20))
    model.start()
    calls = ask(model, 7)
    gate.wait_for_runs(1)
    calls += ask(model, 7)
    gate.release()
    assert [code_of(call) for call in calls] == [Code.INTERNAL] * 2
    assert "a secret" not in calls[1].wait()[0].message
    model.drain()
    assert model.join(20)


def test_requests_that_cannot_be_looked_up_end_with_an_incident_and_the_next_ones_are_served(timer):
    broken = [True]

    def digest(data, seed) -> bytes:
        if broken:
            raise MemoryError
        return bytes(16)

    model = served_model(EchoSession(), timer, cache=ResponseCache(1 << 20, digest=digest))
    model.start()
    assert [code_of(call) for call in ask(model, 1, 2)] == [Code.INTERNAL] * 2
    broken.clear()
    assert value_of(ask(model, 1)[0]) == 1
    assert outcomes(model) == {Outcome.OK: 1, Outcome.OTHER: 2}
    model.drain()
    assert model.join(20)


def doubtful() -> Worth:
    worth = Worth()
    worth.looked_up(MISSES_MAX, MISSES_MAX)
    assert worth.is_doubtful
    return worth


def test_looking_up_is_left_when_nothing_is_found_for_long_under_load():
    worth = doubtful()
    assert not worth.skips(LOADED_REQUESTS, 0), "the load is not known yet"
    skipped = [worth.skips(LOADED_REQUESTS, WINDOW_NS) for _ in range(2 * LOOK_STRIDE)]
    assert skipped == ([True] * (LOOK_STRIDE - 1) + [False]) * 2
    worth.looked_up(4, 3)
    assert not worth.is_doubtful, "a hit makes up for many misses"
    assert not worth.skips(LOADED_REQUESTS, WINDOW_NS)


def test_everything_is_looked_up_without_load_and_soon_after_it():
    worth = doubtful()
    worth.skips(LOADED_REQUESTS - 1, 0)
    assert not any(worth.skips(1, WINDOW_NS) for _ in range(LOADED_REQUESTS))
    assert worth.skips(1, 2 * WINDOW_NS)
    assert not worth.skips(1, 4 * WINDOW_NS), "a window without requests has passed"


def test_a_few_hits_bring_the_lookups_back_however_many_misses_there_were():
    worth = Worth()
    for _ in range(100):
        worth.looked_up(MISSES_MAX, MISSES_MAX)
    worth.looked_up(1, 0)
    assert worth.is_doubtful, "a hit now and then changes nothing"
    worth.looked_up(MISSES_MAX // HIT_WORTH, 0)
    assert not worth.is_doubtful


def test_a_cache_that_finds_one_in_250_is_always_looked_up():
    worth = Worth()
    for _ in range(1000):
        worth.looked_up(250, 249)
        assert not worth.is_doubtful


def test_requests_that_are_not_looked_up_run_and_are_counted_as_misses(start, session):
    session.release()
    now_ns = 0
    model = start(ResponseCache(1 << 24), max_batch_rows=64, clock=lambda: now_ns)
    asked = 0
    while asked < MISSES_MAX + LOADED_REQUESTS:
        for call in ask(model, *range(asked, asked + 64)):
            call.wait()
        asked += 64
    now_ns += WINDOW_NS
    calls = ask(model, 10**6, 10**6, 10**6)
    assert [value_of(call) for call in calls] == [10**6] * 3
    snapshot = model.statistics.snapshot()
    assert snapshot.cache is not None
    assert (snapshot.cache.skipped, snapshot.cache.miss.count) == (3, asked + 3)
    now_ns += 2 * WINDOW_NS
    assert value_of(ask(model, 0)[0]) == 0
    assert counts(model)[1] == 1, "what was kept before is found when the load is over"


def test_every_request_of_many_threads_ends_once_with_its_own_answer(start, session):
    """Few values and a small cache, so that hits, followers, evictions, deadlines and clients that leave all meet."""
    session.release()
    model = start(ResponseCache(4 * (ENTRY_BYTES + 100)), instances=2)

    def ask_and_leave(seed: int) -> list[tuple[int, bool, RecordingCall]]:
        random = np.random.default_rng(seed)
        asked = []
        for _ in range(150):
            values = random.integers(0, 8, random.integers(1, 6)).tolist()
            life_ns = int(random.integers(50_000, 2_000_000)) if random.random() < 0.3 else None
            for value, call in zip(values, ask(model, *values, life_ns=life_ns), strict=True):
                leaves = bool(random.random() < 0.1)
                if leaves:
                    leave(call)
                asked.append((value, leaves, call))
        return asked

    with ThreadPoolExecutor(4) as pool:
        asked = [item for found in pool.map(ask_and_leave, range(4)) for item in found]
    model.drain()
    assert model.join(20)
    for value, leaves, call in asked:
        assert len(call.ends) == 1 or (leaves and not call.ends)
        if call.ends and call.ends[0][0].code is Code.OK:
            assert value_of(call) == value
        assert not call.ends or call.ends[0][0].code in (Code.OK, Code.DEADLINE_EXCEEDED)
    assert sum(outcomes(model).values()) == len(asked)
    assert repr(model._cache).startswith("<ModelCache <Coalescer: 0 flights, 0 followers>")
