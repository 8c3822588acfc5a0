"""Which ensembles are made of which models, and which version of a model a step gets. Pure: names and states only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from sluice_server.repository.errors import ModelLoadError

M = TypeVar("M")


class MissingPart(ModelLoadError):
    """A model that an ensemble needs is not served. `is_wanted`: because somebody has unloaded it, not by a fault."""

    def __init__(self, message: str, *, model: str, is_wanted: bool) -> None:
        super().__init__(message, model=model)
        self.is_wanted = is_wanted


@dataclass(frozen=True, slots=True)
class PartState(Generic[M]):
    """What is served of one model, by its versions; where that is nothing, why, and whether that is wanted."""

    served: Mapping[int, M]
    reason: str = "it was not loaded, or is in no model repository"
    is_wanted: bool = False

    def choose(self, ensemble: str, part: str, version: int | None) -> M:
        """The version that a step of an ensemble names, None for the latest; MissingPart when it is not served."""
        depends = f"ensemble '{ensemble}' depends on '{part}'"
        if not self.served:
            raise MissingPart(
                f"{depends} which has no loaded version: {self.reason}", model=ensemble, is_wanted=self.is_wanted
            )
        if version is None:
            return self.served[max(self.served)]
        if version not in self.served:
            numbers = ", ".join(map(str, sorted(self.served)))
            raise MissingPart(
                f"{depends} whose required version {version} is not loaded: it has {numbers}",
                model=ensemble,
                is_wanted=False,
            )
        return self.served[version]


@dataclass(slots=True)
class Dependencies:
    """The parts of each ensemble, as it was last loaded. Not thread-safe."""

    parts: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def dependents(self, name: str) -> list[str]:
        """The ensembles that a model is a part of, through others too, each behind its own parts."""
        found = {name}
        grown = True
        while grown:
            grown = False
            for ensemble, parts in self.parts.items():
                if ensemble not in found and found & set(parts):
                    found.add(ensemble)
                    grown = True
        found.remove(name)
        return [each for each in load_order(found, lambda each: self.parts.get(each, ())) if each in found]

    def check_cycle(self, name: str, parts: Iterable[str]) -> None:
        """Raise ModelLoadError when an ensemble of these parts would be a part of itself."""
        waiting: list[tuple[str, tuple[str, ...]]] = [(part, (name, part)) for part in parts]
        seen: set[str] = set()
        while waiting:
            part, path = waiting.pop()
            if part == name:
                raise ModelLoadError(f"ensemble '{name}' contains itself: {' -> '.join(path)}", model=name)
            if part not in seen:
                seen.add(part)
                waiting += [(below, (*path, below)) for below in self.parts.get(part, ())]


def load_order(names: Iterable[str], parts_of: Callable[[str], Iterable[str]]) -> list[str]:
    """Names and all parts of them, each behind its own parts; whoever is a part of itself stands anywhere."""
    order: dict[str, None] = {}
    for name in sorted(names):
        # By hand, as a chain of ensembles may be longer than Python's stack.
        stack = [(name, iter(sorted(parts_of(name))))]
        entered = {name}
        while stack:
            current, below = stack[-1]
            part = next((each for each in below if each not in order and each not in entered), None)
            if part is None:
                order[current] = None
                stack.pop()
            else:
                entered.add(part)
                stack.append((part, iter(sorted(parts_of(part)))))
    return list(order)
