"""What the simulator is for: how many answers come in time, by policy; and that it tells of the queue alone."""

import itertools
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sluice_batching import NO_DEADLINE, Arrival, LevelPolicy, Priorities, QueuePolicy, Report, Simulation, Strategy
from sluice_batching import simulate as command
from sluice_batching.simulate import POLICIES, arrive, linear, main, read_arrivals, strategy

MS = 1_000_000
S = 1000 * MS
SLO_NS = 300 * MS


def compared(
    arrivals: list[Arrival], run_ns: Callable[[int], int], policy: QueuePolicy, instances: int = 1
) -> dict[str, Report]:
    return {name: Simulation(strategy(name, policy), run_ns, instances).run(arrivals) for name in POLICIES}


# --- What the policies are worth


@pytest.mark.parametrize("max_batch_rows", [1, 4])
def test_of_a_burst_that_comes_at_once_nothing_starts_after_its_deadline_and_all_that_can_be_is_in_time(
    max_batch_rows: int,
) -> None:
    policy = QueuePolicy(max_batch_rows=max_batch_rows, batching=max_batch_rows > 1)
    reports = compared(arrive("burst", 60, 100, (SLO_NS, SLO_NS), burst=60), linear(100, 0), policy)
    assert (reports["deadline"].in_time, reports["deadline"].started_late) == (3 * max_batch_rows, 0)
    assert reports["fifo"].started_late == 60 - 3 * max_batch_rows


@pytest.mark.parametrize("max_batch_rows", [1, 4])
def test_of_a_burst_at_four_times_the_capacity_half_as_many_again_are_in_time_as_first_come_first_served(
    max_batch_rows: int,
) -> None:
    policy = QueuePolicy(max_batch_rows=max_batch_rows, batching=max_batch_rows > 1)
    arrivals = arrive("uniform", 60 * max_batch_rows, 40 * max_batch_rows, (SLO_NS, SLO_NS))
    reports = compared(arrivals, linear(100, 0), policy)
    ours = reports["deadline"]
    assert ours.started_late == 0
    assert ours.in_time >= 1.5 * max(reports["fifo"].in_time, reports["expiry"].in_time)


@pytest.mark.parametrize(("max_batch_rows", "run_ns"), [(1, linear(30, 0)), (8, linear(60, 2)), (8, linear(10, 10))])
@pytest.mark.parametrize("ttl_ns", [(SLO_NS, SLO_NS), (200 * MS, 600 * MS)])
def test_at_three_times_the_capacity_the_server_gives_what_it_can_and_in_time(
    max_batch_rows: int, run_ns: Callable[[int], int], ttl_ns: tuple[int, int]
) -> None:
    capacity = max_batch_rows * S / run_ns(max_batch_rows)
    policy = QueuePolicy(max_batch_rows=max_batch_rows, batching=max_batch_rows > 1)
    arrivals = arrive("poisson", round(90 * capacity), 3 * capacity, ttl_ns)
    report = Simulation(strategy("deadline", policy), run_ns).run(arrivals)
    assert report.in_time >= 0.95 * capacity * report.ended_ns / S
    assert report.quantile_ns(0.99) <= 1.3 * ttl_ns[1]
    assert report.started_late == 0


def test_below_its_capacity_a_server_refuses_nobody() -> None:
    policy = QueuePolicy(max_batch_rows=8, batching=True)
    arrivals = arrive("poisson", 3000, 50, (SLO_NS, SLO_NS), seed=3)
    report = Simulation(strategy("deadline", policy), linear(60, 2)).run(arrivals)
    assert (report.in_time, report.refused, report.expired) == (3000, 0, 0)


# --- That it is the queue


@settings(max_examples=60)
@given(
    gaps_ns=st.lists(st.integers(0, 50), min_size=1, max_size=40),
    ttls_ns=st.lists(st.one_of(st.none(), st.integers(0, 200)), min_size=40, max_size=40),
    rows=st.lists(st.integers(1, 4), min_size=40, max_size=40),
    delay_ns=st.integers(0, 30),
    bound_rows=st.sampled_from([0, 6]),
    instances=st.integers(1, 3),
    name=st.sampled_from(POLICIES),
)
def test_every_arrival_is_counted_once_and_answers_take_at_least_a_run(
    gaps_ns: list[int],
    ttls_ns: list[int | None],
    rows: list[int],
    delay_ns: int,
    bound_rows: int,
    instances: int,
    name: str,
) -> None:
    arrivals = [
        Arrival(at_ns, size, NO_DEADLINE if ttl_ns is None else at_ns + ttl_ns)
        for at_ns, ttl_ns, size in zip(itertools.accumulate(gaps_ns), ttls_ns, rows, strict=False)
    ]
    policy = QueuePolicy(max_batch_rows=4, batching=True, max_delay_ns=delay_ns, max_queue_rows=bound_rows)
    report = Simulation(strategy(name, policy), lambda rows: 20 + rows, instances).run(arrivals)
    answered = report.in_time + report.late
    assert answered + report.refused + report.expired == len(arrivals)
    assert len(report.latencies_ns) == answered
    assert min(report.latencies_ns, default=21) >= 21
    assert max(report.batch_rows, default=1) <= 4
    assert name == "fifo" or report.started_late == 0


