"""What a configuration says of priorities and queue policies: read in Triton's terms, refused if without effect."""

import pytest

from sluice_batching import LevelPolicy, Priorities
from sluice_server.execution.priorities import priorities_of
from sluice_server.repository.config import parse_text
from sluice_server.repository.errors import ConfigError
from sluice_server.repository.validate import MAX_TIMEOUT_US, check_config

MS = 1_000_000


def of(scheduler: str) -> Priorities | None:
    config = parse_text(f"dynamic_batching {{ {scheduler} }}", "")
    check_config(config, "m")
    return priorities_of(config)


def test_levels_and_policies_are_read_as_they_are_written() -> None:
    assert of(
        """priority_levels: 3 default_priority_level: 2
        default_queue_policy { max_queue_size: 7 }
        priority_queue_policy { key: 1 value { default_timeout_microseconds: 5000 allow_timeout_override: true } }
        priority_queue_policy { key: 3 value { default_timeout_microseconds: 9000 timeout_action: DELAY } }"""
    ) == Priorities(
        levels=3,
        default_level=2,
        default_policy=LevelPolicy(max_requests=7),
        policies={
            1: LevelPolicy(timeout_ns=5 * MS, allow_timeout_override=True),
            3: LevelPolicy(timeout_ns=9 * MS, delays=True),
        },
    )


def test_a_policy_needs_no_levels() -> None:
    assert of("default_queue_policy { max_queue_size: 7 }") == Priorities(default_policy=LevelPolicy(max_requests=7))


def test_an_order_that_is_preserved_goes_with_one_level_and_timeouts_that_reject() -> None:
    priorities = of(
        """preserve_ordering: true priority_levels: 1 default_priority_level: 1
        default_queue_policy { default_timeout_microseconds: 5000 }
        priority_queue_policy { key: 1 value { timeout_action: DELAY } }"""
    )
    assert priorities is not None
    assert priorities.default_policy == LevelPolicy(timeout_ns=5 * MS)


def test_without_either_there_are_no_priorities() -> None:
    assert of("preferred_batch_size: []") is None


@pytest.mark.parametrize(
    ("scheduler", "field", "complaint"),
    [
        ("priority_levels: 2", "default_priority_level", "is 0, expected 1 to priority_levels, which is 2"),
        (
            "priority_levels: 2 default_priority_level: 3",
            "default_priority_level",
            "is 3, expected 1 to priority_levels, which is 2",
        ),
        ("default_priority_level: 1", "default_priority_level", "is 1, and there are no levels: set priority_levels"),
        (
            "priority_levels: 2 default_priority_level: 1 priority_queue_policy { key: 3 value {} }",
            'priority_queue_policy["3"]',
            "is of level 3, expected 1 to priority_levels, which is 2",
        ),
        (
            "priority_queue_policy { key: 1 value {} }",
            'priority_queue_policy["1"]',
            "is of level 1, and there are no levels: set priority_levels",
        ),
        (
            f"default_queue_policy {{ default_timeout_microseconds: {MAX_TIMEOUT_US + 1} }}",
            "default_queue_policy.default_timeout_microseconds",
            f"is {MAX_TIMEOUT_US + 1}, expected {MAX_TIMEOUT_US} at most",
        ),
        (
            "preserve_ordering: true priority_levels: 2 default_priority_level: 1",
            "priority_levels",
            "is 2, expected 1 at most, as preserve_ordering is true: priorities put requests before others",
        ),
        (
            "preserve_ordering: true default_queue_policy { default_timeout_microseconds: 1 timeout_action: DELAY }",
            "default_queue_policy.timeout_action",
            "DELAY puts requests behind others, which preserve_ordering rules out",
        ),
        (
            "preserve_ordering: true priority_levels: 1 default_priority_level: 1 priority_queue_policy"
            " { key: 1 value { default_timeout_microseconds: 1 timeout_action: DELAY } }",
            'priority_queue_policy["1"].timeout_action',
            "DELAY puts requests behind others, which preserve_ordering rules out",
        ),
    ],
)
def test_what_could_have_no_effect_is_refused_by_name(scheduler: str, field: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        of(scheduler)
    assert str(caught.value) == f"model 'm': dynamic_batching.{field} {complaint}"
    assert caught.value.field == f"dynamic_batching.{field}"
