"""`sluice check`: what each model's configuration becomes, and why, without serving it."""

from __future__ import annotations

from typing import TYPE_CHECKING, TextIO

from sluice_server.errors import SluiceError
from sluice_server.execution import runtime
from sluice_server.execution.loader import Host, PreparedModel, prepare
from sluice_server.execution.options import describe
from sluice_server.repository.config import read_config
from sluice_server.repository.describe import explain
from sluice_server.repository.layout import Repositories
from sluice_server.repository.versions import select

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from sluice_proto.model_config_pb2 import ModelConfig
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
        directory = repositories.find(name)
        written = None if directory.config_path is None else read_config(directory.config_path)
        versions = select(None if written is None else written.version_policy, directory.versions)
    except SluiceError as error:
        yield f"{_BROKEN}{error}"
        return
    if not versions:
        yield f"{_BROKEN}no version to load: {directory.path} has {list(directory.versions) or 'none'}"
    for version in versions:
        yield f"  version {version}"
        try:
            prepared = prepare(directory, version, written, settings, host)
        except SluiceError as error:
            yield f"{_BROKEN}{error}"
            continue
        yield from (f"    {line}" for line in _decisions(written, prepared))


def _decisions(written: ModelConfig | None, prepared: PreparedModel) -> Iterator[str]:
    yield from explain(written, prepared.config, prepared.groups[0].session.signature)
    if prepared.proof is not None:
        yield f"batch proof: {prepared.proof}"
    if prepared.curve is not None:
        yield f"batch curve: {prepared.curve}"
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
