"""What a served model version accepts and returns, worked out once at load so that a request only looks things up."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sluice_proto.model_config_pb2 import ModelInput
from sluice_proto.tensors import BY_CONFIG_TYPE, DType
from sluice_server.errors import Internal
from sluice_server.graph import VARIABLE, format_shape
from sluice_server.repository.sequences import Control, control_datatype

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from sluice_proto.model_config_pb2 import ModelConfig, ModelOutput
    from sluice_server.execution.buckets import Buckets

NO_LABELS: Mapping[str, tuple[bytes, ...]] = MappingProxyType({})
"""Of a model without label files."""


@dataclass(frozen=True, slots=True)
class TensorInterface:
    """One input or output as clients see it; `dims` leave the batch dimension out, -1 is any size.

    `graph_dims` are the dims of the graph's own tensor where they are others: by `reshape`, or because a configuration
    cannot write a scalar, which is [1] there. They hold as many elements, and as many open dimensions in the same
    order. `labels` are the names of the classes of an output, by their index; an empty one is none.
    Requests whose shapes of a `ragged` input differ may share a batch.
    """

    name: str
    dtype: DType
    dims: tuple[int, ...]
    optional: bool
    graph_dims: tuple[int, ...] | None = None
    labels: tuple[bytes, ...] = ()
    ragged: bool = False

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

    def to_graph(self, shape: tuple[int, ...], batch_dims: int) -> tuple[int, ...]:
        """The graph's shape of an accepted tensor of a client; both begin with `batch_dims` dimensions, 0 or 1."""
        return _carried(shape, batch_dims, self.dims, self.dims if self.graph_dims is None else self.graph_dims)

    def to_client(self, shape: tuple[int, ...], batch_dims: int) -> tuple[int, ...]:
        """The client's shape of a tensor that the graph gave; one of another rank, which it may have, is kept."""
        if self.graph_dims is None or len(shape) - batch_dims != len(self.graph_dims):
            return shape
        return _carried(shape, batch_dims, self.graph_dims, self.dims)


def _carried(
    shape: tuple[int, ...], batch_dims: int, dims: tuple[int, ...], other_dims: tuple[int, ...]
) -> tuple[int, ...]:
    """A shape of `dims` as one of `other_dims`: the sizes of the open dimensions go over in their order."""
    sizes = iter([size for size, dim in zip(shape[batch_dims:], dims, strict=True) if dim == VARIABLE])
    return (*shape[:batch_dims], *(next(sizes) if dim == VARIABLE else dim for dim in other_dims))


def has_queue_policy(config: ModelConfig) -> bool:
    """Whether a configuration says anything on priorities or on how long requests may wait."""
    scheduler = config.dynamic_batching
    return bool(
        scheduler.priority_levels or scheduler.HasField("default_queue_policy") or scheduler.priority_queue_policy
    )


@dataclass(frozen=True, slots=True)
class ModelInterface:
    """The tensors of one model version. `max_batch_rows` is 0 for a model without a batch dimension.

    `max_request_rows` is the same, or more where larger requests are split.
    """

    name: str
    version: str
    max_batch_rows: int
    max_request_rows: int
    inputs: dict[str, TensorInterface]
    outputs: dict[str, TensorInterface]
    output_names: tuple[str, ...]
    required_inputs: int
    variable: bool
    """Whether two valid requests may differ in more than their rows, so that a batch key must tell them apart."""
    keyed_inputs: tuple[str, ...]
    """The inputs whose shapes requests of one batch have in common: all but the ragged ones."""
    buckets: Buckets | None = None
    """How requests share a batch whose shapes differ and are padded; None: they do not."""
    prioritizes: bool = False
    """Whether the queue decides what a request's `priority` and `timeout` mean. Else there are no priorities, and the
    timeout is a deadline."""
    sequenced: bool = False
    """Whether every request is part of a sequence."""
    id_datatype: str = ""
    """The data type in which the model is told a sequence's id; empty when it is not."""

    @property
    def key_tells_shapes(self) -> bool:
        """Whether requests with equal batch keys and rows have inputs of equal shapes."""
        return self.buckets is None and len(self.keyed_inputs) == len(self.inputs)

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        version: int,
        scalars: frozenset[str] = frozenset(),
        labels: Mapping[str, tuple[bytes, ...]] = NO_LABELS,
        buckets: Buckets | None = None,
    ) -> ModelInterface:
        """Read a completed configuration; `scalars` are the tensors that are scalars in the graph."""
        masks = frozenset() if buckets is None else buckets.masks

        def read(item: ModelInput | ModelOutput, *, optional: bool) -> TensorInterface:
            graph_dims = tuple(item.reshape.shape) if item.HasField("reshape") else None
            return TensorInterface(
                item.name,
                BY_CONFIG_TYPE[item.data_type],
                tuple(item.dims),
                optional,
                () if item.name in scalars else graph_dims,
                labels.get(item.name, ()),
                isinstance(item, ModelInput) and item.allow_ragged_batch,
            )

        inputs = {item.name: read(item, optional=item.optional or item.name in masks) for item in config.input}
        outputs = {item.name: read(item, optional=False) for item in config.output}
        return cls(
            name=config.name,
            version=str(version),
            max_batch_rows=config.max_batch_size,
            max_request_rows=config.max_batch_size,
            inputs=inputs,
            outputs=outputs,
            output_names=tuple(outputs),
            required_inputs=sum(not tensor.optional for tensor in inputs.values()),
            variable=any((tensor.variable and not tensor.ragged) or tensor.optional for tensor in inputs.values()),
            keyed_inputs=tuple(name for name, tensor in inputs.items() if not tensor.ragged),
            buckets=buckets,
            prioritizes=has_queue_policy(config),
            sequenced=config.HasField("sequence_batching"),
            id_datatype=next(
                (
                    control_datatype(item.control[0])
                    for item in config.sequence_batching.control_input
                    if item.control[0].kind == Control.CONTROL_SEQUENCE_CORRID
                ),
                "",
            ),
        )

    @property
    def batch_dims(self) -> int:
        """How many dimensions stand before a tensor's dims: 1 for the rows of a model that batches."""
        return 1 if self.max_batch_rows else 0

    def shape_key(self, arrays: Mapping[str, Any]) -> tuple[object, ...]:
        """What the batch key of a request has of its inputs' shapes, which begin with its rows if there are any.

        `InvalidArgument` when they do not agree in a length that is padded.
        """
        dims = {name: arrays[name].shape[self.batch_dims :] for name in self.keyed_inputs if name in arrays}
        return tuple(dims.items()) if self.buckets is None else self.buckets.key(dims)

    @property
    def reshapes_outputs(self) -> bool:
        """Whether any output has another shape for clients than in the graph."""
        return any(output.graph_dims is not None for output in self.outputs.values())

    def to_client(self, names: Sequence[str], arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Outputs as the graph gave them, as clients see them; `Internal` for one that is not of its dims."""
        return [self._as_seen(name, array) for name, array in zip(names, arrays, strict=True)]

    def _as_seen(self, name: str, array: np.ndarray) -> np.ndarray:
        shape = self.outputs[name].to_client(array.shape, self.batch_dims)
        try:
            return array.reshape(shape)
        except ValueError as error:
            raise Internal(
                f"output '{name}' came out with shape {format_shape(array.shape)}, which the model's configuration"
                f" makes {format_shape(shape)}"
            ) from error
