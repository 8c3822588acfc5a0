"""Opens a model version: completes its configuration, opens its sessions, tries it, and says what was decided.

Everything that can go wrong with a version goes wrong here. `sluice check` stops after it; the loader goes on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sluice_server.execution.batch_proof import Verdict
from sluice_server.execution.bucket_options import read_buckets
from sluice_server.execution.merging import merges
from sluice_server.execution.objective import read_slo_ns
from sluice_server.execution.placement import open_groups
from sluice_server.execution.sequences import SequenceTensors
from sluice_server.execution.split import PARTS_MAX, read_split
from sluice_server.execution.trials import TrialOptions, try_model
from sluice_server.protocol.interface import ModelInterface
from sluice_server.repository.autocomplete import complete, normalize
from sluice_server.repository.labels import read_labels
from sluice_server.repository.validate import scalar_tensors

if TYPE_CHECKING:
    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.host import Host
    from sluice_server.execution.placement import DeviceGroup
    from sluice_server.execution.trials import Findings
    from sluice_server.repository.layout import ModelDirectory
    from sluice_server.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class PreparedModel:
    """A version with its sessions open: everything that loading decides."""

    config: ModelConfig
    groups: tuple[DeviceGroup, ...]
    interface: ModelInterface
    slo_ns: int
    """The latency objective; 0: there is none."""
    splits: bool
    """Whether requests of more rows than max_batch_size are taken, and split."""
    sequences: SequenceTensors | None
    """What the server feeds and keeps for a model with sequences."""
    findings: Findings

    @property
    def merges(self) -> bool:
        """Whether requests share batches."""
        proof = self.findings.proof
        return merges(self.config) and (proof is None or proof.verdict is not Verdict.UNSAFE)

    @property
    def instances(self) -> int:
        """How many run, on all devices."""
        return sum(group.threads.instances for group in self.groups)

    @property
    def notice(self) -> str:
        """What RepositoryIndex says of the version though it is ready: what it does not do as configured; or ""."""
        if self.findings.padding:
            why = self.findings.padding
            return f"shape_buckets are off, requests share a batch where their shapes are equal: {why}"
        if self.findings.proof is None or self.merges:
            return ""
        return (
            f"dynamic batching is off, each request is its own execution: {self.findings.proof.reason}"
            " (parameter 'batch_proof' = off has requests merged all the same)"
        )

    @property
    def fallbacks(self) -> tuple[str, ...]:
        """A sentence for each provider that was asked for and is not used."""
        return tuple(text for group in self.groups for text in (*group.providers.warnings, *group.session.fallbacks))

    @property
    def properties(self) -> dict[str, str]:
        """What ModelMetadata tells of how the model really runs, read back from its sessions."""
        providers = dict.fromkeys(name for group in self.groups for name in group.session.providers)
        properties = {
            "execution_providers": ",".join(providers),
            "instances": str(self.instances),
            "intra_op_threads": str(self.groups[0].threads.intra_op_threads),
        }
        if self.findings.proof is not None:
            properties["batch_proof"] = str(self.findings.proof)
        if self.findings.curve is not None:
            properties["batch_curve"] = str(self.findings.curve)
        if self.fallbacks:
            properties["provider_fallback"] = "; ".join(self.fallbacks)
        return properties


def prepare(
    directory: ModelDirectory, version: int, written: ModelConfig | None, settings: ModelSettings, host: Host
) -> PreparedModel:
    """Open one version. Raises ConfigError for what is written, ModelLoadError, BackendError or InvalidArgument
    (providers, options) for what does not fit the model file or the machine.
    """
    config = normalize(written, name=directory.name, auto_complete=settings.auto_complete, gpu_available=host.has_cuda)
    wanted = TrialOptions.of(written, config)
    path = directory.model_file(version, config.default_model_filename)
    groups = open_groups(path, config, settings, host)
    # What one session shows of the model holds for the others.
    signature = groups[0].session.signature
    completed = complete(
        config,
        signature,
        auto_complete=settings.auto_complete,
        default_max_batch_size=settings.default_max_batch_size,
    )
    sequences = None
    if completed.HasField("sequence_batching"):
        sequences = SequenceTensors.of(completed, signature, directory.path)
    scalars, labels = scalar_tensors(completed, signature), read_labels(completed, directory.path)
    interface = ModelInterface.of(completed, version, scalars, labels, read_buckets(completed))
    findings = try_model(path, groups[0], completed, interface, wanted, settings, host)
    if findings.padding:
        interface = ModelInterface.of(completed, version, scalars, labels)
    splits = read_split(completed)
    if splits:
        interface = replace(interface, max_request_rows=interface.max_batch_rows * PARTS_MAX)
    return PreparedModel(completed, groups, interface, read_slo_ns(completed), splits, sequences, findings)
