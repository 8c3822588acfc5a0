"""What a replay shows, without sending anything: verdicts, exit statuses, limits, and how all of it is told."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from sluice_client import InvalidRequest
from sluice_client.load.latencies import CODES, NOT_SENT, Generator, Records
from sluice_client.load.open_loop import Run
from sluice_client.replay.differences import DEFAULT_TOLERANCES, Answer, Tolerance
from sluice_client.replay.report import as_json, as_text
from sluice_client.replay.sending import Replayed
from sluice_client.replay.verdict import (
    DIFFERENT,
    SAME,
    UNDECIDED,
    Quantile,
    judge,
    measured,
    parse_ratios,
    parse_tolerance,
    recorded,
)
from sluice_proto import grpc_service_pb2 as pb
from sluice_proto.capture import Capture, CapturedRequest, CaptureHead
from support.requests import infer_request

UNAVAILABLE = CODES.index("UNAVAILABLE")


def answer(value: float) -> bytes:
    response = pb.ModelInferResponse(model_name="m", model_version="1")
    response.outputs.add(name="Y", datatype="FP32", shape=(1, 1))
    response.raw_output_contents.append(np.float32(value).tobytes())
    return response.SerializeToString()


def captured(*answers: Answer, service_ms: int = 10, truncated_bytes: int = 0) -> Capture:
    question = infer_request("m", {"X": np.ones((1, 1), np.float32)}).SerializeToString()
    requests = tuple(
        CapturedRequest(number * 1_000_000, 0, service_ms * 1_000_000, each.code, "m", question, each.response)
        for number, each in enumerate(answers)
    )
    return Capture(CaptureHead(0, 0.5), requests, truncated_bytes)


def replayed(*answers: Answer, takes_ms: float = 10.0, lag_p99_ms: float = 0.1) -> Replayed:
    intended_s = np.arange(len(answers)) / 1e3
    records = Records.of(intended_s, intended_s, intended_s + takes_ms / 1e3, [each.code for each in answers])
    return Replayed(Run(records, Generator(lag_p99_ms / 1e3, 0.5, 3, 0)), answers)


ONE, TWO = Answer(0, answer(1.0)), Answer(0, answer(2.0))


def test_the_same_answers_are_the_same():
    capture = captured(ONE, TWO)
    verdict = judge(capture.requests, recorded(capture), replayed(ONE, TWO))
    assert (verdict.exit_status, verdict.compared, verdict.incomparable) == (SAME, 2, {})
    assert verdict.quantiles == [Quantile(percent, 0.01, pytest.approx(0.01)) for percent in (50, 95, 99)]


def test_a_difference_names_the_request_and_decides_whatever_the_generator_did():
    capture = captured(ONE, ONE)
    verdict = judge(capture.requests, recorded(capture), replayed(ONE, TWO, lag_p99_ms=50))
    assert verdict.exit_status == DIFFERENT
    ((number, model, (difference,)),) = [(each.number, each.model, each.differences) for each in verdict.differing]
    assert (number, model, difference.output) == (1, "m", "Y")


def test_what_floats_may_be_off_by_is_the_callers():
    capture = captured(ONE)
    allowed = dict.fromkeys(DEFAULT_TOLERANCES, Tolerance(0, 1))
    assert judge(capture.requests, recorded(capture), replayed(TWO), tolerances=allowed).exit_status == SAME


def test_a_generator_that_was_the_bottleneck_leaves_no_verdict():
    capture = captured(ONE)
    slow = judge(capture.requests, recorded(capture), replayed(ONE, lag_p99_ms=50, takes_ms=99), limits={50.0: 1.5})
    assert slow.exit_status == UNDECIDED
    before = measured("other:1", replayed(ONE, lag_p99_ms=50))
    assert judge(capture.requests, before, replayed(ONE)).exit_status == UNDECIDED


@pytest.mark.parametrize(("takes_ms", "exit_status"), [(14.9, SAME), (15.1, DIFFERENT)])
def test_latencies_are_held_to_the_limits(takes_ms, exit_status):
    capture = captured(ONE, TWO)
    now = replayed(ONE, TWO, takes_ms=takes_ms)
    verdict = judge(capture.requests, recorded(capture), now, limits={99.0: 1.5, 99.9: 1.6})
    assert verdict.exit_status == exit_status
    assert [each.percent for each in verdict.quantiles] == [50, 95, 99, 99.9]
    baseline = measured("other:1", replayed(ONE, TWO))
    assert judge(capture.requests, baseline, now, limits={99.0: 1.5}).exit_status == exit_status


def test_a_limit_is_not_kept_by_no_answer_at_all():
    failed = Answer(CODES.index("INTERNAL"))
    capture = captured(failed)
    verdict = judge(capture.requests, recorded(capture), replayed(failed), limits={50.0: 2.0})
    assert (verdict.differing, verdict.exit_status) == ([], DIFFERENT)
    assert math.isnan(verdict.quantiles[0].ratio)
    assert as_json(verdict, capture)["latency"][0]["ratio"] is None


def test_what_cannot_be_compared_is_counted_by_reason():
    capture = captured(Answer(UNAVAILABLE), Answer(0), ONE)
    verdict = judge(capture.requests, recorded(capture), replayed(ONE, ONE, ONE))
    assert verdict.incomparable == {"expected UNAVAILABLE": 1, "the answer was not kept": 1}
    assert (verdict.compared, verdict.exit_status) == (1, SAME)


def test_where_nothing_is_compared_there_is_no_verdict():
    capture = captured(Answer(UNAVAILABLE))
    verdict = judge(capture.requests, recorded(capture), replayed(Answer(UNAVAILABLE)))
    assert (verdict.compared, verdict.exit_status) == (0, UNDECIDED)
    assert as_text(verdict, capture).splitlines()[-1] == "no verdict: no answer could be compared"


def test_requests_that_were_not_sent_are_different():
    capture = captured(ONE, ONE)
    verdict = judge(capture.requests, recorded(capture), replayed(ONE, Answer(NOT_SENT)))
    assert verdict.exit_status == DIFFERENT
    assert verdict.replayed.gap_error_p99_s != verdict.replayed.gap_error_p99_s  # one request has no gaps


def test_errors_of_gaps_are_between_requests_that_were_sent():
    intended = np.array([0.0, 1.0, 2.0, 3.0])
    sent = np.array([0.5, 1.5, np.nan, 3.75])
    run = Run(Records.of(intended, sent, sent, [0, 0, NOT_SENT, 0]), Generator(0, 0, 1, 1))
    assert Replayed(run, ()).gap_error_p99_s == pytest.approx(0.25)


def test_the_text_tells_what_differs_and_where():
    capture = captured(*[ONE] * 12, Answer(0), truncated_bytes=7)
    failed = Answer(CODES.index("INTERNAL"))
    now = replayed(*[TWO] * 11, failed, ONE, takes_ms=20)
    verdict = judge(capture.requests, recorded(capture), now, limits={50.0: 1.2, 99.0: 3.0})
    lines = as_text(verdict, capture).splitlines()
    assert lines[0] == "the file ends within a record: its last 7 bytes were passed over"
    assert lines[1] == "13 requests, a share of 0.5 of those that came: OK 12, INTERNAL 1"
    assert lines[2] == "answers: 12 of 12 differ from the recorded ones, 1 not compared (the answer was not kept)"
    assert lines[3] == (
        "  request 0, m: output 'Y', 1 of 1 values, first at [0, 0]: 1.0 became 2.0; the largest difference is 1"
    )
    assert lines[13] == "  and 2 more requests"
    assert [line.split() for line in lines if line.startswith("p")] == [
        ["p50", "10.000", "20.000", "2.00", "1.2", "FAIL"],
        ["p95", "10.000", "20.000", "2.00"],
        ["p99", "10.000", "20.000", "2.00", "3", "pass"],
    ]
    assert lines[-1] == "verdict: different"


def test_codes_and_baselines_are_told_too():
    capture = captured(ONE)
    verdict = judge(capture.requests, measured("other:1", replayed(ONE)), replayed(Answer(CODES.index("INTERNAL"))))
    text = as_text(verdict, capture)
    assert "answers: 1 of 1 differ from those of other:1" in text
    assert "  request 0, m: the answer, code: OK became INTERNAL" in text
    assert "other:1 ms" in text
    assert "recorded" not in text


def test_no_verdict_says_why():
    capture = captured(ONE)
    text = as_text(judge(capture.requests, recorded(capture), replayed(ONE, lag_p99_ms=50)), capture)
    assert text.splitlines()[-1].startswith("no verdict: the generator was the bottleneck")


def test_the_json_has_all_of_it_and_only_numbers_that_json_has():
    capture = captured(ONE, ONE)
    nan = Answer(0, answer(math.nan))
    verdict = judge(capture.requests, recorded(capture), replayed(nan, Answer(CODES.index("INTERNAL"))))
    found = json.loads(json.dumps(as_json(verdict, capture), allow_nan=False))
    assert (found["verdict"], found["requests"], found["compared"], found["differing"]) == ("different", 2, 2, 2)
    assert found["outcomes"] == {"OK": 1, "INTERNAL": 1}
    assert found["differences"][0] == {
        "request": 0, "model": "m", "reason": "values", "output": "Y", "count": 1, "elements": 1, "index": [0, 0],
        "expected": "1.0", "actual": "nan", "largest": None,
    }  # fmt: skip
    assert found["differences"][1]["reason"] == "code"


def test_ratios_and_tolerances_are_read():
    assert parse_ratios(["p50=1.2", "p99.9=2"]) == {50.0: 1.2, 99.9: 2.0}
    assert parse_tolerance("1e-4/0") == dict.fromkeys(["FP16", "BF16", "FP32", "FP64"], Tolerance(1e-4, 0))


@pytest.mark.parametrize("text", ["p50", "p50=", "p0=1", "p100=1", "p50=0", "p50=-1", "50=1", "p50=1,p99=2", "p50=inf"])
def test_a_ratio_that_is_not_understood_is_refused(text):
    with pytest.raises(InvalidRequest, match=r"--latency-ratio .*like p99=1\.5"):
        parse_ratios([text])


def test_a_quantile_has_one_limit():
    with pytest.raises(InvalidRequest, match="gives p50 twice"):
        parse_ratios(["p50=1", "p50.0=2"])


@pytest.mark.parametrize("text", ["", "1e-4", "1e-4/", "/1", "-1/0", "0/-1", "e/e", "1e999/0", "nan/0"])
def test_a_tolerance_that_is_not_understood_is_refused(text):
    with pytest.raises(InvalidRequest, match=r"--tolerance .*RTOL/ATOL"):
        parse_tolerance(text)
