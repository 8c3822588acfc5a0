"""Arrival processes: as many requests as their rate says, where their spacing says, and never one before another."""

from __future__ import annotations

import statistics
from itertools import islice, pairwise, takewhile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_batching.arrivals import Constant, Diurnal, Ramp, arrivals, even, exponential, grouped

RATES = st.one_of(
    st.builds(Constant, st.floats(0.1, 5000)),
    st.builds(Ramp, st.floats(0, 5000), st.floats(0.1, 5000), st.floats(0.1, 100)),
    st.builds(
        lambda low, more, period: Diurnal(low, low + more, period),
        st.floats(0, 500),
        st.floats(1, 500),
        st.floats(1, 60),
    ),
)


def until(rate, spacing, end_s: float) -> list[float]:
    return list(takewhile(lambda at_s: at_s < end_s, arrivals(rate, spacing)))


@given(RATES, st.one_of(st.builds(exponential, st.integers()), st.builds(grouped, st.integers(1, 9)), st.builds(even)))
def test_arrivals_never_go_back_in_time(rate, spacing):
    times_s = list(islice(arrivals(rate, spacing), 100))
    assert times_s[0] >= 0
    assert all(before <= after for before, after in pairwise(times_s))


@given(RATES, st.integers(1, 100))
def test_evenly_spaced_arrivals_come_where_the_rate_expects_them(rate, number):
    *_, last_s = islice(arrivals(rate, even()), number)
    assert rate.until(last_s) == pytest.approx(number - 1, abs=0.01)


def test_even_arrivals_of_a_constant_rate_are_equally_far_apart():
    assert list(islice(arrivals(Constant(100), even()), 4)) == pytest.approx([0, 0.01, 0.02, 0.03], abs=1e-6)


def test_arrivals_end_with_their_spacings():
    assert list(arrivals(Constant(2), iter([1.0, 1.0]))) == [0.5, 1.0]


def test_a_burst_comes_at_once_and_the_next_when_as_many_are_due():
    assert list(islice(arrivals(Constant(100), grouped(2)), 5)) == pytest.approx([0, 0, 0.02, 0.02, 0.04], abs=1e-6)


def test_a_poisson_process_has_gaps_as_spread_as_they_are_long():
    times_s = list(islice(arrivals(Constant(100), exponential(7)), 20_000))
    gaps_s = [after - before for before, after in pairwise(times_s)]
    assert statistics.fmean(gaps_s) == pytest.approx(0.01, rel=0.03)
    assert statistics.stdev(gaps_s) == pytest.approx(0.01, rel=0.05)
    assert times_s == list(islice(arrivals(Constant(100), exponential(7)), 20_000))
    assert times_s != list(islice(arrivals(Constant(100), exponential(8)), 20_000))


def test_a_ramp_rises_in_a_straight_line_and_goes_on_at_its_end():
    ramp = Ramp(0, 100, 10)
    assert len(until(ramp, even(), 5)) == pytest.approx(125, abs=1)
    assert len(until(ramp, even(), 10)) == pytest.approx(500, abs=1)
    assert len(until(ramp, even(), 12)) == pytest.approx(700, abs=1)


def test_a_ramp_can_fall():
    assert len(until(Ramp(100, 10, 10), even(), 20)) == pytest.approx(550 + 100, abs=1)


def test_a_day_is_lowest_at_its_start_and_highest_at_noon():
    day = Diurnal(10, 90, 24)
    times_s = until(day, even(), 24)
    assert len(times_s) == pytest.approx(24 * 50, abs=1)
    assert len([at_s for at_s in times_s if at_s < 1]) == pytest.approx(10, abs=3)
    assert len([at_s for at_s in times_s if 11.5 <= at_s < 12.5]) == pytest.approx(90, abs=3)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: Constant(0), "per_s is 0, expected a number above 0"),
        (lambda: Constant(float("nan")), "per_s is nan"),
        (lambda: Ramp(-1, 1, 1), "first_per_s is -1, expected 0 or more"),
        (lambda: Ramp(1, 0, 1), "last_per_s is 0"),
        (lambda: Ramp(1, 1, float("inf")), "over_s is inf"),
        (lambda: Diurnal(5, 4, 1), "lowest_per_s is 5, above highest_per_s, 4"),
        (lambda: next(grouped(0)), "size is 0"),
    ],
)
def test_what_is_no_process_is_refused_by_name(make, complaint):
    with pytest.raises(ValueError, match=complaint):
        make()
