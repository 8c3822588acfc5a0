"""What is predicted from the runs so far: by size, by medians, and never for longer than the evidence is worth."""

from hypothesis import given
from hypothesis import strategies as st

from sluice_batching import RunTimes

MS = 1_000_000
SECOND = 1000 * MS


def recorded(*runs: tuple[int, int], instances: int = 1) -> RunTimes:
    """(rows, milliseconds), each of which ended at time 0."""
    run_times = RunTimes(instances)
    for rows, run_ms in runs:
        run_times.record(rows, run_ms * MS, 0)
    return run_times


def test_nothing_is_predicted_before_a_few_runs_of_the_size() -> None:
    run_times = recorded((1, 900), (1, 10))
    assert run_times.predict_ns(1, 0) == 0
    run_times.record(1, 12 * MS, 0)
    assert run_times.predict_ns(1, 0) == 12 * MS


def test_the_median_of_the_last_runs_is_predicted_so_that_an_outlier_changes_nothing() -> None:
    run_times = recorded(*[(1, 10)] * 9, (1, 500))
    assert run_times.predict_ns(1, 0) == 10 * MS


def test_old_runs_are_forgotten_as_new_ones_come() -> None:
    run_times = recorded(*[(1, 10)] * 100, *[(1, 30)] * 9)
    assert run_times.predict_ns(1, 0) == 30 * MS


def test_sizes_that_share_their_three_highest_bits_are_one_class() -> None:
    run_times = recorded((16, 20), (17, 22), (19, 24))
    assert run_times.predict_ns(18, 0) == 22 * MS
    assert run_times.predict_ns(15, 0) == 0


def test_for_a_size_that_is_not_known_the_next_smaller_one_speaks() -> None:
    run_times = recorded(*[(2, 10)] * 3, *[(8, 30)] * 3)
    assert [run_times.predict_ns(rows, 0) for rows in (1, 2, 7, 8, 64)] == [0, 10 * MS, 10 * MS, 30 * MS, 30 * MS]


def test_a_prediction_is_worth_nothing_a_second_and_eight_runs_after_the_last_run() -> None:
    run_times = recorded(*[(1, 100)] * 3)
    assert run_times.predict_ns(1, SECOND + 800 * MS) == 100 * MS
    assert run_times.predict_ns(1, SECOND + 800 * MS + 1) == 0


def test_danger_is_near_for_twice_the_longest_run_of_late() -> None:
    assert RunTimes().danger_ns == 0
    run_times = recorded((1, 10), (8, 50), (1, 10))
    assert 98 * MS < run_times.danger_ns < 100 * MS
    for _ in range(1000):
        run_times.record(1, 10 * MS, 0)
    assert 20 * MS <= run_times.danger_ns < 20.1 * MS


def test_the_wait_is_that_at_the_best_throughput_on_all_instances() -> None:
    run_times = recorded((1, 10), (8, 40), instances=2)
    assert run_times.wait_ns(80) == 200 * MS
    assert run_times.wait_ns(0) == 0


def test_the_wait_is_not_known_before_the_first_run() -> None:
    assert RunTimes().wait_ns(80) is None


def test_it_shows_what_it_knows() -> None:
    assert repr(RunTimes()) == "<RunTimes by rows: none yet>"
    assert repr(recorded((8, 40), (1, 10))) == "<RunTimes by rows: 1: 10.000 ms, 8: 40.000 ms>"


@given(runs=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 10**12)), min_size=1))
def test_a_prediction_is_always_a_time_that_was_measured_of_no_larger_class(runs: list[tuple[int, int]]) -> None:
    run_times = RunTimes()
    for rows, run_ns in runs:
        run_times.record(rows, run_ns, 0)
    for rows, _ in runs:
        shift = max(0, rows.bit_length() - 3)
        below = (rows >> shift) + 1 << shift
        assert run_times.predict_ns(rows, 0) in {0, *(run_ns for other, run_ns in runs if other < below)}
