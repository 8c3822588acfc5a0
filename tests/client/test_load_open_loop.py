"""The open-loop sender: on a virtual clock to the microsecond, and against the real server."""

from __future__ import annotations

import asyncio
import time
from itertools import takewhile
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fake_server import FakeServer, Fault
from grpc import StatusCode
from hypothesis import given
from hypothesis import strategies as st

from sluice_batching.arrivals import Constant, arrivals, exponential
from sluice_client import InvalidRequest
from sluice_client.load.latencies import CODES, LAG_P99_LIMIT_S, NOT_SENT
from sluice_client.load.open_loop import Sender, run_precisely, send_at
from sluice_proto.grpc_service_pb2 import ModelStatisticsRequest
from support.models import identity, write_model
from support.requests import infer_request
from support.virtual_time import passing, run_virtually

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.timed

REQUEST = infer_request("identity", {"X": np.ones((1, 4), np.float32)}).SerializeToString()


def until(times_s: Iterator[float], end_s: float) -> list[float]:
    return list(takewhile(lambda at_s: at_s < end_s, times_s))


def idle() -> float:
    """The CPU seconds of a generator that needs none."""
    return 0.0


@given(
    st.lists(st.integers(0, 5_000), max_size=40).map(sorted),
    st.lists(st.integers(1, 3_000), min_size=1, max_size=5),
    st.integers(1, 6),
)
def test_requests_are_sent_at_their_times_whatever_is_open(due_ms, takes_ms, most):
    """Against a model: a request is sent exactly when it is due, unless as many as allowed are open then."""

    async def send(number: int) -> int:
        await passing(takes_ms[number % len(takes_ms)] / 1e3)
        return 0

    # A little after the whole millisecond at which others end, so that no two things happen at once.
    times_s = [ms / 1e3 + 1e-4 for ms in due_ms]
    run = run_virtually(send_at(times_s, send, max_in_flight=most, cpu_s=idle))
    ends_ms, not_sent = [], 0
    for number, ms in enumerate(due_ms):
        if sum(end > ms for end in ends_ms) >= most:
            not_sent += 1
            assert run.records.codes[number] == NOT_SENT
            assert np.isnan(run.records.sent_s[number])
            continue
        took_ms = takes_ms[number % len(takes_ms)]
        ends_ms.append(ms + took_ms)
        assert run.records.sent_s[number] == pytest.approx(ms / 1e3 + 1e-4, abs=1e-6)
        assert run.records.ended_s[number] == pytest.approx((ms + took_ms) / 1e3 + 1e-4, abs=1e-6)
    assert run.generator.not_sent == not_sent
    assert run.generator.most_in_flight <= most


