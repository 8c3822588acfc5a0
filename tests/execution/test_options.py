"""Which parameter sets which option of ONNX Runtime, the defaults, and what is refused."""

import onnxruntime
import pytest

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.execution.options import OptionPlan, describe, plan_options, run_options, session_options
from sluice_server.execution.parameters import BadOption
from sluice_server.execution.threads import ThreadPlan

THREADS = ThreadPlan(instances=2, intra_op_threads=3, inter_op_threads=1)


def config(level: int = 0, **parameters: str) -> ModelConfig:
    result = ModelConfig(name="digits")
    result.optimization.graph.level = level
    for key, value in parameters.items():
        result.parameters[key].string_value = value
    return result


def plan(level: int = 0, parameters: dict[str, str] | None = None) -> OptionPlan:
    return plan_options(config(level, **(parameters or {})), THREADS)


def test_by_default_threads_are_the_plan_s_and_nothing_spins_or_logs() -> None:
    assert plan() == OptionPlan(
        model="digits",
        session={
            "intra_op_num_threads": 3,
            "inter_op_num_threads": 1,
            "graph_optimization_level": "ORT_ENABLE_ALL",
            "log_severity_level": 4,
        },
        session_entries={"session.intra_op.allow_spinning": "0", "session.inter_op.allow_spinning": "0"},
    )


def test_a_plan_becomes_session_options() -> None:
    options = session_options(plan(parameters={"execution_mode": "1", "enable_mem_arena": "0", "session.x": "y"}))
    assert options.intra_op_num_threads == 3
    assert options.execution_mode == onnxruntime.ExecutionMode.ORT_PARALLEL
    assert options.enable_cpu_mem_arena is False
    assert options.get_session_config_entry("session.x") == "y"
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@pytest.mark.parametrize(
    ("level", "name"),
    [(0, "ORT_ENABLE_ALL"), (-1, "ORT_ENABLE_BASIC"), (1, "ORT_ENABLE_EXTENDED"), (2, "ORT_DISABLE_ALL")],
)
def test_triton_s_graph_levels_are_mapped_to_onnx_runtime_s(level: int, name: str) -> None:
    made = session_options(plan(level))
    assert made.graph_optimization_level == getattr(onnxruntime.GraphOptimizationLevel, name)


def test_a_graph_level_that_does_not_exist_is_refused() -> None:
    with pytest.raises(BadOption, match=r"parameter 'optimization\.graph\.level' is '3'"):
        plan(3)


def test_the_graph_level_may_be_given_by_onnx_runtime_s_name_but_not_against_the_field() -> None:
    parameters = {"graph_optimization_level": "ORT_ENABLE_LAYOUT"}
    assert plan(parameters=parameters).session["graph_optimization_level"] == "ORT_ENABLE_LAYOUT"
    with pytest.raises(BadOption, match=r"ORT_ENABLE_EXTENDED as in optimization\.graph\.level, or only one"):
        plan(1, parameters)


@pytest.mark.parametrize(
    ("key", "value", "name", "set_to"),
    [
        ("enable_mem_arena", "0", "enable_cpu_mem_arena", False),
        ("enable_cpu_mem_arena", "false", "enable_cpu_mem_arena", False),
        ("enable_mem_pattern", "0", "enable_mem_pattern", False),
        ("enable_mem_reuse", "0", "enable_mem_reuse", False),
        ("enable_profiling", "true", "enable_profiling", True),
        ("execution_mode", "ORT_PARALLEL", "execution_mode", onnxruntime.ExecutionMode.ORT_PARALLEL),
        ("execution_order", "PRIORITY_BASED", "execution_order", onnxruntime.ExecutionOrder.PRIORITY_BASED),
        ("log_severity_level", "2", "log_severity_level", 2),
        ("log_verbosity_level", "7", "log_verbosity_level", 7),
        ("logid", "here", "logid", "here"),
        ("optimized_model_filepath", "/a/b.onnx", "optimized_model_filepath", "/a/b.onnx"),
        ("profile_file_prefix", "p_", "profile_file_prefix", "p_"),
        ("use_deterministic_compute", "1", "use_deterministic_compute", True),
        ("use_per_session_threads", "0", "use_per_session_threads", False),
    ],
)
def test_a_parameter_sets_the_attribute_of_session_options(key: str, value: str, name: str, set_to: object) -> None:
    assert getattr(session_options(plan(parameters={key: value})), name) == set_to


