"""Which instances of a model run on which device, and the session that they share there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice_proto.model_config_pb2 import ModelInstanceGroup
from sluice_server.execution.options import plan_options
from sluice_server.execution.parameters import parameter_values
from sluice_server.execution.providers import choose_providers
from sluice_server.execution.session import Session
from sluice_server.execution.threads import plan_threads

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sluice_proto.model_config_pb2 import ModelConfig, ModelRateLimiter
    from sluice_server.execution.host import Host
    from sluice_server.execution.options import OptionPlan
    from sluice_server.execution.providers import ProviderPlan
    from sluice_server.execution.threads import ThreadPlan
    from sluice_server.settings import ModelSettings

CPU_DEVICE = -1
"""Where a GPU's number would stand for a session on the CPU."""


@dataclass(frozen=True, slots=True)
class DeviceGroup:
    """The instances of a model on one device: they share one session."""

    device: int
    session: Session
    threads: ThreadPlan
    options: OptionPlan
    providers: ProviderPlan
    limits: tuple[ModelRateLimiter, ...]
    """The `rate_limiter` of each instance that is asked for; there may be fewer."""


def placements(config: ModelConfig) -> dict[int, list[ModelInstanceGroup]]:
    """The groups that are on each device, in order: they share one session."""
    found: dict[int, list[ModelInstanceGroup]] = {}
    for group in config.instance_group:
        on_cpu = group.kind == ModelInstanceGroup.KIND_CPU
        for device in (CPU_DEVICE,) if on_cpu else tuple(group.gpus) or (0,):
            found.setdefault(device, []).append(group)
    return found


def open_groups(path: Path, config: ModelConfig, settings: ModelSettings, host: Host) -> tuple[DeviceGroup, ...]:
    """Open a session of the model file at `path` on each device that a configuration names."""
    return tuple(
        _open_group(path, config, device, members, settings, host) for device, members in placements(config).items()
    )


def _open_group(
    path: Path,
    config: ModelConfig,
    device: int,
    members: Sequence[ModelInstanceGroup],
    settings: ModelSettings,
    host: Host,
) -> DeviceGroup:
    """Open the session of the groups that are on a device."""
    providers = choose_providers(
        config,
        members[0].kind,
        max(device, 0),
        host.providers,
        host.gpus,
        group=members[0].name,
        allow_fallback=settings.allow_provider_fallback,
    )
    limits = tuple(group.rate_limiter for group in members for _ in range(group.count))
    threads = plan_threads(len(limits), parameter_values(config), host.cpus, model=config.name, on_gpu=providers.on_gpu)
    options = plan_options(config, threads)
    session = Session(path, options, providers.choices, allow_fallback=settings.allow_provider_fallback)
    return DeviceGroup(device, session, threads, options, providers, limits)
