"""`sluice load`: its table, its search, and a reason for whatever is wrong; on fake servers, and on a real slow one."""

from __future__ import annotations

import json
import re
import subprocess
from typing import TYPE_CHECKING

import numpy as np
import pytest
from fake_server import FakeServer, Fault
from grpc import StatusCode

from deploy.processes import SLUICE
from sluice_client import InvalidRequest
from sluice_client.cli import main
from sluice_client.load.cli import cut_rows, lag_limit_s
from sluice_client.load.objectives import parse_objectives
from sluice_client.load.options import ARRIVALS, Arrivals
from support.models import slow, write_model

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Run = Callable[..., tuple[int, str, str]]

pytestmark = pytest.mark.timed

INPUTS = ("--input", "X=[[1,2,3]]", "--input", 'S=["a"]')


@pytest.fixture
def run(server: FakeServer, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `sluice load identity --endpoint <the fake server> ...`; gives exit status, stdout and stderr."""

    def run(*arguments: str, model: str = "identity", inputs: tuple[str, ...] = INPUTS) -> tuple[int, str, str]:
        exit_status = main(["load", model, "--endpoint", server.address, *inputs, *arguments])
        captured = capsys.readouterr()
        return exit_status, captured.out, captured.err

    return run


def test_a_load_prints_a_table_with_every_measure(run: Run, server: FakeServer) -> None:
    exit_status, out, err = run(
        "--rate", "100", "--duration", "0.5", "--warmup", "0.1", "--arrivals", "constant", "--slo", "p99=4s"
    )
    assert err == ""
    title, *lines = [line for line in out.splitlines() if line]
    assert title == f"identity at {server.address}, deadline 5 s, 100 requests/s (constant) for 0.6 s"
    assert [re.sub(r"[\d.,]+", "N", line) for line in " ".join(lines).split()] == (
        "requested sent answered goodput requests/s N N N N ms pN pN pN pN max "
        "response timeN from the intended sending N N N N N service timeN from the real sending N N N N N "
        "lag of the generator N N N N N errors N% of N requests "
        "server mean batch N rowsN N ms in the queueN N ms in runs (warm-up includedN "
        "generator N of a coreN at most N in flight; not the bottleneck "
        "objective pN=Ns: N msN met objective errors=N%: N%N met"
    ).replace("includedN", "included)").split()
    assert lines[1].split() == ["requests/s", "100.0", "100.0", "100.0", "100.0"]
    assert exit_status == 0


def test_a_load_as_json_has_windows_over_time(run: Run) -> None:
    exit_status, out, err = run("--rate", "50", "--duration", "2", "--warmup", "0.2", "--json", "--slo", "p99=3s")
    assert err.startswith("identity at ")
    found = json.loads(out)
    assert exit_status == 0
    assert found["requested_per_s"] == pytest.approx(50)
    assert found["outcomes"] == {"OK": found["requests"]}
    assert sum(window["requests"] for window in found["windows"]) == found["requests"]
    assert [window["from_s"] for window in found["windows"]] == [0.2, 1.2]
    assert 0 < found["response"]["p50_s"] <= found["response"]["p999_s"]
    assert found["objectives"][0] == {"objective": "p99=3s", "value": found["response"]["p99_s"], "met": True}
    assert found["generator"]["problem"] == ""


def test_an_objective_that_is_missed_is_said_and_fails_the_command(run: Run) -> None:
    exit_status, out, _ = run("--rate", "50", "--duration", "0.4", "--warmup", "0", "--slo", "p50=1us")
    assert re.search(r"\nobjective  p50=1us: [\d.]+ ms, MISSED\n", out)
    assert exit_status == 1


def test_errors_are_counted_by_code_and_missed_by_default(run: Run, server: FakeServer) -> None:
    server.on_call = refuse_all_but_the_first(server)
    exit_status, out, _ = run("--rate", "50", "--duration", "0.4", "--warmup", "0", "--slo", "p50=4s")
    (errors,) = [line for line in out.splitlines() if line.startswith("errors")]
    assert re.fullmatch(r"errors     100.00% of (\d+) requests, RESOURCE_EXHAUSTED \1", errors)
    assert "objective  p50=4s: nothing was answered, MISSED\nobjective  errors=0.1%: 100.00%, MISSED\n" in out
    assert exit_status == 1


def test_a_load_of_which_nothing_is_answered_fails_without_an_objective_too(run: Run, server: FakeServer) -> None:
    server.on_call = refuse_all_but_the_first(server)
    exit_status, out, _ = run("--rate", "50", "--duration", "0.4", "--warmup", "0")
    assert re.search(r"\nresponse time, from the intended sending( +-){5}\n", out)
    assert exit_status == 1


def refuse_all_but_the_first(server: FakeServer):
    def refuse(seen) -> None:
        if seen.rpc == "ModelInfer" and server.count("ModelInfer") > 1:
            server.faults.append(Fault(StatusCode.RESOURCE_EXHAUSTED))

    return refuse


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_a_generator_that_is_the_bottleneck_says_so_and_fails(run: Run, json_flag) -> None:
    """No Python sends 40,000 requests a second."""
    exit_status, out, _ = run("--rate", "40000", "--duration", "0.05", "--warmup", "0", *json_flag)
    assert "the generator was the bottleneck: " in out
    assert exit_status == 1


def test_requests_beyond_the_bound_are_errors_that_were_not_sent(run: Run, server: FakeServer) -> None:
    _, out, _ = run("--rate", "1000", "--duration", "0.1", "--warmup", "0", "--max-in-flight", "1")
    sent = server.count("ModelInfer") - 2  # the one that was tried and the one that connected
    (errors,) = [line for line in out.splitlines() if line.startswith("errors")]
    total, not_sent = map(int, re.findall(r" (\d+)\b(?!\.)", errors))
    assert errors.endswith(f"NOT_SENT {not_sent}")
    assert total == sent + not_sent


def test_options_reach_the_requests(run: Run, server: FakeServer, tmp_path: Path) -> None:
    np.savez(tmp_path / "golden.npz", X=np.arange(18.0, dtype=np.float32).reshape(6, 3), S=np.array(list("abcdef")))
    inputs = ("--input", f"X=@{tmp_path}/golden.npz:X", "--input", f"S=@{tmp_path}/golden.npz:S")
    run(
        *("--rate", "50", "--duration", "0.2", "--warmup", "0", "--rows", "2", "--priority", "3", "--output", "X"),
        *("--deadline", "7", "--model-version", "1"),
        inputs=inputs,
    )
    loaded = [seen for seen in server.seen if seen.rpc == "ModelInfer"][2:]
    assert [seen.request.inputs[0].shape for seen in loaded] == [[2, 3]] * len(loaded)
    first = {seen.request.raw_input_contents[0] for seen in loaded}
    assert first == {np.arange(at, at + 6, dtype=np.float32).tobytes() for at in (0, 6, 12)}
    assert {seen.request.parameters["priority"].int64_param for seen in loaded} == {3}
    assert {seen.request.model_version for seen in loaded} == {"1"}
    assert {seen.request.outputs[0].name for seen in loaded} == {"X"}
    assert all(5 < seen.time_remaining_s < 8 for seen in loaded)


@pytest.mark.long
def test_a_search_that_never_meets_its_objective_says_so(run: Run, server: FakeServer) -> None:
    server.on_call = refuse_all_but_the_first(server)
    exit_status, out, _ = run(
        *("--find-capacity", "--slo", "errors=1%", "--start-rate", "512", "--window", "0.05", "--warmup", "0"),
        *("--target-rate", "1000"),
    )
    assert exit_status == 1
    assert out.endswith("\n\nno capacity: errors=1% is not kept at 8 requests/s either\n")


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_a_search_up_to_its_highest_rate_says_so_and_counts_replicas(run: Run, json_flag) -> None:
    exit_status, out, err = run(
        *("--find-capacity", "--slo", "errors=50%", "--start-rate", "30", "--max-rate", "50", "--window", "0.4"),
        *("--warmup", "0", "--target-rate", "350", "--headroom", "0.2", *json_flag),
    )
    assert exit_status == 0
    if not json_flag:
        assert out.endswith(
            "\n\ncapacity: at least 50 requests/s keep errors=50%; try more with --max-rate\n"
            "replicas: 350 requests/s take 9 at 20% headroom (38.9 requests/s each), 10 if one may be away\n"
        )
        return
    found = json.loads(out)
    assert (found["end"], found["capacity_per_s"]) == ("always", 50)
    assert found["replicas"] == {"target_per_s": 350, "headroom": 0.2, "replicas": 9}
    assert {point["rate_per_s"] for point in found["curve"]} >= {30, 50}
    # What is a result goes to standard output, what shows the progress does not: two lines of titles, and the curve.
    assert len(err.splitlines()) == 2 + len(found["curve"])


@pytest.mark.long
def test_a_search_in_which_the_generator_is_the_limit_fails(run: Run) -> None:
    exit_status, out, _ = run(
        *("--find-capacity", "--slo", "p99=20ms", "--start-rate", "20000", "--window", "0.02", "--warmup", "0"),
    )
    assert exit_status == 1
    assert "\n\nno capacity found: the generator was the bottleneck: " in out
    assert out.endswith(", at 20,000 requests/s, so this is no limit of the server\n")


@pytest.mark.long
def test_the_capacity_of_a_real_server_is_near_one_over_its_service_time(start_server, repository) -> None:
    """A model of a few milliseconds, one request at a time: what else the machine does is in its service time too.

    Above its capacity the server falls behind, however much time the requests have. The generator is a process of its
    own: it counts all CPU time of its process as its own, and the server is in this one.
    """
    write_model(repository, "slow", slow(4000))
    server = start_server(repository)
    options = "--find-capacity --json --slo errors=5% --deadline 3 --window 0.2 --warmup 0.2 --precision 0.4"
    command = [SLUICE, "load", "slow", "--endpoint", server.target, "--input", "X=[[1]]", *options.split()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    found = json.loads(done.stdout)
    assert (done.returncode, found["end"]) == (0, "found"), done.stderr
    *_, missed = found["curve"]
    *_, held = (point for point in found["curve"] if point["rate_per_s"] == found["capacity_per_s"])
    assert (held["verdict"], missed["rate_per_s"] > held["rate_per_s"]) == ("holds", True)
    # What the instance had to do of what it can: requests/s times seconds in a run, by the server's own statistics.
    busy, busier = (point["rate_per_s"] * point["server"]["compute_ms"] / 1e3 for point in (held, missed))
    assert busy < 1.2
    assert busier > 0.6
    assert all(point["server"]["mean_batch_rows"] == 1 for point in found["curve"])


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((), "say how many requests/s to send with --rate, or --find-capacity with an --slo"),
        (("--rate", "0"), "argument --rate: '0' is not a number above 0"),
        (("--rate", "inf"), "argument --rate: 'inf' is not a number above 0"),
        (("--rate", "fast"), "argument --rate: 'fast' is not a number above 0"),
        (("--rate", "5", "--duration", "-1"), "argument --duration: '-1' is not a number above 0"),
        (("--rate", "5", "--warmup", "-1"), "argument --warmup: '-1' is not a number, 0 or more"),
        (("--rate", "5", "--connections", "0"), "argument --connections: '0' is not a whole number from 1 on"),
        (("--rate", "5", "--priority", "1.5"), "argument --priority: '1.5' is not a whole number from 1 on"),
        (("--rate", "5", "--deadline", "0"), "a deadline must be above 0"),
        (("--rate", "5", "--burst-size", "4"), "--burst-size is for --arrivals bursts, not poisson"),
        (("--rate", "5", "--from-rate", "4"), "--from-rate is for --arrivals ramp and diurnal, not poisson"),
        (("--rate", "5", "--windows", "5"), "--windows is for --find-capacity"),
        (("--rate", "5", "--target-rate", "5"), "--target-rate is for --find-capacity"),
        (
            ("--rate", "5", "--slo", "p99=5"),
            "--slo 'p99=5': write a time above 0 with its unit (us, ms or s), like p99",
        ),
        (
            ("--rate", "5", "--slo", "p99=5s"),
            "an objective of 5 s says nothing with a deadline of 5 s, after which requests are errors: raise --dea",
        ),
        (
            ("--rate", "5", "--arrivals", "diurnal", "--from-rate", "6"),
            "--from-rate 6 is above --rate 5, the highest of the day",
        ),
        (
            ("--rate", "1e9"),
            "1e+09 requests/s for 11 s are 11,000,000,000 requests, at most 10,000,000 can be recorded",
        ),
        (("--rate", "5", "--rows", "2"), "--rows 2: the inputs have 1 rows"),
        (("--find-capacity",), "--find-capacity needs an objective, like --slo p99=50ms"),
        (("--find-capacity", "--rate", "5"), "--rate does not go with --find-capacity"),
        (("--find-capacity", "--arrivals", "ramp"), "--arrivals ramp has no one rate, so it has no capacity to find"),
        (("--find-capacity", "--slo", "p9=1s", "--headroom", "0.1"), "--headroom is for --target-rate"),
        (("--find-capacity", "--slo", "p9=1s", "--headroom", "1"), "'1' is not a share, 0 or more and below 1"),
        (("--find-capacity", "--slo", "p9=1s", "--precision", "0"), "'0' is not a share above 0 and below 1"),
        (
            ("--find-capacity", "--slo", "p9=1s", "--windows", "4"),
            "--windows 4: not even all of them give a confidence of 0.95, at least 5 are needed",
        ),
        (
            ("--find-capacity", "--slo", "p9=1s", "--windows", "101"),
            "--windows 101: at most 100; make them longer with",
        ),
        (
            ("--find-capacity", "--slo", "p9=1s", "--start-rate", "5", "--max-rate", "4"),
            "--start-rate 5 is above --max-rate 4",
        ),
    ],
)
def test_options_that_are_wrong_are_refused(run: Run, arguments: tuple[str, ...], reason: str) -> None:
    exit_status, out, err = run(*arguments)
    assert (exit_status, out) == (2, "")
    assert reason in err
    assert "Traceback" not in err


def test_a_model_that_is_unknown_and_a_server_that_is_away_are_said(run: Run, server: FakeServer) -> None:
    exit_status, out, err = run("--rate", "5", model="nope")
    assert (exit_status, out) == (1, "")
    assert err == f"sluice load: NOT_FOUND: model 'nope' is not found [{server.address}, model 'nope']\n"
    server.stop()
    exit_status, out, err = run("--rate", "5", "--deadline", "1", inputs=("--input", "X=/dev/null.npy"))
    assert (exit_status, out) == (2, "")
    exit_status, out, err = run("--rate", "5", "--deadline", "1")
    assert (exit_status, out) == (1, "")
    assert err.startswith("sluice load: UNAVAILABLE: failed to connect to all addresses")


@pytest.mark.parametrize("kind", ARRIVALS)
def test_arrivals_come_as_many_as_the_rate_says_in_the_time(kind: str) -> None:
    arrivals = Arrivals(kind, burst_size=7, from_per_s=100, seed=3)
    times_s = arrivals.times_s(300, 20.0)
    assert list(times_s) == sorted(times_s)
    assert times_s[0] >= 0
    assert times_s[-1] < 20.0
    expected = 20 * (200 if kind in ("ramp", "diurnal") else 300)
    assert arrivals.mean_per_s(300, 0, 20) == pytest.approx(expected / 20)
    assert len(times_s) == pytest.approx(expected, rel=0.05)
    alone = arrivals.mean_per_s(300, 0, 1)
    assert (alone == pytest.approx(300)) == (kind not in ("ramp", "diurnal"))


def test_inputs_are_cut_into_rows_and_the_rest_is_left_out() -> None:
    cut = cut_rows({"X": np.arange(5), "Y": np.arange(10).reshape(5, 2)}, 2)
    assert [each["X"].tolist() for each in cut] == [[0, 1], [2, 3]]
    assert [each["Y"].tolist() for each in cut] == [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [({"X": (3,), "Y": (2,)}, "X 3, Y 2"), ({"X": (3,), "Y": ()}, "X 3, Y 0"), ({}, "none")],
)
def test_inputs_without_equally_many_rows_are_not_cut(shapes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=f"--rows cuts inputs that have equally many rows; these have {reason}$"):
        cut_rows({name: np.zeros(shape) for name, shape in shapes.items()}, 1)


@pytest.mark.parametrize(
    ("texts", "limit_s"),
    [([], 0.005), (["p99=10ms"], 0.005), (["p50=200ms", "p99=3s"], 0.02), (["errors=1%"], 0.5)],
)
def test_the_generator_may_be_late_by_a_tenth_of_what_is_judged(texts: list[str], limit_s: float) -> None:
    assert lag_limit_s(parse_objectives(texts) if texts else (), 5.0) == pytest.approx(limit_s)
