"""The graph of an ensemble: its rules one by one, and any graph against evaluating it step by step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sluice_server.dataflow import Graph, GraphError, Progress, Step

BROKEN = [
    # steps (what each takes, what it makes), inputs, outputs, the error
    (["a:b", "a:b"], "a", "b", "'b' can appear in an output map only once, and is in those of step 0 and step 1"),
    (["a:bb"], "a", "b", "'b' can appear in an output map only once, and two outputs of step 0 are mapped to it"),
    (["a:b", "b:a"], "a", "b", "ensemble input 'a' is written by step 1"),
    (["a:b"], "az", "b", "ensemble input 'z' is not used by any step"),
    (["a:b"], "a", "bz", "ensemble output 'z' is not written by any step"),
    (["a:b", "bz:c"], "a", "c", "ensemble tensor 'z', input '1' of step 1, is not written by any step"),
    (["a:bz"], "a", "b", "ensemble tensor 'z', written by step 0, is unused"),
    (["ac:b", "b:c"], "a", "b", "steps 0, 1 wait for each other"),
    (["a:b", "bd:c", "c:d"], "a", "d", "steps 1, 2 wait for each other"),
    (["ab:b"], "a", "b", "step 0 waits for itself"),
    (["ad:b", "b:c", "c:d", "c:e"], "a", "e", "steps 0, 1, 2 wait for each other"),
]


def steps_of(texts: list[str]) -> list[Step]:
    """Steps from texts such as `ab:c`: takes the tensors a and b, makes c; a model's names are numbers."""
    maps = [[{str(n): tensor for n, tensor in enumerate(side)} for side in text.split(":")] for text in texts]
    return [Step(takes, makes) for takes, makes in maps]


@pytest.mark.parametrize(("texts", "inputs", "outputs", "error"), BROKEN)
def test_each_rule_of_a_graph_has_its_error(texts: list[str], inputs: str, outputs: str, error: str) -> None:
    with pytest.raises(GraphError) as caught:
        Graph(steps_of(texts), inputs, outputs)
    assert error in str(caught.value)


def test_a_plan_has_only_what_the_outputs_need() -> None:
    graph = Graph(steps_of(["a:bc", "b:d", "c:e", "e:f"]), "a", "df")
    whole = graph.plan("df")
    assert whole.outputs == {0: ("0", "1"), 1: ("0",), 2: ("0",), 3: ("0",)}
    assert (whole.first, whole.waits) == ((0,), {0: 0, 1: 1, 2: 1, 3: 1})
    part = graph.plan("d")
    assert part.outputs == {0: ("0",), 1: ("0",)}
    assert part.followers == {0: (1,), 1: ()}


def test_an_output_may_be_an_input_as_it_came() -> None:
    graph = Graph(steps_of(["a:b"]), "a", "ab")
    assert graph.plan("a").outputs == {}
    assert graph.plan("a").first == ()
    assert Progress(graph.plan("a")).is_over


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Step], list[str], list[str]]:
    """Any graph, its steps in any order."""
    inputs = [f"in{n}" for n in range(draw(st.integers(1, 3)))]
    known, steps = list(inputs), []
    for number in range(draw(st.integers(1, 6))):
        takes = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3))
        makes = [f"t{number}_{n}" for n in range(draw(st.integers(1, 3)))]
        steps.append(Step(dict(enumerate(takes)), {f"out{n}": name for n, name in enumerate(makes)}))  # type: ignore[arg-type]
        known += makes
    taken = {tensor for step in steps for tensor in step.takes.values()}
    unused = [name for name in known if name not in taken and name not in inputs]
    more = draw(st.lists(st.sampled_from([name for name in known if name in taken]), unique=True))
    outputs = list(dict.fromkeys([*unused, *more]))
    return draw(st.permutations(steps)), [name for name in inputs if name in taken], outputs


@given(graphs(), st.data())
def test_any_graph_computes_what_it_says_in_any_order_of_ends(
    drawn: tuple[list[Step], list[str], list[str]], data: st.DataObject
) -> None:
    steps, inputs, outputs = drawn
    graph = Graph(steps, inputs, outputs)
    wanted = data.draw(st.lists(st.sampled_from(outputs), min_size=1, unique=True))
    plan = graph.plan(wanted)
    progress = Progress(plan)
    tensors = {name: start_of(name) for name in inputs}
    ready, ran = list(plan.first), []
    while ready:
        number = ready.pop(data.draw(st.integers(0, len(ready) - 1)))
        ran.append(number)
        for name, value in apply(steps[number], tensors).items():
            if name in plan.outputs[number]:
                tensors[steps[number].makes[name]] = value
        ready += progress.done(number)
    assert progress.is_over
    assert sorted(ran) == sorted(plan.outputs)
    for name in wanted:
        np.testing.assert_array_equal(tensors[name], evaluate(name, steps, inputs))
    # Nothing runs that no wanted output needs.
    assert set(ran) == needed(wanted, steps)


def start_of(tensor: str) -> np.ndarray:
    """An input: whole numbers, which add up the same in any order; they wrap around."""
    return np.array([len(tensor), ord(tensor[-1]), 1], np.uint64)


def apply(step: Step, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a step's model computes: of each output another mixture of the inputs."""
    values = [tensors[name] * np.uint64(2 * place + 3) for place, name in enumerate(step.takes.values())]
    return {name: np.sum(values, axis=0) + np.uint64(place) for place, name in enumerate(step.makes)}


def evaluate(tensor: str, steps: list[Step], inputs: list[str]) -> np.ndarray:
    """The value of a tensor, from the inputs on, without any plan."""
    if tensor in inputs:
        return start_of(tensor)
    for step in steps:
        for name, made in step.makes.items():
            if made == tensor:
                return apply(step, {taken: evaluate(taken, steps, inputs) for taken in step.takes.values()})[name]
    raise AssertionError(f"nobody makes {tensor}")


def needed(tensors: list[str], steps: list[Step]) -> set[int]:
    found: set[int] = set()
    for tensor in tensors:
        for number, step in enumerate(steps):
            if tensor in step.makes.values():
                found |= {number} | needed(list(step.takes.values()), steps)
    return found
