"""What sequence_batching may say: every rule has an error that names the field, and the defaults are filled in."""

from __future__ import annotations

import pytest

from sluice_server.graph import GraphSignature, TensorSpec
from sluice_server.repository.autocomplete import complete, normalize
from sluice_server.repository.config import parse_text
from sluice_server.repository.describe import explain
from sluice_server.repository.errors import ConfigError, ModelLoadError

TENSORS = """
input { name: "X" data_type: TYPE_FP32 dims: [ 1 ] }
output { name: "Y" data_type: TYPE_FP32 dims: [ 1 ] }
"""
START = "kind: CONTROL_SEQUENCE_START fp32_false_true: [ 0, 1 ]"
STATE = 'input_name: "IN" output_name: "OUT" data_type: TYPE_FP32 dims: [ -1, 2 ]'
INITIAL = 'name: "zeros" data_type: TYPE_FP32 dims: [ 3, 2 ]'


def normalized(batching: str, rows: int = 4):
    text = f"max_batch_size: {rows} {TENSORS} sequence_batching {{ {batching} }}"
    return normalize(parse_text(text, "config.pbtxt"), name="m")


def control(text: str, name: str = "START") -> str:
    return f'control_input {{ name: "{name}" control {{ {text} }} }}'


def state(more: str = "", text: str = STATE) -> str:
    return f"state {{ {text} {more} }}"


@pytest.mark.parametrize(
    ("batching", "problem"),
    [
        (
            "direct { minimum_slot_utilization: 1.5 }",
            "sequence_batching.direct.minimum_slot_utilization is 1.5, expected 0 to 1",
        ),
        ("oldest { }", "sequence_batching.oldest.max_candidate_sequences is 0, expected 1 or more"),
        (
            "oldest { max_candidate_sequences: 1 preferred_batch_size: 5 }",
            "sequence_batching.oldest.preferred_batch_size 5 must be from 1 to max_batch_size, which is 4",
        ),
        ("control_input { }", "sequence_batching.control_input[0].name is missing"),
        (control(START, "X"), "sequence_batching.control_input[0].name 'X' is the name of another input"),
        (control(START) * 2, "sequence_batching.control_input[1].name 'START' is the name of another input"),
        (
            'control_input { name: "C" }',
            "sequence_batching.control_input[0].control of 'C' has 0 entries, expected one",
        ),
        (
            control(START) + control(START, "again"),
            "sequence_batching.control_input[1].control[0].kind CONTROL_SEQUENCE_START is given twice",
        ),
        (
            control("kind: CONTROL_SEQUENCE_READY"),
            "sequence_batching.control_input[0].control[0] of CONTROL_SEQUENCE_READY needs one of int32_false_true,"
            " fp32_false_true, bool_false_true, got none",
        ),
        (
            control(START + " int32_false_true: [ 0, 1 ]"),
            "sequence_batching.control_input[0].control[0] of CONTROL_SEQUENCE_START needs one of int32_false_true,"
            " fp32_false_true, bool_false_true, got int32_false_true and fp32_false_true",
        ),
        (
            control("kind: CONTROL_SEQUENCE_END bool_false_true: [ true ]"),
            "sequence_batching.control_input[0].control[0].bool_false_true must have two values, the one for false and"
            " the one for true",
        ),
        (
            control(START + " data_type: TYPE_FP32"),
            "sequence_batching.control_input[0].control[0].data_type has no meaning for CONTROL_SEQUENCE_START, whose"
            " type is that of its two values",
        ),
        (
            control("kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32"),
            "sequence_batching.control_input[0].control[0].data_type of CONTROL_SEQUENCE_CORRID must be one of"
            " TYPE_UINT64, TYPE_INT64, TYPE_UINT32, TYPE_INT32, TYPE_STRING",
        ),
        (
            control("kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64 int32_false_true: [ 0, 1 ]"),
            "sequence_batching.control_input[0].control[0].int32_false_true has no meaning for CONTROL_SEQUENCE_CORRID,"
            " which has a data_type",
        ),
        (state(text='output_name: "OUT"'), "sequence_batching.state[0].input_name is missing"),
        (state(text='input_name: "IN"'), "sequence_batching.state[0].output_name is missing"),
        (
            state(text='input_name: "X" output_name: "OUT"'),
            "sequence_batching.state[0].input_name 'X' is the name of another input",
        ),
        (
            state() + state(text='input_name: "IN2" output_name: "OUT"'),
            "sequence_batching.state[1].output_name 'OUT' is the output of another state",
        ),
        (
            state(text='input_name: "IN" output_name: "OUT"'),
            "sequence_batching.state[0].data_type of 'IN' is missing",
        ),
        (
            state(text='input_name: "IN" output_name: "OUT" data_type: TYPE_FP32'),
            "sequence_batching.state[0].dims of 'IN' is missing",
        ),
        (
            state(text='input_name: "IN" output_name: "OUT" data_type: TYPE_FP32 dims: [ 0 ]'),
            "sequence_batching.state[0].dims is [0], expected sizes of 1 and more, or -1 for any",
        ),
        (
            state(f"initial_state {{ {INITIAL} zero_data: true }}" * 2),
            "sequence_batching.state[0].initial_state of 'IN' has 2 entries, expected one",
        ),
        (state("initial_state { }"), "sequence_batching.state[0].initial_state[0].name is missing"),
        (
            state('initial_state { name: "i" data_type: TYPE_INT32 }'),
            "sequence_batching.state[0].initial_state[0].data_type of 'i' must be that of the state, TYPE_FP32",
        ),
        (
            state('initial_state { name: "i" data_type: TYPE_FP32 dims: [ -1, 2 ] }'),
            "sequence_batching.state[0].initial_state[0].dims is [-1,2], expected sizes that fit the state's [-1,2]",
        ),
        (
            state(f"initial_state {{ {INITIAL} }}"),
            "sequence_batching.state[0].initial_state[0] 'zeros' needs zero_data: true or a data_file",
        ),
        (
            state(f'initial_state {{ {INITIAL} data_file: "../x" }}'),
            "sequence_batching.state[0].initial_state[0].data_file '../x' must be a relative path that stays inside the"
            " model's directory",
        ),
    ],
)
def test_each_rule_names_the_field_that_breaks_it(batching, problem):
    with pytest.raises(ConfigError) as refusal:
        normalized(batching)
    assert str(refusal.value) == f"model 'm': {problem}"


