"""Which requests Triton's trace settings choose: those of the whole server, and the values that a model has of its own.

A request counts for its model's settings where the model has any, else for the server's. Every `rate`-th one is
traced, until `count` have been. A model's own value stands whatever becomes of the server's; what it has none of
follows the server. Changed settings begin to count anew, but what is left of `count` stays unless it was set.

`TraceSampler._lock` guards the settings and their counters; `armed` is read without it, once per request, so that
tracing costs nothing while it is off.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

LEVELS = ("TIMESTAMPS", "TENSORS")
"""What a trace can have in it; none of them is OFF."""

OFF = "OFF"

UNLIMITED = -1
"""The `count` that never runs out."""

RATE_DEFAULT = 1000
"""Triton's: one request of a thousand."""


@dataclass(frozen=True, slots=True)
class TraceOptions:
    """One set of trace settings; `levels` are of LEVELS and in their order. A rate or a count of 0 traces nothing."""

    levels: tuple[str, ...] = ()
    rate: int = RATE_DEFAULT
    count: int = UNLIMITED
    log_frequency: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    """How a chosen request is traced, and by whose settings: a model's name, or "" for the server's."""

    levels: tuple[str, ...]
    log_frequency: int
    scope: str


class _Scope:
    """A set of options with its counters."""

    __slots__ = ("left", "options", "seen")

    def __init__(self, options: TraceOptions, left: int) -> None:
        self.options = options
        self.left = left
        self.seen = 0

    @property
    def traces(self) -> bool:
        return bool(self.options.levels and self.options.rate and self.left)

    def choose(self, *, forced: bool) -> bool:
        if not self.traces:
            return False
        self.seen += 1
        if not forced and self.seen % self.options.rate:
            return False
        if self.left > 0:
            self.left -= 1
        return True

    def changed(self, options: TraceOptions, *, count_is_set: bool) -> _Scope:
        """The scope that takes this one's place."""
        keeps_count = not count_is_set and options.count == self.options.count
        return _Scope(options, self.left if keeps_count else options.count)


class TraceSampler:
    """The trace settings of a server, changed and asked from any thread. `start` are those of the command line."""

    def __init__(self, start: TraceOptions) -> None:
        self._start = start
        self._lock = threading.Lock()
        self._server = _Scope(start, start.count)
        self._own: dict[str, dict[str, Any]] = {}
        self._models: dict[str, _Scope] = {}
        self.armed = self._server.traces

    def options(self, model: str = "") -> TraceOptions:
        """The settings that count for a model, or the server's; `count` is what is left of it."""
        with self._lock:
            scope = self._models.get(model, self._server)
            return replace(scope.options, count=scope.left)

    def change(self, changes: Mapping[str, Any], model: str = "") -> None:
        """Set fields of TraceOptions; None clears: to the start value, or for a model to what the server has."""
        with self._lock:
            if model:
                self._change_model(model, changes)
            else:
                self._change_server(changes)
            self._arm()

    def sample(self, model: str, *, forced: bool = False) -> Sample | None:
        """Whether a request to this model is traced; a `forced` one is at any rate, while the count lasts."""
        with self._lock:
            own = self._models.get(model)
            scope = self._server if own is None else own
            if not scope.choose(forced=forced):
                return None
            if not scope.left:
                self._arm()
            return Sample(scope.options.levels, scope.options.log_frequency, "" if own is None else model)

    def _change_server(self, changes: Mapping[str, Any]) -> None:
        values = {name: getattr(self._start, name) if value is None else value for name, value in changes.items()}
        self._server = self._server.changed(replace(self._server.options, **values), count_is_set="count" in changes)
        for model, own in self._own.items():
            self._follow(model, own, count_is_set="count" in changes and "count" not in own)

    def _change_model(self, model: str, changes: Mapping[str, Any]) -> None:
        own = {**self._own.get(model, {}), **changes}
        own = {name: value for name, value in own.items() if value is not None}
        if own:
            self._own[model] = own
            self._follow(model, own, count_is_set="count" in changes)
        else:
            self._own.pop(model, None)
            self._models.pop(model, None)

    def _follow(self, model: str, own: Mapping[str, Any], *, count_is_set: bool) -> None:
        options = replace(self._server.options, **own)
        before = self._models.get(model, self._server)
        if before is self._server or count_is_set or options != before.options:
            self._models[model] = before.changed(options, count_is_set=count_is_set)

    def _arm(self) -> None:
        self.armed = any(scope.traces for scope in (self._server, *self._models.values()))
