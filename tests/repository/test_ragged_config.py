"""What a configuration may say of ragged batching, and what its model file must have for it."""

from __future__ import annotations

import pytest

from sluice_server.graph import GraphSignature, TensorSpec
from sluice_server.repository.autocomplete import complete, normalize
from sluice_server.repository.config import parse_text
from sluice_server.repository.describe import explain
from sluice_server.repository.errors import ConfigError, ModelLoadError

INPUT = 'input { name: "X" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }\n'
OUTPUT = 'output { name: "Y" data_type: TYPE_FP32 dims: -1 }\n'
MADE = 'batch_input { kind: BATCH_ELEMENT_COUNT target_name: "N" data_type: TYPE_INT32 source_input: "X" }\n'
CUT = 'batch_output { target_name: "Y" source_input: "X" }\n'
BATCHING = "max_batch_size: 4 dynamic_batching { }\n"
WHOLE = BATCHING + INPUT + OUTPUT + MADE + CUT

SIGNATURE = GraphSignature(
    (TensorSpec("X", "FP32", (-1,)), TensorSpec("N", "INT32", (-1,))), (TensorSpec("Y", "FP32", (-1,)),)
)


def completed(text: str, signature: GraphSignature = SIGNATURE, **more: bool):
    config = normalize(parse_text(text, "config.pbtxt"), name="m", **more)
    return complete(config, signature, **more)


def with_input(name: str, datatype: str, shape: tuple[int, ...]) -> GraphSignature:
    """The signature with one input in place of that of its name."""
    inputs = {spec.name: spec for spec in SIGNATURE.inputs} | {name: TensorSpec(name, datatype, shape)}
    return GraphSignature(tuple(inputs.values()), SIGNATURE.outputs)


def test_what_is_valid_is_reported_as_it_is_written():
    config = completed(WHOLE)
    assert config.input[0].allow_ragged_batch
    assert (config.batch_input[0].target_name, config.batch_output[0].source_input) == (["N"], ["X"])
    assert completed(WHOLE) == complete(config, SIGNATURE)


def test_check_says_what_is_made_and_how_it_is_cut():
    lines = explain(parse_text(WHOLE, "config.pbtxt"), completed(WHOLE), SIGNATURE)
    assert "input 'X': ragged, requests of any shapes share a batch; the model gets it flat" in lines
    assert "batch_input 'N': BATCH_ELEMENT_COUNT of 'X', made for each batch" in lines
    assert "batch_output 'Y': BATCH_SCATTER_WITH_INPUT_SHAPE, cut by the shapes of 'X'" in lines
    assert not [line for line in lines if "not listed" in line]


@pytest.mark.parametrize("field", ["output", "dynamic_batching"])
def test_outputs_and_the_scheduler_are_completed_and_what_is_made_is_no_input(field: str):
    """Auto-complete adds the scheduler only where it has something else to do."""
    text = "max_batch_size: 4\n" + INPUT + MADE if field == "dynamic_batching" else BATCHING + INPUT + MADE
    config = completed(text)
    assert [tensor.name for tensor in config.input] == ["X"]
    assert [tensor.name for tensor in config.output] == ["Y"]
    assert config.HasField("dynamic_batching")


