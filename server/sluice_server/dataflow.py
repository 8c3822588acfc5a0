"""The graph of an ensemble: who makes which tensor, which steps a request needs, in which order. Pure: names only.

A tensor is a name that the ensemble knows: one of its inputs, one of its outputs, or what one step gives to another.
A step has a map from its model's inputs to the tensors that it takes, and one from its model's outputs to those that
it makes. A graph that was built keeps these rules, which are Triton's:

* a tensor is made once: it is an input, or the output of exactly one step;
* every input is taken by a step, every output and every tensor that a step takes is made, and what nobody takes and is
  no output is not made;
* no step waits for itself, directly or through others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass


class GraphError(ValueError):
    """A graph that breaks a rule; the text says which, for which tensor or step (counted from 0)."""


@dataclass(frozen=True, slots=True)
class Step:
    """One step: `takes` and `makes` lead from the names of its model to tensors."""

    takes: Mapping[str, str]
    makes: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done for some outputs: only the steps that they need, by their numbers."""

    outputs: Mapping[int, tuple[str, ...]]
    """The model's outputs to ask each step for: those that somebody needs. Its keys are the steps, in an order in which
    they could run one after the other."""
    first: tuple[int, ...]
    """The steps that can begin at once."""
    waits: Mapping[int, int]
    """How many other steps each step waits for."""
    followers: Mapping[int, tuple[int, ...]]
    """Who waits for each step."""


class Graph:
    """A checked graph; it never changes."""

    __slots__ = ("_inputs", "_makers", "order", "steps")

    def __init__(self, steps: Sequence[Step], inputs: Collection[str], outputs: Collection[str]) -> None:
        """Raise GraphError for the first rule that is broken."""
        self.steps = tuple(steps)
        self._inputs = frozenset(inputs)
        self._makers = _makers(steps, self._inputs)
        taken = Counter(tensor for step in steps for tensor in step.takes.values())
        for name in inputs:
            if name not in taken:
                raise GraphError(f"ensemble input '{name}' is not used by any step")
        for name in outputs:
            if name not in self._makers and name not in self._inputs:
                raise GraphError(f"ensemble output '{name}' is not written by any step")
        for number, step in enumerate(steps):
            for name, tensor in step.takes.items():
                if tensor not in self._makers and tensor not in self._inputs:
                    raise GraphError(
                        f"ensemble tensor '{tensor}', input '{name}' of step {number}, is not written by any step"
                    )
        for tensor, number in self._makers.items():
            if tensor not in taken and tensor not in outputs:
                raise GraphError(f"ensemble tensor '{tensor}', written by step {number}, is unused")
        self.order = self._sorted()
        """The numbers of all steps, each after those that it waits for."""

    def plan(self, outputs: Collection[str]) -> Plan:
        """The part of the graph that some of its outputs need."""
        wanted = set(outputs)
        needed: dict[int, tuple[str, ...]] = {}
        for number in reversed(self.order):
            step = self.steps[number]
            names = tuple(name for name, tensor in step.makes.items() if tensor in wanted)
            if names:
                needed[number] = names
                wanted.update(step.takes.values())
        needed = dict(reversed(needed.items()))
        before = {number: self._waits_for(number) for number in needed}
        return Plan(
            outputs=needed,
            first=tuple(number for number in needed if not before[number]),
            waits={number: len(others) for number, others in before.items()},
            followers={
                number: tuple(other for other, others in before.items() if number in others) for number in needed
            },
        )

    def _waits_for(self, number: int) -> set[int]:
        return {self._makers[tensor] for tensor in self.steps[number].takes.values() if tensor in self._makers}

    def _sorted(self) -> tuple[int, ...]:
        order: list[int] = []
        left = {number: self._waits_for(number) for number in range(len(self.steps))}
        while left:
            ready = [number for number, others in left.items() if not others & left.keys()]
            if not ready:
                circle = sorted(_circle(left))
                if len(circle) == 1:
                    raise GraphError(f"step {circle[0]} waits for itself")
                raise GraphError(f"steps {', '.join(map(str, circle))} wait for each other")
            order += ready
            for number in ready:
                del left[number]
        return tuple(order)


def _makers(steps: Sequence[Step], inputs: Collection[str]) -> dict[str, int]:
    """Which step makes each tensor."""
    makers: dict[str, int] = {}
    for number, step in enumerate(steps):
        for tensor in step.makes.values():
            if tensor in makers:
                raise GraphError(
                    f"ensemble tensor '{tensor}' can appear in an output map only once, and is in those of step"
                    f" {makers[tensor]} and step {number}"
                    if makers[tensor] != number
                    else f"ensemble tensor '{tensor}' can appear in an output map only once, and two outputs of step"
                    f" {number} are mapped to it"
                )
            if tensor in inputs:
                raise GraphError(f"ensemble input '{tensor}' is written by step {number}")
            makers[tensor] = number
    return makers


def _circle(waits_for: Mapping[int, set[int]]) -> set[int]:
    """The steps of one circle among steps that all wait for another of them."""
    path = [next(iter(waits_for))]
    while path[-1] not in path[:-1]:
        path.append(min(waits_for[path[-1]] & waits_for.keys()))
    return set(path[path.index(path[-1]) :])


class Progress:
    """How far one request has come through a plan. Not thread-safe.

    Every step of the plan becomes ready once, when all steps that it waits for are done; `is_over` when all are done.
    """

    __slots__ = ("_left", "_plan", "_waits")

    def __init__(self, plan: Plan) -> None:
        """The steps in `plan.first` are ready."""
        self._plan = plan
        self._waits = dict(plan.waits)
        self._left = len(plan.waits)

    @property
    def is_over(self) -> bool:
        """Whether every step is done."""
        return not self._left

    def done(self, number: int) -> list[int]:
        """A step is done: gives the steps that are ready by that."""
        self._left -= 1
        ready = []
        for follower in self._plan.followers[number]:
            self._waits[follower] -= 1
            if not self._waits[follower]:
                ready.append(follower)
        return ready
