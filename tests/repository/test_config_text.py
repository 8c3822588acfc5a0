"""config.pbtxt and JSON overrides: what is read, and how each mistake is told, with its place."""

import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_proto.model_config_pb2 import DataType, ModelInstanceGroup
from sluice_server.repository.config import MAX_CONFIG_BYTES, parse_json, parse_text, read_config
from sluice_server.repository.errors import ConfigError

DIGITS = """
# The usual layout of a Triton configuration.
platform: "onnxruntime_onnx"
max_batch_size: 8
input [
  {
    name: "X"
    data_type: TYPE_FP32
    dims: [ 64 ]
  },
  { name: "Y", data_type: TYPE_STRING, dims: [ -1, 2 ] }
]
output { name: "p" data_type: TYPE_FP32 dims: 10 }
dynamic_batching { preferred_batch_size: [ 4, 8 ] max_queue_delay_microseconds: 100 }
parameters { key: "intra_op_thread_count" value: { string_value: "1" } }
"""


def test_a_usual_config_is_read_with_comments_lists_and_both_separators() -> None:
    config = parse_text(DIGITS, "config.pbtxt")
    assert config.max_batch_size == 8
    assert [(tensor.name, tensor.data_type, list(tensor.dims)) for tensor in config.input] == [
        ("X", DataType.TYPE_FP32, [64]),
        ("Y", DataType.TYPE_STRING, [-1, 2]),
    ]
    assert list(config.dynamic_batching.preferred_batch_size) == [4, 8]
    assert config.parameters["intra_op_thread_count"].string_value == "1"


