"""Models with sequences: their control inputs, their state from run to run, and what a client is told of them.

Made by the loader in place of what `instance.py` and `model.py` have, so that other models do nothing for it.

The state of a sequence is a tuple of arrays, one row each, that the server keeps with it (`LiveSequence.state`). It is
gathered into the batch before a run and cut out of the outputs after it. A request that fails, alone or as the guilty
one of a batch, leaves the state as it was; when it was to begin the sequence, the next one begins it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sluice_batching import SequenceNotStarted
from sluice_proto import errors as proto_errors
from sluice_proto import tensors
from sluice_proto.tensors import BY_CONFIG_TYPE, BY_NAME
from sluice_server.errors import Internal, InvalidArgument
from sluice_server.execution.instance import BatchRunner
from sluice_server.execution.model import ServedModel
from sluice_server.graph import VARIABLE, format_shape
from sluice_server.observability.statistics import Outcome
from sluice_server.repository.errors import ModelLoadError
from sluice_server.repository.sequences import INITIAL_STATE_DIRECTORY, PAIRS, Control, control_datatype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from sluice_batching import BatchingError, RunTimes, Step
    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.instance import Answers, Encode, Runnable
    from sluice_server.execution.request import InferRequest
    from sluice_server.graph import GraphSignature
    from sluice_server.observability.statistics import ModelStatistics
    from sluice_server.status import StatusMapper

STATE_BYTES_MAX = 1 << 30
"""Of one state at its beginning: every live sequence has one, so that a larger one is a slip of the hand."""

State = tuple[np.ndarray, ...]
"""One row of each state of a model, in the order of its configuration."""


@dataclass(frozen=True, slots=True)
class ControlTensor:
    """One control input: what it says of each row. `shape` is that of the whole tensor, -1 for the rows."""

    name: str
    kind: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    false: Any
    true: Any

    def of(self, steps: Sequence[Step], rows: Sequence[int], width: int) -> np.ndarray:
        """The tensor for `width` rows, of which `rows` are those of the steps; the others have no request."""
        values = np.full(width, self.false, self.dtype)
        for step, row in zip(steps, rows, strict=True):
            if self.kind == Control.CONTROL_SEQUENCE_CORRID:
                values[row] = _id_as(self.dtype, step.sequence_id)
            elif self.kind == Control.CONTROL_SEQUENCE_READY or self._flag(step):
                values[row] = self.true
        return values.reshape(self.shape)

    def _flag(self, step: Step) -> bool:
        return step.end if self.kind == Control.CONTROL_SEQUENCE_END else begins(step)


def begins(step: Step) -> bool:
    """Whether a request runs on the initial state: it begins its sequence, or nothing before it has succeeded."""
    return step.start or step.sequence is None or step.sequence.state is None


@dataclass(frozen=True, slots=True)
class StateTensor:
    """One state: its input, its output, and the row with which a sequence begins."""

    input_name: str
    output_name: str
    initial: np.ndarray


class SequenceTensors:
    """The tensors of a model that its clients do not see, and how a batch gets and leaves them."""

    def __init__(
        self, controls: Sequence[ControlTensor], states: Sequence[StateTensor], *, has_rows: bool, pads: bool
    ) -> None:
        """`has_rows`: whether tensors have a batch dimension. `pads`: whether sequences keep their row in a batch, so
        that rows without a request are filled up, and the model is told which those are.
        """
        self._controls = controls
        self._states = states
        self._has_rows = has_rows
        self._pads = pads

    @classmethod
    def of(cls, config: ModelConfig, signature: GraphSignature, directory: Path) -> SequenceTensors:
        """Read a completed configuration; `directory` is the model's. ModelLoadError for an initial state that cannot
        be had.
        """
        batching = config.sequence_batching
        has_rows = config.max_batch_size > 0
        scalars = {spec.name for spec in signature.inputs if not spec.shape}
        controls = [
            _control(item.name, item.control[0], (-1, 1) if has_rows else () if item.name in scalars else (1,))
            for item in batching.control_input
        ]
        states = [
            StateTensor(each.input_name, each.output_name, _initial(each, config.name, directory, has_rows=has_rows))
            for each in batching.state
        ]
        # A model that is not told of rows without a request cannot know of them: it is spared them.
        told = any(control.kind == Control.CONTROL_SEQUENCE_READY for control in controls)
        return cls(controls, states, has_rows=has_rows, pads=told and has_rows and not batching.HasField("oldest"))

    def run(
        self, session: Runnable, steps: Sequence[Step], output_names: Sequence[str], feeds: dict[str, np.ndarray]
    ) -> list[np.ndarray]:
        """Run a batch with its controls and states; each step has its new state then, which nobody uses yet."""
        rows = [step.sequence.row for step in steps] if self._pads and steps[0].sequence else range(len(steps))
        width = rows[-1] + 1 if self._has_rows else 1
        padded = width > len(steps)
        if padded:
            feeds = {name: _spread(array, rows, width) for name, array in feeds.items()}
        feeds = {**feeds, **{control.name: control.of(steps, rows, width) for control in self._controls}}
        for place, state in enumerate(self._states):
            array = _gather(state, [_row_before(step, place, state) for step in steps])
            feeds[state.input_name] = _spread(array, rows, width) if padded else array
        names = [*output_names, *(state.output_name for state in self._states if state.output_name not in output_names)]
        outputs = session.run(names, feeds)
        if padded:
            outputs = [_gathered(name, array, rows, width) for name, array in zip(names, outputs, strict=True)]
        kept = [outputs[names.index(state.output_name)] for state in self._states]
        for place, step in enumerate(steps):
            step.state = tuple([self._cut(array, place, len(steps)) for array in kept])
        return outputs[: len(output_names)]

    def _cut(self, array: np.ndarray, row: int, rows: int) -> np.ndarray:
        """One row of a state after a run; a copy, as a view would keep the rows of all others in memory."""
        if not self._has_rows:
            return array
        if not array.ndim or len(array) != rows:
            raise Internal(
                f"a state came out with shape {format_shape(array.shape)} for {rows} rows: the model does not keep one"
                " row per input row; set max_batch_size to 0"
            )
        return array if rows == 1 else array[row : row + 1].copy()


def _control(name: str, control: Any, shape: tuple[int, ...]) -> ControlTensor:
    datatype = control_datatype(control)
    dtype = BY_NAME[datatype].numpy
    if control.kind == Control.CONTROL_SEQUENCE_CORRID:
        nobody: Any = b"" if datatype == "BYTES" else 0
        return ControlTensor(name, control.kind, shape, dtype, nobody, nobody)
    field = next(field for field, of_field in PAIRS.items() if of_field == datatype)
    false, true = getattr(control, field)
    return ControlTensor(name, control.kind, shape, dtype, false, true)


def _id_as(dtype: np.dtype[Any], sequence_id: int | str) -> Any:
    if isinstance(sequence_id, str):
        return sequence_id.encode()
    return np.uint64(sequence_id).astype(dtype)


def _initial(state: Any, model: str, directory: Path, *, has_rows: bool) -> np.ndarray:
    """The row with which sequences begin; open dimensions are 1 when the configuration names no initial state."""
    dtype = BY_CONFIG_TYPE[state.data_type]
    initial = state.initial_state[0] if state.initial_state else None
    dims = [1 if dim == VARIABLE else dim for dim in state.dims] if initial is None else initial.dims
    shape = (1, *dims) if has_rows else tuple(dims)
    if math.prod(shape) * (dtype.itemsize or np.dtype(object).itemsize) > STATE_BYTES_MAX:
        raise ModelLoadError(
            f"state '{state.input_name}' of model '{model}' begins with shape {format_shape(shape)}, which takes more"
            f" than {STATE_BYTES_MAX} bytes",
            model=model,
        )
    if initial is None or not initial.HasField("data_file"):
        return np.zeros(shape, dtype.numpy) if dtype.itemsize else np.full(shape, b"", object)
    path = f"{INITIAL_STATE_DIRECTORY}/{initial.data_file}"
    try:
        return tensors.view(dtype, shape, (directory / path).read_bytes())
    except OSError as error:
        problem = error.strerror
    except proto_errors.TensorError as error:
        problem = f"does not hold {dtype.name} of shape {format_shape(shape)}: {error}"
    raise ModelLoadError(f"initial state '{initial.name}' of model '{model}': '{path}': {problem}", model=model)


def _row_before(step: Step, place: int, state: StateTensor) -> np.ndarray:
    if begins(step):
        return state.initial
    row: np.ndarray = step.sequence.state[place]
    return row


def _gather(state: StateTensor, rows: list[np.ndarray]) -> np.ndarray:
    """The states of a batch; those of different shapes cannot be run together, and whoever asked tries with fewer."""
    if len(rows) == 1:
        return rows[0]
    if len({row.shape for row in rows}) > 1:
        raise Internal(f"the states '{state.input_name}' of these sequences have different shapes")
    return np.concatenate(rows)


def _spread(array: np.ndarray, rows: Sequence[int], width: int) -> np.ndarray:
    """The rows of an array at their places among `width`, with nothing in the others."""
    shape = (width, *array.shape[1:])
    spread = np.full(shape, b"", object) if array.dtype == object else np.zeros(shape, array.dtype)
    spread[list(rows)] = array
    return spread


def _gathered(name: str, array: np.ndarray, rows: Sequence[int], width: int) -> np.ndarray:
    if not array.ndim or len(array) != width:
        raise Internal(
            f"output '{name}' came out with shape {format_shape(array.shape)} for {width} rows: the model does not keep"
            " one row per input row; set max_batch_size to 0"
        )
    return array[list(rows)]


class _SequenceRun:
    """A session that runs one batch of sequences."""

    __slots__ = ("_batch", "_tensors", "session")

    def __init__(self, session: Runnable, batch: Sequence[InferRequest], tensors: SequenceTensors) -> None:
        self.session = session
        self._batch = batch
        self._tensors = tensors

    def run(self, output_names: Sequence[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """As the session's."""
        steps = [request.step for request in self._batch]
        for step in steps:
            if step.start and step.sequence is not None:
                step.sequence.state = None  # what was before is over, whether or not this succeeds
        return self._tensors.run(self.session, steps, output_names, feeds)


