"""The table of model versions: what is known of each, which take requests, who is bound to whom, and how one leaves.

States of a version: LOADING -> READY -> UNLOADING -> UNAVAILABLE("unloaded"), or LOADING -> UNAVAILABLE(reason). A
version that is ready has a reason too when it does not do all that its configuration says: its `notice`.
New versions take the place of old ones in one assignment; an old one then drains, so that no request is lost. One that
ensembles are bound to is drained only when every ensemble on it has answered its requests.

Lock: `ModelTable._lock` guards the entries, and who is bound to whom, and is held for look-ups and assignments only.
`_served` is replaced as a whole and never changed, so `find` reads it without a lock.
"""

from __future__ import annotations

import enum
import logging
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from sluice_server.errors import InvalidArgument, NotFound
from sluice_server.repository.autocomplete import normalize
from sluice_server.repository.ensembles import is_ensemble, part_names, version_of
from sluice_server.repository.parts import Dependencies, PartState
from sluice_server.repository.versions import parse_version

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.served import Served
    from sluice_server.repository.layout import ModelDirectory

logger = logging.getLogger(__name__)

UNLOADED = "unloaded"
"""The reason of a version that was unloaded on purpose, as in Triton; such a version does not make a server unready."""


class State(enum.StrEnum):
    """A version's state, with the names of RepositoryIndex."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of RepositoryIndex; a model that was never loaded has a name only."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


@dataclass(slots=True)
class Version:
    """What is known of one version."""

    state: State
    reason: str = ""
    model: Served | None = None
    files: Hashable = None
    """What of the disk it was loaded from; None when a load call brought it along."""
    is_wanted: bool = False
    """Unavailable because somebody has unloaded it, or a part of it: no reason for the server to be unready."""

    @property
    def is_settled(self) -> bool:
        """Whether it is not a failure: ready, on its way, or away because somebody wanted that."""
        return self.state is not State.UNAVAILABLE or self.is_wanted


class Recipe(NamedTuple):
    """What an ensemble was last loaded from."""

    directory: ModelDirectory
    config: ModelConfig
    files: Mapping[int, Hashable]


class Entry:
    """What is known of one model that somebody tried to load."""

    __slots__ = ("fingerprint", "is_along", "loading", "recipe", "versions")

    def __init__(self) -> None:
        self.loading = threading.Lock()
        self.versions: dict[int, Version] = {}
        self.fingerprint: Hashable = None
        self.recipe: Recipe | None = None
        """Of an ensemble that is to be served as long as its parts are."""
        self.is_along = False
        """Whether it was loaded only as a part of an ensemble."""

    def served(self) -> dict[int, Served]:
        """The versions that take requests, by number."""
        return {number: item.model for number, item in self.versions.items() if item.model is not None}

    def unload(self) -> dict[int, Served]:
        """Take the served versions out and give them; those that failed are forgiven. Others are on their way out."""
        leaving = self.served()
        for number, item in self.versions.items():
            if item.model is not None:
                self.versions[number] = Version(State.UNLOADING)
            elif item.state is State.UNAVAILABLE:
                self.versions[number] = Version(State.UNAVAILABLE, UNLOADED, is_wanted=True)
        self.fingerprint = self.recipe = None
        return leaving

    def as_part(self) -> PartState[Served]:
        """What an ensemble finds."""
        reason = next((item.reason for item in self.versions.values() if item.reason), UNLOADED)
        return PartState(self.served(), reason, all(item.is_settled for item in self.versions.values()))

    def unchanged(self, files: Mapping[int, Hashable]) -> dict[int, Version]:
        """The served versions of which the same is on disk as what they were loaded from."""
        return {
            number: item
            for number, item in self.versions.items()
            if item.model is not None and item.files is not None and item.files == files.get(number)
        }

    def all_ready(self) -> bool:
        """Whether there is anything, and all of it takes requests."""
        return bool(self.versions) and all(item.state is State.READY for item in self.versions.values())


class ModelTable:
    """The versions and their entries. Every public method is for any thread; each request calls `find`."""

    def __init__(self, on_readiness: Callable[[str, bool], None]) -> None:
        """`on_readiness` hears of each model (and of the server, as `""`) whenever it may have changed."""
        self._on_readiness = on_readiness
        self._draining = False
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._served: dict[tuple[str, str], Served] = {}
        self._retiring: set[Served] = set()
        self._dependencies = Dependencies()
        self._uses: Counter[Served] = Counter()
        """How many ensembles, loads of them included, need each version that is a part."""
        self._unused = threading.Condition(self._lock)

    def find(self, name: str, version: str) -> Served:
        """The model to run a request on; `""` is the highest version served.

        `InvalidArgument`: the version is not a number; `NotFound`: nothing of that name and version is served.
        """
        model = self._served.get((name, version))
        return model if model is not None else self._find_by_number(name, version)

    def _find_by_number(self, name: str, version: str) -> Served:
        number = parse_version(version)
        served = self._served
        model = served.get((name, "" if number is None else str(number)))
        if model is not None:
            return model
        unknown = f"Request for unknown model: '{name}'"
        if number is not None and (name, "") in served:
            raise NotFound(f"{unknown} version {number} is not found")
        with self._lock:
            was_loaded = bool(entry.versions) if (entry := self._entries.get(name)) else False
        if was_loaded:
            raise NotFound(f"{unknown} has no available versions")
        raise NotFound(f"{unknown} is not found")

    def served_versions(self, name: str) -> list[int]:
        """The versions of a model that take requests, in rising order."""
        with self._lock:
            entry = self._entries.get(name)
            return sorted(entry.served()) if entry else []

    def served(self) -> list[Served]:
        """Every version that takes requests, by name and version."""
        with self._lock:
            return [model for _, entry in sorted(self._entries.items()) for _, model in sorted(entry.served().items())]

    def select(self, name: str, version: str) -> list[Served]:
        """The versions that ModelStatistics is asked for; an unknown one is `InvalidArgument` there, as in Triton."""
        number = parse_version(version)
        models = [model for model in self.served() if not name or model.interface.name == name]
        if name and not models:
            raise InvalidArgument(f"requested model '{name}' is not available")
        if number is not None:
            models = [model for model in models if model.interface.version == str(number)]
            if not models:
                raise InvalidArgument(f"requested model version is not available for model '{name}': {number}")
        return models

    def drain(self) -> None:
        """The server is ending: not ready any more, and no more loads; what its front still accepts is answered."""
        self._draining = True
        self._tell("", False)
        for name in {model.interface.name for model in self.served()}:
            self._tell(name, False)

    def stop(self, timeout_s: float) -> bool:
        """Drain every queue and wait for the instances, for up to `timeout_s` in all; False when time ran out first."""
        models = self.served()
        with self._lock:
            models += self._retiring
        until = time.monotonic() + timeout_s
        finished = True
        for ensemble in sorted((model for model in models if model.parts), key=_height, reverse=True):
            ensemble.drain()
            ensemble.join(max(0.0, until - time.monotonic()))
        for model in models:
            model.drain()
        for model in models:
            if not model.join(max(0.0, until - time.monotonic())):
                finished = False
                logger.warning("requests were still running when time was up", extra={"model": model.interface.name})
        return finished

    def _tell(self, name: str, ready: bool) -> None:
        # A load that ends while the server drains must not bring clients back.
        self._on_readiness(name, ready and not self._draining)

    def _bind(self, name: str, config: ModelConfig | None) -> Sequence[Served]:
        """The versions that run the steps of an ensemble, which stay until `_let_go`; none for any other model.

        Raises ConfigError, or ModelLoadError when a part is not served.
        """
        if config is None or not is_ensemble(config):
            return ()
        config = normalize(config, name=name)
        names = part_names(config)
        with self._lock:
            self._dependencies.check_cycle(name, names)
            # From now on a change of these is followed too: it comes behind this load, and is done with then.
            known = self._dependencies.parts.get(name, ())
            self._dependencies.parts[name] = tuple(dict.fromkeys((*known, *names)))
            parts = []
            for step in config.ensemble_scheduling.step:
                entry = self._entries.get(step.model_name)
                state: PartState[Served] = PartState({}) if entry is None else entry.as_part()
                parts.append(state.choose(name, step.model_name, version_of(step)))
            self._uses.update(set(parts))
        return parts

    def _let_go(self, parts: Iterable[Served]) -> None:
        """An ensemble, or a load of one, needs these versions no more."""
        with self._lock:
            self._uses.subtract(parts)
            self._uses += Counter()  # without those that nobody uses
            self._unused.notify_all()

    def _swap(self, name: str, entry: Entry, kept: dict[int, Version], fresh: dict[int, Version]) -> None:
        """Put fresh versions into the place of all but those that are kept."""
        with self._lock:
            old = {number: model for number, model in entry.served().items() if number not in kept}
            leaving = {number: Version(State.UNLOADING) for number in old}
            entry.versions = {**leaving, **kept, **fresh}
            self._rebuild()
            serves = bool(entry.served())
        for number, item in sorted(fresh.items()):
            if item.model is not None:
                extra = {"model": name, "version": number, **item.model.properties}
                logger.info("model is ready", extra=extra)
        self._tell(name, serves)
        for number, model in old.items():
            self._retire(model, entry, number)

    def _rebuild(self) -> None:
        """Make the table that `find` reads; the caller holds the lock."""
        served: dict[tuple[str, str], Served] = {}
        for name, entry in self._entries.items():
            for number, model in sorted(entry.served().items()):
                served[name, str(number)] = served[name, ""] = model
        self._served = served

    def _retire(self, model: Served, entry: Entry, number: int) -> None:
        """Let a version that was taken out of the table finish, on a thread of its own; a part behind its ensembles."""
        with self._lock:
            leaving = entry.versions.get(number)
            self._retiring.add(model)
            in_use = self._uses[model] > 0
        if not in_use:
            model.drain()

        def wait() -> None:
            with self._lock:
                self._unused.wait_for(lambda: not self._uses[model])
            model.drain()
            model.join(None)
            self._let_go(model.parts)
            with self._lock:
                self._retiring.discard(model)
                # Unless it was loaded again meanwhile, and perhaps unloaded again: then somebody else waits for that.
                if leaving is not None and leaving is entry.versions.get(number) and leaving.state is State.UNLOADING:
                    entry.versions[number] = Version(State.UNAVAILABLE, UNLOADED, is_wanted=True)

        threading.Thread(target=wait, name=f"retire-{model.interface.name}", daemon=True).start()


def _height(model: Served) -> int:
    """How many ensembles are on top of each other in a version: 0 for a model."""
    return 1 + max(map(_height, model.parts)) if model.parts else 0
