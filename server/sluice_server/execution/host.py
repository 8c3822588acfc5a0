"""What this machine gives to models: CPUs, GPUs, and what ONNX Runtime can use of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice_server.execution import curve_cache, runtime
from sluice_server.execution.providers import CUDA, count_gpus
from sluice_server.execution.threads import available_cpus

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Host:
    """What this machine gives to models: CPUs by quota and affinity, GPUs, and ONNX Runtime's providers."""

    cpus: int
    gpus: int
    providers: tuple[str, ...]
    processors: str = ""
    """The names of its CPUs and GPUs."""
    cache_directory: Path | None = None
    """Where this user's caches are."""

    @property
    def has_cuda(self) -> bool:
        """Whether a model that names no device gets a GPU: there is one, and this ONNX Runtime can use it."""
        return self.gpus > 0 and CUDA in self.providers

    @classmethod
    def of_this_machine(cls, environ: Mapping[str, str]) -> Host:
        """Look at the machine; CUDA_VISIBLE_DEVICES limits the GPUs as it does for CUDA."""
        return cls(
            available_cpus(),
            count_gpus(environ.get("CUDA_VISIBLE_DEVICES")),
            runtime.available_providers(),
            curve_cache.processors(),
            curve_cache.default_directory(environ),
        )
