"""Which model versions are served: loading, swapping, unloading, and what RepositoryIndex says of each.

States of a version: LOADING -> READY -> UNLOADING -> UNAVAILABLE("unloaded"), or LOADING -> UNAVAILABLE(reason). A
version that is ready has a reason too when it does not do all that its configuration says: its `notice`.
A loaded model is replaced by loading the new one beside the old and swapping the two in one assignment; the old one
then drains, so that no request is lost. When the new one fails, the old one goes on. A version of which nothing has
changed on disk is kept as it is.

Mode poll: `poll` is one look at the repositories. A model that is new, changed or gone is loaded or unloaded once two
looks in a row have found the same, so that what is being copied is left alone; one that fails is tried again when it
has changed again.

Locks: `_Entry.loading` serialises loads and unloads of one model and is held for as long as they take;
`ModelManager._lock` guards the table of entries and is held for look-ups and assignments only. `_served` is replaced
as a whole and never changed, so `find` reads it without a lock. `poll` is for one thread.
"""

from __future__ import annotations

import enum
import logging
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sluice_server.errors import Internal, InvalidArgument, NotFound, SluiceError, Unavailable
from sluice_server.repository.config import parse_json, read_config
from sluice_server.repository.errors import ConfigError, ModelLoadError
from sluice_server.repository.layout import write_override
from sluice_server.repository.versions import parse_version, select

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Mapping

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.model import ServedModel
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

    def __call__(self, directory: ModelDirectory, version: int, config: ModelConfig | None) -> ServedModel:
        """Load one version; `config` is the configuration as written, None when there is none."""


@dataclass(slots=True)
class _Version:
    state: State
    reason: str = ""
    model: ServedModel | None = None
    files: Hashable = None
    """What of the disk it was loaded from; None when a load call brought it along."""


