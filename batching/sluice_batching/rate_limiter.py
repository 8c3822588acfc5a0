"""Lets instances of all models run only while the resources that they claim are free. Triton's rate limiter.

A resource is a name and a number of copies: a pool for each device, or one for the whole server. An instance that has
work asks with its claim, waits until all of it is free, runs, and gives it back.

Who is next
-----------
Claims have a weight: one of weight 2 gets half as many turns as one of weight 1, while both wait all the time. Each
turn moves a claim back by its weight on a virtual time line, and the one that is furthest ahead is next; a claim that
comes back after a pause starts at the present, so that it has no old turns to its credit (stride scheduling,
Waldspurger and Weihl 1995). Whoever cannot have all it needs yet keeps what it needs for itself: those behind it get
only what is left then, so that large claims are not starved by small ones.

Locks
-----
`RateLimiter._lock` guards every field; the condition belongs to it. Nothing is called with it held.
"""

import itertools
import threading
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple


class Resource(NamedTuple):
    """A pool of copies; `device` is a GPU's number, -1 for the CPU, None for the whole server."""

    name: str
    device: int | None = None


class TooFewCopies(Exception):
    """A claim can never be granted: the pool was told to have fewer copies than it needs."""

    def __init__(self, resource: Resource, copies: int, needed: int) -> None:
        super().__init__(f"resource '{resource.name}' has {copies} copies and {needed} are needed")
        self.resource = resource
        self.copies = copies
        self.needed = needed


class Claim:
    """What one instance needs for each run, and its place among those that wait. Made once for each instance."""

    __slots__ = ("granted", "needs", "order", "passed", "weight")

    def __init__(self, needs: Mapping[Resource, int], weight: int = 1) -> None:
        self.needs = dict(needs)
        self.weight = weight
        self.passed = 0
        self.order = 0
        self.granted = False


class ResourcePools:
    """Which claims are granted, in which order. Not thread-safe, no clock.

    Without a number of copies that was given, a pool has as many as its largest claim needs.
    """

    def __init__(self, copies: Mapping[Resource, int] | None = None) -> None:
        """`copies` by resource; one without a device counts for each device, and for the whole server."""
        self._given = dict(copies or {})
        self._registered: list[Claim] = []
        self._taken: Counter[Resource] = Counter()
        self._waiting: list[Claim] = []
        self._present = 0
        self._orders = itertools.count()

    def check(self, claim: Claim) -> None:
        """TooFewCopies when a claim could never be granted."""
        for resource, needed in claim.needs.items():
            given = self._copies_given(resource)
            if given is not None and needed > given:
                raise TooFewCopies(resource, given, needed)

    def register(self, claim: Claim) -> None:
        """Have a claim that passes `check` count for the sizes of pools; before it is asked with."""
        self._registered.append(claim)

    def unregister(self, claim: Claim) -> None:
        """Forget a claim that will not be asked with again."""
        self._registered.remove(claim)

    def copies(self, resource: Resource) -> int:
        """How many copies there are."""
        given = self._copies_given(resource)
        if given is not None:
            return given
        return max((claim.needs.get(resource, 0) for claim in self._registered), default=0)

    def ask(self, claim: Claim) -> None:
        """Let a claim wait its turn; `grant` says when it has come."""
        claim.passed = max(claim.passed, self._present)
        claim.order = next(self._orders)
        self._waiting.append(claim)

    def release(self, claim: Claim) -> None:
        """Give back what was granted."""
        claim.granted = False
        self._taken.subtract(claim.needs)

    def grant(self) -> list[Claim]:
        """The claims whose turn it is now; they wait no longer and have what they need."""
        kept: Counter[Resource] = Counter()
        granted = []
        for claim in sorted(self._waiting, key=lambda claim: (claim.passed, claim.order)):
            fits = all(
                self._taken[resource] + kept[resource] + needed <= self.copies(resource)
                for resource, needed in claim.needs.items()
            )
            if not fits:
                kept.update(claim.needs)
                continue
            claim.granted = True
            self._taken.update(claim.needs)
            self._present = max(self._present, claim.passed)
            claim.passed += claim.weight
            granted.append(claim)
        self._waiting = [claim for claim in self._waiting if not claim.granted]
        return granted

    def _copies_given(self, resource: Resource) -> int | None:
        return self._given.get(resource, self._given.get(Resource(resource.name)))


class RateLimiter:
    """The pools of a server, for the threads of all instances."""

    def __init__(self, copies: Mapping[Resource, int] | None = None) -> None:
        """As `ResourcePools`."""
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._pools = ResourcePools(copies)

    def check(self, claim: Claim) -> None:
        """As `ResourcePools.check`."""
        with self._lock:
            self._pools.check(claim)

    def register(self, claim: Claim) -> None:
        """As `ResourcePools.register`; what waits may fit into a larger pool."""
        with self._lock:
            self._pools.register(claim)
            self._grant()

    def unregister(self, claim: Claim) -> None:
        """As `ResourcePools.unregister`."""
        with self._lock:
            self._pools.unregister(claim)

    def acquire(self, claim: Claim) -> None:
        """Wait until a claim is granted; who asks gives it back with `release`."""
        with self._lock:
            self._pools.ask(claim)
            self._grant()
            while not claim.granted:
                self._changed.wait()

    def release(self, claim: Claim) -> None:
        """Give back what `acquire` has waited for."""
        with self._lock:
            self._pools.release(claim)
            self._grant()

    def _grant(self) -> None:
        if self._pools.grant():
            self._changed.notify_all()
