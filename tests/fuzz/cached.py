"""Fuzzed here: requests to models with a response cache, next to the same models without one."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hypothesis import strategies as st

from fuzz import serving
from fuzz.inference import built_requests
from fuzz.serving import Serving, check_at_rest, check_good, judge, judge_answer
from fuzz.subject import MESSAGE_BYTES_MAX, joined, parted
from sluice_server.execution.cached import CachedModel
from sluice_server.execution.response_cache import ResponseCache
from sluice_server.status import Code
from support.fakes import RecordingCall

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CACHE_BYTES = 1 << 16
"""Some hundred answers: each run of the fuzzer pushes many out."""

SHARED = b"shared_memory"
"""Requests with this in them are not compared: what they read there, another may have written."""


@dataclass
class Cached:
    """Several requests at once, some of them equal, and once more: each is answered as it is without a cache."""

    cached: Serving
    plain: Serving
    cache: ResponseCache

    def check(self, data: bytes) -> None:
        """The messages as one list, of which equal ones run once, and the list again, of which those are hits."""
        messages = parted(data)
        plain = [self.plain.end_of(message).ends[0] for message in messages]
        for _ in range(2):
            calls = [RecordingCall(message) for message in messages]
            self.cached.dispatcher(calls)
            for message, call, (status, payload) in zip(messages, calls, plain, strict=True):
                got, answer = call.wait()
                got.message.encode()  # so that it can be sent
                if got.code is Code.OK:
                    judge_answer(message, answer)
                else:
                    judge(message, got.code, got.message)
                # A timeout may be a microsecond, and a hit be faster than that.
                if Code.DEADLINE_EXCEEDED not in (got.code, status.code) and SHARED not in data:
                    assert (got.code, answer) == (status.code, payload), (got, status)
            assert all(len(call.ends) == 1 for call in calls)

    def look(self) -> None:
        """Good requests are answered, nobody leads or follows, and the cache is within its bound."""
        check_good(self.cached)
        check_good(self.plain)
        models = self.cached.manager.served()
        check_at_rest(models)
        for model in models:
            assert isinstance(model, CachedModel)
            assert not len(model._cache.following)
            assert not len(model._cache._flights), model._cache
        usage = self.cache.usage()
        assert usage.size_bytes <= usage.max_bytes == CACHE_BYTES


@contextmanager
def open_cached(directory: Path) -> Iterator[Cached]:
    cache = ResponseCache(CACHE_BYTES)
    with serving.serving(directory / "cached", cache) as cached, serving.serving(directory / "plain") as plain:
        yield Cached(cached, plain, cache)


def cached_seeds() -> list[bytes]:
    """The good requests, each twice and with its neighbour; and those of one model with other outputs."""
    good = serving.seeds()
    return [joined([message, after, message]) for message, after in zip(good, [*good[1:], good[0]], strict=True)]


@st.composite
def built_lists(draw: st.DrawFn) -> bytes:
    """A few requests, some of them again."""
    some = [message for message in draw(st.lists(built_requests, min_size=1, max_size=3)) if message]
    again = draw(st.lists(st.sampled_from(some), max_size=3)) if some else []
    return joined([message[:MESSAGE_BYTES_MAX] for message in [*some, *again]])
