"""Quantiles of the last minute against sorting, and what leaves the window when."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_server.observability.latencies import (
    QUANTILE_ERROR,
    QUANTILES_DEFAULT,
    SLICES,
    WINDOW_NS,
    Latencies,
    LatencyOptions,
    Window,
)

SECOND_NS = 1_000_000_000


@given(
    values=st.lists(st.one_of(st.integers(0, 300), st.integers(0, 10**12), st.integers(0, 2**62)), min_size=1),
    quantile=st.sampled_from((0.001, 0.25, *QUANTILES_DEFAULT)),
)
def test_a_quantile_is_within_its_error_of_the_value_at_its_rank(values, quantile):
    window = Window()
    window.add(0, values)
    ((_, found),) = window.summary(0, (quantile,)).quantiles
    exact = sorted(values)[max(1, math.ceil(quantile * len(values))) - 1]
    assert abs(found - exact) <= exact * QUANTILE_ERROR


@given(st.lists(st.integers(0, 2**62), min_size=2))
def test_quantiles_rise(values):
    window = Window()
    window.add(0, values)
    found = [value for _, value in window.summary(0, QUANTILES_DEFAULT).quantiles]
    assert found == sorted(found)


def test_values_leave_with_their_slice_and_stay_in_count_and_sum():
    window = Window()
    slice_ns = WINDOW_NS // SLICES
    window.add(0, [100])
    window.add(slice_ns, [50], 3)
    last_ns = WINDOW_NS - 1
    assert window.summary(last_ns, (0.9,)).quantiles == ((0.9, 100.0),)
    assert window.summary(WINDOW_NS, (0.9,)).quantiles == ((0.9, 50.0),)
    after = window.summary(WINDOW_NS + slice_ns, (0.9,))
    assert math.isnan(after.quantiles[0][1])
    assert (after.count, after.sum_ns) == (4, 250)


def test_a_window_in_use_for_long_keeps_no_more_than_its_slices():
    window = Window()
    for second in range(300):
        window.add(second * SECOND_NS, range(0, 10**6, 10**3))
    assert len(window._slices) <= SLICES


def test_a_clock_reading_before_the_receipt_counts_as_no_time():
    window = Window()
    window.add(0, [-5])
    assert window.summary(0, (0.5,)).quantiles == ((0.5, 0.0),)


@pytest.mark.parametrize(
    ("options", "summaries", "has_histogram"),
    [
        (LatencyOptions(), set(), False),
        (LatencyOptions(histogram=True), set(), True),
        (LatencyOptions((0.5,)), {"request", "queue", "compute_input", "compute_infer", "compute_output"}, False),
    ],
)
def test_only_what_was_asked_for_is_kept(options, summaries, has_histogram):
    latencies = Latencies(options, clock=lambda: 0)
    latencies.record([10, 20], [1, 2], 3, 4, 5)
    snapshot = latencies.snapshot()
    assert set(snapshot.summaries) == summaries
    assert (snapshot.first_response is not None) is has_histogram


def test_each_request_is_charged_with_its_own_times_and_the_whole_of_the_batchs():
    latencies = Latencies(LatencyOptions((0.5,)), clock=lambda: 0)
    latencies.record([10, 20], [1, 2], 3, 4, 5)
    latencies.record([30], [3], 6, 7, 8)
    sums = {name: (summary.count, summary.sum_ns) for name, summary in latencies.snapshot().summaries.items()}
    assert sums == {
        "request": (3, 60),
        "queue": (3, 6),
        "compute_input": (3, 12),
        "compute_infer": (3, 15),
        "compute_output": (3, 18),
    }
