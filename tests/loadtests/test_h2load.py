"""How h2load is called and read, and that an answer with a grpc-status never counts as a success."""

import shutil
from pathlib import Path

import pytest

from loadtests import h2load, processes
from loadtests.framing import frame
from loadtests.h2load import Load, LoadError, Report
from loadtests.models import generate
from loadtests.peers import METHOD, Counters, mean_batch
from sluice_proto.grpc_service_pb2 import ModelInferRequest

REPORT = """
finished in 217.25ms, 2945.88 req/s, 491.29KB/s
requests: 640 total, 640 started, 640 done, 640 succeeded, 0 failed, 0 errored, 0 timeout
status codes: 640 2xx, 0 3xx, 0 4xx, 0 5xx
traffic: 106.73KB (109294) total, 13.14KB (13454) headers (space savings 95.11%), 61.88KB (63360) data
                     min         max         mean         sd        +/- sd
time for request:     1.46ms     18.42ms     10.31ms      2.33ms    75.31%
"""


def test_a_report_is_read() -> None:
    assert h2load.parse_report(REPORT) == Report(elapsed_s=0.21725, total=640, succeeded=640, data_bytes=63360)


@pytest.mark.parametrize(("text", "seconds"), [("1.50s", 1.5), ("20.5ms", 0.0205), ("700us", 0.0007)])
def test_times_are_read_in_all_units(text: str, seconds: float) -> None:
    assert h2load.parse_report(REPORT.replace("217.25ms", text)).elapsed_s == pytest.approx(seconds)


def test_output_without_a_report_is_shown() -> None:
    with pytest.raises(LoadError, match="could not connect"):
        h2load.parse_report("could not connect to host")


def test_ends_are_sorted() -> None:
    lines = ["1700000000000000\t200\t900\n", "1700000000000100\t200\t450\n"]
    assert h2load.parse_log(lines) == ([1700000000000550, 1700000000000900], [900, 450])


def test_the_rate_leaves_out_a_slow_beginning_and_end() -> None:
    steady = list(range(1_000_000, 2_000_000, 1000))
    ends = [500_000, 1_000_000 - 1000, *steady, 5_000_000, 9_000_000]
    assert h2load.steady_rate(ends, in_flight=2, elapsed_s=9.0) == pytest.approx(1000)


def test_the_rate_of_a_few_requests_is_over_all_the_time() -> None:
    assert h2load.steady_rate([1, 2, 3, 4, 5], in_flight=2, elapsed_s=0.5) == 10


def test_all_requests_answered_with_a_message_are_a_success() -> None:
    h2load.check(h2load.parse_report(REPORT), requests=640, expected=640 * 99)


def test_a_request_without_http_200_fails_the_load() -> None:
    with pytest.raises(LoadError, match="639 of 640"):
        h2load.check(Report(1.0, 640, 639, 639 * 99), requests=640, expected=640 * 99)


def test_an_answer_without_a_message_fails_the_load() -> None:
    with pytest.raises(LoadError, match="grpc-status"):
        h2load.check(Report(1.0, 640, 640, 639 * 99), requests=640, expected=640 * 99)


def test_a_message_is_framed_as_not_compressed_and_with_its_length() -> None:
    assert frame(b"\x0a" * 300) == b"\x00\x00\x00\x01\x2c" + b"\x0a" * 300


def test_mean_batch_is_rows_per_execution_in_between() -> None:
    before, after = Counters(10, 0, 10, 10), Counters(110, 0, 110, 30)

    assert mean_batch(before, after, requests=100) == 5.0


@pytest.mark.parametrize("after", [Counters(109, 0, 109, 30), Counters(110, 1, 110, 30)])
def test_requests_that_the_server_does_not_count_as_succeeded_fail_the_load(after: Counters) -> None:
    with pytest.raises(LoadError, match="of 100 requests"):
        mean_batch(Counters(10, 0, 10, 10), after, requests=100)


@pytest.mark.skipif(shutil.which("h2load") is None, reason="h2load (nghttp2-client) is not installed")
def test_errors_of_a_real_server_fail_the_load_although_they_are_http_200(tmp_path: Path) -> None:
    model = generate("identity", tmp_path / "models")
    unknown = ModelInferRequest.FromString(model.request)
    unknown.model_name = "unknown"
    with processes.sluice(tmp_path / "models", tmp_path, "grpcio") as server:
        done = h2load.run(server.address, h2load.grpc_request(METHOD, model.request, 94), Load(1, 4), 40, tmp_path)
        with pytest.raises(LoadError, match="grpc-status"):
            h2load.run(
                server.address, h2load.grpc_request(METHOD, unknown.SerializeToString(), 94), Load(1, 4), 40, tmp_path
            )

    assert done.requests == 40
    assert 0 < done.p50_ms <= done.p99_ms
