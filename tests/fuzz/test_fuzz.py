"""A small run of every target, the same each time: its seeds, and inputs that Hypothesis builds or changes."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fuzz.subject import changed, joined, parted, watched
from fuzz.targets import TARGETS

EXAMPLES = 150
"""Of each target: a second or two."""


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    return TARGETS[request.param]


@pytest.fixture(scope="module")
def subject(target, tmp_path_factory):
    with target.open(tmp_path_factory.mktemp(target.name)) as opened, watched(opened) as subject:
        yield subject


def test_the_seeds_are_good(target, subject):
    for data in target.seeds():
        subject.check(data)
    subject.look()


def test_no_input_does_any_harm(target, subject):
    @settings(
        max_examples=EXAMPLES,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.built | changed(target.seeds()))
    def send(data):
        subject.check(data)

    send()
    subject.look()


@given(st.lists(st.binary(max_size=300), max_size=8))
def test_messages_that_are_joined_come_apart_again(messages):
    assert parted(joined(messages)) == messages


@given(st.binary())
def test_any_bytes_come_apart(data):
    assert len(b"".join(parted(data))) <= len(data)
