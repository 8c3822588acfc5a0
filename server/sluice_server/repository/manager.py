"""Which model versions are served: loading, swapping, unloading, and what RepositoryIndex says of each.

States of a version: LOADING -> READY -> UNLOADING -> UNAVAILABLE("unloaded"), or LOADING -> UNAVAILABLE(reason). A
version that is ready has a reason too when it does not do all that its configuration says: its `notice`.
A loaded model is replaced by loading the new one beside the old and swapping the two in one assignment; the old one
then drains, so that no request is lost. When the new one fails, the old one goes on. A version of which nothing has
changed on disk is kept as it is.

Mode poll: `poll` is one look at the repositories. A model that is new, changed or gone is loaded or unloaded once two
looks in a row have found the same, so that what is being copied is left alone; one that fails is tried again when it
has changed again.

Ensembles: one is bound to the versions of its parts that are served when it is loaded, and loaded anew from the same
configuration whenever those of a part have changed: so it goes when a part goes, comes back with it, and is checked
against each new one. A version that was replaced is drained only when every ensemble on it has answered its requests.

Locks: `_Entry.loading` serialises loads and unloads of one model and is held for as long as they take, never with
that of another model; `ModelManager._lock` guards the table of entries, and who is bound to whom, and is held for
look-ups and assignments only. `_served` is replaced as a whole and never changed, so `find` reads it without a lock.
`poll` is for one thread.
"""

from __future__ import annotations

import enum
import logging
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

from sluice_server.errors import Internal, InvalidArgument, NotFound, SluiceError, Unavailable
from sluice_server.repository.autocomplete import normalize
from sluice_server.repository.config import parse_json, read_config
from sluice_server.repository.ensembles import check_uploaded, is_ensemble, part_names, version_of
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.layout import write_override
from sluice_server.repository.parts import Dependencies, MissingPart, PartState, load_order
from sluice_server.repository.versions import parse_version, select

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.served import Served
    from sluice_server.repository.layout import Fingerprint, ModelDirectory, Repositories

logger = logging.getLogger(__name__)

LOAD_ALL = "*"
"""The name that `--load-model` takes for every model of the repositories."""

UNLOADED = "unloaded"
"""The reason of a version that was unloaded on purpose, as in Triton; such a version does not make a server unready."""

UNEXPECTED = "Internal: unexpected error, the server's log has the details"
"""The reason of a version whose load raised what it should not: what clients see is never the text of a bug."""


class ControlMode(enum.StrEnum):
    """`--model-control-mode`: what is loaded at start, and whether load and unload calls are taken."""

    NONE = "none"
    POLL = "poll"
    EXPLICIT = "explicit"


class State(enum.StrEnum):
    """A version's state, with the names of RepositoryIndex."""

    LOADING = "LOADING"
    READY = "READY"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


@dataclass(frozen=True, slots=True)
class Override:
    """What a load call brings along: a configuration (JSON), and the files of a model directory by relative path."""

    config: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of RepositoryIndex; a model that was never loaded has a name only."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class Loader(Protocol):
    """Makes a version ready to serve (not yet started); raises a SluiceError that says why it cannot."""

    def __call__(
        self, directory: ModelDirectory, version: int, config: ModelConfig | None, parts: Sequence[Served]
    ) -> Served:
        """Load one version; `config` is the configuration as written, None when there is none.

        `parts` are the versions that run the steps of an ensemble, one for each.
        """


@dataclass(slots=True)
class _Version:
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


class _Recipe(NamedTuple):
    """What an ensemble was last loaded from."""

    directory: ModelDirectory
    config: ModelConfig
    files: Mapping[int, Hashable]


