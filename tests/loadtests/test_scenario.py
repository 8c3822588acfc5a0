"""Scenario files: what they come to, and the exact error for each thing that is no good."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up import ARRIVALS, REQUEST, SERVER, SLO, TOP, write_repository, write_scenario

from loadtests.scenario import Scenario, read_scenario
from loadtests.toml_table import ScenarioError
from sluice_proto.capture import CapturedRequest, CaptureHead, CaptureWriter

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "loadtests" / "scenarios").glob("*.toml"))


def read(folder: Path, *parts: str) -> Scenario:
    if not (folder / "models").exists():
        write_repository(folder)
    return read_scenario(write_scenario(folder, *parts))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_scenarios_that_come_with_the_project_are_good(path):
    scenario = read_scenario(path)
    assert scenario.times_s
    assert scenario.objectives


def test_a_file_with_nothing_but_what_it_needs(tmp_path):
    scenario = read(tmp_path)

    assert (scenario.name, scenario.title, scenario.duration_s) == ("test", "A test", 2.0)
    assert scenario.times_s == tuple(pytest.approx(number / 50) for number in range(100))
    assert (scenario.generator.workers, scenario.generator.lag_p99_ms, scenario.generator.cpu_share) == (1, 5.0, 0.9)
    (request,) = scenario.requests
    assert (request.protocol, request.client, request.rows, request.priority) == ("unary", "sluice", (1,), 0)
    assert request.deadline_ms is None
    assert request.golden == tmp_path / "models" / "double" / "golden.npz"
    assert scenario.mean_gap_ms == pytest.approx(20.0)


def test_a_file_with_everything(tmp_path):
    requests = (
        '[[requests]]\nmodel = "double"\nshare = 3\nrows = [1, 4]\nprotocol = "rest"\n'
        'deadline_ms = 20\npriority = 2\ngolden = "models/double/golden.npz"\n'
        '[[requests]]\nmodel = "double"\nclient = "tritonclient"\ndeadline_ms = 30'
    )
    generator = "[generator]\nworkers = 2\nmax_in_flight = 10\nlag_p99_ms = 50\ncpu_share = 0.5"
    server = '[server]\nrepository = "models"\nflags = ["--allow-client-shm"]'
    scenario = read(tmp_path, requests, generator, server, "[slo]\nerror_ratio = 0.01\nmin_goodput_ratio = 0.9")

    assert [(each.protocol, each.client, each.share) for each in scenario.requests] == [
        ("rest", "tritonclient", 3.0),
        ("unary", "tritonclient", 1.0),
    ]
    assert scenario.requests[0].rows == (1, 4)
    assert (scenario.generator.workers, scenario.generator.max_in_flight) == (2, 10)
    assert scenario.server.flags == ("--allow-client-shm",)
    limits = {each.kind.key: each.limit for each in scenario.objectives}
    assert limits == {"error_ratio": 0.01, "min_goodput_ratio": 0.9}


@pytest.mark.parametrize(
    ("arrivals", "expected"),
    [
        ('process = "bursts"\nper_s = 4\nsize = 4', [0, 0, 0, 0, 1, 1, 1, 1]),
        ('process = "ramp"\nfirst_per_s = 1\nlast_per_s = 2.5\nover_s = 2\nspacing = "even"', [0, 0.775, 1.333, 1.794]),
        ('process = "replay"\ntimes = "times.txt"', [0, 0.5, 0.5, 1.5]),
        ('process = "replay"\ntimes = "times.txt"\nspeed = 2', [0, 0.25, 0.25, 0.75, 1.5]),
    ],
)
def test_arrival_processes(tmp_path, arrivals, expected):
    (tmp_path / "times.txt").write_text("10\n10.5\n10.5\n11.5\n13\n")
    scenario = read(tmp_path, f"[arrivals]\n{arrivals}")
    assert scenario.times_s == tuple(pytest.approx(time, abs=1e-3) for time in expected)


def test_requests_come_when_those_of_a_capture_did(tmp_path):
    path = tmp_path / "monday.capture"
    writer = CaptureWriter(path, CaptureHead(0, 1.0), 1 << 20)
    writer.append([CapturedRequest(s * 1_000_000_000, 0, 5, 0, "m", b"", b"") for s in (70, 71, 71, 99)])
    writer.close()
    text = f'[arrivals]\nprocess = "replay"\ntimes = "{path.name}"\nspeed = 2'
    assert read(tmp_path, text).times_s == (0.0, 0.5, 0.5)
    path.write_bytes(path.read_bytes().replace(b"\0\0\0\0m", b"\0\0\0\1m"))
    with pytest.raises(ScenarioError, match=r"times: .*monday.capture cannot be read: .*at byte \d+: "):
        read(tmp_path, text)


@pytest.mark.parametrize(
    "arrivals",
    [
        'process = "poisson"\nper_s = 100',
        'process = "diurnal"\nlowest_per_s = 20\nhighest_per_s = 180\nperiod_s = 2',
        'process = "ramp"\nfirst_per_s = 0\nlast_per_s = 200\nover_s = 2',
    ],
)
def test_processes_by_chance_are_the_same_each_time_and_another_with_another_seed(tmp_path, arrivals):
    first, again, other = (read(tmp_path, f"[arrivals]\n{arrivals}\nseed = {seed}").times_s for seed in (1, 1, 2))
    assert first == again != other
    assert 150 < len(first) < 250
    assert all(one <= next_one for one, next_one in pairwise(first))
    assert 0 <= first[0] <= first[-1] < 2


BAD = {
    "no TOML": (["title = "], "no TOML: Invalid value (at line 1, column 9)"),
    "unknown at the top": (["seconds = 3\n"], "seconds: unknown key; known here: title, duration_s, server, generator, "
                           "arrivals, requests, slo"),
    "no title": (["duration_s = 1\n#title =\n"], "title: missing; expected a string that is not empty"),
    "no number": (['title = "x"\nduration_s = "long"\n'], "duration_s: expected a number above 0, at most 86400, "
                  "got 'long'"),
    "not finite": (['title = "x"\nduration_s = inf\n'], "duration_s: expected a number above 0, at most 86400, "
                   "got inf"),
    "no whole number": (["[generator]\nworkers = 1.5"], "[generator] workers: expected a whole number from 1 to 64, "
                        "got 1.5"),
    "a truth is no number": (["[generator]\nworkers = true"], "[generator] workers: expected a whole number from 1 to "
                             "64, got True"),
    "above a core": (["[generator]\ncpu_share = 2"], "[generator] cpu_share: expected a number above 0, at most 1, "
                     "got 2"),
    "no folder": (['[server]\nrepository = "nowhere"'], "[server] repository: {folder}/nowhere is no folder"),
    "no texts": (['[server]\nrepository = "models"\nflags = "-v"'], "[server] flags: expected a list of strings, "
                 "got '-v'"),
    "unknown process": (['[arrivals]\nprocess = "gauss"'], '[arrivals] process: expected one of "constant", "poisson", '
                        '"bursts", "ramp", "diurnal", "replay", got \'gauss\''),
    "rate of zero": (['[arrivals]\nprocess = "poisson"\nper_s = 0'], "[arrivals] per_s: expected a number above 0, "
                     "got 0"),
    "a key of another process": (['[arrivals]\nprocess = "constant"\nper_s = 1\nsize = 2'], "[arrivals] size: unknown "
                                 "key; known here: process, per_s"),
    "too many": (['[arrivals]\nprocess = "constant"\nper_s = 1e7'], "[arrivals]: more than 2,000,000 requests are due "
                 "within duration_s = 2"),
    "day upside down": (['[arrivals]\nprocess = "diurnal"\nlowest_per_s = 9\nhighest_per_s = 3\nperiod_s = 2'],
                        "[arrivals]: lowest_per_s is 9.0, above highest_per_s, 3.0"),
    "no times": (['[arrivals]\nprocess = "replay"\ntimes = "none.txt"'], "[arrivals] times: {folder}/none.txt cannot "
                 "be read: [Errno 2] No such file or directory: '{folder}/none.txt'"),
    "no time": (['[arrivals]\nprocess = "replay"\ntimes = "word.txt"'], "[arrivals] times: {folder}/word.txt:2: "
                "expected a number of seconds, got 'soon'"),
    "back in time": (['[arrivals]\nprocess = "replay"\ntimes = "back.txt"'], "[arrivals] times: {folder}/back.txt:2: 1 "
                     "is not finite, or earlier than the line before"),
    "nobody comes": (['[arrivals]\nprocess = "replay"\ntimes = "empty.txt"'], "[arrivals]: no request is due within "
                     "duration_s = 2"),
    "no requests": (["requests = []\n# [[requests]]\n" + TOP], "requests: expected one table or more, each "
                    "[[requests]], got []"),
    "no golden": (['[[requests]]\nmodel = "triple"'], "[requests 1] golden: {folder}/models/triple/golden.npz is no "
                  "file: expected one of numpy.savez, with arrays [rows, ...] by input"),
    "our client has no REST": (['[[requests]]\nmodel = "double"\nclient = "sluice"\nprotocol = "rest"'],
                               '[requests 1] client: "sluice" speaks gRPC only (unary, stream, shared_memory); "rest" '
                               'goes with "tritonclient"'),
    "no rows": (['[[requests]]\nmodel = "double"\nrows = []'], "[requests 1] rows: expected a whole number from 1 to "
                "65536, or a list of such, got []"),
    "unknown of the second": ([REQUEST + REQUEST + "prio = 3"], "[requests 2] prio: unknown key; known here: model, "
                              "protocol, client, golden, share, rows, deadline_ms, priority"),
    "unknown objective": (["[slo]\nerror_ratio = 0\np98_ms = 3"], "[slo] p98_ms: unknown key; known here: p50_ms, "
                          "p95_ms, p99_ms, p999_ms, error_ratio, min_throughput_per_s, min_goodput_ratio, "
                          "p99_over_lone_p50, arrival_error_p99_ms, arrival_error_over_gap, "
                          "generator_cpu_us_per_request, server_cpu_us_per_request, server_cpu_cores, server_rss_mib"),
    "errors not limited": (["[slo]\np99_ms = 3"], "[slo] error_ratio: missing; latencies are those of answers, so say "
                           "what share of requests may go without (0)"),
    "errors that cannot be too many": (["[slo]\nerror_ratio = 1"], "[slo] error_ratio: expected a number from 0 on, at "
                                       "most 0.999, got 1"),
    "a throughput that is always reached": (["[slo]\nerror_ratio = 0\nmin_throughput_per_s = 0"],
                                            "[slo] min_throughput_per_s: expected a number above 0, got 0"),
    "goodput without deadline": (["[slo]\nerror_ratio = 0\nmin_goodput_ratio = 0.9"], "[slo] min_goodput_ratio: every "
                                 "one of [[requests]] needs a deadline_ms for it"),
    "a table that is none": (['server = "here"\n# [server]\n' + TOP], "server: expected a table, [server], got 'here'"),
}  # fmt: skip


@pytest.mark.parametrize(("parts", "problem"), BAD.values(), ids=BAD)
def test_what_is_no_good_is_refused_by_file_and_key(tmp_path, parts, problem):
    (tmp_path / "word.txt").write_text("1\nsoon\n")
    (tmp_path / "back.txt").write_text("2\n1\n")
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ScenarioError) as refused:
        read(tmp_path, *parts)
    assert str(refused.value) == f"{tmp_path}/test.toml: {problem.format(folder=tmp_path)}"


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ScenarioError, match=r"none\.toml: cannot be read: No such file or directory"):
        read_scenario(tmp_path / "none.toml")


def test_the_plan_is_the_mix_in_the_order_of_the_arrivals(tmp_path):
    mix = f"{REQUEST}share = 3\n{REQUEST}rows = 2\n"
    scenario = read(tmp_path, mix, '[arrivals]\nprocess = "constant"\nper_s = 1000')
    plan = list(scenario.plan())

    assert [due_s for due_s, _, _ in plan] == list(scenario.times_s)
    assert 0.7 < sum(kind == 0 for _, kind, _ in plan) / len(plan) < 0.8
    assert list(scenario.plan()) == plan


@given(workers=st.integers(1, 5), number=st.integers(1, 40))
def test_workers_share_all_requests_between_them(tmp_path_factory, workers, number):
    """By the slices that locustfile.py takes."""
    folder = tmp_path_factory.mktemp("scenario")
    scenario = read(folder, SERVER, ARRIVALS.replace("50", str(number)), REQUEST, SLO)
    shares = [list(scenario.plan())[index::workers] for index in range(workers)]
    assert sorted(each for share in shares for each in share) == sorted(scenario.plan())