def test_every_attribute_of_this_onnx_runtime_s_session_options_can_be_set() -> None:
    made = onnxruntime.SessionOptions()
    attributes = {name for name in dir(made) if not name.startswith("_") and not callable(getattr(made, name))}
    examples = {
        "execution_mode": "0",
        "execution_order": "DEFAULT",
        "graph_optimization_level": "ORT_ENABLE_ALL",
    }
    for name in attributes:
        assert name in plan(parameters={name: examples.get(name, "1")}).session


@pytest.mark.parametrize(
    "key", ["session.disable_prepacking", "optimization.enable_gelu_approximation", "mlas.disable_kleidiai", "ep.x.y"]
)
def test_session_configuration_entries_pass_through(key: str) -> None:
    made = session_options(plan(parameters={key: "1"}))
    assert made.get_session_config_entry(key) == "1"


def test_any_session_entry_passes_with_its_prefix() -> None:
    assert plan(parameters={"ort.session.some.key": "v"}).session_entries["some.key"] == "v"


def test_spinning_can_be_turned_on() -> None:
    parameters = {"session.intra_op.allow_spinning": "true"}
    assert plan(parameters=parameters).session_entries["session.intra_op.allow_spinning"] == "1"


def test_run_options_pass_by_their_own_name_or_with_the_prefix() -> None:
    parameters = {
        "memory.enable_memory_arena_shrinkage": "cpu:0;gpu:1",
        "gpu_graph_id": "-1",
        "ort.run.some.key": "v",
        "ort.run.only_execute_path_to_fetches": "1",
        "ort.run.log_severity_level": "3",
    }
    made = run_options(plan(parameters=parameters))
    assert made.get_run_config_entry("memory.enable_memory_arena_shrinkage") == "cpu:0;gpu:1"
    assert made.get_run_config_entry("gpu_graph_id") == "-1"
    assert made.get_run_config_entry("some.key") == "v"
    assert made.only_execute_path_to_fetches is True
    assert made.log_severity_level == 3


def test_parameters_of_others_are_left_alone() -> None:
    assert plan(parameters={"my_own": "x", "client_note": "", "sessions": "3"}) == plan()


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("enable_mem_pattern", "2", "0, 1, true or false"),
        ("execution_mode", "2", "one of 0, 1, ORT_SEQUENTIAL, ORT_PARALLEL"),
        ("graph_optimization_level", "99", "one of ORT_DISABLE_ALL"),
        ("log_severity_level", "5", "a whole number from 0 to 4"),
        ("session.intra_op.allow_spinning", "maybe", "0, 1, true or false"),
        ("session." + "k" * 1024, "1", "a key of 1 to 1024 characters"),
        ("ort.session.", "1", "a key of 1 to 1024 characters"),
        ("ort.run.", "1", "a key of 1 to 1024 characters"),
        ("session.key", "v" * 8193, "a value of at most 8192 characters"),
        ("memory.enable_memory_arena_shrinkage", "tpu:0", "devices such as 'cpu:0'"),
        ("ort.run.terminate", "1", "no such parameter"),
    ],
)
def test_a_bad_value_is_refused_with_model_key_and_what_was_expected(key: str, value: str, expected: str) -> None:
    with pytest.raises(BadOption) as caught:
        plan(parameters={key: value})
    assert (caught.value.model, caught.value.key) == ("digits", key)
    assert expected in str(caught.value)


def test_two_values_for_one_entry_are_refused() -> None:
    with pytest.raises(BadOption, match="the same value wherever"):
        plan(parameters={"session.a": "1", "ort.session.session.a": "2"})


def test_an_option_that_this_onnx_runtime_lacks_is_refused_by_name() -> None:
    with pytest.raises(BadOption, match="parameter 'from_the_future' is '1', expected an option of ONNX Runtime"):
        session_options(OptionPlan("digits", session={"from_the_future": 1}))


def test_a_plan_is_told_in_words() -> None:
    parameters = {"enable_mem_arena": "0", "session.disable_prepacking": "1", "ort.run.logid": "r"}
    assert describe(plan(parameters=parameters)) == (
        "enable_cpu_mem_arena = off",
        "graph_optimization_level = ORT_ENABLE_ALL",
        "inter_op_num_threads = 1",
        "intra_op_num_threads = 3",
        "log_severity_level = 4",
        "waiting threads sleep instead of spinning",
        "session entry session.disable_prepacking = 1",
        "each run: logid = r",
    )


def test_spinning_is_told_where_it_is_on() -> None:
    lines = describe(plan(parameters={"session.intra_op.allow_spinning": "1"}))
    assert "session entry session.intra_op.allow_spinning = 1" in lines
    assert not [line for line in lines if "sleep" in line]
