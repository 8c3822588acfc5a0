"""Reads a model's latency objective, `slo_p99_ms` in its configuration's `parameters`."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from sluice_server.execution.parameters import BadOption, parameter_values

if TYPE_CHECKING:
    from sluice_proto.model_config_pb2 import ModelConfig

PARAMETER = "slo_p99_ms"

SLO_MS_MAX = 3_600_000
"""An hour: a longer one is a slip of the hand."""

_NS_PER_MS = 1_000_000


def read_slo_ns(config: ModelConfig) -> int:
    """The objective in nanoseconds, 0 for none; BadOption for what is no time in milliseconds."""
    text = parameter_values(config).get(PARAMETER)
    if text is None:
        return 0
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", text) or not 0 < float(text) <= SLO_MS_MAX:
        raise BadOption(config.name, PARAMETER, text, f"milliseconds above 0, up to {SLO_MS_MAX}")
    if config.HasField("sequence_batching"):
        raise BadOption(config.name, PARAMETER, text, "no value, as sequences are not batched by it")
    return int(float(text) * _NS_PER_MS)
