"""Delays are taken where they were found to bring rows/s, and given up where they do not: traces of runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import cycle

import pytest

from sluice_batching.delay_trials import EPOCH_RUNS, NO_WAIT, PAIRS, REST_NS, SETTLING_RUNS, DelayTrials, Wait

MS = 1_000_000

TRIAL_RUNS = (2 * PAIRS) * (EPOCH_RUNS + SETTLING_RUNS)
"""Of one instance, until a trial is won."""

Behaviour = Callable[[Wait], tuple[int, int, int]]
"""What the next run is under a wait: rows, how long it takes, how long the instance waits before it."""


class Model:
    """One or more instances whose runs follow a behaviour, on a clock of their own."""

    def __init__(self, instances: int = 1, most_rows: int = 64, most_delay_ns: int = 100 * MS) -> None:
        self.trials = DelayTrials(instances)
        self.now_ns = 0
        self._limits = (most_rows, most_delay_ns)
        self._instances = instances

    def runs(self, count: int, behave: Behaviour) -> list[Wait]:
        """So many runs; gives the waits that were in effect, without repetitions."""
        seen = [self.trials.wait]
        for _ in range(count):
            rows, run_ns, pause_ns = behave(self.trials.wait)
            # Instances run side by side, and so end a run each after a part of the time.
            self.now_ns += (run_ns + pause_ns) // self._instances
            self.trials.record(rows, run_ns, self.now_ns, *self._limits)
            if self.trials.wait != seen[-1]:
                seen.append(self.trials.wait)
        return seen


def in_two_parts(rows: int = 16, alone_ms: int = 9, together_ms: int = 10, back_ms: int = 1) -> Behaviour:
    """Clients who come back together under a delay, and as two parts that take turns without it."""
    halves: Iterator[int] = cycle([rows // 2, rows - rows // 2])

    def behave(wait: Wait) -> tuple[int, int, int]:
        return (rows, together_ms * MS, back_ms * MS) if wait.delay_ns else (next(halves), alone_ms * MS, 0)

    return behave


def test_a_delay_that_makes_one_run_of_two_is_taken():
    model = Model()
    model.runs(TRIAL_RUNS, in_two_parts())
    assert model.trials.wait == Wait(16, int(13.5 * MS))
    assert repr(model.trials) == "<DelayTrials: Wait(rows=16, delay_ns=13500000)>"


def test_an_odd_number_of_clients_is_found_too():
    model = Model()
    model.runs(TRIAL_RUNS, in_two_parts(rows=17))
    assert model.trials.wait.rows == 17


def test_two_instances_have_three_parts_between_them():
    model = Model(instances=2)
    model.runs(2 * TRIAL_RUNS, in_two_parts())
    assert model.trials.wait.rows == 12


def test_a_delay_that_brings_nothing_is_tried_once_and_again_after_a_rest():
    model = Model()
    same: Behaviour = lambda wait: (8, 9 * MS, 0)  # noqa: E731 # it reads as what it is
    tried = model.runs(3 * TRIAL_RUNS, same)
    assert tried == [NO_WAIT, Wait(16, int(13.5 * MS)), NO_WAIT]
    assert "is tried" not in repr(model.trials)
    assert model.runs(REST_NS // (9 * MS), same) == tried


def test_a_gain_that_is_not_worth_it_is_not_taken():
    model = Model()
    # 8 rows in 9 ms, and 16 in 17.5.
    assert model.runs(TRIAL_RUNS, in_two_parts(together_ms=17, back_ms=0))[-1] == NO_WAIT
    assert model.trials.wait == NO_WAIT


@pytest.mark.parametrize(("rows", "pause_ms"), [(8, 10), (60, 0)])
def test_nothing_is_tried_where_instances_have_time_to_spare_or_batches_are_full(rows: int, pause_ms: int):
    model = Model()
    assert model.runs(3 * TRIAL_RUNS, lambda wait: (rows, 9 * MS, pause_ms * MS)) == [NO_WAIT]


def test_no_more_is_tried_than_may_be_merged_and_waited():
    model = Model(most_rows=12, most_delay_ns=11 * MS)
    assert model.runs(2 * (EPOCH_RUNS + SETTLING_RUNS), in_two_parts())[1] == Wait(12, 11 * MS)
    assert "is tried" in repr(model.trials)


def test_a_delay_is_dropped_when_batches_wait_in_vain():
    model = Model()
    model.runs(TRIAL_RUNS, in_two_parts())
    assert model.trials.wait.delay_ns
    dropped = model.runs(2 * (EPOCH_RUNS + SETTLING_RUNS), lambda wait: (12, 9 * MS, wait.delay_ns))
    assert dropped[-1] == NO_WAIT


def test_a_trial_ends_when_the_load_goes_away():
    model = Model()
    model.runs(EPOCH_RUNS + SETTLING_RUNS, in_two_parts())
    assert model.trials.wait.delay_ns
    assert model.runs(EPOCH_RUNS + SETTLING_RUNS, lambda wait: (1, 9 * MS, 50 * MS))[-1] == NO_WAIT


def test_a_delay_that_was_taken_has_to_win_again_after_a_rest():
    model = Model()
    model.runs(TRIAL_RUNS, in_two_parts())
    rest_runs = REST_NS // (11 * MS) + EPOCH_RUNS + SETTLING_RUNS
    assert model.runs(rest_runs, in_two_parts(rows=32))[-1] == NO_WAIT
    model.runs(TRIAL_RUNS, in_two_parts(rows=32))
    assert model.trials.wait.rows == 32
