"""What a served model version accepts and returns, worked out once at load so that a request only looks things up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sluice_proto.tensors import BY_CONFIG_TYPE, DType
from sluice_server.graph import VARIABLE

if TYPE_CHECKING:
    from sluice_proto.model_config_pb2 import ModelConfig, ModelInput, ModelOutput


@dataclass(frozen=True, slots=True)
class TensorInterface:
    """One input or output as clients see it; `dims` leave the batch dimension out, -1 is any size.

    `unit` tensors have a last dimension of 1 for clients that the graph's own tensor lacks: a configuration cannot
    write a tensor without dims.
    """

    name: str
    dtype: DType
    dims: tuple[int, ...]
    optional: bool
    unit: bool = False

    @property
    def variable(self) -> bool:
        """Whether requests may differ in this tensor's shape, apart from their rows."""
        return VARIABLE in self.dims

    def accepts(self, dims: tuple[int, ...]) -> bool:
        """Whether dims of a request (without the batch dimension) fit."""
        return dims == self.dims or (
            len(dims) == len(self.dims)
            and all(wanted in (VARIABLE, got) for wanted, got in zip(self.dims, dims, strict=True))
        )


@dataclass(frozen=True, slots=True)
class ModelInterface:
    """The tensors of one model version. `max_batch_rows` is 0 for a model without a batch dimension."""

    name: str
    version: str
    max_batch_rows: int
    inputs: dict[str, TensorInterface]
    outputs: dict[str, TensorInterface]
    output_names: tuple[str, ...]
    required_inputs: int
    variable: bool
    """Whether two valid requests may differ in more than their rows, so that a batch key must tell them apart."""

    @classmethod
    def of(cls, config: ModelConfig, version: int, units: frozenset[str] = frozenset()) -> ModelInterface:
        """Read a completed configuration; `units` are the names of its unit tensors."""

        def read(item: ModelInput | ModelOutput, *, optional: bool) -> TensorInterface:
            dtype = BY_CONFIG_TYPE[item.data_type]
            return TensorInterface(item.name, dtype, tuple(item.dims), optional, item.name in units)

        inputs = {item.name: read(item, optional=item.optional) for item in config.input}
        outputs = {item.name: read(item, optional=False) for item in config.output}
        return cls(
            name=config.name,
            version=str(version),
            max_batch_rows=config.max_batch_size,
            inputs=inputs,
            outputs=outputs,
            output_names=tuple(outputs),
            required_inputs=sum(not tensor.optional for tensor in inputs.values()),
            variable=any(tensor.variable or tensor.optional for tensor in inputs.values()),
        )