BAD = [
    (
        "max_batch_size: 4\n" + INPUT + OUTPUT + MADE,
        "input[0].allow_ragged_batch needs a max_batch_size above 0 and dynamic_batching",
    ),
    ("dynamic_batching { }" + INPUT + OUTPUT + MADE, "input[0].allow_ragged_batch needs a max_batch_size above 0"),
    (
        "max_batch_size: 4\n" + OUTPUT + MADE + INPUT.replace("true", "false"),
        "batch_input needs a max_batch_size above",
    ),
    (
        "max_batch_size: 4\n" + OUTPUT + CUT + INPUT.replace("true", "false"),
        "batch_output needs a max_batch_size above",
    ),
    (WHOLE.replace('target_name: "N"', ""), "batch_input[0].target_name is missing"),
    (WHOLE.replace('target_name: "N"', 'target_name: ""'), "batch_input[0].target_name is missing"),
    (WHOLE.replace('"N"', '"X"'), "batch_input[0].target_name 'X' is the name of another input"),
    (WHOLE + MADE, "batch_input[1].target_name 'N' is the name of another input"),
    (WHOLE.replace("TYPE_INT32", "TYPE_INT8"), "batch_input[0].data_type is TYPE_INT8, expected one of TYPE_INT32, "),
    (WHOLE.replace("data_type: TYPE_INT32", ""), "batch_input[0].data_type is TYPE_INVALID, expected one of"),
    (
        WHOLE.replace('TYPE_INT32 source_input: "X"', "TYPE_INT32"),
        "batch_input[0].source_input has 0 names, expected 1",
    ),
    (
        WHOLE.replace('TYPE_INT32 source_input: "X"', 'TYPE_INT32 source_input: ["X", "X"]'),
        "batch_input[0].source_input has 2 names, expected 1",
    ),
    (
        WHOLE.replace('TYPE_INT32 source_input: "X"', 'TYPE_INT32 source_input: "Z"'),
        "batch_input[0].source_input 'Z' is no input; there are X",
    ),
    (WHOLE.replace('{ target_name: "Y"', "{"), "batch_output[0].target_name is missing"),
    (
        WHOLE.replace('{ target_name: "Y"', '{ target_name: "Z"'),
        "batch_output[0].target_name 'Z' is no output; there are Y",
    ),
    (WHOLE + CUT, "batch_output[1].target_name 'Y' is in batch_output already"),
    (WHOLE.replace('"Y" source_input: "X"', '"Y" source_input: "N"'), "batch_output[0].source_input 'N' is no input"),
    (
        WHOLE.replace(OUTPUT, OUTPUT.replace("dims: -1", "dims: [ -1, -1 ]")),
        "batch_output[0].target_name 'Y' has dims [-1,-1], and its input 'X' has [-1]: an open dimension is to have",
    ),
]


@pytest.mark.parametrize(("text", "expected"), BAD, ids=range(len(BAD)))
def test_what_cannot_be_is_refused_with_the_field(text: str, expected: str):
    with pytest.raises(ConfigError) as caught:
        completed(text)
    assert str(caught.value).startswith(f"model 'm': {expected}")
    assert caught.value.model == "m"


@pytest.mark.parametrize("auto_complete", [True, False])
def test_a_batch_input_is_no_source_although_the_model_file_has_it(auto_complete: bool):
    signature = GraphSignature(SIGNATURE.inputs[1:], SIGNATURE.outputs)
    text = (BATCHING + MADE + OUTPUT).replace('"X"', '"N"')
    with pytest.raises(ConfigError, match=r"batch_input\[0\].source_input 'N' is no input"):
        completed(text, signature, auto_complete=auto_complete)


MISFITS = [
    (
        with_input("X", "FP32", (-1, 4)),
        WHOLE,
        "unable to load model 'm', configuration expects model provides input with shape [-1] for ragged input 'X',"
        " model provides [-1,4]",
    ),
    (
        GraphSignature(SIGNATURE.inputs[:1], SIGNATURE.outputs),
        WHOLE,
        "unexpected batch input 'N', allowed inputs are: X",
    ),
    (
        with_input("N", "INT64", (-1,)),
        WHOLE,
        "unable to load model 'm', configuration expects datatype INT32 for batch input 'N', model provides INT64",
    ),
    (
        with_input("N", "INT32", (-1, 1)),
        WHOLE,
        "unable to load model 'm', configuration expects shape [-1] for batch input 'N' of kind BATCH_ELEMENT_COUNT,"
        " model provides [-1,1]",
    ),
    (
        with_input("N", "INT32", (-1, 2)),
        WHOLE.replace("BATCH_ELEMENT_COUNT", "BATCH_ITEM_SHAPE"),
        "unable to load model 'm', configuration expects shape [-1,1] for batch input 'N' of kind BATCH_ITEM_SHAPE,"
        " model provides [-1,2]",
    ),
    (
        with_input("P", "INT32", (-1,)),
        WHOLE,
        "unable to load model 'm', configuration expects 2 inputs, model provides 3: missing 'P'",
    ),
]


@pytest.mark.parametrize(("signature", "text", "expected"), MISFITS, ids=range(len(MISFITS)))
def test_what_does_not_fit_the_model_file_is_refused(signature: GraphSignature, text: str, expected: str):
    with pytest.raises(ModelLoadError) as caught:
        completed(text, signature)
    assert str(caught.value) == expected


@pytest.mark.parametrize("shape", [(-1, 1), (-1, -1)])
def test_shapes_of_items_may_be_open_or_as_many_as_the_source_has_dimensions(shape: tuple[int, ...]):
    completed(WHOLE.replace("BATCH_ELEMENT_COUNT", "BATCH_ITEM_SHAPE"), with_input("N", "INT32", shape))