class _Entry:
    """What is known of one model that somebody tried to load."""

    __slots__ = ("fingerprint", "is_along", "loading", "recipe", "versions")

    def __init__(self) -> None:
        self.loading = threading.Lock()
        self.versions: dict[int, _Version] = {}
        self.fingerprint: Hashable = None
        self.recipe: _Recipe | None = None
        """Of an ensemble that is to be served as long as its parts are."""
        self.is_along = False
        """Whether it was loaded only as a part of an ensemble."""

    def served(self) -> dict[int, Served]:
        return {number: item.model for number, item in self.versions.items() if item.model is not None}

    def unload(self) -> dict[int, Served]:
        """Take the served versions out and give them; those that failed are forgiven. Others are on their way out."""
        leaving = self.served()
        for number, item in self.versions.items():
            if item.model is not None:
                self.versions[number] = _Version(State.UNLOADING)
            elif item.state is State.UNAVAILABLE:
                self.versions[number] = _Version(State.UNAVAILABLE, UNLOADED, is_wanted=True)
        self.fingerprint = self.recipe = None
        return leaving

    def as_part(self) -> PartState[Served]:
        """What an ensemble finds."""
        reason = next((item.reason for item in self.versions.values() if item.reason), UNLOADED)
        return PartState(self.served(), reason, all(item.is_settled for item in self.versions.values()))

    def unchanged(self, files: Mapping[int, Hashable]) -> dict[int, _Version]:
        """The served versions of which the same is on disk as what they were loaded from."""
        return {
            number: item
            for number, item in self.versions.items()
            if item.model is not None and item.files is not None and item.files == files.get(number)
        }

    def all_ready(self) -> bool:
        return bool(self.versions) and all(item.state is State.READY for item in self.versions.values())


