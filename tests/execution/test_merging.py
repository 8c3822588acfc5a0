"""Whether requests share batches, by `dynamic_batching` and the parameter `merge_requests`."""

import pytest

from sluice_server.execution.merging import merges
from sluice_server.execution.parameters import BadOption
from sluice_server.repository.autocomplete import normalize
from sluice_server.repository.config import parse_text

BATCHES = "max_batch_size: 8 dynamic_batching { }"


def merged(text: str, merge_requests: str | None = None) -> bool:
    """By a configuration with its defaults, as a model has it."""
    if merge_requests is not None:
        text += f' parameters {{ key: "merge_requests" value {{ string_value: "{merge_requests}" }} }}'
    return merges(normalize(parse_text(text, "config.pbtxt"), name="m"))


@pytest.mark.parametrize(
    ("text", "merge_requests", "expected"),
    [
        (BATCHES, None, True),
        (BATCHES, "true", True),
        (BATCHES, "false", False),
        ("max_batch_size: 8", None, False),
        ("max_batch_size: 8", "false", False),
        ("max_batch_size: 1 dynamic_batching { }", None, False),
        ("dynamic_batching { }", "false", False),
        ("max_batch_size: 8 dynamic_batching { default_queue_policy { max_queue_size: 3 } }", "0", False),
    ],
)
def test_requests_are_merged_by_dynamic_batching_unless_the_parameter_says_otherwise(text, merge_requests, expected):
    assert merged(text, merge_requests) is expected


@pytest.mark.parametrize(
    ("text", "merge_requests", "expected"),
    [
        ("max_batch_size: 8", "true", "false, as max_batch_size is 0 or 1, or dynamic_batching is missing"),
        (BATCHES, "perhaps", "0, 1, true or false"),
        (
            "max_batch_size: 8 dynamic_batching { max_queue_delay_microseconds: 5 }",
            "false",
            "true, as max_queue_delay_microseconds waits for requests",
        ),
        (
            "max_batch_size: 8 dynamic_batching { preferred_batch_size: [ 4, 8 ] }",
            "false",
            "true, as preferred_batch_size is of merged requests",
        ),
        (
            f'{BATCHES} input {{ name: "X" data_type: TYPE_FP32 dims: -1 allow_ragged_batch: true }}',
            "false",
            "true, as ragged batches are of merged requests",
        ),
        (
            "max_batch_size: 8 sequence_batching { oldest { max_candidate_sequences: 4 } }",
            "false",
            "no value, as sequences are not batched by it",
        ),
    ],
)
def test_what_would_have_no_effect_is_refused(text, merge_requests, expected):
    with pytest.raises(BadOption) as caught:
        merged(text, merge_requests)
    assert str(caught.value) == f"model 'm': parameter 'merge_requests' is '{merge_requests}', expected {expected}"