class SequenceRunner(BatchRunner):
    """Runs batches of sequences, keeps their states, and lets the sequences go on."""

    def __init__(
        self,
        encode: Encode,
        statistics: ModelStatistics,
        to_status: StatusMapper,
        tensors: SequenceTensors,
        finish: Callable[[Sequence[InferRequest]], None],
        *,
        has_batch_dimension: bool,
        run_times: RunTimes | None = None,
    ) -> None:
        """`finish` is the queue's."""
        super().__init__(encode, statistics, to_status, has_batch_dimension=has_batch_dimension, run_times=run_times)
        self._tensors = tensors
        self._finish = finish

    def run(self, session: Runnable, batch: list[InferRequest], earlier: Answers) -> Answers:
        """As the base does, which calls this again for each half of a batch that failed."""
        if isinstance(session, _SequenceRun):
            session = session.session
        try:
            return super().run(_SequenceRun(session, batch, self._tensors), batch, earlier)
        finally:
            self._finish(batch)

    def _answered(self, batch: list[InferRequest], answers: list[list[Buffer]]) -> Answers:
        # Not before the answers are made: a request whose answer cannot be has failed.
        for step in [request.step for request in batch]:
            if step.sequence is not None:  # a warm-up's has none
                step.sequence.state = step.state
        return super()._answered(batch, answers)


class SequenceModel(ServedModel):
    """A served version whose requests are parts of sequences."""

    def _refuse(self, request: InferRequest, error: BatchingError) -> None:
        if not isinstance(error, SequenceNotStarted):
            super()._refuse(request, error)
            return
        self.statistics.record_refused(Outcome.INVALID)
        refusal = InvalidArgument(
            f"inference request for sequence {error.sequence_id} to model '{self.interface.name}' must specify the"
            " START flag on the first request of the sequence: it has not begun, or has ended, also by being idle for"
            " too long"
        )
        self._turn_away(request, refusal)