class ModelManager:
    """The models of the server. Every method is for any thread; `find` is the one that each request calls."""

    def __init__(
        self,
        repositories: Repositories,
        loader: Loader,
        *,
        mode: ControlMode = ControlMode.NONE,
        strict_readiness: bool = True,
        load_threads: int = 1,
        load_retries: int = 0,
        on_readiness: Callable[[str, bool], None] = lambda _name, _ready: None,
    ) -> None:
        """`on_readiness` hears of each model (and of the server, as `""`) whenever it may have changed.

        A version that fails to load is tried again `load_retries` times, at once as in Triton.
        """
        self._repositories = repositories
        self._loader = loader
        self._mode = mode
        self._strict_readiness = strict_readiness
        self._load_threads = load_threads
        self._load_retries = load_retries
        self._on_readiness = on_readiness
        self._lock = threading.Lock()
        self._entries: dict[str, _Entry] = {}
        self._served: dict[tuple[str, str], Served] = {}
        self._retiring: set[Served] = set()
        self._dependencies = Dependencies()
        self._uses: Counter[Served] = Counter()
        """How many ensembles, loads of them included, need each version that is a part."""
        self._unused = threading.Condition(self._lock)
        self._seen: Mapping[str, Hashable] = {}
        self._followed: dict[str, Hashable] = {}
        self._started = False
        self._draining = False

    # --- questions -------------------------------------------------------------------------------------------------

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

    @property
    def server_ready(self) -> bool:
        """Whether everything that was to be loaded at start has been, and, if readiness is strict, is ready."""
        if not self._started or self._draining:
            return False
        with self._lock:
            return not self._strict_readiness or all(self._is_settled(entry) for entry in self._entries.values())

    @staticmethod
    def _is_settled(entry: _Entry) -> bool:
        """Ready, or unloaded on purpose."""
        return all(item.is_settled for item in entry.versions.values())

    def index(self, *, ready_only: bool = False) -> list[IndexEntry]:
        """RepositoryIndex: every model of the repositories or of the table, by name and version."""
        with self._lock:
            known = {
                name: [
                    IndexEntry(name, str(number), str(item.state), item.reason)
                    for number, item in sorted(entry.versions.items())
                ]
                for name, entry in self._entries.items()
            }
        entries: list[IndexEntry] = []
        for name in sorted({*self._repositories.scan(), *known}):
            entries += known.get(name) or [IndexEntry(name)]
        return [entry for entry in entries if not ready_only or entry.state == State.READY]

    # --- life ------------------------------------------------------------------------------------------------------

    def start(self, load_models: Iterable[str], should_stop: Callable[[], bool] = lambda: False) -> list[str]:
        """Load what the control mode says; the names that failed, whose reasons are logged and in the index.

        From when `should_stop` says so, no further load is begun.
        """
        names = set(load_models)
        if self._mode is ControlMode.POLL:
            self._seen = self._repositories.fingerprints()
            self._followed = dict(self._seen)
            names = set(self._seen)
        elif self._mode is ControlMode.NONE or LOAD_ALL in names:
            names = set(self._repositories.scan())
        parts = [part for name in names for part in self._parts_on_disk(name) if not should_stop()]
        failed = self._load_along(parts, names) + self._load_all(names, should_stop)
        self._started = not should_stop()
        self._tell("", self.server_ready)
        return failed

    def poll(self, should_stop: Callable[[], bool] = lambda: False) -> None:
        """Look at the repositories, and follow what has changed since the start and the last call; never raises.

        From when `should_stop` says so, no further load is begun.
        """
        try:
            found = self._repositories.fingerprints()
        except SluiceError as error:  # what is served goes on
            logger.error("the model repository cannot be read", extra={"reason": str(error)})
            return
        known = {*self._followed, *found}
        settled = {name for name in known if found.get(name) == self._seen.get(name)}
        changed = {name for name in settled if found.get(name) != self._followed.get(name)}
        self._seen = found
        if not changed:
            return
        for name in changed - set(found):
            del self._followed[name]
            self._unload(name)
        loading = changed & set(found)
        self._followed |= {name: found[name] for name in loading}
        self._load_all(loading, should_stop)
        self._tell("", self.server_ready)

    def _load_all(self, names: set[str], should_stop: Callable[[], bool]) -> list[str]:
        """Load models side by side, and then the ensembles among them one by one; the names that failed."""

        def load(name: str) -> bool:
            return should_stop() or self._load_or_log(name)

        parts = {name: self._parts_on_disk(name) for name in names}
        with self._lock:
            # What is served has those that it was loaded with.
            new = {name: found for name, found in parts.items() if found}
            self._dependencies.parts = new | self._dependencies.parts
        models = sorted(name for name in names if not parts[name])
        with ThreadPoolExecutor(self._load_threads, thread_name_prefix="load") as pool:
            failed = [name for name, ok in zip(models, pool.map(load, models), strict=True) if not ok]
        ensembles = load_order(names - set(models), lambda name: parts.get(name, ()))
        return sorted(failed + [name for name in ensembles if parts.get(name) and not load(name)])

    def _parts_of(self, name: str, override: Override) -> tuple[str, ...]:
        """The parts of an ensemble that is to be loaded, as far as its configuration can be read."""
        if override.config is None:
            return self._parts_on_disk(name)
        try:
            return part_names(parse_json(override.config))
        except ConfigError:
            return ()

    def _parts_on_disk(self, name: str) -> tuple[str, ...]:
        """The parts of an ensemble, as far as its configuration can be read; loading it tells what cannot."""
        try:
            directory = self._repositories.find(name)
            return () if directory.config_path is None else part_names(read_config(directory.config_path))
        except SluiceError:
            return ()

    def _load_along(self, parts: Iterable[str], asked_for: Collection[str]) -> list[str]:
        """Load parts of ensembles, and theirs, apart from what is asked for by its name; the names that failed."""
        failed = []
        known = self._repositories.scan()
        for name in load_order(parts, self._parts_on_disk):
            if name not in known:  # the ensemble says so
                continue
            with self._lock:
                entry = self._entries.get(name)
                is_new = entry is None or not entry.served()
                # What a load call has brought along stays.
                stays = entry is not None and not is_new and entry.fingerprint is None
            if stays or name in asked_for:
                continue
            if not self._load_or_log(name):
                failed.append(name)
            elif is_new:
                with self._lock:
                    self._entries[name].is_along = True
        return failed

    def _load_or_log(self, name: str) -> bool:
        try:
            self._load(name, Override())
        except SluiceError as error:
            reason = str(error)
            logger.error("model failed to load", extra={"model": name, "reason": reason})
        except Exception:
            reason = UNEXPECTED
            logger.exception("model failed to load", extra={"model": name})
        else:
            return True
        with self._lock:
            entry = self._entries.setdefault(name, _Entry())
            if not entry.versions:  # refused before any version was tried: the index has to show it all the same
                entry.versions[1] = _Version(State.UNAVAILABLE, reason)
        return False

    def load(self, name: str, override: Override | None = None) -> None:
        """Load or reload a model, an ensemble after its parts, and wait for it; an unchanged one stays as it is.

        `Unavailable` outside explicit mode; `Internal` for what is written (`failed to load 'X', ...`);
        `InvalidArgument` (`load failed for model 'X': ...`) for what the model file or the machine does not fit.
        """
        self._require_explicit()
        override = override or Override()
        try:
            self._load_along(self._parts_of(name, override), {name})
            self._load(name, override)
            with self._lock:
                self._entries[name].is_along = False
        finally:
            self._tell("", self.server_ready)

    def unload(self, name: str, *, with_parts: bool = False) -> None:
        """Stop serving a model; returns at once, accepted requests are still answered. An unknown name is no error.

        `with_parts` unloads the parts of an ensemble too, as far as they were loaded along with it and are not parts
        of another ensemble that is served.
        """
        self._require_explicit()
        with self._lock:
            parts = load_order({name}, lambda each: self._dependencies.parts.get(each, ()))
        self._unload(name)
        for part in reversed(parts) if with_parts else ():
            if part != name and self._is_only_along(part):
                self._unload(part)
        self._tell("", self.server_ready)

    def _is_only_along(self, name: str) -> bool:
        """Whether nobody asked for a part by its name, and no ensemble needs it any more."""
        with self._lock:
            entry = self._entries.get(name)
            needed = any(name in self._dependencies.parts[each] for each in self._dependencies.dependents(name))
            return entry is not None and entry.is_along and not needed

    def _unload(self, name: str) -> None:
        with self._lock:
            entry = self._entries.get(name)
        if entry is None:
            return
        with entry.loading:
            with self._lock:
                leaving = entry.unload()
                self._dependencies.parts.pop(name, None)
                self._rebuild()
            self._tell(name, False)
            for number, model in leaving.items():
                self._retire(model, entry, number)
        if leaving:
            self._renew_dependents(name)

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

    # --- loading ---------------------------------------------------------------------------------------------------

    def _require_explicit(self) -> None:
        if self._mode is not ControlMode.EXPLICIT:
            raise Unavailable(
                "explicit model load / unload is not allowed: the server runs with"
                f" --model-control-mode={self._mode}, start it with --model-control-mode=explicit"
            )
        if self._draining:
            raise Unavailable("the server is shutting down")

    def _tell(self, name: str, ready: bool) -> None:
        # A load that ends while the server drains must not bring clients back.
        self._on_readiness(name, ready and not self._draining)

    def _load(self, name: str, override: Override) -> None:
        try:
            config = None if override.config is None else parse_json(override.config)
            if not override.files:
                self._repositories.find(name)  # a name that is no model's must not leave an entry behind
                self._load_entry(name, config, None)
            elif config is None:
                raise ConfigError("the files of a load call need its parameter 'config' too", model=name)
            else:
                with tempfile.TemporaryDirectory(prefix="sluice-model-", ignore_cleanup_errors=True) as scratch:
                    self._load_entry(name, config, write_override(name, override.files, Path(scratch)))
        except ConfigError as error:
            raise Internal(f"failed to load '{name}', failed to poll from model repository: {error}") from error

    def _load_entry(self, name: str, config: ModelConfig | None, uploaded: ModelDirectory | None) -> None:
        """Load what is on disk, or else was brought along: a configuration, or a whole directory with it."""
        with self._lock:
            entry = self._entries.setdefault(name, _Entry())
            before = entry.served()
        try:
            with entry.loading:
                self._load_locked(name, entry, config, uploaded)
        finally:
            with self._lock:
                changed = entry.served() != before
            if changed:
                self._renew_dependents(name)

    def _load_locked(
        self, name: str, entry: _Entry, config: ModelConfig | None, uploaded: ModelDirectory | None
    ) -> None:
        # Read only now: what was on disk before another load of this model had its turn may be out of date.
        directory = uploaded or self._repositories.find(name)
        # An override is never what is on disk, so that a plain load after it reads the disk again.
        fingerprint = directory.fingerprint() if config is None else None
        if fingerprint is not None and entry.fingerprint == fingerprint and entry.all_ready():
            return
        if config is None and directory.config_path is not None:
            config = read_config(directory.config_path)
        parts = part_names(config)
        if parts and uploaded is not None and config is not None:
            check_uploaded(config, name)
        replacing = bool(entry.served())
        try:
            self._load_versions(entry, directory, config, fingerprint)
        except SluiceError:
            if not replacing:  # it comes when its parts do
                self._remember(name, entry, directory, config, fingerprint)
            elif entry.recipe is not None:  # what it was loaded from goes on
                with self._lock:
                    self._dependencies.parts[name] = part_names(entry.recipe.config)
            raise
        self._remember(name, entry, directory, config, fingerprint)
        entry.fingerprint = fingerprint

    def _remember(
        self,
        name: str,
        entry: _Entry,
        directory: ModelDirectory,
        config: ModelConfig | None,
        fingerprint: Fingerprint | None,
    ) -> None:
        """Keep what an ensemble was loaded from, for when its parts change."""
        parts = part_names(config)
        with self._lock:
            if config is None or not parts:
                entry.recipe = None
                self._dependencies.parts.pop(name, None)
                return
            numbers = select(config.version_policy, directory.versions)
            entry.recipe = _Recipe(directory, config, _files(directory, fingerprint, numbers))
            self._dependencies.parts[name] = parts

    def _renew_dependents(self, name: str) -> None:
        """The served versions of a model have changed: load the ensembles anew that it is a part of."""
        with self._lock:
            ensembles = [(each, self._entries.get(each)) for each in self._dependencies.dependents(name)]
        for ensemble, entry in ensembles:
            if entry is not None:
                with entry.loading:
                    self._renew(ensemble, entry)

    def _renew(self, name: str, entry: _Entry) -> None:
        recipe = entry.recipe
        if recipe is None:  # unloaded, or not loaded yet
            return
        fresh = {}
        for number in select(recipe.config.version_policy, recipe.directory.versions):
            try:
                model = self._load_one(recipe.directory, number, recipe.config)
                model.start()
            except SluiceError as error:
                extra = {"model": name, "version": number, "reason": str(error)}
                logger.warning("ensemble is not served any more, as its parts have changed", extra=extra)
                is_wanted = isinstance(error, MissingPart) and error.is_wanted
                fresh[number] = _Version(State.UNAVAILABLE, _reason(error), is_wanted=is_wanted)
            else:
                fresh[number] = _Version(State.READY, "", model, recipe.files.get(number))
        self._swap(name, entry, {}, fresh)

    def _load_versions(
        self, entry: _Entry, directory: ModelDirectory, config: ModelConfig | None, fingerprint: Fingerprint | None
    ) -> None:
        name = directory.name
        policy = config.version_policy if config is not None else None
        numbers = select(policy, directory.versions)
        if not numbers:
            raise InvalidArgument(
                f"load failed for model '{name}': at least one version must be available under the version policy of"
                f" model '{name}', and {directory.path.name} has {list(directory.versions) or 'none'}"
            )
        files = _files(directory, fingerprint, numbers)
        with self._lock:
            replacing = bool(entry.served())
            if not replacing:
                entry.versions = {number: _Version(State.LOADING) for number in numbers}
            kept = entry.unchanged(files)
        loaded: dict[int, Served] = {}
        try:
            failed = self._load_each(directory, [number for number in numbers if number not in kept], config, loaded)
            if not (failed and replacing):
                for model in loaded.values():
                    model.start()
        except BaseException as error:
            reason = str(error) if isinstance(error, SluiceError) else UNEXPECTED
            self._give_up(entry, loaded, dict.fromkeys(numbers, reason), replacing=replacing)
            raise
        if failed and replacing:
            self._give_up(entry, loaded, failed, replacing=True)
        else:
            fresh = {
                **{
                    number: _Version(State.READY, model.notice, model, files.get(number))
                    for number, model in loaded.items()
                },
                **{number: _Version(State.UNAVAILABLE, text) for number, text in failed.items()},
            }
            self._swap(name, entry, kept, fresh)
        if failed:
            reasons = "".join(f"version {number} is at UNAVAILABLE state: {text};\n" for number, text in failed.items())
            raise InvalidArgument(f"load failed for model '{name}': {reasons}")

    def _load_each(
        self,
        directory: ModelDirectory,
        numbers: list[int],
        config: ModelConfig | None,
        loaded: dict[int, Served],
    ) -> dict[int, str]:
        """Put versions into `loaded`; gives the reasons of those that failed."""
        failed: dict[int, str] = {}
        for number in numbers:
            try:
                loaded[number] = self._load_one(directory, number, config)
            except ConfigError:
                raise
            except SluiceError as error:
                failed[number] = _reason(error)
        return failed

    def _load_one(self, directory: ModelDirectory, number: int, config: ModelConfig | None) -> Served:
        """Load one version, again when that failed for what may be different the next time."""
        parts = self._bind(directory.name, config)
        try:
            for _ in range(self._load_retries):
                try:
                    return self._load_bound(directory, number, config, parts)
                except ConfigError:
                    raise
                except SluiceError as error:
                    extra = {"model": directory.name, "version": number, "reason": str(error)}
                    logger.warning("model failed to load and is tried again", extra=extra)
            return self._load_bound(directory, number, config, parts)
        finally:
            self._let_go(set(parts))

    def _load_bound(
        self, directory: ModelDirectory, number: int, config: ModelConfig | None, parts: Sequence[Served]
    ) -> Served:
        model = self._loader(directory, number, config, parts)
        with self._lock:
            self._uses.update(model.parts)
        return model

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

    def _give_up(self, entry: _Entry, loaded: dict[int, Served], reasons: dict[int, str], *, replacing: bool) -> None:
        """Forget new versions that were loaded; the old ones, where there are any, go on."""
        for model in loaded.values():
            model.drain()
            self._let_go(model.parts)
        if not replacing:
            with self._lock:
                entry.versions = {number: _Version(State.UNAVAILABLE, text) for number, text in reasons.items()}

    def _swap(self, name: str, entry: _Entry, kept: dict[int, _Version], fresh: dict[int, _Version]) -> None:
        """Put fresh versions into the place of all but those that are kept."""
        with self._lock:
            old = {number: model for number, model in entry.served().items() if number not in kept}
            leaving = {number: _Version(State.UNLOADING) for number in old}
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

    def _retire(self, model: Served, entry: _Entry, number: int) -> None:
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
                    entry.versions[number] = _Version(State.UNAVAILABLE, UNLOADED, is_wanted=True)

        threading.Thread(target=wait, name=f"retire-{model.interface.name}", daemon=True).start()


def _files(directory: ModelDirectory, fingerprint: Fingerprint | None, numbers: Iterable[int]) -> dict[int, Hashable]:
    """What of the disk each version is loaded from; nothing where that is not what is on disk."""
    if fingerprint is None:
        return {}
    return {number: directory.of_version(fingerprint, number) for number in numbers}


def _reason(error: SluiceError) -> str:
    """What the index says of a version that failed to load."""
    if isinstance(error, ModelLoadError):
        return error.reason
    return f"{'Invalid argument' if isinstance(error, InvalidArgument) else 'Internal'}: {error}"


def _height(model: Served) -> int:
    """How many ensembles are on top of each other in a version: 0 for a model."""
    return 1 + max(map(_height, model.parts)) if model.parts else 0
