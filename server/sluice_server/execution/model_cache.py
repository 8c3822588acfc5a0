"""What the response cache does for one model version: who is answered from it, who runs, and who waits for whose run.

    admit       a list of requests is looked up    hit: answered now · equal to one in flight: follows it · else: leads
    complete    a batch has run                    the answers are kept, and given to the followers
    fail        requests have failed               their followers fail with them
    pass_on     leaders have expired unrun         for each its first follower leads the rest
    leave       a client has left                  its work goes on as long as somebody waits for it

Requests with the same fingerprint that are in flight at once run once (`sluice_batching.Coalescer`). Followers wait in
a queue of which nothing is taken to run: it bounds them as the model's own queue does its own, watches their deadlines,
and decides who ends a follower, as only one can take it out: its leader's end, its own deadline, or its client.

Lock: that of the `ResponseCache`; the queues' locks, and the timer's, may be taken with it held, and never the other
way around.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from sluice_batching import Coalescer
from sluice_server.execution.response_cache import Fingerprints, is_same, make_entries
from sluice_server.execution.shared_memory import SharedTensors

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from sluice_batching import BatchingError, BatchQueue
    from sluice_server.execution.request import InferRequest
    from sluice_server.execution.response_cache import Payload, ResponseCache
    from sluice_server.observability.statistics import ModelStatistics
    from sluice_server.protocol.interface import ModelInterface


MISSES_MAX = 1024
"""After so many misses that no hit made up for, the cache is not worth its time under load: looking up and keeping
takes about a microsecond of a request's ten and more."""

HIT_WORTH = 256
"""A hit makes up for so many misses: a cache that finds one in 250 requests is looked up always."""

WINDOW_NS = 50_000_000
"""Load is counted over this time: long enough to mean something, and over soon after the load is."""

LOADED_REQUESTS = 100
"""In a window. Below 2,000 requests/s all lookups together take no more than a few thousandths of a core."""

LOOK_STRIDE = 32
"""Of the lists that need not be looked up every 32nd is, so that it is soon known when requests begin to repeat."""


class Worth:
    """Knows when looking up is not worth it: when next to nothing is found, and many requests come. Pure.

    Races between threads cost a lookup more or less.
    """

    __slots__ = ("_in_window", "_is_loaded", "_lists", "_misses", "_window_ends_ns")

    def __init__(self) -> None:
        # That no hit has made up for, from 0 to twice MISSES_MAX: a few hits in a row always bring the lookups back.
        self._misses = 0
        self._lists = 0
        self._in_window = 0
        self._is_loaded = False
        self._window_ends_ns = 0

    @property
    def is_doubtful(self) -> bool:
        """Whether so little is found that it depends on the load."""
        return self._misses >= MISSES_MAX

    def skips(self, requests: int, now_ns: int) -> bool:
        """Whether a list of so many requests is better not looked up; asked for every list while it is doubtful."""
        since_ns = now_ns - self._window_ends_ns
        if since_ns >= 0:
            # After a window in which nothing came there is no load, whatever was before.
            self._is_loaded = since_ns < WINDOW_NS and self._in_window >= LOADED_REQUESTS
            self._in_window = 0
            self._window_ends_ns = now_ns + WINDOW_NS
        self._in_window += requests
        if not (self._is_loaded and self.is_doubtful):
            return False
        self._lists = (self._lists + 1) % LOOK_STRIDE
        return self._lists != 0

    def looked_up(self, requests: int, misses: int) -> None:
        """Note a list that was looked up."""
        self._misses = min(max(0, self._misses + misses - (requests - misses) * HIT_WORTH), 2 * MISSES_MAX)


class Admitted(NamedTuple):
    """What is to be done with a list of requests; those that are in none of these follow another."""

    leaders: Sequence[InferRequest]
    """To be queued and run, for all who come to follow them; or only for themselves, without a fingerprint."""
    hits: Sequence[tuple[InferRequest, Payload]] = ()
    """To be answered with what was kept."""
    refused: Sequence[tuple[InferRequest, BatchingError]] = ()
    """Would follow another, but cannot wait for it."""


