"""The scheduling features switched on for all models but the one that is measured: what they cost without their use.

Two servers of this version serve the identity model as it is. One has no feature on. The other has the flags that
features need, and next to that model one for each feature: a cost that is paid for their being there at all, in
decoding, queueing, running or encoding, shows as a difference. What both pay it does not show; the bare echo does that.
"""

import shutil
from pathlib import Path

from loadtests.models import generate

FLAGS = (
    "--cache-config=local,size=67108864",
    "--rate-limit=execution_count",
    "--rate-limit-resource=R:1",
    "--allow-client-shm",
)

MODELS = {
    "with_cache": "response_cache { enable: true } dynamic_batching { }",
    "with_priorities": "dynamic_batching { priority_levels: 3 default_priority_level: 2 }",
    "with_queue_policy": "dynamic_batching { default_queue_policy {"
    " default_timeout_microseconds: 100000 allow_timeout_override: true max_queue_size: 100 } }",
    "with_objective": 'dynamic_batching { } parameters { key: "slo_p99_ms" value { string_value: "50" } }',
    "with_split": 'dynamic_batching { } parameters { key: "split_requests" value { string_value: "true" } }',
    "with_preferred_sizes": "dynamic_batching { preferred_batch_size: [ 8, 16 ] max_queue_delay_microseconds: 500 }",
    "with_rate_limiter": "dynamic_batching { } instance_group { count: 1 kind: KIND_CPU rate_limiter {"
    ' resources { name: "R" count: 1 } } }',
    "with_sequences": "sequence_batching { oldest { max_candidate_sequences: 16 } }",
}
"""What the configuration of each says, beside the tensors of the identity model."""

OTHERS = ("lengths_bucketed", "pipeline")
"""Shape buckets and an ensemble, which need models of their own."""


def write(repository: Path, measured: Path) -> Path:
    """A repository with the identity model out of another one, and all neighbours; gives its own path."""
    shutil.copytree(measured / "identity", repository / "identity")
    for name in OTHERS:
        generate(name, repository)
    tensors = "".join(
        f'{kind} {{ name: "{tensor}" data_type: TYPE_FP32 dims: 16 }}\n'
        for kind, tensor in (("input", "X"), ("output", "Y"))
    )
    for name, text in MODELS.items():
        shutil.copytree(measured / "identity" / "1", repository / name / "1")
        (repository / name / "config.pbtxt").write_text(
            f'backend: "onnxruntime"\nmax_batch_size: 64\n{tensors}{text}\n'
        )
    return repository
