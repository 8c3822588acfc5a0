"""Written forms of endpoints, TLS material and metadata: what is read, and what is refused with a reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_client import Client, InvalidRequest, RetryPolicy, Tls
from sluice_client.base import read_metadata
from sluice_client.endpoints import Endpoint, parse_endpoint, parse_endpoints

PEM = b"-----BEGIN CERTIFICATE-----"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("localhost:8001", Endpoint("localhost:8001", "localhost:8001", secure=False)),
        ("localhost", Endpoint("localhost", "localhost:8001", secure=False)),
        ("[::1]:9", Endpoint("[::1]:9", "[::1]:9", secure=False)),
        ("[::1]", Endpoint("[::1]", "[::1]:8001", secure=False)),
        ("grpc://10.0.0.1:80", Endpoint("grpc://10.0.0.1:80", "10.0.0.1:80", secure=False)),
        ("grpc://host/", Endpoint("grpc://host/", "host:8001", secure=False)),
        ("grpcs://host:443", Endpoint("grpcs://host:443", "host:443", secure=True)),
        ("dns:///pool.svc:8001", Endpoint("dns:///pool.svc:8001", "dns:///pool.svc:8001", secure=False, spread=True)),
        (
            "ipv4:10.0.0.1:1,10.0.0.2:1",
            Endpoint("ipv4:10.0.0.1:1,10.0.0.2:1", "ipv4:10.0.0.1:1,10.0.0.2:1", False, True),
        ),
        ("unix:///run/s.sock", Endpoint("unix:///run/s.sock", "unix:///run/s.sock", secure=False)),
    ],
)
def test_an_endpoint_is_read_in_each_form(text: str, expected: Endpoint) -> None:
    assert parse_endpoint(text, tls=False) == expected


def test_tls_makes_every_endpoint_secure_and_refuses_one_that_says_plain() -> None:
    assert all(endpoint.secure for endpoint in parse_endpoints(["a:1", "unix:///s", "dns:///b", "grpcs://c"], tls=True))
    with pytest.raises(InvalidRequest, match="asks for no TLS"):
        parse_endpoint("grpc://a:1", tls=True)


@pytest.mark.parametrize(
    ("endpoints", "reason"),
    [
        ([], "no endpoint"),
        ("", "not understood"),
        ("a:0", "0 is not a port"),
        ("a:65536", "65536 is not a port"),
        ("a:b", "not understood"),
        ("::1", "not understood"),
        ("unix:///", "not understood"),
        ("http://a:8000", "use grpc://host:port"),
        ("https://a:8000", "use grpcs://host:port"),
        (["a:1", "grpc://a:1"], "given twice"),
        ([8001], "got int"),
    ],
)
def test_a_wrong_endpoint_is_refused_with_a_reason(endpoints: str, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason):
        Client(endpoints)


@given(st.text())
def test_any_text_is_an_endpoint_or_an_invalid_request(text: str) -> None:
    try:
        endpoint = parse_endpoint(text, tls=False)
    except InvalidRequest:
        return
    assert endpoint.text == text


def test_tls_material_is_checked_when_it_is_built() -> None:
    with pytest.raises(InvalidRequest, match="belong together"):
        Tls(certificate_chain=PEM)
    with pytest.raises(InvalidRequest, match="root_certificates is not PEM"):
        Tls(root_certificates=b"ca.pem")
    with pytest.raises(FileNotFoundError):
        Tls.from_files(root_certificates="/nowhere/ca.pem")
    assert "secret" not in repr(Tls(None, PEM, b"-----BEGIN secret"))


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_attempts": 0},
        {"multiplier": 0.5},
        {"initial_backoff_s": -1},
        {"max_backoff_s": float("nan")},
        {"budget_ratio": float("inf")},
        {"budget_tokens": 0},
    ],
)
def test_a_retry_policy_is_valid_once_built(wrong: dict[str, float]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        RetryPolicy(**wrong)


@pytest.mark.parametrize("deadline_s", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_client_refuses_a_deadline_that_is_none(deadline_s: float) -> None:
    with pytest.raises(InvalidRequest, match="deadline"):
        Client("a:1", deadline_s=deadline_s)


def test_metadata_is_taken_as_mapping_or_pairs() -> None:
    assert read_metadata({"authorization": "Bearer x", "trace-bin": b"\0"}) == (
        ("authorization", "Bearer x"),
        ("trace-bin", b"\0"),
    )
    assert read_metadata([("a", "1"), ("a", "2")]) == (("a", "1"), ("a", "2"))
    assert read_metadata(None) == ()


@pytest.mark.parametrize(
    "pair",
    [("Upper", "x"), ("", "x"), ("grpc-timeout", "1S"), ("a", "\n"), ("a", "é"), ("a", b"x"), ("a-bin", "x"), (1, "x")],
)
def test_metadata_that_grpc_would_not_send_is_refused(pair: tuple[str, str]) -> None:
    with pytest.raises(InvalidRequest, match="metadata"):
        read_metadata([pair])
