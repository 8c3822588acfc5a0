"""Managers over fake loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from manager_fakes import FakeLoader, World

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def make_world(repository: Path) -> Callable[..., World]:
    """Make a manager over the test's repository; options are ModelManager's, `loader` is a FakeLoader."""

    def make(loader: FakeLoader | None = None, **options: Any) -> World:
        return World(repository, loader or FakeLoader(), **options)

    return make


@pytest.fixture
def world(make_world: Callable[..., World]) -> World:
    """One in explicit mode that has started with no model."""
    world = make_world()
    world.start()
    return world
