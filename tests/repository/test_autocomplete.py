"""What a configuration becomes: defaults, auto-complete from the model file, and the errors of both families."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_proto.model_config_pb2 import ModelConfig, ModelInstanceGroup
from sluice_proto.tensors import BY_NAME
from sluice_server.graph import GraphSignature, TensorSpec
from sluice_server.repository.autocomplete import DEFAULT_MAX_BATCH_SIZE, complete, normalize
from sluice_server.repository.config import parse_text
from sluice_server.repository.describe import explain
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.validate import scalar_tensors


def graph(*, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]) -> GraphSignature:
    """An FP32 signature with these names and shapes."""
    return GraphSignature(
        tuple(TensorSpec(name, "FP32", shape) for name, shape in inputs.items()),
        tuple(TensorSpec(name, "FP32", shape) for name, shape in outputs.items()),
    )


BATCHING = graph(inputs={"X": (-1, 64)}, outputs={"p": (-1, 10)})
FIXED = graph(inputs={"X": (16,)}, outputs={"p": (-1, 10)})

X = ' input { name: "X" data_type: TYPE_FP32 dims: 64 } '
P = ' output { name: "p" data_type: TYPE_FP32 dims: 10 } '


def both_steps(
    written: ModelConfig | None,
    signature: GraphSignature = BATCHING,
    *,
    auto_complete: bool = True,
    gpu_available: bool = False,
    default: int = DEFAULT_MAX_BATCH_SIZE,
) -> ModelConfig:
    config = normalize(written, name="m", auto_complete=auto_complete, gpu_available=gpu_available)
    return complete(config, signature, auto_complete=auto_complete, default_max_batch_size=default)


def completed(text: str | None, signature: GraphSignature = BATCHING, **options: Any) -> ModelConfig:
    return both_steps(None if text is None else parse_text(text, "config.pbtxt"), signature, **options)


def test_without_a_config_a_batching_model_gets_batch_size_4_the_batcher_and_every_default() -> None:
    assert completed(None) == parse_text(
        """
        name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime"
        version_policy { latest { num_versions: 1 } }
        max_batch_size: 4
        input { name: "X" data_type: TYPE_FP32 dims: 64 }
        output { name: "p" data_type: TYPE_FP32 dims: 10 }
        instance_group { name: "m" count: 2 kind: KIND_CPU }
        default_model_filename: "model.onnx"
        dynamic_batching { preferred_batch_size: 4 }
        optimization { input_pinned_memory { enable: true } output_pinned_memory { enable: true } }
        """,
        "expected",
    )


def test_a_full_config_is_left_alone_and_gets_no_scheduler() -> None:
    config = completed(X + P + "max_batch_size: 8")
    assert config.max_batch_size == 8
    assert not config.HasField("dynamic_batching")
    assert completed('input { name: "X" data_type: TYPE_FP32 dims: [ -1, 64 ] }' + P.replace("10", "[ -1, 10 ]")) == (
        completed(
            "max_batch_size: 0 "
            'input { name: "X" data_type: TYPE_FP32 dims: [ -1, 64 ] }'
            'output { name: "p" data_type: TYPE_FP32 dims: [ -1, 10 ] }'
        )
    )


def test_only_the_missing_list_of_tensors_is_filled() -> None:
    narrow = graph(inputs={"X": (-1, -1)}, outputs={"p": (-1, 10), "q": (-1, 2)})
    config = completed(X, narrow)
    assert [list(tensor.dims) for tensor in config.input] == [[64]]
    assert [tensor.name for tensor in config.output] == ["p", "q"]
    assert [tensor.name for tensor in completed(P, narrow).output] == ["p"]


@pytest.mark.parametrize(
    ("text", "default", "size", "batcher"),
    [
        ("", 4, 4, True),
        ("", 16, 16, True),
        ("", 1, 1, False),
        ("", 0, 0, False),
        ("max_batch_size: 2", 4, 2, True),
        ("max_batch_size: 1", 4, 1, False),
        ("max_batch_size: 1 dynamic_batching {}", 4, 1, True),
    ],
)
def test_an_explicit_batch_size_is_kept_and_the_batcher_needs_more_than_1(
    text: str, default: int, size: int, batcher: bool
) -> None:
    config = completed(text, default=default)
    assert config.max_batch_size == size
    assert config.HasField("dynamic_batching") == batcher
    assert list(config.input[0].dims) == ([64] if size else [-1, 64])
    if batcher:
        assert list(config.dynamic_batching.preferred_batch_size) == [size]


def test_a_model_that_cannot_batch_keeps_its_whole_shapes_and_gets_no_batcher() -> None:
    config = completed(None, FIXED)
    assert (config.max_batch_size, config.HasField("dynamic_batching")) == (0, False)
    assert [list(config.input[0].dims), list(config.output[0].dims)] == [[16], [-1, 10]]


def test_a_scalar_is_listed_as_one_element_and_a_vector_of_a_batching_model_too() -> None:
    scalar = graph(inputs={"x": (-1, 576), "rate": ()}, outputs={"y": (-1, 1)})
    config = completed(None, scalar)
    assert config.max_batch_size == 0
    assert (list(config.input[1].dims), config.input[1].HasField("reshape")) == ([1], False)
    assert scalar_tensors(config, scalar) == {"rate"}

    vector = graph(inputs={"x": (-1, 4)}, outputs={"label": (-1,), "p": (-1, 3), "one": (-1, 1)})
    config = completed(None, vector)
    assert config.max_batch_size == 4
    assert (list(config.output[0].dims), config.output[0].HasField("reshape")) == ([1], True)
    assert scalar_tensors(config, vector) == frozenset()
    assert both_steps(config, vector) == config


def test_inputs_with_a_value_in_the_file_are_served_only_when_the_config_lists_them() -> None:
    signature = GraphSignature(
        (TensorSpec("X", "FP32", (-1, 2)), TensorSpec("scale", "FP32", (2,), optional=True)),
        (TensorSpec("p", "FP32", (-1, 2)),),
    )
    assert [tensor.name for tensor in completed(None, signature).input] == ["X"]
    listed = (
        'input { name: "X" data_type: TYPE_FP32 dims: [ -1, 2 ] }'
        'input { name: "scale" data_type: TYPE_FP32 dims: 2 optional: true }'
        'output { name: "p" data_type: TYPE_FP32 dims: [ -1, 2 ] }'
    )
    assert [tensor.optional for tensor in completed(listed, signature).input] == [False, True]


def test_instance_groups_get_names_kinds_and_counts() -> None:
    def groups(text: str, *, gpu: bool = False) -> list[tuple[str, int, str, list[int]]]:
        config = normalize(parse_text(text, ""), name="m", gpu_available=gpu)
        return [
            (group.name, group.count, group.Kind.Name(group.kind), list(group.gpus)) for group in config.instance_group
        ]

    assert groups("") == [("m", 2, "KIND_CPU", [])]
    assert groups("", gpu=True) == [("m", 1, "KIND_GPU", [])]
    assert groups("instance_group {}") == [("m_0", 2, "KIND_CPU", [])]
    assert groups("instance_group { gpus: [ 0, 1 ] }") == [("m_0", 2, "KIND_CPU", [])]
    assert groups("instance_group { gpus: [ 0, 1 ] }", gpu=True) == [("m_0", 1, "KIND_GPU", [0, 1])]
    assert groups('instance_group [ { count: 3 kind: KIND_CPU }, { name: "g" kind: KIND_GPU } ]', gpu=True) == [
        ("m_0", 3, "KIND_CPU", []),
        ("g", 1, "KIND_GPU", []),
    ]


def test_what_is_written_stays_as_it_is_written() -> None:
    written = parse_text(
        """
        backend: "onnxruntime" default_model_filename: "net.onnx"
        version_policy { specific { versions: [ 3, 1 ] } }
        max_batch_size: 8
        input { name: "X" data_type: TYPE_FP32 dims: [ 3, 2, 2 ] format: FORMAT_NCHW }
        output { name: "p" data_type: TYPE_FP32 dims: 10 label_filename: "labels.txt" }
        dynamic_batching { preferred_batch_size: [ 2, 8 ] max_queue_delay_microseconds: 50 }
        optimization { input_pinned_memory { enable: false } graph { level: -1 } }
        parameters { key: "anything" value { string_value: "kept" } }
        """,
        "",
    )
    config = normalize(written, name="m")
    added = ModelConfig(name="m", platform="onnxruntime_onnx")
    added.instance_group.add(name="m", count=2, kind=ModelInstanceGroup.KIND_CPU)
    added.optimization.output_pinned_memory.enable = True
    added.MergeFrom(written)
    assert config == added


def test_neither_step_changes_what_it_is_given() -> None:
    written = parse_text("max_batch_size: 2", "")
    before = ModelConfig.FromString(written.SerializeToString())
    config = normalize(written, name="m")
    assert written == before
    before = ModelConfig.FromString(config.SerializeToString())
    complete(config, BATCHING)
    assert config == before


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        ('name: "other"', ("name is 'other'", "directory's name 'm'")),
        ('platform: "tensorrt_plan"', ("platform is 'tensorrt_plan'", "unknown", "onnxruntime_onnx")),
        ('backend: "python"', ("backend is 'python'", "unknown")),
        ("max_batch_size: -1", ("max_batch_size is -1", "expected 0 or more")),
        ("max_batch_size: 4 dynamic_batching { preferred_batch_size: 8 }", ("preferred_batch_size 8", "which is 4")),
        ("max_batch_size: 4 dynamic_batching { preferred_batch_size: 0 }", ("preferred_batch_size 0",)),
        (X + P + "dynamic_batching { preferred_batch_size: 1 }", ("preferred_batch_size 1", "which is 0")),
        ("instance_group { count: -1 }", ("instance_group[0].count is -1",)),
        ("instance_group { count: 100000 }", ("instance_group[0].count is 100000", "1 to 1024")),
        ("instance_group { kind: KIND_CPU gpus: 0 }", ("instance_group[0].gpus must be empty for KIND_CPU",)),
        ("instance_group { kind: KIND_GPU gpus: -1 }", ("instance_group[0].gpus [-1]",)),
        ("instance_group { kind: KIND_GPU gpus: [ 1, 1 ] }", ("instance_group[0].gpus [1, 1]",)),
        ('instance_group [ { name: "a" }, { name: "a" } ]', ("instance_group[1].name 'a'",)),
        ('default_model_filename: "../model.onnx"', ("default_model_filename '../model.onnx'", "stays inside")),
        ('default_model_filename: "/etc/passwd"', ("default_model_filename '/etc/passwd'", "stays inside")),
        (f'default_model_filename: "{"a" * 256}"', ("longer than 255 bytes",)),
        ('output { label_filename: "../../x" }', ("output[0].label_filename '../../x'",)),
        ("input { data_type: TYPE_FP32 dims: 1 }" + P, ("input[0].name is missing",)),
        ('input { name: "X" dims: 1 }' + P, ("input[0].data_type of 'X' is missing",)),
        ('input { name: "X" data_type: TYPE_FP32 }' + P, ("input[0].dims of 'X' is missing",)),
        (X.replace("64", "[ 2, 0 ]") + P, ("input[0].dims of 'X' is [2,0]",)),
        (X + P.replace("10", "-2"), ("output[0].dims of 'p' is [-2]",)),
        (X + X + P, ("input[1].name 'X' is the name of another input",)),
        (X + P + P, ("output[1].name 'p' is the name of another output",)),
        (
            X.replace("dims: 64", "dims: 1 reshape {}") + P,
            ("model input 'X' cannot have empty reshape for non-batching model", "not supported for m"),
        ),
        (
            "max_batch_size: 4" + X.replace("dims: 64", "dims: [ 1, 2 ] reshape {}") + P,
            ("input[0].reshape of 'X' is []", "different size than dims [1,2]"),
        ),
        *(
            (X.replace("dims: 64", f"dims: {dims} reshape {{ shape: {shape} }}") + P, facts)
            for dims, shape, facts in [
                ("64", "[ 8, 7 ]", ("input[0].reshape of 'X' is [8,7]", "different size than dims [64]")),
                ("64", "[ 64, -1 ]", ("input[0].reshape of 'X' is [64,-1]", "different number of variable-size")),
                ("[ 2, -1, 6 ]", "[ 6, -1, 2 ]", ("input[0].reshape of 'X' is [6,-1,2]", "different size")),
                ("64", "[ 64, 0 ]", ("input[0].reshape of 'X' is [64,0]", "sizes of 1 and more")),
                ("64", "[ 64, -2 ]", ("input[0].reshape of 'X' is [64,-2]", "sizes of 1 and more")),
            ]
        ),
        (
            "max_batch_size: 4" + X.replace("dims: 64", "dims: 64 optional: true") + P,
            ("input[0].optional of 'X' needs max_batch_size 0",),
        ),
    ],
)
def test_a_wrong_configuration_is_a_config_error_before_the_model_file_is_opened(
    text: str, facts: tuple[str, ...]
) -> None:
    written = parse_text(text, "config.pbtxt")
    with pytest.raises(ConfigError) as caught:
        normalize(written, name="m", gpu_available=True)
    assert caught.value.model == "m"
    for fact in facts:
        assert fact in str(caught.value)


def test_rules_that_depend_on_completion_are_checked_after_it() -> None:
    assert list(completed("dynamic_batching { preferred_batch_size: 4 }").dynamic_batching.preferred_batch_size) == [4]
    with pytest.raises(ConfigError, match="preferred_batch_size 8 must be from 1 to max_batch_size, which is 4"):
        completed("dynamic_batching { preferred_batch_size: 8 }")


def test_without_config_and_without_auto_complete_a_model_does_not_load() -> None:
    with pytest.raises(ConfigError, match=r"model 'm' has no config\.pbtxt, and auto-complete is off"):
        normalize(None, name="m", auto_complete=False)
    with pytest.raises(ModelLoadError, match="configuration expects 0 inputs, model provides 1: missing 'X'"):
        completed("", auto_complete=False)
    with pytest.raises(ModelLoadError, match="configuration expects 0 outputs, model provides 1"):
        completed("max_batch_size: 4" + X, auto_complete=False)


NOTE = "(an initial batch dimension because max_batch_size > 0 followed by the explicit tensor shape, making"


@pytest.mark.parametrize(
    ("text", "signature", "message"),
    [
        (
            "max_batch_size: 4",
            FIXED,
            "autofill failed for model 'm': model does not support batching while non-zero max_batch_size is specified:"
            " 4, but dimension 0 of input 'X' is fixed at 16 (shape [16])",
        ),
        (
            "max_batch_size: 4" + X + P,
            graph(inputs={"X": (16,)}, outputs={"p": (-1, 10)}),
            "model 'm', tensor 'X': for the model to support batching the shape should have at least 1 dimension and"
            " the first dimension must be -1; but shape expected by the model is [16]",
        ),
        (
            "max_batch_size: 4" + X + P,
            graph(inputs={"X": ()}, outputs={"p": (-1, 10)}),
            "model 'm', tensor 'X': for the model to support batching the shape should have at least 1 dimension and"
            " the first dimension must be -1; but shape expected by the model is []",
        ),
        (
            "max_batch_size: 4" + X.replace("64", "5") + P,
            BATCHING,
            "model 'm', tensor 'X': the model expects 2 dimensions (shape [-1,64]) but the model configuration"
            f" specifies 2 dimensions {NOTE} complete shape [-1,5])",
        ),
        (
            X + P,
            BATCHING,
            "model 'm', tensor 'X': the model expects 2 dimensions (shape [-1,64]) but the model configuration"
            " specifies 1 dimensions (shape [64])",
        ),
        (
            "max_batch_size: 4" + X.replace("64", "-1") + P,
            BATCHING,
            "model 'm', tensor 'X': the model expects 2 dimensions (shape [-1,64]) but the model configuration"
            f" specifies 2 dimensions {NOTE} complete shape [-1,-1])",
        ),
        (
            "max_batch_size: 4" + X + P.replace("10", "1"),
            graph(inputs={"X": (-1, 64)}, outputs={"p": (-1,)}),
            "model 'm', tensor 'p': the model expects 1 dimensions (shape [-1]) but the model configuration"
            f" specifies 2 dimensions {NOTE} complete shape [-1,1])",
        ),
        (
            "max_batch_size: 4" + X.replace("FP32", "INT32") + P,
            BATCHING,
            "unable to load model 'm', configuration expects datatype TYPE_INT32 for input 'X',"
            " model provides TYPE_FP32",
        ),
        (
            "max_batch_size: 4" + X + P.replace("FP32", "STRING"),
            BATCHING,
            "unable to load model 'm', configuration expects datatype TYPE_STRING for output 'p',"
            " model provides TYPE_FP32",
        ),
        (
            "max_batch_size: 4" + X + X.replace("X", "NOPE") + P,
            graph(inputs={"X": (-1, 64), "W": (-1, 2)}, outputs={"p": (-1, 10)}),
            "unexpected inference input 'NOPE', allowed inputs are: W, X",
        ),
        (
            "max_batch_size: 4" + X + P.replace('"p"', '"q"'),
            BATCHING,
            "unexpected inference output 'q', allowed outputs are: p",
        ),
        (
            "max_batch_size: 4" + X + P,
            graph(inputs={"X": (-1, 64), "W": (-1, 2)}, outputs={"p": (-1, 10)}),
            "unable to load model 'm', configuration expects 1 inputs, model provides 2: missing 'W'",
        ),
        (
            X.replace("dims: 64", "dims: [ -1, 64 ] optional: true") + P.replace("10", "[ -1, 10 ]"),
            BATCHING,
            "unable to load model 'm', input 'X' is optional in the configuration,"
            " but the model file has no value for it",
        ),
        (
            "",
            GraphSignature((TensorSpec("X", "FLOAT8E5M2", (-1, 2)),), (TensorSpec("p", "FP32", (-1, 2)),)),
            "unable to load model 'm', tensor 'X' has datatype FLOAT8E5M2, which the protocol does not have",
        ),
    ],
)
def test_a_model_file_that_does_not_fit_is_a_load_error(text: str, signature: GraphSignature, message: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        completed(text, signature)
    assert str(caught.value) == message
    assert caught.value.reason == f"Invalid argument: {message}"
    assert caught.value.model == "m"


def test_a_config_may_narrow_what_the_model_leaves_open_and_leave_outputs_out() -> None:
    signature = graph(inputs={"X": (-1, -1)}, outputs={"p": (-1, -1), "q": (-1, 2)})
    config = completed("max_batch_size: 4" + X + P, signature)
    assert [tensor.name for tensor in config.output] == ["p"]


DIMS = st.sampled_from([-1, -1, 1, 3])
SHAPES = st.lists(DIMS, max_size=3).map(tuple)


@st.composite
def signatures(draw: st.DrawFn) -> GraphSignature:
    batching = draw(st.booleans())

    def spec(name: str, *, may_be_optional: bool) -> TensorSpec:
        shape = draw(SHAPES)
        return TensorSpec(
            name,
            draw(st.sampled_from(sorted(BY_NAME))),
            (-1, *shape) if batching else shape,
            optional=may_be_optional and draw(st.booleans()),
        )

    inputs = tuple(spec(f"in{i}", may_be_optional=i > 0) for i in range(draw(st.integers(1, 3))))
    outputs = tuple(spec(f"out{i}", may_be_optional=False) for i in range(draw(st.integers(1, 3))))
    return GraphSignature(inputs, outputs)


PARTS = st.lists(
    st.sampled_from(
        [
            "max_batch_size: 6",
            "dynamic_batching { max_queue_delay_microseconds: 5 }",
            'instance_group [ { count: 1 }, { name: "b" gpus: 3 } ]',
            "version_policy { all {} }",
            'platform: "onnxruntime_onnx"',
            "optimization { input_pinned_memory {} }",
        ]
    ),
    unique=True,
)


@given(signature=signatures(), parts=PARTS, default=st.integers(0, 8), gpu=st.booleans())
def test_completing_a_completed_config_changes_nothing(
    signature: GraphSignature, parts: list[str], default: int, gpu: bool
) -> None:
    written = parse_text("\n".join(parts), "")
    try:
        once = both_steps(written, signature, default=default, gpu_available=gpu)
    except ModelLoadError:
        assert written.max_batch_size
        assert not signature.batchable
        return
    assert both_steps(once, signature, default=default, gpu_available=gpu) == once
    assert both_steps(once, signature, auto_complete=False, gpu_available=gpu) == once
    assert all(tensor.dims for tensor in (*once.input, *once.output))
    assert explain(written, once, signature)
