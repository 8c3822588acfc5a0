"""Who runs for whom: the coalescer against a naive model, and the cases that decide whether anybody is forgotten."""

from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sluice_batching import Coalescer


@dataclass
class NaiveFlight:
    """Everybody who is in it, the leader first, and who of them still wants the result."""

    members: list[str] = field(default_factory=list)
    leader_wants: bool = True


class CoalescerAgainstModel(RuleBasedStateMachine):
    """Every call goes to both; every request leaves exactly once."""

    def __init__(self) -> None:
        super().__init__()
        self.coalescer: Coalescer[str] = Coalescer()
        self.flights: dict[str, NaiveFlight] = {}
        self.came: list[str] = []
        self.left: list[str] = []

    def new(self) -> str:
        self.came.append(f"request {len(self.came)}")
        return self.came[-1]

    @rule(key=st.sampled_from("abc"))
    def come(self, key: str) -> None:
        request = self.new()
        if key in self.flights:
            self.coalescer.follow(key, request)
            self.flights[key].members.append(request)
        else:
            self.coalescer.lead([key], [request])
            self.flights[key] = NaiveFlight([request])

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.flights)))
        flight = self.flights[key]
        request = data.draw(st.sampled_from(flight.members))
        if request == flight.members[0]:
            flight.leader_wants = False
        else:
            flight.members.remove(request)
            self.left.append(request)
        assert self.coalescer.leave(key, request) is (not flight.leader_wants and len(flight.members) == 1)

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.flights)))
        flight = self.flights[key]
        self.left.append(flight.members.pop(0))
        flight.leader_wants = True
        first = flight.members[0] if flight.members else None
        assert self.coalescer.promote(key) == first
        if first is None:
            del self.flights[key]

    @precondition(lambda self: self.flights)
    @rule(data=st.data())
    def land(self, data: st.DataObject) -> None:
        keys = data.draw(st.lists(st.sampled_from(sorted(self.flights)), unique=True))
        members = [self.flights.pop(key).members for key in keys]
        assert self.coalescer.land(keys) == [follower for flight in members for follower in flight[1:]]
        self.left += [each for flight in members for each in flight]

    @invariant()
    def both_know_the_same(self) -> None:
        assert len(self.coalescer) == len(self.flights)
        for key in "abc":
            leader = self.flights[key].members[0] if key in self.flights else None
            assert self.coalescer.leader(key) == leader
            assert self.coalescer.has_none_of([key]) is (leader is None)
        assert self.coalescer.has_followers is any(len(flight.members) > 1 for flight in self.flights.values())

    @invariant()
    def memory_is_bounded_by_what_is_in_flight(self) -> None:
        kept = self.coalescer._followers
        assert {key: list(requests) for key, requests in kept.items()} == {
            key: flight.members[1:] for key, flight in self.flights.items() if len(flight.members) > 1
        }
        assert self.coalescer._unwanted == {key for key, flight in self.flights.items() if not flight.leader_wants}

    def teardown(self) -> None:
        for key in list(self.flights):
            self.left += [self.flights.pop(key).members[0], *self.coalescer.land([key])]
        assert sorted(self.left) == sorted(self.came)


TestCoalescerAgainstModel = CoalescerAgainstModel.TestCase
TestCoalescerAgainstModel.settings = settings(max_examples=150, stateful_step_count=40)


def test_the_work_of_a_leader_that_leaves_goes_on_while_anybody_waits():
    coalescer: Coalescer[str] = Coalescer()
    coalescer.lead(["key"], ["leader"])
    coalescer.follow("key", "follower")
    assert coalescer.leave("key", "leader") is False
    assert coalescer.leave("key", "follower") is True
    assert coalescer.leader("key") == "leader"
    coalescer.follow("key", "late follower")
    assert coalescer.leave("key", "leader") is False
    assert coalescer.land(["key"]) == ["late follower"]


def test_leaving_what_one_is_not_in_changes_nothing():
    coalescer: Coalescer[str] = Coalescer()
    assert coalescer.leave("key", "stranger") is False
    coalescer.lead(["key"], ["leader"])
    coalescer.follow("key", "follower")
    assert coalescer.leave("key", "stranger") is False
    assert repr(coalescer) == "<Coalescer: 1 flights, 1 followers>"


def test_the_first_follower_leads_the_others_on():
    coalescer: Coalescer[str] = Coalescer()
    coalescer.lead(["key"], ["leader"])
    for follower in ("first", "second"):
        coalescer.follow("key", follower)
    coalescer.leave("key", "leader")
    assert coalescer.promote("key") == "first"
    assert coalescer.leave("key", "second") is False
    assert coalescer.land(["key"]) == []
    assert coalescer.promote("key") is None


def test_a_flight_that_is_not_there_cannot_land():
    with pytest.raises(KeyError):
        Coalescer[str]().land(["key"])
