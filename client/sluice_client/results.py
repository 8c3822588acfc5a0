"""What calls return: plain frozen values, made from the protocol's messages."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from sluice_client.flow import Timing

Array = npt.NDArray[Any]
Parameter = bool | int | float | str


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Result(Mapping[str, Array]):
    """The answer to an inference: a mapping from output name to array, in the server's order.

    Arrays of a fixed-size type are read-only views of the answer's bytes, or of the shared memory that the output went
    to: `.copy()` one to write into it. BYTES outputs are object arrays of bytes. `model_version` is the version that
    ran, `id` the request's id, `parameters` what the server said about the answer as a whole, `timing` how long it took
    and where.
    """

    outputs: Mapping[str, Array]
    model_name: str
    model_version: str
    id: str
    parameters: Mapping[str, Parameter]
    timing: Timing

    def __getitem__(self, name: str) -> Array:
        try:
            return self.outputs[name]
        except KeyError:
            raise KeyError(f"no output {name!r}; there are {sorted(self.outputs)}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self.outputs)

    def __len__(self) -> int:
        return len(self.outputs)

    def __repr__(self) -> str:
        outputs = ", ".join(f"{name}: {array.dtype}{list(array.shape)}" for name, array in self.outputs.items())
        took = f"{self.timing.total_s * 1e3:.2f} ms from {self.timing.endpoint}"
        return f"<Result of {self.model_name} version {self.model_version}: {outputs}; {took}>"


@dataclass(frozen=True, slots=True)
class ServerMetadata:
    """Who the server is."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class TensorMetadata:
    """An input or output of a model: protocol datatype ("FP32", ...) and shape, -1 for any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ModelMetadata:
    """What a model takes and gives, and which versions of it are served."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclass(frozen=True, slots=True)
class ModelIndex:
    """A model version in the server's repository; version and state are "" for a model that was never loaded."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True, slots=True)
class Duration:
    """How often something happened and how long it took in sum."""

    count: int
    ns: int

    @property
    def mean_ms(self) -> float:
        """The mean time in milliseconds, 0 when it never happened."""
        return self.ns / self.count / 1e6 if self.count else 0.0


@dataclass(frozen=True, slots=True)
class BatchStatistics:
    """Executions with one total batch size: how many, and where their time went."""

    batch_size: int
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration


@dataclass(frozen=True, slots=True)
class ModelStatistics:
    """The counters of a model version since it was loaded.

    `inference_count` counts rows, `execution_count` runs of the model; the durations count requests.
    `last_inference_ms` is the Unix time in milliseconds, 0 for never.
    """

    name: str
    version: str
    last_inference_ms: int
    inference_count: int
    execution_count: int
    success: Duration
    fail: Duration
    queue: Duration
    compute_input: Duration
    compute_infer: Duration
    compute_output: Duration
    cache_hit: Duration
    cache_miss: Duration
    batches: tuple[BatchStatistics, ...]

    @property
    def mean_batch_rows(self) -> float:
        """Rows per execution, 0 before the first."""
        return self.inference_count / self.execution_count if self.execution_count else 0.0
