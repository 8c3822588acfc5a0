"""What has changed in the model repositories from look to look, told once it has settled. Pure.

A model that is new, changed or gone counts once two looks in a row have found the same of it, so that what is being
copied is left alone. It is told once, and again only when it has changed again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping


@dataclass(frozen=True, slots=True)
class Changes:
    """The names of models that are there no more, and of those that are new or have changed."""

    gone: frozenset[str] = frozenset()
    changed: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.gone or self.changed)


class ChangeDetector:
    """Compares looks; each is the models by name, with a fingerprint of what each is on disk."""

    def __init__(self, found: Mapping[str, Hashable]) -> None:
        """`found` is the first look, of which nothing is told."""
        self._last = found
        self._told = dict(found)

    def look(self, found: Mapping[str, Hashable]) -> Changes:
        """What has settled with this look."""
        names = {*self._told, *found}
        settled = {name for name in names if found.get(name) == self._last.get(name)}
        changed = {name for name in settled if found.get(name) != self._told.get(name)}
        self._last = found
        gone = changed - found.keys()
        for name in gone:
            del self._told[name]
        self._told |= {name: found[name] for name in changed - gone}
        return Changes(frozenset(gone), frozenset(changed - gone))
