"""The check of record and replay, in short: its goals are measured, and can be missed."""

from __future__ import annotations

import pytest

from loadtests import replay_check
from loadtests.results import Goal

pytestmark = pytest.mark.timed


@pytest.mark.long
def test_a_short_check_captures_everything_replays_it_the_same_and_finds_the_spoiled_model(transport, tmp_path):
    share, gaps, same, spoiled = replay_check.check(tmp_path, 200, 500.0, transport, 1)
    assert (share.value.median, share.is_met, same.value.high, same.is_met) == (1, True, 0, True)
    assert spoiled.is_met
    # Whether this machine is busy is for `make replay-check` to say.
    assert (gaps.limit, gaps.value.median > 0) == (replay_check.GAP_ERROR_MS, True)


@pytest.mark.parametrize(("limit", "status"), [(1.0, 0), (2.0, 1)])
def test_a_missed_goal_is_the_exit_status(limit, status, capsys):
    goals = [Goal("a goal", (1.0,), limit, at_least=True)]
    assert replay_check.conclude(goals) == status
    assert ("MISSED" in capsys.readouterr().out) is bool(status)
