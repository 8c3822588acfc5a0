"""Every field of ModelConfig is implemented or refused by name; none is silently accepted."""

from collections.abc import Iterator

import pytest
from google.protobuf.descriptor import Descriptor

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.repository.autocomplete import normalize
from sluice_server.repository.config import parse_text
from sluice_server.repository.errors import ConfigError
from sluice_server.repository.fields import IMPLEMENTED, REFUSED


def all_paths(descriptor: Descriptor, prefix: str = "") -> Iterator[str]:
    """Every path of field names that has to stand in a table: nothing below a refused one."""
    for field in descriptor.fields:
        path = f"{prefix}{field.name}"
        yield path
        message = field.message_type
        if path in REFUSED or message is None:
            continue
        if message.GetOptions().map_entry:
            message = message.fields_by_name["value"].message_type
        if message is not None:
            yield from all_paths(message, f"{path}.")


def test_every_field_stands_in_exactly_one_table() -> None:
    paths = set(all_paths(ModelConfig.DESCRIPTOR))
    assert paths == IMPLEMENTED | REFUSED
    assert not IMPLEMENTED & REFUSED


REFUSALS = [
    ("sequence_batching { iterative_sequence: true }", "sequence_batching.iterative_sequence"),
    (
        "sequence_batching { state {} state { use_same_buffer_for_input_output: true } }",
        "sequence_batching.state[1].use_same_buffer_for_input_output",
    ),
    ("sequence_batching { state { use_growable_memory: true } }", "sequence_batching.state[0].use_growable_memory"),
    (
        'ensemble_scheduling { step {} step { model_namespace: "a" } }',
        "ensemble_scheduling.step[1].model_namespace",
    ),
    ("input {} input { is_shape_tensor: true }", "input[1].is_shape_tensor"),
    ("input { is_non_linear_format_io: true }", "input[0].is_non_linear_format_io"),
    ("output { is_shape_tensor: true }", "output[0].is_shape_tensor"),
    ("output { is_non_linear_format_io: true }", "output[0].is_non_linear_format_io"),
    ('instance_group { profile: "0" }', "instance_group[0].profile[0]"),
    ("instance_group { passive: true }", "instance_group[0].passive"),
    ("instance_group { secondary_devices { device_id: 1 } }", "instance_group[0].secondary_devices[0]"),
    ('instance_group { host_policy: "a" }', "instance_group[0].host_policy"),
    ("instance_group { kind: KIND_MODEL }", "instance_group[0].kind KIND_MODEL"),
    ("optimization { priority: PRIORITY_MAX }", "optimization.priority"),
    ("optimization { cuda { graphs: true } }", "optimization.cuda.graphs"),
    ("optimization { gather_kernel_buffer_threshold: 1 }", "optimization.gather_kernel_buffer_threshold"),
    ("optimization { eager_batching: true }", "optimization.eager_batching"),
    ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled"),
    ('model_operations { op_library_filename: "a.so" }', "model_operations.op_library_filename[0]"),
    ('model_repository_agents { agents { name: "a" } }', "model_repository_agents.agents[0]"),
    ('cc_model_filenames { key: "7.5" value: "a" }', 'cc_model_filenames["7.5"]'),
    ('metric_tags { key: "a" value: "b" }', 'metric_tags["a"]'),
    ("model_metrics { metric_control {} }", "model_metrics.metric_control[0]"),
    ('runtime: "a"', "runtime"),
]


@pytest.mark.parametrize(("text", "field"), REFUSALS)
def test_a_field_that_is_not_implemented_is_refused_by_name(text: str, field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        normalize(parse_text(text, "config.pbtxt"), name="m")
    assert str(caught.value) == f"model 'm': {field} is not implemented in this version"
    assert caught.value.model == "m"


def test_every_refused_field_has_a_case_above() -> None:
    shown = [field.split("[")[0] for _, field in REFUSALS]
    assert all(any(is_at_or_below(field, path) for field in without_indices()) for path in REFUSED), shown


def without_indices() -> list[str]:
    return ["".join(part.split("[")[0] + "." for part in field.split(".")).rstrip(".") for _, field in REFUSALS]


def is_at_or_below(field: str, path: str) -> bool:
    return field == path or field.startswith(f"{path}.")


@pytest.mark.parametrize(
    "text",
    [
        "response_cache { enable: false }",
        "model_transaction_policy { decoupled: false }",
        "instance_group { passive: false }",
        "optimization { priority: PRIORITY_DEFAULT cuda { graphs: false } eager_batching: false }",
        'runtime: ""',
    ],
)
def test_a_refused_field_at_its_default_has_no_effect_and_is_let_through(text: str) -> None:
    written = parse_text(text, "config.pbtxt")
    assert normalize(written, name="m").name == "m"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("input { data_type: 99 }", "input[0].data_type"),
        ("input { format: 7 }", "input[0].format"),
        ("instance_group { kind: 9 }", "instance_group[0].kind"),
    ],
)
def test_an_enum_number_without_a_name_is_refused(text: str, field: str) -> None:
    with pytest.raises(ConfigError, match="expected one of") as caught:
        normalize(parse_text(text, "config.pbtxt"), name="m")
    assert caught.value.field == field
