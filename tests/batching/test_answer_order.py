"""Answers leave in the order in which their requests came: against a naive model, and the cases that decide."""

from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sluice_batching import AnswerOrder, QueueFull


@dataclass
class Place:
    """One key in a plain list, with its answer."""

    key: int
    answer: str | None = None


class AnswerOrderAgainstModel(RuleBasedStateMachine):
    """Every call goes to both; each key leaves once, and answers by rising keys."""

    def __init__(self) -> None:
        super().__init__()
        self.order: AnswerOrder[int, str] = AnswerOrder(max_held=3, max_bytes=8)
        self.places: list[Place] = []
        self.came = 0
        self.left: list[int] = []
        self.answered: list[int] = []

    def any_key(self, data: st.DataObject) -> int:
        return data.draw(st.integers(0, self.came))

    @rule(count=st.integers(0, 3))
    def enter(self, count: int) -> None:
        keys = range(self.came, self.came + count)
        self.came += count
        self.order.enter(keys)
        self.places += [Place(key) for key in keys]

    @rule(data=st.data(), answer=st.text("ab", max_size=4))
    def put(self, data: st.DataObject, answer: str) -> None:
        key = self.any_key(data)
        place = next((place for place in self.places if place.key == key), None)
        assert self.order.put(key, answer, len(answer)) is (place is not None)
        if place is not None and place.answer is None:
            place.answer = answer

    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        key = self.any_key(data)
        self.order.leave([key])
        self.left += [place.key for place in self.places if place.key == key]
        self.places = [place for place in self.places if place.key != key]

    @precondition(lambda self: self.places)
    @rule()
    def pop(self) -> None:
        first = self.places[0]
        if first.answer is None:
            assert self.order.pop() is None
            return
        assert self.order.pop() == (first.key, first.answer)
        self.places.pop(0)
        self.answered.append(first.key)

    @invariant()
    def both_know_the_same(self) -> None:
        held = [place.answer for place in self.places if place.answer is not None]
        size_bytes = sum(map(len, held))
        assert len(self.order) == len(self.places)
        assert repr(self.order) == (
            f"<AnswerOrder: {len(self.places)} places, {len(held)} answers of {size_bytes} bytes held>"
        )
        full = self.order.overflow()
        assert (full is not None) is (len(held) >= 3 or size_bytes >= 8)
        assert self.answered == sorted(self.answered)

    def teardown(self) -> None:
        remaining = [place.key for place in self.places]
        assert sorted([*self.left, *self.answered, *remaining]) == list(range(self.came))


TestAnswerOrderAgainstModel = AnswerOrderAgainstModel.TestCase
TestAnswerOrderAgainstModel.settings = settings(max_examples=150, stateful_step_count=40)


def popped(order: AnswerOrder[str, str]) -> list[tuple[str, str]]:
    return list(iter(order.pop, None))


def test_an_answer_waits_for_all_before_it():
    order: AnswerOrder[str, str] = AnswerOrder()
    order.enter(["first", "second", "third"])
    assert order.put("third", "3")
    assert order.put("second", "2")
    assert popped(order) == []
    assert order.put("first", "1")
    assert popped(order) == [("first", "1"), ("second", "2"), ("third", "3")]


def test_who_leaves_holds_up_nobody():
    order: AnswerOrder[str, str] = AnswerOrder()
    order.enter(["first", "second", "third"])
    order.put("second", "2")
    order.leave(["first"])
    assert popped(order) == [("second", "2")]
    assert not order.put("first", "too late")


def test_what_never_entered_has_nothing_to_wait_for():
    order: AnswerOrder[str, str] = AnswerOrder()
    order.enter(["first"])
    assert not order.put("stranger", "answer")
    order.leave(["stranger"])
    assert len(order) == 1


def test_the_first_of_two_answers_counts():
    order: AnswerOrder[str, str] = AnswerOrder()
    order.enter(["first", "second"])
    assert order.put("second", "answer", 5)
    assert order.put("second", "failure", 7)
    order.leave(["first"])
    assert popped(order) == [("second", "answer")]


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        ({"max_held": 2}, "the queue is full: 2 of 2 answers are waiting"),
        ({"max_bytes": 100}, "the queue is full: 120 of 100 bytes of answers are waiting"),
    ],
)
def test_so_much_is_held_before_nothing_more_enters(limits: dict[str, int], text: str):
    order: AnswerOrder[int, str] = AnswerOrder(**limits)
    order.enter([1, 2, 3])
    order.put(2, "answer", 60)
    assert order.overflow() is None
    order.put(3, "answer", 60)
    full = order.overflow()
    assert isinstance(full, QueueFull)
    assert str(full) == text
    order.put(1, "answer")
    while order.pop():
        pass
    assert order.overflow() is None
    assert repr(order) == "<AnswerOrder: 0 places, 0 answers of 0 bytes held>"


def test_leaving_takes_the_answer_along():
    order: AnswerOrder[int, str] = AnswerOrder(max_held=1)
    order.enter([1, 2])
    order.put(2, "answer", 60)
    order.leave([2])
    assert order.overflow() is None
    assert len(order) == 1
