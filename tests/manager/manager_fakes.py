"""A loader and models without ONNX Runtime: every load and every end waits for the test where the test wants that."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from sluice_server.repository.layout import Repositories
from sluice_server.repository.manager import ControlMode, ModelManager
from support.fakes import PATIENCE_S

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.repository.layout import ModelDirectory


@dataclass(frozen=True)
class FakeInterface:
    name: str
    version: str


class FakeModel:
    """What the manager needs of a served model. It has nothing to finish, unless `busy` is cleared by the test."""

    def __init__(self, name: str, version: int, config: ModelConfig | None, parts: Iterable[Any] = ()) -> None:
        self.parts = tuple(dict.fromkeys(parts))
        self.interface = FakeInterface(name, str(version))
        self.config = config
        self.properties: dict[str, str] = {}
        self.notice = ""
        self.started = self.draining = False
        self.start_error: Exception | None = None
        self.finished = threading.Event()
        self.finished.set()

    def start(self) -> None:
        if self.start_error is not None:
            raise self.start_error
        self.started = True

    def drain(self) -> None:
        self.draining = True

    def join(self, timeout_s: float | None) -> bool:
        assert self.draining
        return self.finished.wait(PATIENCE_S if timeout_s is None else timeout_s)


@dataclass
class FakeLoader:
    """Notes every load. `errors` has what loading a model raises; models in `held` load when their event is set."""

    errors: dict[str, Exception] = field(default_factory=dict)
    held: dict[str, threading.Event] = field(default_factory=dict)
    start_errors: dict[str, Exception] = field(default_factory=dict)
    loads: list[tuple[str, int]] = field(default_factory=list)
    files: dict[str, list[str]] = field(default_factory=dict)
    models: list[FakeModel] = field(default_factory=list)
    began: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))

    def __call__(
        self, directory: ModelDirectory, version: int, config: ModelConfig | None, parts: Iterable[Any]
    ) -> Any:
        name = directory.name
        self.loads.append((name, version))
        self.files[name] = sorted(str(path.relative_to(directory.path)) for path in directory.path.rglob("*"))
        self.began.release()
        if name in self.held:
            assert self.held[name].wait(PATIENCE_S)
        for key in (name, f"{name}/{version}"):
            if key in self.errors:
                raise self.errors[key]
        model = FakeModel(name, version, config, parts)
        model.start_error = self.start_errors.get(name)
        self.models.append(model)
        return model

    def wait_for_load(self) -> None:
        """Wait until one more load has begun."""
        assert self.began.acquire(timeout=PATIENCE_S)


class World:
    """A manager over a repository in a directory, its loader, and everything that it said about readiness."""

    def __init__(self, root: Path, loader: FakeLoader, others: tuple[Path, ...] = (), **options: Any) -> None:
        self.root = root
        self.loader = loader
        self.readiness: list[tuple[str, bool]] = []
        defaults: dict[str, Any] = {"mode": ControlMode.EXPLICIT, "strict_readiness": True, "load_threads": 2}
        self.manager = ModelManager(
            Repositories([root, *others]),
            loader,
            **{**defaults, **options},
            on_readiness=lambda name, ready: self.readiness.append((name, ready)),
        )

    def start(self, *names: str) -> list[str]:
        return self.manager.start(names)

    def index(self, name: str) -> list[tuple[str, str, str]]:
        return [(item.version, item.state, item.reason) for item in self.manager.index() if item.name == name]

    def served(self, name: str, version: str = "") -> Any:
        """The fake model that a request would run on."""
        return self.manager.find(name, version)


def write(root: Path, name: str, versions: Iterable[int] = (1,), config: str | None = None) -> Path:
    """Add a model that only the fake loader can load. Gives its directory."""
    for version in versions:
        directory = root / name / str(version)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "model.onnx").write_bytes(b"fake")
    if config is not None:
        (root / name / "config.pbtxt").write_text(config)
    return root / name
