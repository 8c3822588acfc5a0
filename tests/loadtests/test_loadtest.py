"""`make loadtest` from end to end: real server, real Locust, a few seconds each; ratios only, as machines differ."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from made_up import write_repository, write_scenario

from loadtests import run
from loadtests.markdown import plain
from loadtests.slo import KINDS

if TYPE_CHECKING:
    from conftest import StartServer

pytestmark = pytest.mark.timed

ROOT = Path(__file__).resolve().parents[2]

TIMEOUT_S = 240

TRIES = 3
"""Of what a busy machine can spoil: it makes latencies larger, never smaller."""

GENEROUS = "[generator]\nlag_p99_ms = 1000\ncpu_share = 1"
"""For tests that are not about the generator."""


def loadtest(folder: Path, scenario: Path, *flags: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """The command on a scenario, and its JSON result ({} where there is none)."""
    results = folder / "results"
    command = [sys.executable, "-m", "loadtests.run", str(scenario), f"--results={results}", *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    files = list(results.glob("*.json")) if results.exists() else []
    return done, json.loads(files[0].read_text()) if files else {}


def left_behind() -> list[Path]:
    """The shared memory, of either client, whose process has ended."""
    objects = ((re.match(r"sluice-(?:load-)?(\d+)-", path.name), path) for path in Path("/dev/shm").iterdir())
    return [path for found, path in objects if found and not Path("/proc", found[1]).exists()]


def failed(result: dict[str, Any]) -> set[str]:
    return {each["key"] for each in result["objectives"] if not each["passed"]}


def test_a_short_run_keeps_its_ratios(tmp_path, transport):
    """The run of continuous integration: no request fails, and load costs a request a multiple of a lone one's time."""
    write_repository(tmp_path)
    arrivals = '[arrivals]\nprocess = "poisson"\nper_s = 8'
    slo = "[slo]\nerror_ratio = 0\np99_over_lone_p50 = 50\narrival_error_over_gap = 1\nmin_goodput_ratio = 0.9"
    requests = '[[requests]]\nmodel = "double"\ndeadline_ms = 10_000'
    scenario = write_scenario(tmp_path, 'title = "Short"\nduration_s = 4', arrivals, requests, slo, GENEROUS)
    for _ in range(TRIES):
        done, result = loadtest(tmp_path, scenario, f"--transport={transport}")
        (told,) = result["runs"]
        assert told["outcomes"] == {"OK": told["requests"]}, done.stderr
        if done.returncode == 0:
            break
    assert (done.returncode, failed(result)) == (0, set()), done.stdout + done.stderr
    assert result["passed"]
    assert re.search(
        r"\| response time p99, over a lone request's p50 +\| +at most 50 \| +[\d.,]+ \| pass \|", done.stdout
    )


@pytest.mark.long
def test_a_slow_server_fails_each_kind_of_objective(tmp_path):
    """The model takes some 0.1 s; of 30 requests a second, half leave after 0.2 s and the others wait.

    All limits are far above what the same load on a model that takes no time comes to, but for the resident memory and
    for what is the generator's: those no run could keep.
    """
    write_repository(tmp_path, iterations=100_000)
    arrivals = '[arrivals]\nprocess = "constant"\nper_s = 30'
    requests = "\n".join(
        f'[[requests]]\nmodel = "double"\ndeadline_ms = {deadline_ms}' for deadline_ms in (200, 60_000)
    )
    limits = {
        "p50_ms": 40, "p95_ms": 80, "p99_ms": 90, "p999_ms": 95, "error_ratio": 0.1, "min_throughput_per_s": 25,
        "min_goodput_ratio": 0.9, "p99_over_lone_p50": 3, "arrival_error_p99_ms": 1e-6, "arrival_error_over_gap": 1e-8,
        "generator_cpu_us_per_request": 1, "server_cpu_us_per_request": 10_000, "server_cpu_cores": 0.1,
        "server_rss_mib": 1,
    }  # fmt: skip
    slo = "\n".join(["[slo]", *(f"{key} = {limit}" for key, limit in limits.items())])
    done, result = loadtest(tmp_path, write_scenario(tmp_path, arrivals, requests, slo, GENEROUS))

    assert done.returncode == 1, done.stderr
    assert failed(result) == {kind.key for kind in KINDS}
    assert not result["passed"]
    assert done.stdout.count("FAIL") == len(KINDS), done.stdout
    assert result["machine"]["packages"]
    (report,) = (tmp_path / "results").glob("*.html")
    check_report(report.read_text())


