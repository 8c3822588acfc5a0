"""Waiting for clients who come back: only where it saves more than it costs, and only as long as they come."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_batching import Anticipation
from sluice_batching.anticipation import LEAST_NS, RETRY_EVERY, SHARE, Company

MS = 1_000_000
MERGE_ROWS = 64


def weighty(rows: int) -> float:
    """A run that reads much memory whatever its rows: 8 ms, and 0.7 ms for each."""
    return 8 * MS + 0.7 * MS * rows


def anticipation(run_ns=weighty) -> Anticipation:
    return Anticipation([(rows, run_ns(rows)) for rows in (1, 2, 4, 8, 16, 32, 64)])


def test_after_a_half_batch_the_other_half_is_waited_for_as_long_as_that_pays():
    company = anticipation().expect(32, 32, MERGE_ROWS)
    assert company == Company(64, 4 * MS)  # half of the 8 ms that one run instead of two saves


def test_when_all_have_been_answered_the_first_to_come_back_does_not_run_alone():
    assert anticipation().expect(64, 0, MERGE_ROWS) == Company(64, 4 * MS)


def test_a_wait_is_a_small_share_of_the_run_however_much_it_would_save():
    company = anticipation(lambda rows: 50 * MS).expect(1, 1, MERGE_ROWS)
    assert company == Company(2, round(50 * MS * SHARE))


@pytest.mark.parametrize(
    ("ran", "waiting", "why"),
    [
        (1, 0, "a client alone comes back alone"),
        (64, 64, "the next batch is full already"),
        (1, 100, "it is more than full"),
    ],
)
def test_nothing_is_waited_for_that_changes_nothing(ran, waiting, why):
    assert anticipation().expect(ran, waiting, MERGE_ROWS) is None, why


def test_a_model_whose_batches_save_nothing_or_whose_runs_are_short_never_waits():
    in_proportion = anticipation(lambda rows: MS * rows)
    assert not in_proportion.can_pay(MERGE_ROWS)
    assert in_proportion.expect(32, 32, MERGE_ROWS) is None
    quick = anticipation(lambda rows: LEAST_NS)
    assert not quick.can_pay(MERGE_ROWS)
    assert quick.expect(32, 32, MERGE_ROWS) is None
    assert anticipation().can_pay(MERGE_ROWS)
    assert not anticipation().can_pay(1)


def test_times_between_and_beyond_the_measured_sizes_are_on_the_line():
    known = Anticipation([(8, 10.0 * MS), (16, 12.0 * MS)])
    # (1 and 3 take as long as 8, 4 too): one run in place of two saves 10 ms, of which a tenth of a run is waited.
    assert known.expect(3, 1, MERGE_ROWS) == Company(4, MS)
    assert known.expect(6, 6, MERGE_ROWS) == Company(12, round(11 * MS * SHARE))
    assert known.expect(16, 16, MERGE_ROWS) is None  # 32 take twice as long as 16


def test_clients_that_do_not_come_back_are_soon_not_waited_for_and_asked_for_again_later():
    waits = anticipation()
    waited = 0
    for _ in range(20):
        if company := waits.expect(32, 32, MERGE_ROWS):
            waits.note(company, 32, 34)
            waited += 1
    assert 3 <= waited <= 8
    assert "of the rows waited for have come" in repr(waits)
    answers = [waits.expect(32, 32, MERGE_ROWS) for _ in range(2 * RETRY_EVERY + 2)]
    assert len([each for each in answers if each]) == 2
    # They come now: what was learned is forgotten in a few waits.
    waited = 0
    for _ in range(5 * RETRY_EVERY):
        if company := waits.expect(32, 32, MERGE_ROWS):
            waits.note(company, 32, 64)
            waited += 1
    assert waited > 2 * RETRY_EVERY


@given(
    ran=st.integers(1, 64),
    waiting=st.integers(0, 200),
    merge_rows=st.integers(1, 64),
    fixed_ns=st.integers(0, 100 * MS),
    row_ns=st.integers(1, 10 * MS),
)
def test_a_wait_is_for_a_larger_batch_and_saves_at_least_twice_its_length(ran, waiting, merge_rows, fixed_ns, row_ns):
    waits = anticipation(lambda rows: fixed_ns + row_ns * rows)
    company = waits.expect(ran, waiting, merge_rows)
    if company is None:
        return
    assert waiting < company.rows <= min(merge_rows, waiting + ran)
    assert LEAST_NS <= company.within_ns <= fixed_ns / 2 + 1
    assert company.within_ns <= SHARE * (fixed_ns + row_ns * company.rows) + 1
    assert waits.can_pay(merge_rows)


def closed_loop_s(runs: int, away_ns: int, waits: Anticipation | None) -> tuple[int, int]:
    """Time and rows of so many runs for 64 clients that are away for some time after each answer."""
    now_ns, rows_done = 0, 0
    ready_ns = [0] * 32 + [weighty(32)] * 32  # half of them come while the first half runs
    for _ in range(runs):
        batch = sorted(ready_ns)[:MERGE_ROWS]
        now_ns = max(now_ns, batch[0])
        going = [at_ns for at_ns in batch if at_ns <= now_ns]
        now_ns += round(weighty(len(going)))
        rows_done += len(going)
        ready_ns = sorted(ready_ns)[len(going) :] + [now_ns + away_ns] * len(going)
        waiting = len([at_ns for at_ns in ready_ns if at_ns <= now_ns])
        company = waits.expect(len(going), waiting, MERGE_ROWS) if waits else None
        if waits and company:
            back_ns = sorted(ready_ns)[company.rows - 1]
            now_ns = min(back_ns, now_ns + company.within_ns)
            waits.note(company, waiting, len([at_ns for at_ns in ready_ns if at_ns <= now_ns]))
    return now_ns, rows_done


@pytest.mark.parametrize(("away_ns", "gain"), [(2 * MS, 1.1), (20 * MS, 0.98)])
def test_clients_that_come_back_soon_are_served_faster_and_others_no_slower(away_ns, gain):
    without_ns, without = closed_loop_s(500, away_ns, None)
    with_ns, rows = closed_loop_s(500, away_ns, anticipation())
    assert rows / with_ns >= gain * without / without_ns