class ModelCache:
    """The flights of one model version, and its part of the server's cache; for any thread."""

    def __init__(
        self,
        cache: ResponseCache,
        interface: ModelInterface,
        queue: BatchQueue[InferRequest],
        following: BatchQueue[InferRequest],
        statistics: ModelStatistics,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """`queue` is where leaders wait to run, `following` a queue for the followers that nobody else offers to."""
        self.queue = queue
        self.following = following
        self._cache = cache
        self._owner = cache.new_owner()
        self._fingerprints = Fingerprints(interface, self._owner, cache.digest)
        self._flights: Coalescer[InferRequest] = Coalescer()
        self._statistics = statistics
        self._clock = clock
        self._worth = Worth()
        self._keeps = True

    def __repr__(self) -> str:
        return f"<ModelCache {self._flights!r}, {self.following!r}>"

    def skips(self, requests: Sequence[InferRequest]) -> bool:
        """Whether these are to be run without being looked up: under load, when next to nothing is found."""
        if not (self._worth.is_doubtful and self._worth.skips(len(requests), self._clock())):
            return False
        self._statistics.record_cache_skipped(len(requests))
        return True

    def admit(self, requests: Sequence[InferRequest]) -> Admitted:
        """Look up requests that have no inputs in shared memory (any more); leaders are in flight from now on."""
        began_ns = self._clock()
        keys = []
        for request, fingerprint in zip(requests, self._fingerprints.of(requests), strict=True):
            request.fingerprint = fingerprint
            keys.append(fingerprint[0])
        cache, flights = self._cache, self._flights
        with cache.lock:
            if cache.table.has_none_of(keys) and flights.has_none_of(keys) and len(set(keys)) == len(keys):
                flights.lead(keys, requests)
                admitted = Admitted(requests)
            else:
                admitted = self._admit_each(requests)
        looked_up_ns = (self._clock() - began_ns) // len(requests)
        misses, hits = len(admitted.leaders), len(admitted.hits)
        self._worth.looked_up(len(requests), misses)
        self._statistics.record_cache_lookups(misses, miss_ns=looked_up_ns * misses, hit_ns=looked_up_ns * hits)
        return admitted

    def _admit_each(self, requests: Sequence[InferRequest]) -> Admitted:
        leaders: list[InferRequest] = []
        hits: list[tuple[InferRequest, Payload]] = []
        refused: list[tuple[InferRequest, BatchingError]] = []
        for request in requests:
            fingerprint = request.fingerprint
            assert fingerprint is not None, "set by the caller"
            key = fingerprint[0]
            leader = self._flights.leader(key)
            if leader is not None:
                assert leader.fingerprint is not None, "it leads"
                if leader.fingerprint[1] != fingerprint[1] or not is_same(leader.fingerprint[2], fingerprint[2]):
                    request.fingerprint = None  # another's place is not its own, and it runs alone
                    leaders.append(request)
                    continue
                error = self.following.offer_many((request,))[0]
                if error is None:
                    self._flights.follow(key, request)
                else:
                    refused.append((request, error))
            elif (payload := self._cache.find(fingerprint)) is not None:
                hits.append((request, payload))
            else:
                self._flights.lead((key,), (request,))
                leaders.append(request)
        return Admitted(leaders, hits, refused)

    def complete(
        self, batch: Sequence[InferRequest], answers: Sequence[Sequence[Buffer]]
    ) -> list[tuple[InferRequest, Payload]]:
        """Keep the answers of a batch that has run, and give what its followers are to be answered with."""
        began_ns = self._clock()
        leading: Sequence[InferRequest] = [request for request in batch if request.fingerprint is not None]
        if not leading:
            return []
        if len(leading) < len(batch):
            answers = [each for request, each in zip(batch, answers, strict=True) if request.fingerprint is not None]
        payloads = _payloads(leading, answers)
        keys = [request.fingerprint[0] for request in leading]  # type: ignore[index] # they lead
        entries = make_entries(leading, payloads, shares_memory=len(batch) > 1)
        followers: list[tuple[InferRequest, Payload]] = []
        with self._cache.lock:
            if self._keeps:
                self._cache.table.put(keys, entries)
            if self._flights.has_followers:
                followers = [
                    (follower, tuple(payload))
                    for key, payload in zip(keys, payloads, strict=True)
                    for follower in self._flights.land((key,))
                    if self.following.cancel(follower)
                ]
            else:
                self._flights.land(keys)
        self._statistics.record_cache_lookups(0, miss_ns=self._clock() - began_ns, hit_ns=0)
        return followers

    def fail(self, requests: Sequence[InferRequest]) -> list[InferRequest]:
        """End the flights of requests that have failed, or never will run; gives their followers, who end as they do.

        Of requests that lead none nothing is changed.
        """
        with self._cache.lock:
            return [
                follower
                for request in requests
                if (key := self._key_of_led(request)) is not None
                for follower in self._flights.land((key,))
                if self.following.cancel(follower)
            ]

    def pass_on(self, requests: Sequence[InferRequest]) -> list[InferRequest]:
        """Give the new leaders, to be queued, of the flights whose leaders have left the queue and were not run."""
        promoted = []
        with self._cache.lock:
            for request in requests:
                key = self._key_of_led(request)
                if key is None:
                    continue
                while (first := self._flights.promote(key)) is not None:
                    # One that has just ended leads for an instant only.
                    if self.following.cancel(first):
                        promoted.append(first)
                        break
        return promoted

    def leave(self, request: InferRequest) -> list[InferRequest]:
        """A client has left: gives the requests that have ended by that, unrun."""
        with self._cache.lock:
            if request.fingerprint is None:
                return [request] if self.queue.cancel(request) else []
            if self.following.cancel(request):
                return [request, *self._without(request)]
            return self._without(request)

    def leave_expired(self, followers: Sequence[InferRequest]) -> list[InferRequest]:
        """Followers have expired, and left their queue: gives the leaders that nobody waits for any more, unrun."""
        with self._cache.lock:
            return [leader for follower in followers for leader in self._without(follower)]

    def close(self) -> None:
        """Keep no more answers, and forget those that were kept: the version is on its way out."""
        with self._cache.lock:
            self._keeps = False
        self._cache.forget(self._owner)

    def _key_of_led(self, request: InferRequest) -> bytes | None:
        fingerprint = request.fingerprint
        if fingerprint is None or self._flights.leader(fingerprint[0]) is not request:
            return None
        return fingerprint[0]

    def _without(self, request: InferRequest) -> list[InferRequest]:
        """Take the work of a flight out of the queue when this was the last request that wanted it: its leader."""
        assert request.fingerprint is not None, "it is in a flight"
        key = request.fingerprint[0]
        if not self._flights.leave(key, request):
            return []
        leader = self._flights.leader(key)
        if leader is None or not self.queue.cancel(leader):
            return []
        self._flights.land((key,))
        return [leader]


def read_shared(request: InferRequest) -> None:
    """Read a request's inputs out of shared memory, once and for all; raises what reading raises."""
    shared = request.shared
    assert shared is not None, "it has inputs in shared memory"
    request.arrays |= {name: tensor.read() for name, tensor in shared.inputs.items()}
    request.shared = SharedTensors({}, shared.outputs)


def _payloads(batch: Sequence[InferRequest], answers: Sequence[Sequence[Buffer]]) -> Sequence[Sequence[Buffer]]:
    """The answers without the ids; where these are without what is in shared memory, what was put aside."""
    if not [request for request in batch if request.id or request.shared is not None]:
        return answers
    return [
        request.payload
        if request.shared is not None and request.shared.outputs
        else answer[1:]
        if request.id
        else answer
        for request, answer in zip(batch, answers, strict=True)
    ]
