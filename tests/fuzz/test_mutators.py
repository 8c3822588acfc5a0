"""That changed messages and JSON texts are still that, most of them, and others than before."""

from __future__ import annotations

import json
from random import Random

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from fuzz.configurations import json_seeds
from fuzz.inference import built_requests
from fuzz.mutators import change_json, change_message, in_one, split, unite
from fuzz.serving import seeds
from fuzz.subject import joined, parted
from sluice_proto.grpc_service_pb2 import ModelInferRequest

ROUNDS = 2000


def anyhow(random):
    """The change of bytes that a fuzzer would make."""

    def mutate(data):
        place = random.randrange(len(data) + 1)
        return data[:place] + random.randbytes(random.randrange(3)) + data[place + 1 :]

    return mutate


def parses(data):
    try:
        ModelInferRequest.FromString(data)
    except DecodeError:
        return False
    return True


@given(built_requests)
def test_the_fields_of_a_message_make_it_up_again(data):
    assert ModelInferRequest.FromString(unite(split(data))) == ModelInferRequest.FromString(data)


@pytest.mark.parametrize("data", [b"\x80", b"\x0a\x05ab", b"\x0b", b"\x02\x00", b"\xff" * 12])
def test_what_is_no_message_has_no_fields(data):
    assert split(data) is None


def test_most_changed_requests_are_requests_and_hardly_any_is_what_it_was():
    random = Random(1)
    before = random.choices(seeds(), k=ROUNDS)
    after = [change_message(data, random, anyhow(random)) for data in before]
    assert sum(map(parses, after)) > 0.75 * ROUNDS
    assert sum(new == old for new, old in zip(after, before, strict=True)) < 0.2 * ROUNDS


def test_changed_json_is_json():
    random = Random(1)
    before = random.choices(json_seeds(), k=ROUNDS)
    after = [change_json(data, random, anyhow(random)) for data in before]
    assert all(isinstance(json.loads(data), dict) for data in after)
    assert len(set(after)) > 0.5 * ROUNDS


def test_of_several_messages_one_is_changed():
    random = Random(1)
    first = seeds()[:4]
    whole = joined(first)
    for _ in range(100):
        messages = parted(in_one(change_message)(whole, random, anyhow(random)))
        assert len(messages) in (4, 5)
        assert sum(message in first for message in messages) >= 3


@given(st.binary(), st.integers())
def test_any_bytes_can_be_changed(data, seed):
    random = Random(seed)
    for mutator in (change_message, change_json, in_one(change_message)):
        assert isinstance(mutator(data, random, anyhow(random)), bytes)