class _Entry:
    """What is known of one model that somebody tried to load."""

    __slots__ = ("fingerprint", "loading", "versions")

    def __init__(self) -> None:
        self.loading = threading.Lock()
        self.versions: dict[int, _Version] = {}
        self.fingerprint: Hashable = None

    def served(self) -> dict[int, ServedModel]:
        return {number: item.model for number, item in self.versions.items() if item.model is not None}

    def unload(self) -> dict[int, ServedModel]:
        """Take the served versions out and give them; those that failed are forgiven. Others are on their way out."""
        leaving = self.served()
        for number, item in self.versions.items():
            if item.model is not None:
                self.versions[number] = _Version(State.UNLOADING)
            elif item.state is State.UNAVAILABLE:
                self.versions[number] = _Version(State.UNAVAILABLE, UNLOADED)
        self.fingerprint = None
        return leaving

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
        self._served: dict[tuple[str, str], ServedModel] = {}
        self._retiring: set[ServedModel] = set()
        self._seen: Mapping[str, Hashable] = {}
        self._followed: dict[str, Hashable] = {}
        self._started = False
        self._draining = False

    # --- questions -------------------------------------------------------------------------------------------------

    def find(self, name: str, version: str) -> ServedModel:
        """The model to run a request on; `""` is the highest version served.

        `InvalidArgument`: the version is not a number; `NotFound`: nothing of that name and version is served.
        """
        model = self._served.get((name, version))
        return model if model is not None else self._find_by_number(name, version)

    def _find_by_number(self, name: str, version: str) -> ServedModel:
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

    def served(self) -> list[ServedModel]:
        """Every version that takes requests, by name and version."""
        with self._lock:
            return [model for _, entry in sorted(self._entries.items()) for _, model in sorted(entry.served().items())]

    def select(self, name: str, version: str) -> list[ServedModel]:
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
        return all(item.state is not State.UNAVAILABLE or item.reason == UNLOADED for item in entry.versions.values())

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
        failed = self._load_all(names, should_stop)
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
        def load(name: str) -> bool:
            return should_stop() or self._load_or_log(name)

        with ThreadPoolExecutor(self._load_threads, thread_name_prefix="load") as pool:
            return [name for name, ok in zip(sorted(names), pool.map(load, sorted(names)), strict=True) if not ok]

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
        """Load or reload a model and wait for it; an unchanged one stays as it is.

        `Unavailable` outside explicit mode; `Internal` for what is written (`failed to load 'X', ...`);
        `InvalidArgument` (`load failed for model 'X': ...`) for what the model file or the machine does not fit.
        """
        self._require_explicit()
        try:
            self._load(name, override or Override())
        finally:
            self._tell("", self.server_ready)

    def unload(self, name: str) -> None:
        """Stop serving a model; returns at once, accepted requests are still answered. An unknown name is no error."""
        self._require_explicit()
        self._unload(name)
        self._tell("", self.server_ready)

    def _unload(self, name: str) -> None:
        with self._lock:
            entry = self._entries.get(name)
        if entry is None:
            return
        with entry.loading:
            with self._lock:
                leaving = entry.unload()
                self._rebuild()
            self._tell(name, False)
            for number, model in leaving.items():
                self._retire(model, entry, number)

    def drain(self) -> None:
        """The server is ending: it is no longer ready, and its models take nothing new but finish what they have."""
        self._draining = True
        self._tell("", False)
        for name in {model.interface.name for model in self.served()}:
            self._tell(name, False)

    def stop(self, timeout_s: float) -> bool:
        """Drain every queue and wait for the instances, for up to `timeout_s` in all; False when time ran out first."""
        models = self.served()
        for model in models:
            model.drain()
        with self._lock:
            models += self._retiring
        until = time.monotonic() + timeout_s
        finished = True
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
        with entry.loading:
            # Read only now: what was on disk before another load of this model had its turn may be out of date.
            directory = uploaded or self._repositories.find(name)
            # An override is never what is on disk, so that a plain load after it reads the disk again.
            fingerprint = directory.fingerprint() if config is None else None
            if fingerprint is not None and entry.fingerprint == fingerprint and entry.all_ready():
                return
            if config is None and directory.config_path is not None:
                config = read_config(directory.config_path)
            self._load_versions(entry, directory, config, fingerprint)
            entry.fingerprint = fingerprint

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
        files = {} if fingerprint is None else {number: directory.of_version(fingerprint, number) for number in numbers}
        with self._lock:
            replacing = bool(entry.served())
            if not replacing:
                entry.versions = {number: _Version(State.LOADING) for number in numbers}
            kept = entry.unchanged(files)
        loaded: dict[int, ServedModel] = {}
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
        loaded: dict[int, ServedModel],
    ) -> dict[int, str]:
        """Put versions into `loaded`; gives the reasons of those that failed."""
        failed: dict[int, str] = {}
        for number in numbers:
            try:
                loaded[number] = self._load_one(directory, number, config)
            except ModelLoadError as error:
                failed[number] = error.reason
            except SluiceError as error:
                if isinstance(error, ConfigError):
                    raise
                family = "Invalid argument" if isinstance(error, InvalidArgument) else "Internal"
                failed[number] = f"{family}: {error}"
        return failed

    def _load_one(self, directory: ModelDirectory, number: int, config: ModelConfig | None) -> ServedModel:
        """Load one version, again when that failed for what may be different the next time."""
        for _ in range(self._load_retries):
            try:
                return self._loader(directory, number, config)
            except ConfigError:
                raise
            except SluiceError as error:
                extra = {"model": directory.name, "version": number, "reason": str(error)}
                logger.warning("model failed to load and is tried again", extra=extra)
        return self._loader(directory, number, config)

    def _give_up(
        self, entry: _Entry, loaded: dict[int, ServedModel], reasons: dict[int, str], *, replacing: bool
    ) -> None:
        """Forget new versions that were loaded; the old ones, where there are any, go on."""
        for model in loaded.values():
            model.drain()
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
        served: dict[tuple[str, str], ServedModel] = {}
        for name, entry in self._entries.items():
            for number, model in sorted(entry.served().items()):
                served[name, str(number)] = served[name, ""] = model
        self._served = served

    def _retire(self, model: ServedModel, entry: _Entry, number: int) -> None:
        """Let a version that was taken out of the table finish, on a thread of its own."""
        model.drain()
        with self._lock:
            leaving = entry.versions.get(number)
            self._retiring.add(model)

        def wait() -> None:
            model.join(None)
            with self._lock:
                self._retiring.discard(model)
                # Unless it was loaded again meanwhile, and perhaps unloaded again: then somebody else waits for that.
                if leaving is not None and leaving is entry.versions.get(number) and leaving.state is State.UNLOADING:
                    entry.versions[number] = _Version(State.UNAVAILABLE, UNLOADED)

        threading.Thread(target=wait, name=f"retire-{model.interface.name}", daemon=True).start()
