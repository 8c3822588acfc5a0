"""Which versions a policy serves, and how a request's version string is read."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_proto.model_config_pb2 import ModelVersionPolicy
from sluice_server.errors import InvalidArgument
from sluice_server.repository.versions import parse_version, select

VERSIONS = st.lists(st.integers(1, 2**63 - 1) | st.integers(1, 9), max_size=8)


@given(available=VERSIONS, count=st.integers(0, 10))
def test_latest_serves_the_highest_versions_and_at_least_one_when_there_is_any(
    available: list[int], count: int
) -> None:
    served = select(ModelVersionPolicy(latest=ModelVersionPolicy.Latest(num_versions=count)), available)
    assert list(served) == sorted(served)
    assert len(served) == min(max(count, 1), len(set(available)))
    assert all(version < min(served) for version in set(available) - set(served))


@given(available=VERSIONS, wanted=VERSIONS)
def test_specific_serves_what_is_both_wanted_and_there(available: list[int], wanted: list[int]) -> None:
    policy = ModelVersionPolicy(specific=ModelVersionPolicy.Specific(versions=wanted))
    assert select(policy, available) == tuple(sorted(set(available) & set(wanted)))


@given(available=VERSIONS)
def test_all_serves_all_and_no_policy_serves_the_latest(available: list[int]) -> None:
    everything = tuple(sorted(set(available)))
    assert select(ModelVersionPolicy(all=ModelVersionPolicy.All()), available) == everything
    assert select(None, available) == select(ModelVersionPolicy(), available) == everything[-1:]


@pytest.mark.parametrize(
    ("text", "version"),
    [("", None), ("1", 1), ("0", 0), ("-0", 0), ("007", 7), ("0" * 9000 + "1", 1), (str(2**63 - 1), 2**63 - 1)],
)
def test_a_version_string_is_read(text: str, version: int | None) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize(
    "text", ["abc", "1a", " 1", "1.0", "+1", "--1", "-", "²", "1\n", str(2**63), "9" * 9000, "x" * 9000]
)
def test_a_version_that_is_no_integer_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_version(text)
    message = str(caught.value)
    assert message.startswith(f"failed to get model version from specified version string '{text[:20]}")
    assert message.endswith("version should be an integral value > 0")
    assert len(message) < 200


@pytest.mark.parametrize("text", ["-1", "-42", str(-(2**63) + 1)])
def test_a_negative_version_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        parse_version(text)
    assert str(caught.value) == f"invalid model version specified '{text}' , version should be an integral value > 0"


@given(st.text())
def test_any_version_string_is_read_or_refused(text: str) -> None:
    try:
        version = parse_version(text)
    except InvalidArgument:
        return
    assert (version is None) == (text == "")
