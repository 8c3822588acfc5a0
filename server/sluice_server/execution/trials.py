"""What a model is tried for at load: whether its rows may share batches, which sizes pay, and whether it sees padding.

Each trial is a module of its own; here is what is tried of which model, by what its configuration says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice_server.execution import batch_curve, curve_cache, runtime
from sluice_server.execution.batch_curve import BatchCurve, CurveOptions
from sluice_server.execution.batch_proof import BatchProof, ProofOptions, Verdict, proof_options, prove
from sluice_server.execution.bucket_proof import padding_problem
from sluice_server.execution.curve_cache import CurveCache
from sluice_server.execution.merging import merges
from sluice_server.execution.ragged import is_ragged

if TYPE_CHECKING:
    from pathlib import Path

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.host import Host
    from sluice_server.execution.placement import DeviceGroup
    from sluice_server.protocol.interface import ModelInterface
    from sluice_server.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class TrialOptions:
    """What a configuration says of its trials."""

    proof: ProofOptions
    curve: CurveOptions

    @classmethod
    def of(cls, written: ModelConfig | None, normalized: ModelConfig) -> TrialOptions:
        """Read them; BadOption for a value that they cannot have."""
        return cls(proof_options(normalized), batch_curve.curve_options(written))


@dataclass(frozen=True, slots=True)
class Findings:
    """What came out of the trials."""

    proof: BatchProof | None = None
    """Whether the rows may share batches; None where they do not, and where a batch is not the rows of its requests."""
    curve: BatchCurve | None = None
    """Up to which size batches pay; None where that was not measured."""
    padding: str = ""
    """Why the inputs are not padded although the model has shape buckets; empty for no reason."""


def try_model(
    path: Path,
    group: DeviceGroup,
    config: ModelConfig,
    interface: ModelInterface,
    wanted: TrialOptions,
    settings: ModelSettings,
    host: Host,
) -> Findings:
    """Try the model file at `path` by the session of `group`; `config` is complete, `interface` is of it."""
    if not merges(config) or is_ragged(config):
        return Findings()
    session = group.session
    proof = prove(session, session.signature, config, wanted.proof, session.providers)
    curve = None
    if proof.verdict is not Verdict.UNSAFE and proof.rows and wanted.curve.wanted:
        cache = CurveCache(host.cache_directory if settings.curve_directory is None else settings.curve_directory)
        facts = _facts(path, group, config, proof, host) if cache.keeps else {}
        curve = _curve(group, config, proof, wanted.curve, cache, facts)
    padding = ""
    if interface.buckets is not None:
        padding = padding_problem(session, interface, interface.buckets, proof, wanted.proof)
    return Findings(proof, curve, padding)


def _curve(
    group: DeviceGroup,
    config: ModelConfig,
    proof: BatchProof,
    wanted: CurveOptions,
    cache: CurveCache,
    facts: curve_cache.Facts,
) -> BatchCurve:
    """The curve of a model: the one that is kept, or measured now."""
    points = cache.get(facts)
    if points is None:
        names = [tensor.name for tensor in config.output]
        run_clock = batch_curve.run_clock_for(group.session.providers, group.threads)
        points = batch_curve.measure(group.session, names, proof.rows, config.max_batch_size, run_clock=run_clock)
        # Else there was no time for all sizes, and there may be at another load.
        if points and points[-1].rows == config.max_batch_size:
            cache.put(facts, points)
    return BatchCurve(points, batch_curve.choose_cap(points, config.max_batch_size) if wanted.caps else 0)


def _facts(path: Path, group: DeviceGroup, config: ModelConfig, proof: BatchProof, host: Host) -> curve_cache.Facts:
    """What the curve of a model depends on."""
    return {
        "model": curve_cache.file_digest(path),
        "max_batch_rows": config.max_batch_size,
        "outputs": [tensor.name for tensor in config.output],
        "inputs": {name: [str(array.dtype), *array.shape] for name, array in proof.rows[0].items()},
        "runtime": runtime.runtime_version(),
        "providers": [[choice.name, dict(choice.options)] for choice in group.providers.choices],
        "running": list(group.session.providers),
        "session": dict(group.options.session),
        "session_entries": dict(group.options.session_entries),
        "processors": host.processors,
    }