def check_report(text: str) -> None:
    """It is one file, with plots of what the load was and of what the server showed."""
    titles = ["Latency over time", "Latency by percentile", "Throughput", "Rows per batch", "Queue depth", "Server CPU",
              "Server memory"]  # fmt: skip
    assert [text.count(f"<section><h2>{title}</h2><svg") for title in titles] == [1] * len(titles)
    assert text.count("<svg") == len(titles)
    assert text.count('<td class="fail">FAIL</td>') == len(KINDS)
    # Names of XML's spaces aside, nothing is fetched from anywhere.
    assert not re.findall(r"""(?:src|href)=["'](?!#)|@import|url\((?!#)""", text)


@pytest.mark.long
def test_a_generator_that_cannot_keep_up_fails_the_run(tmp_path):
    """Its one open request meets a model of 0.1 s; all objectives are kept."""
    write_repository(tmp_path, iterations=100_000)
    scenario = write_scenario(
        tmp_path, GENEROUS + "\nmax_in_flight = 1", "[slo]\nerror_ratio = 0.999\np99_ms = 100_000", name="overload"
    )
    done, result = loadtest(tmp_path, scenario)

    assert (done.returncode, failed(result), result["passed"]) == (1, set(), False), done.stderr
    (problem,) = result["runs"][0]["problems"]
    not_sent = result["runs"][0]["outcomes"]["NOT_SENT"]
    who = "the generator was the bottleneck: worker 1"
    told = f"{who} did not send {not_sent} requests, as 1 were in flight (max_in_flight)"
    assert problem == told
    assert f"FAIL: direct: {told}" in done.stdout
    assert re.search(r"\| the generator kept up +\| +\| +no \| FAIL \|", done.stdout)


@pytest.mark.long
def test_every_protocol_and_client_by_two_workers_on_a_server_that_runs(tmp_path, start_server: StartServer):
    repository = write_repository(tmp_path)
    server = start_server(repository, allow_client_shm=True)
    ways = [("unary", "sluice"), ("unary", "tritonclient"), ("stream", "sluice"), ("stream", "tritonclient"),
            ("rest", "tritonclient"), ("shared_memory", "sluice"), ("shared_memory", "tritonclient")]  # fmt: skip
    requests = "\n".join(
        f'[[requests]]\nmodel = "double"\nprotocol = "{protocol}"\nclient = "{client}"\nrows = [1, 3]\npriority = 0\n'
        "deadline_ms = 10_000\n"
        for protocol, client in ways
    )
    scenario = write_scenario(tmp_path, requests, GENEROUS + "\nworkers = 2")
    http_host = f"127.0.0.1:{server.server.http_port}"
    done, result = loadtest(tmp_path, scenario, f"--host={server.target}", f"--http-host={http_host}")

    assert done.returncode == 0, done.stdout + done.stderr
    (told,) = result["runs"]
    assert told["outcomes"] == {"OK": 100}
    assert {title: each["requests"] > 5 for title, each in told["kinds"].items()} == {
        f"double {protocol} ({client})": True for protocol, client in ways
    }
    assert len(told["generators"]) == 2
    assert min(told["service_ms"].values()) > 0
    assert told["measured"]["lone_p50_ms"] > 0
    assert told["measured"]["server_rss_mib"] is None
    assert not left_behind()


