"""Whether rows of different requests may share a batch, tried at load: each row alone, and all of them together.

A model may have an open dimension 0 and still mix its rows: a mean over it, a batch size written into a Reshape, batch
normalisation that was exported in training mode. Merging requests would then answer one client with the data of
another. So rows that are made up run alone and together, and whatever comes out differently is a disproof.

What cannot be tried (no made-up row that the model takes, outputs that are random or the same for every row, runs that
take too long) is no disproof: such a model is batched as its configuration says, and `sluice check` says that nothing
is known.

Where rows come out differently, a batch of copies tells whether the neighbours did it, or the size of the batch: a
model may make much of rounding on made-up inputs, and then others are tried before it is given up.

How outputs are compared: a model that mixes its rows moves an output by some of what the rows differ by, while one that
keeps them apart moves it by rounding, as sums are added up in another order. So values may differ by the tolerance
times their own size, and times what rows differ by; the latter is the tenth part's bound of all elements that differ
at all, so that a few huge ones (a masked logit of -1e9) do not hide the rest.
"""

from __future__ import annotations

import enum
import math
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from sluice_server.errors import Cancelled, SluiceError
from sluice_server.execution.parameters import BadOption, parameter_values, read_choice
from sluice_server.execution.probes import made_up_rows
from sluice_server.execution.providers import CPU, TENSORRT
from sluice_server.execution.run_watch import HasStoppable
from sluice_server.graph import format_shape

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice_proto.model_config_pb2 import ModelConfig
    from sluice_server.execution.instance import Runnable
    from sluice_server.execution.probes import Array, Row
    from sluice_server.graph import GraphSignature

PARAMETER = "batch_proof"
"""The key in a configuration's `parameters`: `off` has the model batched without a proof."""

TOLERANCE_PARAMETER = "batch_proof_tolerance"
"""The key for how far values may be apart, in place of what their types say."""

TOLERANCE_MAX = 1.0
"""From here on two rows would pass for one another."""

ROWS_MAX = 4
"""Rows that are tried: a few that differ show what mixes them, and a load is not to take long."""

ROWS_MIN = 2

CANDIDATES_MAX = 4
"""Of those that a model takes and that show nothing for sure."""

UNSTEADY_FACTOR = 4
"""Noise moves a row as much beside others as alone, and the mean of 16 values of it is no four times another's. Batch
normalisation in training mode is no noise: ONNX Runtime keeps what it learns from run to run, a tenth each."""

BUDGET_NS = 2_000_000_000
"""What the runs of a proof may take, as each load waits for it; the last one may take as long again, and is ended."""

TOLERANCE = 1e-3
"""For FP32 and FP64 on the CPU: models that keep their rows apart were seen to differ by 1.2e-7 of their values."""

TOLERANCES = {np.dtype(np.float16): 1e-2, np.dtype(ml_dtypes.bfloat16): 5e-2}
"""Some units in the last place, which are 1e-3 and 8e-3 of a value."""

DEVICE_TOLERANCE = 1e-2
"""At least this on other devices, which multiply FP32 as TF32, with FP16's precision, in an order of their own."""

SPREAD_QUANTILE = 0.1

_SWITCH = {"on": "on", "off": "off"}


class Verdict(enum.StrEnum):
    """What is known of a model's rows."""

    SAFE = "safe"
    UNSAFE = "unsafe"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class BatchProof:
    """The outcome, and the sentence that says why. `rows` are those that ran alone, none when there were none."""

    verdict: Verdict
    reason: str
    rows: tuple[Row, ...] = field(default=(), repr=False, compare=False)

    def __str__(self) -> str:
        return f"{self.verdict}: {self.reason}"


@dataclass(frozen=True, slots=True)
class ProofOptions:
    """What a configuration says of its proof; `asked` is whether it says so at all."""

    wanted: bool = True
    asked: bool = False
    tolerance: float | None = None


