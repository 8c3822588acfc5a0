"""Splitting a message gives the same as parsing it, and no bytes at all make it fail in another way."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sluice_proto import WireError
from sluice_proto.grpc_service_pb2 import InferParameter, ModelInferRequest, ModelInferResponse
from sluice_proto.wire import MAX_FIELDS, length_delimited, split_raw
from support.wire import agrees_with_parser, joined

short_text = st.text(max_size=8)
parameters = st.dictionaries(short_text, st.builds(InferParameter, int64_param=st.integers(-(2**63), 2**63 - 1)))
inputs = st.builds(
    ModelInferRequest.InferInputTensor,
    name=short_text,
    datatype=st.sampled_from(["FP32", "BYTES", "?"]),
    shape=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=4),
)
requests = st.builds(
    ModelInferRequest,
    model_name=st.text(max_size=200),
    id=short_text,
    parameters=parameters,
    inputs=st.lists(inputs, max_size=3),
    outputs=st.lists(st.builds(ModelInferRequest.InferRequestedOutputTensor, name=short_text), max_size=3),
    raw_input_contents=st.lists(st.binary(max_size=300), max_size=4),
)


@given(requests)
def test_head_and_raws_together_are_the_request(request):
    assert joined(request.SerializeToString()) == request


@given(st.lists(requests, min_size=2, max_size=3))
def test_raw_fields_anywhere_in_the_message_keep_their_order(parts):
    message = b"".join(part.SerializeToString() for part in parts)
    assert joined(message) == ModelInferRequest.FromString(message)


@given(requests, st.data())
def test_a_damaged_message_splits_whenever_it_parses_and_then_means_the_same(request, data):
    message = bytearray(request.SerializeToString() or b"\0")
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    del message[data.draw(st.integers(0, len(message))) :]
    agrees_with_parser(bytes(message))


@given(st.binary(max_size=60))
@example(b"\x3a\x80\x80\x80\x80\x80\x00")  # a length of six bytes
@example(b"\xba\x80\x80\x80\x80\x00\x00")  # a tag of six bytes
@example(b"\xba\x80\x80\x80\x00\x01a")  # a tag that is longer than it must be
@example(b"\xba\x80\x80\x80\x10\x01a")  # the same with a bit beyond the 32nd
@example(b"\x3a\x81\x80\x80\x80\x00a")  # a length that is longer than it must be
@example(b"\x3a\x81" + b"\x80" * 8 + b"\x02a")  # the same with a bit beyond the 64th
@example(b"\x3a\x81" + b"\x80" * 8 + b"\x01a")
@example(b"\x3a\xff\xff\xff\xff\xff")
@example(b"\x02\x00")  # field number 0
@example(b"\x78" + b"\x80" * 9 + b"\x01")  # an unknown number of ten bytes
@example(b"\x78" + b"\x80" * 10 + b"\x01")  # and of eleven
def test_random_bytes_split_whenever_they_parse_and_otherwise_raise_nothing_but_wire_errors(message):
    agrees_with_parser(message)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (b"\x3a", "number is cut off"),
        (b"\x3a\x80", "number is cut off"),
        (b"\xba", "number is cut off"),
        (b"\x3a\x05abcd", "ends 1 bytes after"),
        (b"\x0a\x7fabc", "ends 124 bytes after"),
        (b"\x3a\xff\xff\xff\xff\x0f", "ends 4294967295 bytes after"),
        (b"\x3a" + b"\x80" * 10 + b"\x00", "too long"),
        (b"\xba\x80\x80\x80\x80\x00\x00", "too long"),
        (b"\x78" + b"\xff" * 10 + b"\x01", "too long"),
        (b"\x79\0\0\0\0", "ends 4 bytes after"),
        (b"\x7d\0\0\0", "ends 1 bytes after"),
        (b"\x00\x00", "0 is no field number"),
        (b"\x3b\x3c", "group"),
        (b"\x3c", "group"),
        (b"\x3e\x00", "group's or unknown"),
    ],
)
def test_what_is_not_protobuf_is_refused_with_its_reason(message, reason):
    with pytest.raises(WireError, match=reason):
        split_raw(message)


def test_the_error_tells_where_the_wrong_field_begins():
    with pytest.raises(WireError) as caught:
        split_raw(b"\x0a\x01m\x3a\x09abc")
    assert (caught.value.offset, str(caught.value)) == (
        3,
        "malformed message at byte 3: a field ends 6 bytes after the message",
    )


def test_field_7_of_another_wire_type_and_unknown_fields_stay_in_the_head():
    other = b"\x38\x05" + b"\x39" + bytes(8) + b"\x3d" + bytes(4) + b"\xa2\x06\x02hi"
    head, raws = split_raw(other + b"\x3a\x01a" + other)
    assert (head, [bytes(raw) for raw in raws]) == (other + other, [b"a"])


def test_raws_are_read_only_views_of_the_message_itself():
    message = ModelInferRequest(model_name="m", raw_input_contents=[b"a" * 100_000]).SerializeToString()
    head, (raw,) = split_raw(message)
    assert raw.obj is message
    assert raw.readonly
    assert len(head) == 3


def test_a_view_of_a_message_splits_like_the_message():
    message = ModelInferRequest(model_name="m", raw_input_contents=[b"ab", b""]).SerializeToString()
    head, raws = split_raw(memoryview(b"x" + message)[1:])
    assert (head, [bytes(raw) for raw in raws]) == (b"\x0a\x01m", [b"ab", b""])


def test_a_message_of_nothing_but_fields_is_given_up_in_time():
    assert len(split_raw(b"\x3a\x00" * MAX_FIELDS)[1]) == MAX_FIELDS
    with pytest.raises(WireError, match=f"more than {MAX_FIELDS} fields"):
        split_raw(b"\x3a\x00" * (MAX_FIELDS + 1))


@given(st.lists(st.binary(max_size=20_000), max_size=3))
def test_a_response_joined_from_parts_is_the_response(raws):
    response = ModelInferResponse(model_name="m", id="7")
    parts = [response.SerializeToString()]
    for raw in raws:
        parts += [length_delimited(ModelInferResponse.RAW_OUTPUT_CONTENTS_FIELD_NUMBER, len(raw)), raw]
    response.raw_output_contents.extend(raws)
    assert ModelInferResponse.FromString(b"".join(parts)) == response


@pytest.mark.parametrize(
    ("field_number", "length", "expected"),
    [
        (6, 0, b"\x32\x00"),
        (6, 127, b"\x32\x7f"),
        (6, 128, b"\x32\x80\x01"),
        (16, 2**31, b"\x82\x01\x80\x80\x80\x80\x08"),
    ],
)
def test_a_prefix_is_the_tag_and_the_length(field_number, length, expected):
    assert length_delimited(field_number, length) == expected