@pytest.mark.long
def test_a_model_that_answers_otherwise_than_its_sample_ends_the_run(tmp_path):
    repository = write_repository(tmp_path)
    rows = np.ones((4, 1), np.float32)
    np.savez(repository / "double" / "golden.npz", X=rows, Y=rows)
    done, result = loadtest(tmp_path, write_scenario(tmp_path))
    problem = "loadtest: PayloadError: model 'double': output 'Y' differs from the golden sample"
    assert (done.returncode, result, done.stderr.splitlines()[-1]) == (2, {}, problem)


REFUSED = {
    "no scenario": ("nothing", "there is no scenario 'nothing'; there are "),
    "a flag without a host": ("{file} --server-pid=1", "--server-pid goes with --host; without, a server is started"),
    "REST without its address": ("{file} --host=localhost:1", "rest has REST requests: give --http-host too"),
    "CPU of a server far away": ("{file} --host=localhost:1 --http-host=localhost:2", "rest has objectives on the "
                                 "server's process (server_cpu_cores): give --server-pid"),
    "shared memory at the edge": ("{shared} --via=envoy", "shared has requests in shared memory, which the sidecar "
                                  "lets nobody use"),
}  # fmt: skip


@pytest.mark.parametrize(("flags", "problem"), REFUSED.values(), ids=REFUSED)
def test_what_would_only_show_after_the_load_is_refused_before(tmp_path, capsys, flags, problem):
    write_repository(tmp_path)
    request = '[[requests]]\nmodel = "double"\nprotocol = '
    cores = "[slo]\nerror_ratio = 0\nserver_cpu_cores = 1"
    file = write_scenario(tmp_path, f'{request}"rest"', cores, name="rest")
    shared = write_scenario(tmp_path, f'{request}"shared_memory"', name="shared")
    assert run.main(flags.format(file=file, shared=shared).split()) == 2
    assert capsys.readouterr().err.startswith(f"loadtest: {problem}")


@pytest.mark.long
def test_a_run_through_the_sidecar_shows_what_that_adds(tmp_path):
    write_repository(tmp_path)
    requests = "\n".join(f'[[requests]]\nmodel = "double"\nprotocol = "{each}"' for each in ("unary", "stream", "rest"))
    done, result = loadtest(tmp_path, write_scenario(tmp_path, requests, GENEROUS), "--via=envoy")

    assert done.returncode == 0, done.stdout + done.stderr
    assert [(each["way"], each["outcomes"]) for each in result["runs"]] == [
        ("direct", {"OK": 100}),
        ("via envoy", {"OK": 100}),
    ]
    assert result["held_to_objectives"] == "via envoy"
    direct, via = (each["response_ms"]["p50"] for each in result["runs"])
    row = rf"\| response time p50, ms +\| +{plain(direct)} \| +{plain(via)} \| +{plain(via - direct)} \|"
    assert re.search(row, done.stdout), done.stdout
    (report,) = (tmp_path / "results").glob("*.html")
    html = report.read_text()
    assert "<h2>What the sidecar adds</h2>" in html

    without, with_envoy = (each["measured"] for each in result["runs"])
    assert without["envoy_cpu_us_per_request"] is None
    assert with_envoy["envoy_cpu_us_per_request"] > 0
    server_us = [plain(each["server_cpu_us_per_request"]) for each in (without, with_envoy)]
    envoy_us = plain(with_envoy["envoy_cpu_us_per_request"])
    assert re.search(rf"\| server CPU per request, us +\| +{server_us[0]} \| +{server_us[1]} \|", done.stdout)
    assert re.search(rf"\| Envoy's CPU per request, us +\| +- \| +{envoy_us} \| +{envoy_us} \|", done.stdout)
    assert f"<td>Envoy&#x27;s CPU per request, us</td><td>-</td><td>{envoy_us}</td>" in html
