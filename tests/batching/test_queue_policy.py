"""What a queue's settings refuse, and the names that the package offers."""

import inspect
import pkgutil
from dataclasses import FrozenInstanceError
from importlib import import_module
from typing import Any

import pytest

import sluice_batching
from sluice_batching import QueuePolicy


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"max_batch_rows": 4, "merge_rows": 5}, r"merge_rows must lie in 0\.\.4, got 5"),
        ({"max_batch_rows": 4, "merge_rows": -1}, r"merge_rows must lie in 0\.\.4, got -1"),
        ({"max_batch_rows": 0}, "max_batch_rows must be at least 1, got 0"),
        (
            {"max_batch_rows": 4, "merge_rows": 2, "preferred_batch_rows": (3,)},
            r"preferred_batch_rows must lie in 1\.\.2, got 3",
        ),
        ({"max_delay_ns": -1}, "max_delay_ns must not be negative, got -1"),
        ({"max_queue_rows": -1}, "max_queue_rows must not be negative, got -1"),
        ({"max_queue_bytes": -1}, "max_queue_bytes must not be negative, got -1"),
        ({"max_batch_rows": 4, "preferred_batch_rows": (2, 5)}, r"preferred_batch_rows must lie in 1\.\.4, got 5"),
        ({"max_batch_rows": 4, "preferred_batch_rows": (0,)}, r"preferred_batch_rows must lie in 1\.\.4, got 0"),
        ({"max_delay_ns": 5, "batching": False}, "only with batching"),
        ({"max_batch_rows": 4, "preferred_batch_rows": (2,), "batching": False}, "only with batching"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        QueuePolicy(**{"batching": True, **fields})


def test_settings_cannot_change_once_built() -> None:
    policy = QueuePolicy(batching=True, max_batch_rows=8)
    with pytest.raises(FrozenInstanceError):
        policy.max_batch_rows = 16  # type: ignore[misc]


def test_the_package_lists_every_public_class_in_order() -> None:
    modules = [
        import_module(f"sluice_batching.{module.name}") for module in pkgutil.iter_modules(sluice_batching.__path__)
    ]
    classes = {
        name
        for module in modules
        for name, thing in vars(module).items()
        if inspect.isclass(thing) and thing.__module__ == module.__name__ and not name.startswith("_")
    }
    constants = {"NEVER_QUEUED", "NO_DEADLINE"}
    assert set(sluice_batching.__all__) == classes | constants
    assert sluice_batching.__all__ == sorted(constants) + sorted(classes)
