"""The arithmetic of the benchmark: quantiles, medians and spread."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.summary import Summary, quantile, summarize


def test_quantiles_of_a_hundred_values_are_their_ranks() -> None:
    values = range(1, 101)

    assert [quantile(values, share) for share in (0.01, 0.07, 0.5, 0.99, 1.0)] == [1, 7, 50, 99, 100]


def test_a_single_value_is_every_quantile() -> None:
    assert [quantile([7], share) for share in (0.001, 0.5, 1.0)] == [7, 7, 7]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=300).map(sorted), st.integers(1, 1000))
def test_a_quantile_is_the_smallest_value_that_the_share_does_not_exceed(values: list[int], per_mille: int) -> None:
    found = quantile(values, per_mille / 1000)

    needed = math.ceil(per_mille * len(values) / 1000)
    assert sum(value <= found for value in values) >= needed
    assert sum(value < found for value in values) < needed


@pytest.mark.parametrize("share", [0.0, -0.1, 1.01])
def test_a_share_outside_of_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        quantile([1], share)


def test_no_values_have_no_quantile() -> None:
    with pytest.raises(ValueError, match="no values"):
        quantile([], 0.5)


def test_rounds_are_summed_up_by_their_median_and_extremes() -> None:
    summary = summarize([110.0, 90.0, 100.0])

    assert summary == Summary(median=100.0, low=90.0, high=110.0)
    assert summary.spread == pytest.approx(0.1)


def test_the_spread_of_nothing_is_nothing() -> None:
    assert summarize([0.0]).spread == 0.0