@pytest.mark.parametrize(
    ("text", "line", "column", "what"),
    [
        ('name: "a"\n  nope: 3', 2, 3, "unknown field 'nope' in ModelConfig"),
        ("max_batchsize: 3", 1, 1, "unknown field 'max_batchsize' in ModelConfig; did you mean 'max_batch_size'?"),
        ("input [ { dim: 3 } ]", 1, 11, "unknown field 'dim' in ModelInput; did you mean 'dims'?"),
        ("output { optional: true }", 1, 10, "unknown field 'optional' in ModelOutput"),
        ("version_policy {\n latest { num: 3 } }", 2, 11, "unknown field 'num' in Latest"),
        ('max_batch_size: "x"', 1, 17, 'Couldn\'t parse integer: "x"'),
        ("max_batch_size: 99999999999", 1, 17, "Value out of range: 99999999999"),
        ("instance_group { count: 1.5 }", 1, 25, "Couldn't parse integer: 1.5"),
        ("input [ { data_type: TYPE_FP31 } ]", 1, 22, "TYPE_FP31 is no DataType"),
        ("instance_group { kind: KIND_TPU }", 1, 24, "KIND_TPU is no ModelInstanceGroup.Kind"),
        ('name: "a" name: "b"', 1, 17, "name is given twice in ModelConfig"),
        ("version_policy { latest {} all {} }", 1, 28, "only one of latest and all can be given"),
        ("input [ {", 1, 9, 'Expected "}"'),
        ("{{{{", 1, 1, "Expected identifier or number, got {"),
        ("name: 1", 1, 7, "Expected string but found: '1'"),
        ("[foo.bar]: 3", 1, 6, "does not have extensions"),
        ("\0", 1, 1, "Expected identifier or number"),
    ],
)
def test_a_mistake_in_the_text_is_told_with_its_place(text: str, line: int, column: int, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_text(text, "repo/m/config.pbtxt")
    error = caught.value
    assert (error.source, error.line, error.column) == ("repo/m/config.pbtxt", line, column)
    assert str(error).startswith(f"repo/m/config.pbtxt:{line}:{column}: ")
    assert what in str(error)


@pytest.mark.parametrize("number", ["2222222222", "-2222222222", "2" * 93, "0xffffffffffffffffffff"])
def test_a_number_of_an_enum_that_is_out_of_range_is_told(number: str) -> None:
    with pytest.raises(ConfigError, match=r"pbtxt: the number of an enum's value: Value out of range: -?[12]"):
        parse_text(f"input {{ data_type: {number} }}", "config.pbtxt")


@given(st.text() | st.text(alphabet='{}[]:,"#-1 \n\\name input dims'))
def test_any_text_is_read_or_refused_as_a_config_error(text: str) -> None:
    with contextlib.suppress(ConfigError):
        parse_text(text, "fuzz")


def test_a_file_that_is_not_there_not_text_or_too_large_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.pbtxt"
    with pytest.raises(ConfigError, match=r"config\.pbtxt: cannot be read: No such file"):
        read_config(path)
    path.write_bytes(b'name: "a"\n#  \xff')
    with pytest.raises(ConfigError, match=r"config\.pbtxt:2:4: is not UTF-8 text"):
        read_config(path)
    path.write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(ConfigError, match="is larger than 4194304 bytes"):
        read_config(path)
    path.write_text(DIGITS)
    assert read_config(path) == parse_text(DIGITS, "")


def test_json_takes_both_spellings_of_names_numbers_as_strings_and_enums_by_name() -> None:
    config = parse_json(
        json.dumps(
            {
                "max_batch_size": "4",
                "versionPolicy": {"specific": {"versions": ["1", 2]}},
                "input": [{"name": "X", "dataType": "TYPE_FP32", "dims": ["-1", 16]}],
                "instance_group": [{"kind": "KIND_CPU", "count": 1}],
                "dynamic_batching": {"max_queue_delay_microseconds": "100"},
                "parameters": {"a": {"string_value": "b"}},
                "default_model_filename": None,
            }
        )
    )
    assert config.max_batch_size == 4
    assert list(config.version_policy.specific.versions) == [1, 2]
    assert list(config.input[0].dims) == [-1, 16]
    assert config.instance_group[0].kind == ModelInstanceGroup.KIND_CPU
    assert config.dynamic_batching.max_queue_delay_microseconds == 100
    assert config.parameters["a"].string_value == "b"
    assert config.default_model_filename == ""


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "config override:1:1: is not JSON: Expecting value"),
        ('{"name":\n "a"', "config override:2:5: is not JSON"),
        ('{"a": 1, "a": 2}', "member 'a' appears twice"),
        ("[" * 100_000, "is not usable JSON: maximum recursion depth exceeded"),
        ('{"max_batch_size": ' + "9" * 5000 + "}", "is not usable JSON: Exceeds the limit"),
        ("[]", "the top level must be a JSON object"),
        ("3", "the top level must be a JSON object"),
        ("null", "the top level must be a JSON object"),
        ('{"max_batch_sise": 3}', "unknown field 'max_batch_sise' in ModelConfig; did you mean 'max_batch_size'?"),
        ('{"input": [{"dim": [3]}]}', "unknown field 'dim' in ModelInput; did you mean 'dims'? (at input[0].dim)"),
        ('{"parameters": {"a": {"b": 1}}}', "unknown field 'b' in ModelParameter (at parameters[\"a\"].b)"),
        ('{"parameters": {"a": "b"}}', 'parameters["a"] must be a JSON object'),
        ('{"parameters": []}', "parameters"),
        ('{"dynamic_batching": []}', "dynamic_batching must be a JSON object"),
        ('{"dynamic_batching": ""}', "dynamic_batching must be a JSON object"),
        ('{"input": {}}', "input"),
        ('{"input": [null]}', "input[0] must be a JSON object"),
        ('{"max_batch_size": 1, "maxBatchSize": 2}', "maxBatchSize is given in both spellings"),
        ('{"max_batch_size": "x"}', "max_batch_size"),
        ('{"max_batch_size": 1.5}', "max_batch_size"),
        ('{"max_batch_size": NaN}', "max_batch_size"),
        ('{"max_batch_size": 1e99}', "max_batch_size"),
        ('{"max_batch_size": true}', "max_batch_size"),
        ('{"max_batch_size": {}}', "max_batch_size"),
        ('{"name": 5}', "name"),
        ('{"input": [{"data_type": 1e400}]}', "the number of an enum's value: cannot convert float infinity"),
        ('{"input": [{"data_type": NaN}]}', "data_type"),
        ('{"input": [{"data_type": 2222222222}]}', "data_type"),
        ('{"name": "\\ud800"}', "'\\ud800' is not Unicode text"),
        ('{"\\ud800": 1}', "'\\ud800' is not Unicode text"),
        ('{"input": [{"data_type": "TYPE_\\udfff"}]}', "'TYPE_\\udfff' is not Unicode text"),
        ('{"metric_tags": {"a\\ud83d": "b"}}', "'a\\ud83d' is not Unicode text"),
        ('{"response_cache": {"enable": "true"}}', "response_cache"),
        ('{"input": [{"data_type": "TYPE_FP31"}]}', "TYPE_FP31"),
        ('{"dynamic_batching": {}, "sequence_batching": {}}', "scheduling_choice"),
    ],
)
def test_a_mistake_in_the_json_is_told(text: str, what: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_json(text)
    assert str(caught.value).startswith("config override:")
    assert what in str(caught.value)
    assert str(caught.value).encode()  # it can be sent


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
NAMES = st.sampled_from(
    ["name", "input", "dims", "reshape", "parameters", "kind", "dynamic_batching", "data_type", "shape", "latest"]
)


@given(
    st.dictionaries(
        NAMES,
        st.recursive(
            SCALARS, lambda below: st.lists(below, max_size=3) | st.dictionaries(NAMES, below, max_size=3), max_leaves=8
        ),
    )
)
def test_any_json_is_read_or_refused_as_a_config_error(tree: dict[str, object]) -> None:
    with contextlib.suppress(ConfigError):
        parse_json(json.dumps(tree))
