"""Which requests a batch leaves out as they would end too late: in traces, and whatever the requests."""

from hypothesis import given
from hypothesis import strategies as st

from sluice_batching import NO_DEADLINE, Request
from sluice_batching.lateness import split

MS = 1_000_000


def waiting(*deadlines_ms: float, rows: int = 1) -> list[Request]:
    return [Request(rows, 0, "k", round(deadline_ms * MS)) for deadline_ms in deadlines_ms]


def end_ns(rows: int) -> int:
    """10 ms for each run, and 5 for each row of it."""
    return 10 * MS + 5 * MS * rows


def test_a_request_that_would_be_late_even_alone_is_late() -> None:
    requests = waiting(14, 15, 40)
    assert split(requests, 1, 2, end_ns) == ([requests[1]], [requests[0]])


def test_where_all_that_waits_fits_the_batch_ends_before_it_is_too_long_for_its_first() -> None:
    requests = waiting(20, 100, 100)
    assert split(requests, 3, 0, end_ns) == (requests[:2], [])


def test_where_more_waits_a_request_is_late_that_would_be_in_the_whole_batch() -> None:
    requests = waiting(20, 22, 100, 100, 100)
    assert split(requests, 3, 2, end_ns) == (requests[2:], requests[:2])


def test_no_more_are_given_up_for_a_whole_batch_than_wait_behind_it() -> None:
    requests = waiting(20, 22, 100, 100)
    assert split(requests, 3, 1, end_ns) == (requests[1:3], requests[:1])


def test_a_request_without_a_deadline_is_never_late() -> None:
    requests = [Request(1, 0, "k") for _ in range(4)]
    assert split(requests, 3, 1, end_ns) == (requests[:3], [])


def test_nothing_is_late_by_predictions_that_are_not_there() -> None:
    requests = waiting(1, 2, 3)
    assert split(requests, 3, 0, lambda rows: 0) == (requests, [])


@given(
    sizes=st.lists(st.tuples(st.integers(1, 4), st.one_of(st.just(NO_DEADLINE), st.integers(0, 40))), min_size=1),
    most_rows=st.integers(4, 16),
    run_ns=st.lists(st.integers(0, 40), min_size=17, max_size=17),
)
def test_whatever_waits_the_batch_ends_in_time_and_only_those_are_late_that_would_be(
    sizes: list[tuple[int, int]], most_rows: int, run_ns: list[int]
) -> None:
    requests = [Request(rows, 0, "k", deadline_ns) for rows, deadline_ns in sizes]
    batch_rows = 0
    for request in requests:
        if batch_rows + request.rows > most_rows:
            break
        batch_rows += request.rows
    spare_rows = sum(request.rows for request in requests) - batch_rows
    batch, late = split(requests, batch_rows, spare_rows, run_ns.__getitem__)
    rows = sum(request.rows for request in batch)
    assert batch or late
    assert rows <= batch_rows
    if len(batch) > 1:
        assert run_ns[rows] <= min(request.deadline_ns for request in batch)
    for request in late:
        alone_is_late = request.deadline_ns < run_ns[request.rows]
        assert alone_is_late or (request.deadline_ns < run_ns[batch_rows] and spare_rows > 0)
    assert [each for each in requests if each in batch] == batch
