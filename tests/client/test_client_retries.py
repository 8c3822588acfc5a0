"""What is safe to repeat, what a server may say about it, and what a budget allows."""

import struct

import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from sluice_client import RetryPolicy
from sluice_client.errors import BY_CODE
from sluice_client.retries import Budget, Failure, Origin, Safety, backoff_ns, is_safe
from sluice_client.trailers import DETAILS, PUSHBACK, pushback, retry_delay_ns

FAST = RetryPolicy()


@pytest.mark.parametrize("code", BY_CODE)
@pytest.mark.parametrize("safety", Safety)
def test_after_sending_only_unavailable_of_a_repeatable_call_is_safe(code: str, safety: Safety) -> None:
    assert is_safe(Failure(code, ""), safety) == (code == "UNAVAILABLE" and safety is Safety.REPEATABLE)


@pytest.mark.parametrize(("safety", "safe"), [(Safety.REPEATABLE, True), (Safety.UNSENT, True), (Safety.NEVER, False)])
def test_before_sending_all_but_control_calls_are_safe(safety: Safety, safe: bool) -> None:
    assert is_safe(Failure("UNAVAILABLE", "", Origin.CONNECT), safety) == safe


def test_exhausted_is_safe_only_when_the_server_says_when_to_come_back() -> None:
    assert is_safe(Failure("RESOURCE_EXHAUSTED", "", pushback_ns=5), Safety.REPEATABLE)
    assert not is_safe(Failure("RESOURCE_EXHAUSTED", "", pushback_ns=5), Safety.UNSENT)
    assert not is_safe(Failure("UNAVAILABLE", "", forbidden=True), Safety.REPEATABLE)


def test_the_budget_ends_a_storm_at_half_and_refills_by_successes() -> None:
    budget = Budget(RetryPolicy(budget_tokens=10, budget_ratio=0.5))
    assert [budget.spend() for _ in range(6)] == [True] * 4 + [False] * 2
    assert repr(budget) == "<Budget 4 of 10>"
    for _ in range(5):
        budget.succeeded()
    assert [budget.spend() for _ in range(2)] == [True, False]
    for _ in range(99):
        budget.succeeded()
    assert repr(budget) == "<Budget 10 of 10>"


@given(st.lists(st.booleans(), max_size=300))
def test_retries_never_exceed_half_the_tokens_plus_their_share_of_successes(outcomes: list[bool]) -> None:
    budget = Budget(RetryPolicy(budget_tokens=20, budget_ratio=0.1))
    retries = 0
    for succeeded in outcomes:
        if succeeded:
            budget.succeeded()
        else:
            retries += budget.spend()
    assert retries <= 10 + 0.1 * sum(outcomes)


def test_the_backoff_doubles_up_to_its_bound_with_full_jitter() -> None:
    policy = RetryPolicy(initial_backoff_s=0.1, max_backoff_s=0.5)
    assert [backoff_ns(policy, retry, lambda: 1.0) for retry in range(4)] == [10**8, 2 * 10**8, 4 * 10**8, 5 * 10**8]
    assert backoff_ns(policy, 3, lambda: 0.0) == 0
    assert backoff_ns(policy, 10**6, lambda: 0.5) == 25 * 10**7


@pytest.mark.parametrize(
    ("trailers", "expected"),
    [
        ([], (None, False)),
        ([(PUSHBACK, "250")], (250_000_000, False)),
        ([(PUSHBACK, "0")], (0, False)),
        ([(PUSHBACK, "-1")], (None, True)),
        ([(PUSHBACK, "soon")], (None, True)),
        ([(PUSHBACK, "٣")], (None, True)),
        ([(PUSHBACK, "9" * 5000)], (None, True)),
        ([(PUSHBACK, b"\xff")], (None, True)),
        ([(DETAILS, b"\xff")], (None, False)),
        ([("other", "1")], (None, False)),
    ],
)
def test_the_pushback_trailer_is_read(trailers: list[tuple[str, str]], expected: tuple[int | None, bool]) -> None:
    assert pushback(trailers) == expected


def status_with(*details: tuple[str, bytes]) -> bytes:
    """A google.rpc.Status, written by hand: code 8 and these details."""
    packed = [Any(type_url=f"type.googleapis.com/{name}", value=value).SerializeToString() for name, value in details]
    return b"\x08\x08" + b"".join(b"\x1a" + struct.pack("B", len(each)) + each for each in packed)


def retry_info(seconds: int, nanos: int = 0) -> bytes:
    delay = Duration(seconds=seconds, nanos=nanos).SerializeToString()
    return b"\x0a" + struct.pack("B", len(delay)) + delay


def test_a_retry_info_among_other_details_is_read() -> None:
    status = status_with(("google.rpc.Help", b"\x0a\x01x"), ("google.rpc.RetryInfo", retry_info(1, 500_000_000)))
    assert retry_delay_ns(status) == 1_500_000_000
    assert pushback([(DETAILS, status)]) == (1_500_000_000, False)
    assert pushback([(DETAILS, status), (PUSHBACK, "7")]) == (7_000_000, False)


def test_a_negative_or_damaged_retry_info_does_no_harm() -> None:
    assert retry_delay_ns(status_with(("google.rpc.RetryInfo", retry_info(-1)))) == 0
    assert retry_delay_ns(status_with(("google.rpc.RetryInfo", b"\x0a\x05"))) is None
    assert retry_delay_ns(status_with(("google.rpc.RetryInfo", b""))) is None


@given(st.binary(max_size=200))
def test_any_bytes_as_details_are_read_or_ignored(details: bytes) -> None:
    delay_ns = retry_delay_ns(details)
    assert delay_ns is None or delay_ns >= 0
