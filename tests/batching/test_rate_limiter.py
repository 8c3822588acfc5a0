"""Which claims run when resources are few: the pure pools, against rules and at random, and the limiter for threads."""

from __future__ import annotations

import threading
from collections import Counter

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sluice_batching import Claim, RateLimiter, Resource, ResourcePools, TooFewCopies

PATIENCE_S = 20.0
R1, R2 = Resource("R1", 0), Resource("R2", 0)


def claim(weight: int = 1, **needs: int) -> Claim:
    return Claim({Resource(name, 0): count for name, count in needs.items()}, weight)


def registered(pools: ResourcePools, *claims: Claim) -> tuple[Claim, ...]:
    for each in claims:
        pools.register(each)
    return claims


def test_a_pool_has_as_many_copies_as_the_largest_claim_needs():
    pools = ResourcePools()
    small, large = registered(pools, claim(R1=1), claim(R1=4, R2=2))
    assert (pools.copies(R1), pools.copies(R2), pools.copies(Resource("R3", 0))) == (4, 2, 0)
    pools.unregister(large)
    assert pools.copies(R1) == 1
    pools.unregister(small)
    assert pools.copies(R1) == 0


def test_a_given_number_counts_first_on_its_device_and_else_on_all():
    pools = ResourcePools({Resource("R1"): 10, Resource("R1", 1): 8, Resource("R3"): 2})
    registered(pools, claim(R1=99))
    assert [pools.copies(Resource("R1", device)) for device in (0, 1, None)] == [10, 8, 10]
    assert pools.copies(Resource("R3", None)) == 2


def test_a_claim_that_can_never_be_granted_is_told_what_is_missing():
    pools = ResourcePools({Resource("R1"): 3})
    pools.check(claim(R1=3, R2=9))
    with pytest.raises(TooFewCopies, match="resource 'R1' has 3 copies and 4 are needed") as caught:
        pools.check(claim(R1=4))
    assert (caught.value.resource, caught.value.copies, caught.value.needed) == (R1, 3, 4)


def test_claims_run_together_as_far_as_the_copies_go():
    pools = ResourcePools({Resource("R1"): 3})
    first, second, third = registered(pools, claim(R1=2), claim(R1=2), claim(R1=1))
    pools.ask(first)
    assert pools.grant() == [first]
    pools.ask(second)
    pools.ask(third)
    assert pools.grant() == []  # the third would fit, and the second is before it and lacks one
    pools.release(first)
    assert pools.grant() == [second, third]


def test_who_needs_something_else_is_not_held_up():
    pools = ResourcePools()
    first, second, other = registered(pools, claim(R1=1), claim(R1=1), claim(R2=1))
    for each in (first, second, other):
        pools.ask(each)
    assert pools.grant() == [first, other]


def turns(pools: ResourcePools, claims: tuple[Claim, ...], number: int) -> Counter[Claim]:
    """Who runs, one at a time, while all ask again and again."""
    for each in claims:
        pools.ask(each)
    counts: Counter[Claim] = Counter()
    for _ in range(number):
        (running,) = pools.grant()
        counts[running] += 1
        pools.release(running)
        pools.ask(running)
    return counts


def test_a_claim_of_weight_two_gets_half_as_many_turns():
    pools = ResourcePools()
    claims = registered(pools, claim(R1=1), claim(2, R1=1), claim(4, R1=1))
    counts = turns(pools, claims, 70)
    assert [counts[each] for each in claims] == [40, 20, 10]


def test_who_comes_late_has_no_old_turns_to_its_credit():
    pools = ResourcePools()
    early, late = registered(pools, claim(R1=1), claim(R1=1))
    for _ in range(1000):
        pools.ask(early)
        assert pools.grant() == [early]
        pools.release(early)
    counts = turns(pools, (early, late), 10)
    assert abs(counts[early] - counts[late]) <= 1


class Pools(RuleBasedStateMachine):
    """Any claims, asked and given back in any order: never too many copies, and somebody always gets on."""

    def __init__(self) -> None:
        super().__init__()
        self.copies = {R1: 3, R2: 2}
        self.pools = ResourcePools({Resource(resource.name): count for resource, count in self.copies.items()})
        self.waiting: list[Claim] = []
        self.running: list[Claim] = []

    @rule(r1=st.integers(0, 3), r2=st.integers(0, 2), weight=st.integers(1, 5))
    def ask(self, r1: int, r2: int, weight: int) -> None:
        needs = {resource: count for resource, count in ((R1, r1), (R2, r2)) if count}
        self.waiting += registered(self.pools, Claim(needs, weight))
        self.pools.ask(self.waiting[-1])
        self._grant()

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        claim = self.running.pop(data.draw(st.integers(0, len(self.running) - 1)))
        self.pools.release(claim)
        self._grant()

    def _grant(self) -> None:
        for claim in self.pools.grant():
            self.waiting.remove(claim)
            self.running.append(claim)

    @invariant()
    def never_more_than_there_are(self) -> None:
        taken = Counter[Resource]()
        for claim in self.running:
            taken.update(claim.needs)
        assert all(taken[resource] <= count for resource, count in self.copies.items())

    @invariant()
    def the_first_waits_for_a_reason(self) -> None:
        first = min(self.waiting, key=lambda claim: (claim.passed, claim.order), default=None)
        if first is not None:
            taken = Counter[Resource]()
            for claim in self.running:
                taken.update(claim.needs)
            assert any(taken[resource] + count > self.copies[resource] for resource, count in first.needs.items())


TestPools = Pools.TestCase


def test_threads_wait_for_what_others_have():
    limiter = RateLimiter()
    first, second = claim(R1=1), claim(R1=1)
    for each in (first, second):
        limiter.check(each)
        limiter.register(each)
    limiter.acquire(first)
    granted = threading.Event()
    thread = threading.Thread(target=lambda: (limiter.acquire(second), granted.set()))
    thread.start()
    while not limiter._pools._waiting:
        threading.Event().wait(0.001)
    assert not granted.is_set()
    limiter.release(first)
    assert granted.wait(PATIENCE_S)
    thread.join(PATIENCE_S)
    limiter.release(second)
    for each in (first, second):
        limiter.unregister(each)
    assert limiter._pools.copies(R1) == 0


def test_a_larger_pool_lets_those_in_who_wait():
    limiter = RateLimiter()
    first, second, large = claim(R1=1), claim(R1=1), claim(R1=2)
    limiter.register(first)
    limiter.register(second)
    limiter.acquire(first)
    granted = threading.Event()
    thread = threading.Thread(target=lambda: (limiter.acquire(second), granted.set()))
    thread.start()
    limiter.register(large)
    assert granted.wait(PATIENCE_S)
    thread.join(PATIENCE_S)