def test_a_slow_answer_holds_no_later_request_back():
    async def send(number: int) -> int:
        await passing(10 if number == 0 else 0.5)
        return 0

    run = run_virtually(send_at([0, 1, 2, 3], send, cpu_s=idle))
    np.testing.assert_allclose(run.records.service_s, [10, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(run.records.response_s, [10, 0.5, 0.5, 0.5])
    assert run.generator.most_in_flight == 2


def test_a_generator_that_cannot_keep_up_is_found_out():
    """It needs 20 ms of the loop for each request, and one is due each 10 ms: all but the first are late."""

    async def main():
        loop = asyncio.get_running_loop()

        async def send(number: int) -> int:
            loop._clock.now_s += 0.02
            return 0

        return await send_at([number / 100 for number in range(100)], send, cpu_s=lambda: loop.time() * 0.95)

    run = run_virtually(main())
    assert run.records.response_s[-1] > 0.9
    assert run.records.service_s.max() == pytest.approx(0.02)
    assert run.generator.cpu_share == pytest.approx(0.95)
    assert run.generator.problem.startswith("the generator was the bottleneck: it used 0.95 of a core")


def test_no_requests_are_a_load_too():
    run = run_virtually(send_at([], lambda number: None, cpu_s=idle))
    assert (len(run.records), run.generator.most_in_flight, run.generator.problem) == (0, 0, "")


def test_a_sender_that_fails_ends_the_load_and_cancels_what_is_open():
    cancelled = []

    async def send(number: int) -> int:
        if number == 2:
            raise OSError("no more sockets")
        try:
            await passing(100)
        except asyncio.CancelledError:
            cancelled.append(number)
            raise
        return 0

    with pytest.raises(ExceptionGroup) as caught:
        run_virtually(send_at([0, 1, 2, 3], send, cpu_s=idle))
    assert caught.group_contains(OSError, match="no more sockets")
    assert sorted(cancelled) == [0, 1]


def test_arrivals_at_500_a_second_are_off_by_less_than_5_ms():
    """At the 99th percentile. What else runs on the machine may hold the generator up: one of many loads is without."""
    times_s = until(arrivals(Constant(500), exponential(1)), 0.2)

    async def send(number: int) -> int:
        return 0

    lags_s = (run_precisely(send_at(times_s, send)).generator.lag_p99_s for _ in range(50))
    assert any(lag_s < LAG_P99_LIMIT_S for lag_s in lags_s)


def test_every_request_of_a_load_reaches_a_real_server(start_server, repository):
    write_model(repository, "identity", identity(), max_batch_size=8)
    server = start_server(repository)
    times_s = until(arrivals(Constant(500), exponential(1)), 0.5)

    async def load():
        async with Sender(server.target, [REQUEST], deadline_s=10.0) as sender:
            return await send_at(times_s, sender)

    run = run_precisely(load())
    assert run.records.outcomes == {"OK": len(times_s)}
    np.testing.assert_array_equal(run.records.intended_s, times_s)
    assert (run.records.lag_s >= 0).all()
    assert (run.records.service_s > 0).all()
    assert server.call("ModelStatistics", ModelStatisticsRequest()).model_stats[0].inference_count == len(times_s)


def test_outcomes_are_grpcs_status_codes(server: FakeServer):
    """The one that the server gives, the one of a deadline, and the one of a server that is gone."""
    silent = infer_request("silent", {}).SerializeToString()
    good = infer_request("identity", {}).SerializeToString()
    server.faults.append(Fault(StatusCode.RESOURCE_EXHAUSTED))

    async def load():
        async with Sender(server.address, [good, silent], deadline_s=0.5) as sender:
            codes = [await sender(0), await sender(1), await sender(2)]
            server.stop()
            return [*codes, await sender(4)]

    assert [CODES[code] for code in run_precisely(load())] == [
        "RESOURCE_EXHAUSTED",
        "DEADLINE_EXCEEDED",
        "OK",
        "UNAVAILABLE",
    ]


def test_several_endpoints_and_requests_are_used_in_turns(make_server):
    servers = [make_server(), make_server()]
    requests = [infer_request("identity", {}, request_id=text).SerializeToString() for text in ("a", "b")]

    addresses = [server.address for server in servers]

    async def load():
        async with Sender(addresses, requests, deadline_s=10.0, metadata=(("x-who", "me"),), connections=2) as sender:
            return await send_at([0.0] * 8, sender)

    assert run_precisely(load()).records.outcomes == {"OK": 8}
    assert [sorted(seen.request.id for seen in server.seen) for server in servers] == [["a", "a", "b", "b"]] * 2
    assert {seen.metadata["x-who"] for server in servers for seen in server.seen} == {"me"}


def test_an_endpoint_that_cannot_be_used_is_refused():
    with pytest.raises(InvalidRequest, match="this client speaks gRPC"):
        Sender("http://localhost:8001", [REQUEST], deadline_s=1.0)


def test_timers_are_more_precise_than_a_millisecond():
    """Waits of 0.1 ms each, which the usual selectors would make 1.1 ms."""

    async def waits() -> float:
        started_s = time.perf_counter()
        for _ in range(50):
            await passing(1e-4)
        return time.perf_counter() - started_s

    assert min(run_precisely(waits()) for _ in range(5)) < 50 * 1e-3
