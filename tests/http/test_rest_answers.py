"""Bodies of answers over REST: those that are remembered are the ones that are made anew."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_proto import wire
from sluice_proto.grpc_service_pb2 import ModelInferResponse
from sluice_server.protocol.rest_infer import HEADS_MAX, InferAnswers, OutputForms, cut_raws

ALL_BINARY = OutputForms({}, others_binary=True, in_memory=frozenset())
FORMS = (
    ALL_BINARY,
    OutputForms({"Y0": True, "Y1": True}, others_binary=False, in_memory=frozenset()),
    OutputForms({"Y0": True, "Y1": False}, others_binary=True, in_memory=frozenset()),
    OutputForms({"Y0": True, "Y1": True}, others_binary=True, in_memory=frozenset(("Y1",))),
    OutputForms({}, others_binary=False, in_memory=frozenset()),
)
RAW_FIELD = ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER


def parts_of(raws: list[bytes], *, request_id: str = "", name: str = "m") -> list[bytes]:
    """The parts of an answer with UINT8 outputs, as the encoder makes them."""
    response = ModelInferResponse(model_name=name, model_version="1")
    for place, raw in enumerate(raws):
        response.outputs.add(name=f"Y{place}", datatype="UINT8", shape=[len(raw)])
    parts = [ModelInferResponse(id=request_id).SerializeToString()] if request_id else []
    parts.append(response.SerializeToString())
    for raw in raws:
        parts += [wire.length_delimited(RAW_FIELD, len(raw)), raw]
    return parts


answers = st.builds(parts_of, st.lists(st.binary(max_size=3), max_size=3), request_id=st.sampled_from(["", "", "7"]))


@given(st.lists(answers, min_size=1, max_size=6), st.sampled_from(FORMS), st.data())
def test_any_parts_of_an_answer_give_what_they_give_for_the_first_time(several, forms, data):
    known = InferAnswers()
    for parts in several * 2:
        whole = b"".join(parts)
        cuts = sorted({0, len(whole), *data.draw(st.lists(st.integers(0, len(whole)), max_size=4))})
        for same in (parts, [whole], [whole[start:stop] for start, stop in pairwise(cuts)]):
            got, wanted = known.write(same, forms), InferAnswers().write([whole], forms)
            assert (got.head, b"".join(got.tensors), got.is_binary) == (
                wanted.head,
                b"".join(wanted.tensors),
                wanted.is_binary,
            )


@pytest.mark.parametrize(
    "parts",
    [
        parts_of([]),
        parts_of([b"a"], request_id="7"),
        [b"".join(parts_of([b"a"]))],
        [*parts_of([b"ab"])[:-1], b"a", b"b"],
        parts_of([b"a"], name="m" * 2000),
    ],
)
def test_what_is_not_a_head_and_tensors_behind_their_prefixes_is_not_remembered(parts):
    assert cut_raws(parts) is None


def test_what_is_remembered_is_bounded():
    known = InferAnswers()
    for size in range(HEADS_MAX + 5):
        known.write(parts_of([b"x" * size]), ALL_BINARY)
    assert len(known._heads) == 5