def test_a_response_cache_does_not_go_with_sequences():
    text = f"max_batch_size: 4 {TENSORS} sequence_batching {{ }} response_cache {{ enable: true }}"
    with pytest.raises(ConfigError, match=r"response_cache\.enable is not there for models with sequence_batching"):
        normalize(parse_text(text, "config.pbtxt"), name="m")


def test_the_defaults_are_triton_s():
    assert normalized("").sequence_batching.max_sequence_idle_microseconds == 1_000_000
    assert normalized("max_sequence_idle_microseconds: 5").sequence_batching.max_sequence_idle_microseconds == 5
    assert list(normalized("oldest { max_candidate_sequences: 9 }").sequence_batching.oldest.preferred_batch_size) == [
        4
    ]
    alone = normalized("oldest { max_candidate_sequences: 9 }", rows=0)
    assert not alone.sequence_batching.oldest.preferred_batch_size


def spec(name: str, datatype: str = "FP32", *shape: int) -> TensorSpec:
    return TensorSpec(name, datatype, shape or (-1, 1))


GRAPH = GraphSignature(
    (spec("X"), spec("START"), spec("IN", "FP32", -1, -1, 2)), (spec("Y"), spec("OUT", "FP32", -1, -1, 2))
)


def test_auto_complete_leaves_out_what_clients_do_not_send_and_adds_no_second_scheduler():
    text = f"sequence_batching {{ {control(START)} {state()} oldest {{ max_candidate_sequences: 2 }} }}"
    completed = complete(normalize(parse_text(text, "config.pbtxt"), name="m"), GRAPH)
    assert [tensor.name for tensor in completed.input] == ["X"]
    assert [tensor.name for tensor in completed.output] == ["Y"]
    assert completed.max_batch_size == 4
    assert list(completed.sequence_batching.oldest.preferred_batch_size) == [4]
    assert not completed.HasField("dynamic_batching")


@pytest.mark.parametrize(
    ("batching", "problem"),
    [
        (control(START) + state(text=STATE.replace('"IN"', '"NOPE"')), "unexpected inference input 'NOPE'"),
        (control(START) + state(text=STATE.replace('"OUT"', '"NOPE"')), "unexpected inference output 'NOPE'"),
        (control(START), "configuration expects 2 inputs, model provides 3: missing 'IN'"),
        (
            control(START.replace("fp32", "int32")) + state(),
            "configuration expects datatype TYPE_INT32 for input 'START', model provides TYPE_FP32",
        ),
        (control(START) + state(text=STATE.replace("-1, 2", "2")), "tensor 'IN': the model expects 3 dimensions"),
    ],
)
def test_hidden_tensors_must_fit_the_model_file(batching, problem):
    with pytest.raises(ModelLoadError) as refusal:
        complete(normalized(batching), GRAPH)
    assert problem in str(refusal.value)


@pytest.mark.parametrize(
    ("strategy", "slots"),
    [("", "direct, 2 x 4 sequences"), ("oldest { max_candidate_sequences: 7 }", "oldest, 7 sequences")],
)
def test_what_a_configuration_becomes_is_said_in_words(strategy, slots):
    completed = complete(normalized(control(START) + state() + strategy), GRAPH)
    expected = f"sequence_batching: {slots} at a time; states OUT to IN; one that is idle for 1000000 us ends"
    assert expected in explain(completed, completed, GRAPH)
