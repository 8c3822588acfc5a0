"""Which model versions are served: loading, reloading, unloading, and following what changes on disk.

A loaded model is replaced by loading the new one beside the old and swapping the two. When the new one fails, the old
one goes on. A version of which nothing has changed on disk is kept as it is.

Mode poll: `poll` is one look at the repositories. A model that is new, changed or gone is loaded or unloaded once that
has settled (`changes.py`); one that fails is tried again when it has changed again.

Ensembles: one is bound to the versions of its parts that are served when it is loaded, and loaded anew from the same
configuration whenever those of a part have changed: so it goes when a part goes, comes back with it, and is checked
against each new one.

Locks: `Entry.loading` serialises loads and unloads of one model and is held for as long as they take, never with that
of another model; the table has its own (`table.py`). `poll` is for one thread.
"""

from __future__ import annotations

import enum
import logging
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sluice_server.errors import Internal, InvalidArgument, SluiceError, Unavailable
from sluice_server.repository.changes import ChangeDetector
from sluice_server.repository.config import parse_json, read_config
from sluice_server.repository.ensembles import check_uploaded, part_names
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.layout import write_override
from sluice_server.repository.parts import MissingPart, load_order
from sluice_server.repository.table import Entry, IndexEntry, ModelTable, Recipe, State, Version
from sluice_server.repository.versions import select

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.served import Served
    from sluice_server.repository.layout import Fingerprint, ModelDirectory, Repositories

logger = logging.getLogger(__name__)

LOAD_ALL = "*"
"""The name that `--load-model` takes for every model of the repositories."""

UNEXPECTED = "Internal: unexpected error, the server's log has the details"
"""The reason of a version whose load raised what it should not: what clients see is never the text of a bug."""


class ControlMode(enum.StrEnum):
    """`--model-control-mode`: what is loaded at start, and whether load and unload calls are taken."""

    NONE = "none"
    POLL = "poll"
    EXPLICIT = "explicit"


@dataclass(frozen=True, slots=True)
class Override:
    """What a load call brings along: a configuration (JSON), and the files of a model directory by relative path."""

    config: str | None = None
    files: Mapping[str, bytes] = field(default_factory=dict)


class Loader(Protocol):
    """Makes a version ready to serve (not yet started); raises a SluiceError that says why it cannot."""

    def __call__(
        self, directory: ModelDirectory, version: int, config: ModelConfig | None, parts: Sequence[Served]
    ) -> Served:
        """Load one version; `config` is the configuration as written, None when there is none.

        `parts` are the versions that run the steps of an ensemble, one for each.
        """


class ModelManager(ModelTable):
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
        super().__init__(on_readiness)
        self._repositories = repositories
        self._loader = loader
        self._mode = mode
        self._strict_readiness = strict_readiness
        self._load_threads = load_threads
        self._load_retries = load_retries
        self._changes = ChangeDetector({})
        self._started = False

    # --- questions -------------------------------------------------------------------------------------------------

    @property
    def server_ready(self) -> bool:
        """Whether everything that was to be loaded at start has been, and, if readiness is strict, is ready."""
        if not self._started or self._draining:
            return False
        with self._lock:
            return not self._strict_readiness or all(self._is_settled(entry) for entry in self._entries.values())

    @staticmethod
    def _is_settled(entry: Entry) -> bool:
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
            found = self._repositories.fingerprints()
            self._changes = ChangeDetector(found)
            names = set(found)
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
        changes = self._changes.look(found)
        if not changes:
            return
        for name in changes.gone:
            self._unload(name)
        self._load_all(set(changes.changed), should_stop)
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
            entry = self._entries.setdefault(name, Entry())
            if not entry.versions:  # refused before any version was tried: the index has to show it all the same
                entry.versions[1] = Version(State.UNAVAILABLE, reason)
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

    # --- loading ---------------------------------------------------------------------------------------------------

    def _require_explicit(self) -> None:
        if self._mode is not ControlMode.EXPLICIT:
            raise Unavailable(
                "explicit model load / unload is not allowed: the server runs with"
                f" --model-control-mode={self._mode}, start it with --model-control-mode=explicit"
            )
        if self._draining:
            raise Unavailable("the server is shutting down")

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
            entry = self._entries.setdefault(name, Entry())
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
        self, name: str, entry: Entry, config: ModelConfig | None, uploaded: ModelDirectory | None
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
        entry: Entry,
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
            entry.recipe = Recipe(directory, config, _files(directory, fingerprint, numbers))
            self._dependencies.parts[name] = parts

    def _renew_dependents(self, name: str) -> None:
        """The served versions of a model have changed: load the ensembles anew that it is a part of."""
        with self._lock:
            ensembles = [(each, self._entries.get(each)) for each in self._dependencies.dependents(name)]
        for ensemble, entry in ensembles:
            if entry is not None:
                with entry.loading:
                    self._renew(ensemble, entry)

    def _renew(self, name: str, entry: Entry) -> None:
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
                fresh[number] = Version(State.UNAVAILABLE, _reason(error), is_wanted=is_wanted)
            else:
                fresh[number] = Version(State.READY, "", model, recipe.files.get(number))
        self._swap(name, entry, {}, fresh)

    def _load_versions(
        self, entry: Entry, directory: ModelDirectory, config: ModelConfig | None, fingerprint: Fingerprint | None
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
                entry.versions = {number: Version(State.LOADING) for number in numbers}
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
                    number: Version(State.READY, model.notice, model, files.get(number))
                    for number, model in loaded.items()
                },
                **{number: Version(State.UNAVAILABLE, text) for number, text in failed.items()},
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

    def _give_up(self, entry: Entry, loaded: dict[int, Served], reasons: dict[int, str], *, replacing: bool) -> None:
        """Forget new versions that were loaded; the old ones, where there are any, go on."""
        for model in loaded.values():
            model.drain()
            self._let_go(model.parts)
        if not replacing:
            with self._lock:
                entry.versions = {number: Version(State.UNAVAILABLE, text) for number, text in reasons.items()}


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
