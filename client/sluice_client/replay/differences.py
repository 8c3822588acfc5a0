"""What is different between two ends of the same request: codes, outputs, datatypes, shapes, values. Pure.

Integers, BOOL and BYTES are to be equal. Floats are within tolerance of what is expected, |a - e| <= atol + rtol * |e|,
and NaN equals NaN. What a response says besides its outputs (id, version, parameters) is not compared.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from google.protobuf.message import DecodeError

from sluice_client.errors import InvalidResponse
from sluice_client.load.latencies import CODES, NOT_SENT, OK, code_name
from sluice_client.operations import outputs_of
from sluice_proto import tensors
from sluice_proto.grpc_service_pb2 import ModelInferResponse

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sluice_client.results import Array
    from sluice_proto.capture import Data

BY_LOAD: Final = frozenset(
    CODES.index(name) for name in ("CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
) | {NOT_SENT}
"""Ends that the load and the client decide about, and not the request: nothing to expect of another time."""

SHOWN_CHARACTERS: Final = 60
"""Of a value that is different."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far floats may be from what is expected."""

    rtol: float
    atol: float


DEFAULT_TOLERANCES: Final[Mapping[str, Tolerance]] = MappingProxyType(
    {
        "FP16": Tolerance(1e-3, 1e-5),
        "BF16": Tolerance(1.6e-2, 1e-5),
        "FP32": Tolerance(1.3e-6, 1e-5),
        "FP64": Tolerance(1e-7, 1e-7),
    }
)
"""Those of torch.testing.assert_close. Alone and in a batch, the same model's FP32 outputs differ by some 1e-7."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How a request ended: gRPC's code (or NOT_SENT), and the ModelInferResponse, of no bytes when there is none."""

    code: int
    response: Data = b""


@dataclass(frozen=True, slots=True)
class Difference:
    """One difference; `output` is "" for one between whole answers.

    Of values: how many of how many differ, the first one's index and both values as text, and the largest difference
    of numbers (NaN where one of two is none).
    """

    reason: str
    output: str = ""
    count: int = 0
    elements: int = 0
    index: tuple[int, ...] = ()
    expected: str = ""
    actual: str = ""
    largest: float | None = None


def incomparable(expected: Answer, actual: Answer) -> str:
    """Why there is nothing to compare; "" when there is."""
    if expected.code in BY_LOAD and (actual.code == OK or actual.code in BY_LOAD):
        return f"expected {code_name(expected.code)}"
    if expected.code == actual.code == OK and not len(expected.response):
        return "the answer was not kept"
    return ""


def compare(expected: Answer, actual: Answer, tolerances: Mapping[str, Tolerance]) -> list[Difference]:
    """The differences between two ends that can be compared; `tolerances` is by the datatypes of floats."""
    if expected.code != actual.code:
        return [Difference("code", expected=code_name(expected.code), actual=code_name(actual.code))]
    if expected.code != OK or _same_bytes(expected.response, actual.response):
        return []
    try:
        before = _outputs(expected)
    except InvalidResponse as error:
        return [Difference(f"the expected answer cannot be read: {error}")]
    try:
        after = _outputs(actual)
    except InvalidResponse as error:
        return [Difference(f"the answer cannot be read: {error}")]
    return list(_compare_outputs(before, after, tolerances))


def _same_bytes(one: Data, other: Data) -> bool:
    # Two views are compared element by element; bytes are, in one go, and copying a view is as fast.
    return one is other or bytes(one) == bytes(other)


def _outputs(answer: Answer) -> dict[str, Array]:
    try:
        return outputs_of(ModelInferResponse.FromString(bytes(answer.response)))
    except DecodeError:
        raise InvalidResponse(f"its {len(answer.response)} bytes are no ModelInferResponse") from None


def _compare_outputs(
    before: Mapping[str, Array], after: Mapping[str, Array], tolerances: Mapping[str, Tolerance]
) -> Iterator[Difference]:
    for name in sorted(before.keys() - after.keys()):
        yield Difference("missing", name)
    for name in sorted(after.keys() - before.keys()):
        yield Difference("not expected", name)
    for name, expected in before.items():
        if name in after:
            found = _compare_tensors(name, expected, after[name], tolerances)
            if found is not None:
                yield found


def _compare_tensors(
    name: str, expected: Array, actual: Array, tolerances: Mapping[str, Tolerance]
) -> Difference | None:
    datatypes = tensors.of_array(expected).name, tensors.of_array(actual).name
    if datatypes[0] != datatypes[1]:
        return Difference("datatype", name, expected=datatypes[0], actual=datatypes[1])
    if expected.shape != actual.shape:
        return Difference("shape", name, expected=str(list(expected.shape)), actual=str(list(actual.shape)))
    tolerance = tolerances.get(datatypes[0])
    distances = None if datatypes[0] == "BYTES" else _distances(expected, actual)
    if tolerance is None or distances is None:
        differs = np.asarray(expected != actual, np.bool_)
    else:
        differs = _beyond(tolerance, expected, distances)
    count = int(np.count_nonzero(differs))
    if not count:
        return None
    first = tuple(int(place) for place in np.argwhere(differs)[0])
    return Difference(
        "values",
        name,
        count,
        differs.size,
        first,
        _text(expected[first]),
        _text(actual[first]),
        None if distances is None else float(np.max(distances, where=differs, initial=0.0)),
    )


def _distances(expected: Array, actual: Array) -> Array:
    """|a - e| as FP64; 0 where both are the same, NaN and infinities too."""
    before, after = expected.astype(np.float64), actual.astype(np.float64)
    same = (before == after) | (np.isnan(before) & np.isnan(after))
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(same, 0.0, np.abs(after - before))


def _beyond(tolerance: Tolerance, expected: Array, distances: Array) -> Array:
    with np.errstate(invalid="ignore", over="ignore"):
        limits = tolerance.atol + tolerance.rtol * np.abs(expected.astype(np.float64))
        # What is infinite or NaN on one side alone is at no finite distance, and so within no limit.
        within: Array = (distances == 0) | (np.isfinite(distances) & (distances <= limits))
    return ~within


def _text(value: Any) -> str:
    text = repr(value) if isinstance(value, bytes) else str(value)
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}..."
