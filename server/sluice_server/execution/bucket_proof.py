"""Whether a model looks at padding, tried at load: rows of two lengths alone, and padded together as a batch has them.

The rows are those of the batch proof, cut to a short and a long length of one bucket. An attention without its mask, a
mean over a length or a convolution across its end come out differently: then requests are not padded, and share a batch
only where their shapes are equal. What cannot be tried is no disproof, as for rows (`batch_proof.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sluice_batching import NO_DEADLINE
from sluice_server.errors import SluiceError
from sluice_server.execution.batch_proof import DEVICE_TOLERANCE, Comparison
from sluice_server.execution.buckets import PaddedEncoder, gatherer
from sluice_server.execution.providers import CPU
from sluice_server.execution.request import InferRequest
from sluice_server.execution.warmup import WarmupCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sluice_server.execution.batch_proof import BatchProof, ProofOptions
    from sluice_server.execution.buckets import Buckets
    from sluice_server.execution.probes import Array, Row
    from sluice_server.execution.session import Session
    from sluice_server.protocol.interface import ModelInterface

ROWS = 2
"""A short one and a long one."""


def padding_problem(
    session: Session, interface: ModelInterface, buckets: Buckets, proof: BatchProof, options: ProofOptions
) -> str:
    """What is wrong with padding the model's inputs, "" for nothing, and where it could not be tried."""
    if not buckets.shapes or len(proof.rows) < ROWS or not options.wanted:
        return ""
    names = interface.output_names
    rows = [_cut(row, buckets, halve=number == 0) for number, row in enumerate(proof.rows[:ROWS])]
    try:
        alone = [session.run(names, dict(row)) for row in rows]
    except SluiceError:
        return ""
    requests = [InferRequest(WarmupCall(b""), "", dict(row), names, 1, None, NO_DEADLINE) for row in rows]
    try:
        outputs = session.run(names, gatherer(buckets, interface)(requests))
        apart = PaddedEncoder(interface, buckets).apart(requests, outputs)
    except SluiceError as error:
        return f"rows of two lengths run alone, and padded they fail: {error}"
    floor = 0.0 if set(session.providers) <= {CPU} else DEVICE_TOLERANCE
    comparison = Comparison(names, options.tolerance, floor)
    for got, expected in zip(apart, alone, strict=True):
        if problem := comparison.difference(_columns(got, expected), _columns(expected, expected)):
            return f"a padded row gives other outputs than alone: {problem}"
    return ""


def _cut(row: Row, buckets: Buckets, *, halve: bool) -> dict[str, Array]:
    """A row with a length that has a bucket, the longest or about half of it; masks show all of it."""
    arrays = dict(row)
    for bucket in buckets.shapes:
        first, axis = next(iter(bucket.input_axes.items()))
        longest = min(arrays[first].shape[axis + 1], bucket.sizes[-1])
        # Both lengths have the same bucket.
        below = max((size for size in bucket.sizes if size < longest), default=0)
        length = max(below + 1, longest // 2) if halve else longest
        for name, own_axis in bucket.input_axes.items():
            arrays[name] = arrays[name][(slice(None),) * (own_axis + 1) + (slice(length),)]
        if bucket.mask is not None:
            arrays[bucket.mask] = np.ones_like(arrays[bucket.mask])
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _columns(arrays: Sequence[Array], wanted: Sequence[Array]) -> list[Array]:
    """Arrays that agree in shape as one column each: what rows differ by is asked of all elements of one row here."""
    return [
        array.reshape(-1, 1) if array.shape == other.shape else array
        for array, other in zip(arrays, wanted, strict=True)
    ]
