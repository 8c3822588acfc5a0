"""`sluice check`: what each model's configuration becomes, and why, without serving it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from sluice_server.errors import SluiceError
from sluice_server.execution import runtime
from sluice_server.execution.host import Host
from sluice_server.execution.merging import MERGE
from sluice_server.execution.options import describe
from sluice_server.execution.preparation import PreparedModel, prepare
from sluice_server.execution.split import SPLIT
from sluice_server.repository.autocomplete import normalize
from sluice_server.repository.config import read_config
from sluice_server.repository.describe import explain, explain_ensemble
from sluice_server.repository.ensembles import check_parts, is_ensemble, version_of
from sluice_server.repository.errors import ModelLoadError
from sluice_server.repository.layout import Repositories
from sluice_server.repository.parts import PartState
from sluice_server.repository.versions import select

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.repository.layout import ModelDirectory
    from sluice_server.settings import ModelSettings


def check_models(settings: ModelSettings, names: Sequence[str], environ: Mapping[str, str], out: TextIO) -> int:
    """Print a paragraph for each version of each model that would be loaded; 1 when one of them cannot be."""
    runtime.configure_runtime()
    host = Host.of_this_machine(environ)
    repositories = Repositories(settings.repositories, settings.config_name)
    print(f"this process may use {host.cpus} CPU(s) and {host.gpus} GPU(s); ONNX Runtime {runtime.runtime_version()}"
          f" has {', '.join(host.providers)}", file=out)  # fmt: skip
    good = True
    for name in names or repositories.scan():
        for line in _check_model(repositories, name, settings, host):
            good = good and not line.startswith(_BROKEN)
            print(line, file=out)
    return 0 if good else 1


_BROKEN = "  BROKEN: "


def _check_model(repositories: Repositories, name: str, settings: ModelSettings, host: Host) -> Iterator[str]:
    yield f"\n{name}"
    try:
        directory, written, versions = _read(repositories, name)
    except SluiceError as error:
        yield f"{_BROKEN}{error}"
        return
    if not versions:
        yield f"{_BROKEN}no version to load: {directory.path} has {list(directory.versions) or 'none'}"
    for version in versions:
        yield f"  version {version}"
        try:
            if written is not None and is_ensemble(written):
                lines = _decisions_of_ensemble(repositories, name, written, settings, host)
                yield from (f"    {line}" for line in lines)
                continue
            prepared = prepare(directory, version, written, settings, host)
        except SluiceError as error:
            yield f"{_BROKEN}{error}"
            continue
        yield from (f"    {line}" for line in _decisions(written, prepared))


def _read(repositories: Repositories, name: str) -> tuple[ModelDirectory, ModelConfig | None, tuple[int, ...]]:
    """A model's directory, its configuration as written, and the versions to load."""
    directory = repositories.find(name)
    written = None if directory.config_path is None else read_config(directory.config_path)
    return directory, written, select(None if written is None else written.version_policy, directory.versions)


def _decisions_of_ensemble(
    repositories: Repositories, name: str, written: ModelConfig, settings: ModelSettings, host: Host
) -> list[str]:
    completed = normalize(written, name=name)
    parts = _complete_parts(repositories, completed, settings, host, (name,))
    return explain_ensemble(written, completed, parts)


def _complete_parts(
    repositories: Repositories, ensemble: ModelConfig, settings: ModelSettings, host: Host, path: tuple[str, ...]
) -> list[ModelConfig]:
    """The completed configurations of an ensemble's steps' models, checked; `path` are the ensembles around them."""
    found: dict[tuple[str, int | None], ModelConfig] = {}
    for step in ensemble.ensemble_scheduling.step:
        part, number = step.model_name, version_of(step)
        if (part, number) in found:
            continue
        if part in path:
            circle = " -> ".join((*path[path.index(part) :], part))
            raise ModelLoadError(f"ensemble '{part}' contains itself: {circle}", model=part)
        directory, written, versions = _read(repositories, part)
        version = PartState({each: each for each in versions}, "it has none").choose(ensemble.name, part, number)
        if written is not None and is_ensemble(written):
            config = normalize(written, name=part)
            _complete_parts(repositories, config, settings, host, (*path, part))
        else:
            config = prepare(directory, version, written, settings, host).config
        found[part, number] = config
    parts = [found[step.model_name, version_of(step)] for step in ensemble.ensemble_scheduling.step]
    check_parts(ensemble, parts)
    return parts


def _decisions(written: ModelConfig | None, prepared: PreparedModel) -> Iterator[str]:
    yield from explain(written, prepared.config, prepared.groups[0].session.signature)
    if MERGE in prepared.config.parameters and not prepared.merges:
        yield f"{MERGE}: each request is its own execution; what dynamic_batching says of the queue holds"
    if prepared.splits:
        yield f"{SPLIT}: requests of more than {prepared.config.max_batch_size} rows are queued in parts, answered once"
    if prepared.findings.proof is not None:
        yield f"batch proof: {prepared.findings.proof}"
    if prepared.findings.curve is not None:
        yield f"batch curve: {prepared.findings.curve}"
    if prepared.notice:
        yield prepared.notice
    for group in prepared.groups:
        threads = group.threads
        yield f"runs on {', '.join(group.session.providers)}, as read back from the session"
        yield from (f"{choice.name}: {choice.why}" for choice in group.providers.choices)
        yield f"{threads.instances} instance(s) share one session with {threads.intra_op_threads} intra-op thread(s)"
        yield from threads.reasons
        yield from describe(group.options)
    yield from (f"fallback: {text}" for text in prepared.fallbacks)
