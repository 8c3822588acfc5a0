"""Every refusal of an inference request, over gRPC and REST: its code, its facts, and a server that goes on as ever."""

from __future__ import annotations

from itertools import combinations

import pytest

from protocol import rest_form
from protocol.bad_requests import CASES, INVALID, NOT_FOUND, PREFIX, set_first, simple
from sluice_proto.grpc_service_pb2 import InferParameter, ModelInferRequest
from sluice_server.observability.statistics import Outcome
from sluice_server.status import HTTP_CODES
from support.requests import parameter

REST_CASES = [case for case in CASES if not case.grpc_only]


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_request_with(case, refused):
    message = refused(case.request(), case.code)
    missing = [fact for fact in case.facts if fact not in message]
    assert not missing, f"{missing} not in: {message}"
    if case.from_core:
        assert message.startswith(PREFIX), message


@pytest.mark.parametrize("case", REST_CASES, ids=[case.name for case in REST_CASES])
def test_a_rest_request_with(case, server):
    answer = rest_form.post(server, case.request())
    status, facts = case.rest or (HTTP_CODES[case.code], case.facts)
    message = answer.json()["error"]
    assert answer.status == status, message
    assert [fact for fact in facts if fact not in message] == [], message
    if case.from_core and not case.rest:
        assert message.startswith(PREFIX), message


def test_a_message_without_an_id_says_that_the_id_is_unknown(refused):
    request = simple(rows=9)
    request.ClearField("id")
    assert refused(request, INVALID).startswith("[request id: <id_unknown>] ")


def test_refusals_are_counted_as_invalid_and_not_as_failures(server):
    statistics = server.model("simple").statistics
    before = statistics.snapshot()
    server.refusal("ModelInfer", simple(rows=9))
    after = statistics.snapshot()
    assert after.outcomes[Outcome.INVALID] == before.outcomes[Outcome.INVALID] + 1
    assert after.fail == before.fail
    assert after.success == before.success


OUTPUT0 = ModelInferRequest.InferRequestedOutputTensor(name="OUTPUT0")
MISTAKES = {
    "version": (lambda r: setattr(r, "model_version", "x"), "integral value"),
    "model": (lambda r: setattr(r, "model_name", "nope"), "is not found"),
    "parameter": (lambda r: r.parameters["timeout"].CopyFrom(parameter("1")), "'timeout'"),
    "input twice": (lambda r: r.inputs.append(r.inputs[0]), "input 'INPUT0' already exists"),
    "output twice": (lambda r: r.outputs.extend([OUTPUT0, OUTPUT0]), "output 'OUTPUT0' already"),
    "data": (lambda r: r.ClearField("raw_input_contents"), "unable to find data"),
    "classes": (lambda r: r.outputs.add(name="OUTPUT1").parameters["classification"].CopyFrom(parameter("1")), "class"),
    "output": (lambda r: r.outputs.add(name="NOPE"), "unexpected inference output"),
    "count": (lambda r: r.inputs.pop(), "expected 2 inputs"),
    "name": (lambda r: setattr(r.inputs[-1], "name", "NOPE"), "unexpected inference input"),
    "rows": (lambda r: [tensor.shape.__setitem__(0, 9) for tensor in r.inputs], "batch-size must be"),
    "datatype": (set_first("datatype", "FP64"), "data-type"),
    "shape": (lambda r: r.inputs[0].shape.append(3), "unexpected shape"),
    "size": (lambda r: r.raw_input_contents.__setitem__(slice(None), [b"", b""]), "byte size mismatch"),
}
"""What can be wrong with one request, in the order in which it is looked at."""

COEXISTING = [(first, second) for first, second in combinations(MISTAKES, 2) if {first, second} != {"data", "size"}]


@pytest.mark.parametrize(("first", "second"), COEXISTING)
def test_of_two_mistakes_the_one_that_is_checked_first_is_told(first, second, refused):
    request = simple()
    for mistake in (second, first):
        MISTAKES[mistake][0](request)
    assert MISTAKES[first][1] in refused(request, NOT_FOUND if first == "model" else INVALID)


def test_a_stream_is_told_the_same_in_the_order_of_its_requests_and_goes_on(server):
    requests = [case.request() for case in CASES]
    told = [server.refusal("ModelInfer", request)[1] for request in requests]
    requests.append(simple())
    answers = list(server.stream("ModelStreamInfer", iter(requests)))
    assert [answer.error_message for answer in answers] == [*told, ""]
    assert [answer.infer_response.id for answer in answers] == [request.id for request in requests]


LONG = 100_000


@pytest.mark.parametrize("filler", ["x", "\N{KATAKANA LETTER TU}", "\n", "\0", "%s", "{}"])
@pytest.mark.parametrize("field", ["model", "input", "output", "id", "parameter", "datatype"])
def test_a_message_about_a_name_of_any_length_arrives(field, filler, refused):
    name = filler * LONG
    request = simple()
    match field:
        case "model":
            request.model_name = name
        case "input":
            request.inputs[0].name = name
        case "output":
            request.outputs.add(name=name)
        case "id":
            request.id = name
            request.inputs[0].datatype = "FP32"
        case "parameter":
            request.parameters["triton_" + name].CopyFrom(parameter(1))
        case "datatype":
            request.inputs[0].datatype = name
    message = refused(request, NOT_FOUND if field == "model" else INVALID)
    assert filler * 10 in message
    assert "characters in all" in message


def test_a_shape_of_any_length_is_told_too(refused):
    request = simple()
    request.inputs[0].shape[:] = [1] * LONG
    assert "unexpected shape for input 'INPUT0'" in refused(request, INVALID)


@pytest.mark.parametrize("feature", ["any parameter", "surplus raw data", "known parameters"])
def test_what_looks_odd_and_is_legal_is_answered(feature, server):
    request = simple()
    match feature:
        case "any parameter":
            for key, value in {"a": 1, "b": True, "c": "text", "d": 1.5}.items():
                request.parameters[key].CopyFrom(parameter(value))
        case "surplus raw data":
            request.raw_input_contents.append(b"surplus")
        case "known parameters":
            known = {"timeout": 0, "priority": 0, "sequence_id": 0, "triton_enable_empty_final_response": True}
            for key, value in known.items():
                request.parameters[key].CopyFrom(parameter(value))
            request.parameters["priority"].CopyFrom(InferParameter(uint64_param=2**63))
    assert not server.infer(request).parameters
