"""Records of a load and their quantiles: exact, from raw samples, and from when requests should have been sent."""

from __future__ import annotations

import math

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_client.load.latencies import (
    CODES,
    CPU_LIMIT,
    LAG_P99_LIMIT_S,
    NOT_SENT,
    Generator,
    Quantiles,
    Records,
    code_name,
    quantile,
    summarize,
)

UNAVAILABLE = CODES.index("UNAVAILABLE")

REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 10),
        st.floats(0, 1),
        st.floats(0, 1),
        st.sampled_from([0, 0, 0, CODES.index("DEADLINE_EXCEEDED"), UNAVAILABLE, NOT_SENT]),
    ),
    max_size=60,
)


def records(requests: list[tuple[float, float, float, int]]) -> Records:
    """Of (intended, lag, service, code)."""
    sent = [math.nan if code == NOT_SENT else due + lag for due, lag, _, code in requests]
    ended = [at + service for at, (_, _, service, _) in zip(sent, requests, strict=True)]
    return Records.of([due for due, *_ in requests], sent, ended, [code for *_, code in requests])


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0.001, 1))
def test_a_quantile_is_the_smallest_sample_that_the_share_does_not_exceed(values, share):
    found = quantile(np.array(values), share)
    assert found in values
    # One sample of slack where share x number is whole but for rounding.
    assert sum(value <= found for value in values) >= share * len(values) - 1e-6
    assert sum(value < found for value in values) < share * len(values) + 1e-6


def test_a_quantile_of_a_whole_rank_is_not_one_higher_by_rounding():
    assert quantile(np.arange(1.0, 101.0), 0.07) == 7


def test_a_quantile_of_nothing_is_not_a_number():
    assert math.isnan(quantile(np.array([]), 0.5))


@pytest.mark.parametrize("share", [0, -0.1, 1.1, math.nan])
def test_a_share_out_of_range_is_refused(share):
    with pytest.raises(ValueError, match="a share is above 0 and at most 1"):
        quantile(np.array([1.0]), share)


def test_quantiles_of_a_thousand_samples():
    assert Quantiles.of(np.arange(1000.0, 0, -1)) == Quantiles(500, 950, 990, 999, 1000)


def test_response_counts_from_the_intended_time_and_service_from_the_real_one():
    """A generator that was held up by one slow answer: service times hide it, response times do not."""
    load = Records.of([0, 1, 2], [0, 5, 5.5], [5, 5.5, 6], [0, 0, 0])
    assert load.service_s.tolist() == [5, 0.5, 0.5]
    assert load.response_s.tolist() == [5, 4.5, 4]
    assert load.lag_s.tolist() == [0, 4, 3.5]


def test_the_summary_of_a_load_with_every_outcome():
    load = records(
        [
            (0.5, 0.0, 0.25, 0),
            (0.0, 0.0, 0.5, 0),
            (1.0, 0.0, 0.125, UNAVAILABLE),
            (1.5, 0, 0, NOT_SENT),
            (1.75, 0.5, 1, 0),
        ]
    )
    summary = summarize(load, 2.0, deadline_s=0.5)
    assert summary.requests == 5
    assert (summary.sent_per_s, summary.answered_per_s, summary.goodput_per_s) == (2.0, 1.5, 1.0)
    assert summary.error_ratio == pytest.approx(0.4)
    assert summary.outcomes == {"OK": 3, "UNAVAILABLE": 1, "NOT_SENT": 1}
    assert summary.response == Quantiles(0.5, 1.5, 1.5, 1.5, 1.5)
    assert summary.service == Quantiles(0.5, 1.0, 1.0, 1.0, 1.0)
    assert summary.lag == Quantiles(0, 0.5, 0.5, 0.5, 0.5)


def test_the_summary_of_no_requests_says_so():
    summary = summarize(records([]), 1.0)
    assert (summary.requests, summary.goodput_per_s, summary.outcomes) == (0, 0, {})
    assert math.isnan(summary.error_ratio)
    assert math.isnan(summary.response.p99_s)


@pytest.mark.parametrize("span_s", [0.0, -1.0, math.nan])
def test_a_summary_needs_a_span(span_s):
    with pytest.raises(ValueError, match="a span is above 0 seconds"):
        summarize(records([]), span_s)


@given(REQUESTS)
def test_windows_hold_every_request_once_in_the_order_of_their_times(requests):
    load = records(requests)
    parts = [*load.windows(0.0, 2.5, 4), load.between(10.0, math.inf)]
    assert sum(map(len, parts)) == len(load)
    assert np.concatenate([part.intended_s for part in parts]).tolist() == sorted(due for due, *_ in requests)


@given(REQUESTS, REQUESTS)
def test_loads_that_are_merged_are_one_load(first, second):
    merged = Records.merged([records(first), records(second)])
    whole = summarize(records(first + second), 10.0, 0.5)
    assert repr(summarize(merged, 10.0, 0.5)) == repr(whole)
    assert sum(whole.outcomes.values()) == whole.requests
    assert whole.goodput_per_s <= whole.answered_per_s <= whole.sent_per_s


def test_a_load_as_it_was_sent_has_no_lag_and_its_service_times_as_response_times():
    load = records([(0.0, 1.5, 0.25, 0), (1.0, 0.0, 0.5, 0), (2.0, 0, 0, NOT_SENT)])
    as_sent = load.as_sent()
    assert as_sent.intended_s.tolist() == [1.0, 1.5, 2.0]
    assert as_sent.response_s.tolist() == [0.5, 0.25]
    assert as_sent.lag_s.tolist() == [0, 0]
    assert as_sent.outcomes == load.outcomes


def test_records_of_unequal_lengths_are_refused():
    times = np.zeros(2)
    with pytest.raises(ValueError, match=r"equally long, these have \[1, 2\]"):
        Records(times, times, times, np.zeros(1, np.uint8))


def test_codes_have_grpcs_names():
    assert [code_name(code.value[0]) for code in grpc.StatusCode] == [code.name for code in grpc.StatusCode]
    assert code_name(NOT_SENT) == "NOT_SENT"


@pytest.mark.parametrize(
    ("lag_p99_s", "cpu_share", "problem"),
    [
        (LAG_P99_LIMIT_S, CPU_LIMIT - 0.01, ""),
        (0.0123, 0.1, "the generator was the bottleneck: p99 of its lag is 12.3 ms (limit 5 ms)"),
        (0.0, CPU_LIMIT, "the generator was the bottleneck: it used 0.90 of a core (limit 0.9)"),
        (0.0123, 0.95, "the generator was the bottleneck: it used 0.95 of a core (limit 0.9)"),
        (math.nan, 0.0, ""),
    ],
)
def test_a_generator_that_is_late_or_busy_is_the_bottleneck(lag_p99_s, cpu_share, problem):
    assert Generator(lag_p99_s, cpu_share, 1, 0).problem == problem
