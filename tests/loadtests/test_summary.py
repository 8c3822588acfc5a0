"""What several rounds come to: median, extremes and spread."""

import pytest

from loadtests.summary import Summary, summarize


def test_rounds_are_summed_up_by_their_median_and_extremes() -> None:
    summary = summarize([110.0, 90.0, 100.0])

    assert summary == Summary(median=100.0, low=90.0, high=110.0)
    assert summary.spread == pytest.approx(0.1)


def test_the_spread_of_nothing_is_nothing() -> None:
    assert summarize([0.0]).spread == 0.0