def proof_options(config: ModelConfig) -> ProofOptions:
    """Read the parameters `batch_proof` and `batch_proof_tolerance`; BadOption for a value that they cannot have."""
    parameters = parameter_values(config)
    word = read_choice(config.name, PARAMETER, parameters.get(PARAMETER, "on"), _SWITCH)
    text = parameters.get(TOLERANCE_PARAMETER)
    tolerance = None if text is None else _read_tolerance(config.name, text)
    return ProofOptions(word == "on", PARAMETER in parameters, tolerance)


def _read_tolerance(model: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < TOLERANCE_MAX:
        raise BadOption(model, TOLERANCE_PARAMETER, text, f"a number above 0 and below {TOLERANCE_MAX:g}")
    return value


def prove(
    session: Runnable,
    signature: GraphSignature,
    config: ModelConfig,
    options: ProofOptions,
    providers: Sequence[str] = (CPU,),
    clock: Callable[[], int] = time.perf_counter_ns,
) -> BatchProof:
    """Try a model that merges requests. `config` is complete; `providers` are what the session really has."""
    if not options.wanted:
        return BatchProof(Verdict.UNKNOWN, f"not tried, as parameter '{PARAMETER}' is off")
    if TENSORRT in providers and not options.asked:
        why = f"not tried, as TensorRT would build an engine for it: parameter '{PARAMETER}' = on has it tried"
        return BatchProof(Verdict.UNKNOWN, why)
    floor = 0.0 if set(providers) <= {CPU} else DEVICE_TOLERANCE
    outputs = Comparison([tensor.name for tensor in config.output], options.tolerance, floor)
    return _Trial(session, outputs, clock).of(config, signature)


class _Trial:
    """The runs of one proof, within its budget."""

    def __init__(self, session: Runnable, outputs: Comparison, clock: Callable[[], int]) -> None:
        # A view of its own, whose runs can be ended, where there are such.
        self._stoppable = session.stoppable() if isinstance(session, HasStoppable) else None
        self._session = session if self._stoppable is None else self._stoppable
        self._outputs = outputs
        self._clock = clock

    def of(self, config: ModelConfig, signature: GraphSignature) -> BatchProof:
        """Try one candidate after the other until one shows something; of the others the worst counts."""
        until_ns = self._clock() + BUDGET_NS
        outcome = BatchProof(Verdict.UNKNOWN, "its inputs are too large to make some up")
        tried = 0
        for rows in made_up_rows(config, signature, min(config.max_batch_size, ROWS_MAX)):
            try:
                first = self._run(rows[0])
            except SluiceError as error:
                if not tried:
                    outcome = BatchProof(Verdict.UNKNOWN, f"no made-up row runs: {error}")
            else:
                tried += 1
                found, is_final = self._repeat(rows, first, until_ns)
                if is_final:
                    return found
                if tried == 1 or found.verdict is Verdict.UNSAFE:
                    outcome = found
            if tried == CANDIDATES_MAX or self._clock() >= until_ns:
                break
        return outcome

    def _repeat(self, rows: list[Row], first: list[Array], until_ns: int) -> tuple[BatchProof, bool]:
        """Run the first row again, and go on with as many rows as there is time for.

        Also gives whether that is the last word: other rows may show more of a model that rounds, or shows nothing.
        """
        began_ns = self._clock()
        again = first
        if began_ns < until_ns:
            try:
                again = self._run(rows[0])
            except SluiceError as error:
                return BatchProof(Verdict.UNKNOWN, f"a made-up row runs once only: {error}"), True
        ended_ns = self._clock()
        # Each row takes a run alone, and its share of the run of all.
        count = min(len(rows), (until_ns - ended_ns) // max(1, 2 * (ended_ns - began_ns)))
        if count < ROWS_MIN:
            return BatchProof(Verdict.UNKNOWN, "a run takes too long to try several at load", tuple(rows)), True
        unsteady = self._outputs.difference(again, first)
        try:
            if unsteady:
                return self._compare_unsteady(rows[:count], unsteady), True
            return self._compare(rows[:count], first)
        except SluiceError as error:
            return BatchProof(Verdict.UNKNOWN, f"not every made-up row runs: {error}", tuple(rows[:1])), True

    def _compare(self, rows: list[Row], first: list[Array]) -> tuple[BatchProof, bool]:
        """Run the other rows alone and all of them together; `first` is what the first one gave."""
        alone = [first, *(self._run(row) for row in rows[1:])]
        kept = tuple(rows)
        merged, problem = self._together(rows, alone)
        if problem:
            return BatchProof(Verdict.UNSAFE, problem, kept), True
        apart = _concatenated(alone)
        if problem := self._outputs.difference(merged, apart):
            # Copies of a row are a batch of the same size: what comes out otherwise there is the neighbours' doing.
            copies = self._run(merge([rows[0]] * len(rows)))
            of_first = [array[:1] for array in merged]
            mixed = self._outputs.difference(of_first, [array[:1] for array in copies])
            where = (
                "beside others than alone" if mixed else f"in a batch of {len(rows)} than alone, whoever is beside them"
            )
            return BatchProof(Verdict.UNSAFE, f"rows give other outputs {where}: {problem}", kept), bool(mixed)
        if not self._outputs.difference([np.roll(array, 1, axis=0) for array in apart], apart):
            return BatchProof(
                Verdict.UNKNOWN, "every made-up row gives the same outputs, so that none shows", kept
            ), False
        return BatchProof(
            Verdict.SAFE, f"{len(rows)} made-up rows give the same outputs alone and together", kept
        ), True

    def _compare_unsteady(self, rows: list[Row], unsteady: str) -> BatchProof:
        """Tell whether rows move each other by more than they move by themselves from run to run."""
        twice = [(self._run(row), self._run(row)) for row in rows]
        alone = [second for _, second in twice]
        kept = tuple(rows)
        merged, problem = self._together(rows, alone)
        if problem:
            return BatchProof(Verdict.UNSAFE, problem, kept)
        apart = _concatenated(alone)
        by_itself = _mean_distances(_concatenated([first for first, _ in twice]), apart)
        by_others = _mean_distances(merged, apart)
        if any(moved > UNSTEADY_FACTOR * still for moved, still in zip(by_others, by_itself, strict=True)):
            why = "rows give other outputs beside others than alone, by far more than the same row from run to run"
            return BatchProof(Verdict.UNSAFE, why, kept)
        return BatchProof(Verdict.UNKNOWN, f"the same row gives different outputs: {unsteady}", kept)

    def _together(self, rows: list[Row], alone: list[list[Array]]) -> tuple[list[Array], str]:
        """What all rows give in one run, and what is wrong with its shapes or those of the rows alone."""
        for outputs in alone:
            if problem := self._outputs.misshapen(outputs, 1):
                return [], problem
        try:
            merged = self._run(merge(rows))
        except SluiceError as error:
            return [], f"rows run alone, and {len(rows)} together fail: {error}"
        return merged, self._outputs.misshapen(merged, len(rows)) or self._outputs.reshaped(merged, alone)

    def _run(self, feeds: Row) -> list[Array]:
        """Run for so long as a whole proof may take: a load does not wait for a run that never ends."""
        if self._stoppable is None:
            return self._session.run(self._outputs.names, dict(feeds))
        # A timer for each run, and not one for all: on a busy machine the last one, of all rows together, may begin
        # late, and were it ended for what the others took, that would pass for a disproof.
        timer = threading.Timer(BUDGET_NS / 1e9, self._stoppable.stop)
        timer.start()
        try:
            return self._session.run(self._outputs.names, dict(feeds))
        except Cancelled as error:
            raise Cancelled(f"it takes longer than {BUDGET_NS / 1e9:g} s, and was ended") from error
        finally:
            timer.cancel()
            timer.join()
            self._stoppable.resume()


def _concatenated(alone: Sequence[Sequence[Array]]) -> list[Array]:
    return [np.concatenate(arrays) for arrays in zip(*alone, strict=True)]


def _mean_distances(got: Sequence[Array], expected: Sequence[Array]) -> list[float]:
    """The mean distance of each output's elements, or the share of those that differ where they are no numbers."""
    found = []
    for one, other in zip(got, expected, strict=True):
        if one.dtype.kind in "fV":
            with np.errstate(invalid="ignore"):
                off = np.abs(one.astype(np.float64) - other.astype(np.float64))
            found.append(float(off[np.isfinite(off)].mean()) if np.isfinite(off).any() else 0.0)
        else:
            found.append(float((one != other).mean()) if one.size else 0.0)
    return found


def merge(rows: Sequence[Row]) -> Row:
    """The inputs of one run of several rows."""
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


class Comparison:
    """Tells outputs apart: arrays in the order of `names`, a row in each element of dimension 0."""

    def __init__(self, names: Sequence[str], tolerance: float | None = None, floor: float = 0.0) -> None:
        """`tolerance` in place of those of the types; they are at least `floor`."""
        self.names = names
        self._tolerance = tolerance
        self._floor = floor

    def misshapen(self, arrays: Sequence[Array], rows: int) -> str:
        """The first output that has not one row for each row, "" for none."""
        for name, array in zip(self.names, arrays, strict=True):
            if not array.ndim or len(array) != rows:
                return f"output '{name}' has shape {format_shape(array.shape)} for {rows} row(s)"
        return ""

    def reshaped(self, merged: Sequence[Array], alone: Sequence[Sequence[Array]]) -> str:
        """The first output whose rows have another shape together than alone, "" for none."""
        for row in alone:
            for name, together, array in zip(self.names, merged, row, strict=True):
                got, wanted = together.shape[1:], array.shape[1:]
                if got != wanted:
                    return (
                        f"rows of output '{name}' have shape {format_shape(got)} together, {format_shape(wanted)} alone"
                    )
        return ""

    def difference(self, got: Sequence[Array], expected: Sequence[Array]) -> str:
        """The first output that differs beyond the tolerance, and how; "" for none."""
        for name, array, wanted in zip(self.names, got, expected, strict=True):
            if array.shape != wanted.shape:
                return f"'{name}' of shape {format_shape(array.shape)} and {format_shape(wanted.shape)}"
            if off := self._distance(array, wanted):
                return f"'{name}' {off}"
        return ""

    def _distance(self, array: Array, wanted: Array) -> str:
        """How far two arrays of one shape are apart, "" within the tolerance; other types than floats: any."""
        if array.dtype.kind not in "fV":
            return "" if np.array_equal(array, wanted) else "has other values"
        tolerance = self._tolerance or max(TOLERANCES.get(array.dtype, TOLERANCE), self._floor)
        # In float64, to which BF16 converts and in which no FP16 overflows.
        one, other = array.astype(np.float64), wanted.astype(np.float64)
        if np.allclose(one, other, rtol=tolerance, atol=tolerance * _spread(other), equal_nan=True):
            return ""
        with np.errstate(invalid="ignore"):
            off = np.abs(one - other)
        worst = off[np.isfinite(off)].max(initial=0.0)
        return f"differs by up to {float(worst):.3g}, where {tolerance:g} of a value is allowed"


def _spread(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    """What the rows of an output differ by where they do: less than this in one element of ten."""
    finite = np.where(np.isfinite(values), values, 0.0)
    spread = finite.max(axis=0, initial=-math.inf) - finite.min(axis=0, initial=math.inf)
    differing = spread[spread > 0]
    return float(np.quantile(differing, SPREAD_QUANTILE)) if differing.size else 0.0