def test_a_trace_by_hand() -> None:
    arrivals = [Arrival(0), Arrival(1 * MS), Arrival(2 * MS, deadline_ns=25 * MS), Arrival(3 * MS, deadline_ns=15 * MS)]
    report = Simulation(Strategy(policy=QueuePolicy()), linear(10, 0)).run(arrivals)
    # The last goes second, then the third; that both would be late cannot be known after one run.
    assert report == Report(
        in_time=2,
        late=2,
        latencies_ns=[10 * MS, 17 * MS, 28 * MS, 39 * MS],
        arrivals_ns=[0, 3 * MS, 2 * MS, 1 * MS],
        batch_rows=[1, 1, 1, 1],
        ended_ns=40 * MS,
    )


def test_priorities_are_simulated_too() -> None:
    policy = QueuePolicy(priorities=Priorities(default_policy=LevelPolicy(max_requests=1)))
    report = Simulation(Strategy(policy=policy), linear(10, 0)).run([Arrival(0)] * 3)
    assert (report.in_time, report.refused) == (1, 2)


def test_a_report_without_answers_has_no_times() -> None:
    assert (Report().quantile_ns(0.99), Report().mean_batch_rows) == (0, 0)


# --- Arrivals, and the command


def test_arrivals_have_the_pattern_that_was_asked_for() -> None:
    assert [each.arrival_ns for each in arrive("uniform", 3, 100, None)] == [0, 10 * MS, 20 * MS]
    assert [each.arrival_ns for each in arrive("burst", 5, 100, None, burst=2)] == [0, 0, 20 * MS, 20 * MS, 40 * MS]
    many = arrive("poisson", 10_000, 100, (MS, 3 * MS), rows=2, seed=7)
    assert many == arrive("poisson", 10_000, 100, (MS, 3 * MS), rows=2, seed=7)
    assert 95 * S < many[-1].arrival_ns < 105 * S
    assert {each.rows for each in many} == {2}
    assert all(MS <= each.deadline_ns - each.arrival_ns <= 3 * MS for each in many)


def test_recorded_arrivals_are_read_in_order_of_time() -> None:
    lines = ["# arrival_ns,rows,ttl_ns", "20,2,100  # late in the file", "", "10,1,"]
    assert read_arrivals(lines) == [Arrival(10, 1, NO_DEADLINE), Arrival(20, 2, 120)]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [("1,2", "line 2 is '1,2', expected arrival_ns,rows,ttl_ns"), ("1,0,", "line 2 has 0 rows, expected 1 or more")],
)
def test_a_line_that_is_no_arrival_is_named(line: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        read_arrivals(["1,1,", line])


def test_the_command_prints_the_policies_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--arrivals burst --requests 60 --fixed-ms 100 --deadline-ms 300 --policy deadline fifo"
    assert main(arguments.split()) == 0
    head, ours, fifo = capsys.readouterr().out.splitlines()
    assert head.split() == ["policy", "in", "time", "late", "refused", "expired", "p50", "ms", "p99", "ms", "batch"]
    assert ours.split() == ["deadline", "3", "0", "0", "57", "200.0", "300.0", "1.0"]
    assert fifo.split() == ["fifo", "3", "57", "0", "0", "3000.0", "6000.0", "1.0"]


def test_the_command_reads_a_file_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trace = tmp_path / "trace"
    trace.write_text("".join(f"{at_ms * MS},1,{200 * MS}\n" for at_ms in (0, 0, 0, 0, 0)))
    arguments = ["--trace", str(trace), "--table", "1=10,2=15,4=30", "--max-batch", "8", "--policy", "deadline"]
    assert main(arguments) == 0
    assert capsys.readouterr().out.splitlines()[1].split() == ["deadline", "5", "0", "0", "0", "30.0", "30.0", "5.0"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ("--deadline-ms 0", "'0' is no time in milliseconds above 0, and no range like 100-500"),
        ("--deadline-ms soon", "'soon' is no time in milliseconds above 0"),
        ("--deadline-ms 5-3", "'5-3' is no time in milliseconds above 0"),
        ("--table 1:10", "'1:10' is no table of run times, expected rows=ms,rows=ms"),
        ("--rate 0", "--rate must be above 0, got 0"),
        ("--policy slo", "--slo-ms must be above 0, got 0.0"),
        ("--rows 2", "a request must have 1 to 1 rows, got 2"),
        ("--trace no/such/file", "No such file"),
    ],
)
def test_a_wrong_argument_ends_the_command_with_2_and_says_why(
    arguments: str, complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


def test_an_objective_is_compared_too(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "--slo-ms 100 --requests 3000 --rate 300 --fixed-ms 20 --row-ms 1 --max-batch 8"
    assert main(arguments.split()) == 0
    *_, slo = capsys.readouterr().out.splitlines()
    assert slo.split()[0] == "slo"
    assert float(slo.split()[-2]) <= 100


def test_it_runs_as_a_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["simulate", "--requests", "5"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(command.__file__, run_name="__main__")
    assert caught.value.code == 0
    assert capsys.readouterr().out.count("\n") == 4


def test_clients_ask_again_when_they_are_answered_or_refused() -> None:
    policy = QueuePolicy(max_batch_rows=1, max_queue_rows=1)
    asked: list[int] = []

    def again(now_ns: int) -> int | None:
        asked.append(now_ns)
        return now_ns + 5 * MS if len(asked) < 4 else None

    report = Simulation(Strategy(policy=policy), linear(10, 0)).run([Arrival(0), Arrival(1), Arrival(2)], again)
    # The third is refused at once and after 5 ms, and served then; the first is refused when it comes again.
    assert asked == [2, 5 * MS + 2, 10 * MS, 15 * MS, 20 * MS, 30 * MS]
    assert (report.refused, report.arrivals_ns) == (3, [0, 1, 10 * MS + 2])
