"""Triton's flags that are not there: each is refused by name, with what to do instead if there is anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sluice_server.flag_values import SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence

REFUSED: dict[str, str] = {
    "--allow-sagemaker": "the SageMaker front end is not there",
    "--allow-vertex-ai": "the Vertex AI front end is not there",
    "--backend-directory": "there is one backend, ONNX Runtime, and it is built in",
    "--buffer-management-thread-count": "tensors are views over the received message and are not copied by threads",
    "--cache-directory": "there is one response cache, local, and it is built in",
    "--cuda-memory-pool-byte-size": "ONNX Runtime's own allocator is used: pass gpu_mem_limit to the CUDA provider",
    "--cuda-virtual-address-size": "ONNX Runtime's own allocator is used",
    "--enable-peer-access": "peer access is ONNX Runtime's affair",
    "--grpc-infer-allocation-pool-size": "there is no pool of request objects",
    "--grpc-max-response-pool-size": "there is no pool of response objects",
    "--host-policy": "host policies are not there",
    "--min-supported-compute-capability": "ONNX Runtime decides which GPUs it can use",
    "--model-load-gpu-limit": "there is no limit on a GPU's memory at load",
    "--model-namespacing": "model names are unique over all repositories",
    "--pinned-memory-pool-byte-size": "there is no pinned memory pool",
    "--repoagent-directory": "repository agents are not there",
    "--sagemaker-port": "the SageMaker front end is not there",
    "--sagemaker-safe-port-range": "the SageMaker front end is not there",
    "--sagemaker-thread-count": "the SageMaker front end is not there",
    "--trace-count": "it is deprecated in Triton: use --trace-config count=N",
    "--trace-file": "it is deprecated in Triton: use --trace-config triton,file=FILE",
    "--trace-level": "it is deprecated in Triton: use --trace-config level=TIMESTAMPS",
    "--trace-log-frequency": "it is deprecated in Triton: use --trace-config triton,log-frequency=N",
    "--trace-rate": "it is deprecated in Triton: use --trace-config rate=N",
    "--vertex-ai-default-model": "the Vertex AI front end is not there",
    "--vertex-ai-port": "the Vertex AI front end is not there",
    "--vertex-ai-thread-count": "the Vertex AI front end is not there",
}
"""Triton's flags that this version does not have, with the reason."""


def refuse_unimplemented(argv: Sequence[str]) -> None:
    """Raise for the first of Triton's flags that this version does not have."""
    for argument in argv:
        flag = argument.partition("=")[0]
        if flag in REFUSED:
            raise SettingsError(f"{flag} is a flag of Triton that is not implemented here: {REFUSED[flag]}")
