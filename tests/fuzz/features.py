"""What `together.py` is fuzzed with: models for each way in which requests are run together, and good requests."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import strategies as st

from fuzz.together import Feature
from support import models
from support.requests import infer_request

if TYPE_CHECKING:
    from pathlib import Path

    from sluice_proto.grpc_service_pb2 import ModelInferRequest

ROWS_MAX = 8

indices = st.sampled_from([0, 1, 2, 3, 3, 2, 1, 0, 99, -1])
"""Places of a table of four: the last one is good too, the one before fails the run."""


def _simple(repository: Path) -> None:
    """What good neighbours ask."""
    models.write_model(repository, "simple", models.sum_and_difference(), max_batch_size=8)


def floats(*shape: int) -> np.ndarray:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape)


def index_rows(rows_max: int) -> st.SearchStrategy[dict[str, np.ndarray]]:
    return st.lists(indices, min_size=1, max_size=rows_max).map(lambda values: {"INDEX": _column(values)})


def _column(values: list[int]) -> np.ndarray:
    return np.array(values, np.int64).reshape(-1, 1)


# --- ensembles


def _write_ensembles(repository: Path) -> None:
    """A diamond of steps; a chain whose first step can fail; the chain with one place, and the chain in an ensemble."""
    _simple(repository)
    models.write_model(repository, "double", models.affine(2, 1), max_batch_size=ROWS_MAX)
    models.write_model(repository, "triple", models.affine(3, 0), max_batch_size=ROWS_MAX)
    models.write_model(repository, "sum", models.add_two(), max_batch_size=ROWS_MAX)
    models.write_model(repository, "table", models.gather(), max_batch_size=ROWS_MAX)
    models.write_model(repository, "last", models.affine(2, 0, ("N", 1)), max_batch_size=ROWS_MAX)
    ports = models.port("input", "X") + models.port("output", "Y") + models.port("output", "Z")
    diamond = [
        models.step("sum", {"A": "left", "B": "Z"}, {"Y": "Y"}),
        models.step("double", {"X": "X"}, {"Y": "left"}),
        models.step("triple", {"X": "X"}, {"Y": "Z"}),
    ]
    models.write_ensemble(repository, "diamond", ports, diamond)
    ports = models.port("input", "INDEX", (1,), "INT64") + models.port("output", "Y", (1,))
    last = models.step("last", {"X": "row"}, {"Y": "Y"})
    for name, part, scheduling in (
        ("chain", "table", ""),
        ("narrow", "table", "max_inflight_requests: 1"),
        ("nested", "chain", ""),
    ):
        steps = [models.step(part, {"INDEX": "INDEX"}, {"Y": "row"}), last]
        models.write_ensemble(repository, name, ports, steps, scheduling=scheduling)


def _ensemble_seeds() -> list[ModelInferRequest]:
    return [
        infer_request("diamond", {"X": floats(2, 4)}, request_id="7"),
        infer_request("diamond", {"X": floats(1, 4)}, outputs=["Z"], typed=True),
        *(infer_request(name, {"INDEX": _column([2, 1])}) for name in ("chain", "narrow", "nested")),
        infer_request("nested", {"INDEX": _column([99])}, parameters={"timeout": 30_000_000}),
        infer_request("narrow", {"INDEX": _column([3])}, outputs=["Y"], parameters={"priority": 1}),
    ]


ENSEMBLES = Feature(
    write=_write_ensembles,
    seeds=_ensemble_seeds,
    valid={
        "diamond": st.integers(1, ROWS_MAX).map(lambda rows: {"X": floats(rows, 4)}),
        **dict.fromkeys(("chain", "narrow", "nested"), index_rows(3)),
    },
    outputs={"diamond": ("Y", "Z"), **dict.fromkeys(("chain", "narrow", "nested"), ("Y",))},
    parameters={"timeout": st.sampled_from([1, 1000, 30_000_000]), "mine": st.just("x")},
    failing=frozenset(("chain", "narrow", "nested", "table")),
)

# --- ragged batches

RAGGED_OUTPUTS = ("SHAPE", "FLAT", "PICKED", "TWICE")
"""Those that do not depend on who else is in the batch, in the order of the configuration."""


def _write_ragged(repository: Path) -> None:
    _simple(repository)
    outputs = [
        line for line in models.RAGGED_OUTPUTS.splitlines() if any(f'"{name}"' in line for name in RAGGED_OUTPUTS)
    ]
    text = "\n".join([models.RAGGED_INPUTS, *outputs, models.RAGGED_MADE])
    models.write_configured(repository, "ragged", models.ragged(), f"max_batch_size: 8\n{text}dynamic_batching {{ }}")


def _ragged(rows: int, high: int, wide: int, index: int) -> dict[str, np.ndarray]:
    return {"X": floats(rows, high, wide), "INDEX": _column([index] * rows)}


def _ragged_seeds() -> list[ModelInferRequest]:
    shapes = ((1, 2, 3, 1), (2, 1, 5, 2), (1, 0, 3, 0), (3, 1, 1, 99), (1, 4, 4, 3))
    return [
        infer_request("ragged", _ragged(*shape), outputs=RAGGED_OUTPUTS[:place]) for place, shape in enumerate(shapes)
    ]


RAGGED = Feature(
    write=_write_ragged,
    seeds=_ragged_seeds,
    valid={"ragged": st.builds(_ragged, st.integers(1, 3), st.integers(0, 4), st.integers(0, 5), indices)},
    outputs={"ragged": RAGGED_OUTPUTS},
    failing=frozenset(("ragged",)),
)

# --- shape buckets


def _buckets(shapes: object, batches: str) -> str:
    text = json.dumps(json.dumps(shapes))
    return f"""
        parameters {{ key: "shape_buckets" value {{ string_value: {text} }} }}
        parameters {{ key: "batch_buckets" value {{ string_value: "{batches}" }} }}"""


def _masked_sum() -> bytes:
    """IDS, MASK INT64 [N,L] -> EACH [N,L], their product, and SUM [N,1] of it: whole numbers, exact in any batch."""
    nodes = [
        models.helper.make_node("Mul", ["IDS", "MASK"], ["EACH"]),
        models.helper.make_node("ReduceSum", ["EACH", "axes"], ["SUM"]),
    ]
    return models.build(
        nodes,
        [models.tensor(name, "INT64", ("N", "L")) for name in ("IDS", "MASK")],
        [models.tensor("EACH", "INT64", ("N", "L")), models.tensor("SUM", "INT64", ("N", 1))],
        [models.numpy_helper.from_array(np.array([1], np.int64), "axes")],
    )


def _write_buckets(repository: Path) -> None:
    """A mask that is made or sent, and two axes at once."""
    _simple(repository)
    words = {
        "sizes": [4, 8, 16],
        "axes": {"IDS": 0, "MASK": 0, "EACH": 0},
        "pad": {"IDS": 31},
        "mask": "MASK",
    }
    more = _buckets({"words": words}, "1,4,8")
    models.write_model(repository, "masked", _masked_sum(), max_batch_size=8, more=more)
    axes = {name: {"sizes": [2, 8], "axes": {"X": axis, "Y": axis}} for axis, name in enumerate(("high", "wide"))}
    image = models.identity("FP32", ("N", "H", "W"))
    models.write_model(repository, "image", image, max_batch_size=4, more=_buckets(axes, "2,4"))


def _words(rows: int, length: int, has_mask: bool) -> dict[str, np.ndarray]:
    ids = np.arange(rows * length, dtype=np.int64).reshape(rows, length)
    return {"IDS": ids, "MASK": ids % 3} if has_mask else {"IDS": ids}


def _bucket_seeds() -> list[ModelInferRequest]:
    return [
        infer_request("masked", _words(1, 3, False), outputs=["SUM"]),
        infer_request("masked", _words(2, 4, False), typed=True),
        infer_request("masked", _words(1, 17, True), outputs=["EACH"]),
        infer_request("image", {"X": floats(1, 2, 6)}),
        infer_request("image", {"X": floats(2, 3, 1)}, request_id="7"),
        infer_request("image", {"X": floats(1, 9, 1)}),
    ]


BUCKETS = Feature(
    write=_write_buckets,
    seeds=_bucket_seeds,
    valid={
        "masked": st.builds(_words, st.integers(1, 3), st.integers(0, 18), st.booleans()),
        "image": st.builds(floats, st.integers(1, 2), st.integers(0, 9), st.integers(0, 9)).map(lambda x: {"X": x}),
    },
    outputs={"masked": ("EACH", "SUM"), "image": ("Y",)},
)

# --- requests in parts


def _write_split(repository: Path) -> None:
    """Batches of four rows, and requests of more; of one model the queue holds twenty."""
    _simple(repository)
    more = 'parameters { key: "split_requests" value { string_value: "true" } }'
    models.write_model(repository, "split", models.gather(), max_batch_size=4, more=more)
    models.write_model(repository, "text", models.identity("BYTES", ("N", "L")), max_batch_size=3, more=more)


def _text(rows: int, length: int) -> dict[str, np.ndarray]:
    return {"X": np.array([[b"ab" * place for place in range(length)]] * rows, object).reshape(rows, length)}


def _split_seeds() -> list[ModelInferRequest]:
    return [
        infer_request("split", {"INDEX": _column([0, 1, 2, 3] * 3)}, request_id="7"),
        infer_request("split", {"INDEX": _column([1])}),
        infer_request("split", {"INDEX": _column([0, 1, 2, 3, 0, 99, 1])}, outputs=["Y"], typed=True),
        infer_request("text", _text(7, 2)),
        infer_request("text", _text(2, 3), parameters={"timeout": 30_000_000}),
    ]


SPLIT = Feature(
    write=_write_split,
    seeds=_split_seeds,
    valid={"split": index_rows(20), "text": st.builds(_text, st.integers(1, 10), st.integers(0, 3))},
    outputs={"split": ("Y",), "text": ("Y",)},
    parameters={"timeout": st.sampled_from([1, 1000, 30_000_000])},
    failing=frozenset(("split",)),
)

# --- priorities and queue policies

LEVELS = """dynamic_batching {
  priority_levels: 3 default_priority_level: 2
  default_queue_policy { default_timeout_microseconds: 20000000 allow_timeout_override: true max_queue_size: 2 }
  priority_queue_policy { key: 1 value { timeout_action: DELAY default_timeout_microseconds: 1 max_queue_size: 3 } }
  priority_queue_policy { key: 3 value { default_timeout_microseconds: 500 max_queue_size: 1 } }
}"""
HELD = "dynamic_batching { max_queue_delay_microseconds: 300 preferred_batch_size: [ 2, 4 ] }"


def _write_levels(repository: Path) -> None:
    """Levels that delay, refuse and are full; and a queue that holds requests back."""
    _simple(repository)
    echo = models.identity("INT64", ("N", 1))
    models.write_model(repository, "levels", echo, max_batch_size=4, batching=False, more=LEVELS)
    models.write_model(repository, "held", echo, max_batch_size=4, batching=False, more=HELD)


def _level_seeds() -> list[ModelInferRequest]:
    return [
        *(
            infer_request("levels", {"X": _column([place])}, parameters={"priority": place, "timeout": 30_000_000})
            for place in range(5)
        ),
        infer_request("levels", {"X": _column([1, 2, 3])}, parameters={"timeout": 1}),
        infer_request("held", {"X": _column([7])}, outputs=["Y"]),
        infer_request("held", {"X": _column([7, 8, 9])}, parameters={"priority": 1}),
    ]


_numbers = st.integers(1, 4).map(lambda rows: {"X": _column(list(range(rows)))})
PRIORITIES = Feature(
    write=_write_levels,
    seeds=_level_seeds,
    valid={"levels": _numbers, "held": _numbers},
    outputs={"levels": ("Y",), "held": ("Y",)},
    parameters={
        "priority": st.sampled_from([0, 1, 2, 3, 4, 2**32, -1, 2**63 - 1]),
        "timeout": st.sampled_from([0, 1, 400, 20_000, 30_000_000]),
    },
    crowded=True,
)
