"""The proof that rows may share a batch: models that mix them, models that do not, and what cannot be tried."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.errors import BackendError
from sluice_server.execution.batch_proof import (
    BUDGET_NS,
    ROWS_MAX,
    BatchProof,
    Comparison,
    ProofOptions,
    Verdict,
    proof_options,
    prove,
)
from sluice_server.execution.merging import merges
from sluice_server.execution.options import plan_options
from sluice_server.execution.parameters import BadOption
from sluice_server.execution.probes import PICTURE_SIZES, made_up_rows
from sluice_server.execution.providers import CPU, CUDA, TENSORRT, ProviderChoice
from sluice_server.execution.session import Session
from sluice_server.execution.threads import ThreadPlan
from sluice_server.graph import GraphSignature, TensorSpec
from sluice_server.repository.autocomplete import complete, normalize
from support import mixing_models, models

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from sluice_server.execution.probes import Row

SECOND_NS = 1_000_000_000


def completed(signature: GraphSignature, text: str = "") -> ModelConfig:
    config = text_format.Parse(text, ModelConfig())
    return complete(normalize(config, name="m"), signature)


def open_model(model: bytes) -> Session:
    threads = ThreadPlan(instances=1, intra_op_threads=1, inter_op_threads=1, reasons=())
    return Session(model, plan_options(ModelConfig(name="m"), threads), [ProviderChoice(CPU, {}, "test")])


def proof_of(model: bytes, text: str = "", options: ProofOptions | None = None) -> BatchProof:
    session = open_model(model)
    return prove(session, session.signature, completed(session.signature, text), options or ProofOptions())


@pytest.mark.parametrize("datatype", models.ONNX_TYPES)
def test_rows_that_are_kept_apart_may_be_merged_whatever_their_type(datatype):
    proof = proof_of(models.identity(datatype))
    assert proof == BatchProof(Verdict.SAFE, "4 made-up rows give the same outputs alone and together")
    assert len(proof.rows) == ROWS_MAX


@pytest.mark.parametrize("datatype", ["FP32", "FP16"])
def test_sums_in_another_order_are_the_same(datatype):
    assert proof_of(mixing_models.matmul(datatype)).verdict is Verdict.SAFE


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (mixing_models.mean_over_rows(), "rows give other outputs beside others than alone: 'Y' differs by up to"),
        (mixing_models.training_batch_norm(), "rows give other outputs beside others than alone, by far more than"),
        (mixing_models.masked(), "rows give other outputs beside others than alone: 'Y' differs by up to"),
        (mixing_models.fixed_batch(), "rows run alone, and 4 together fail: "),
        (mixing_models.joined_rows(), "output 'Y' has shape [1,16] for 4 row(s)"),
        (mixing_models.shared_rows(4), "output 'Y' has shape [4,4] for 1 row(s)"),
    ],
    ids=["mean", "batch norm", "masked", "fixed batch", "joined", "bias for each row"],
)
def test_rows_that_are_mixed_may_not_be_merged(model, why):
    proof = proof_of(model)
    assert proof.verdict is Verdict.UNSAFE
    assert proof.reason.startswith(why)


@pytest.mark.parametrize(
    ("model", "why"),
    [
        (mixing_models.noise(), "the same row gives different outputs: 'Y' differs by up to"),
        (mixing_models.strongest(), "every made-up row gives the same outputs"),
        (mixing_models.lookup(1), "no made-up row runs: onnx runtime error 2"),
    ],
    ids=["random", "constant", "index out of bounds"],
)
def test_what_cannot_be_tried_is_no_disproof(model, why):
    proof = proof_of(model)
    assert proof.verdict is Verdict.UNKNOWN
    assert proof.reason.startswith(why)


def test_a_run_that_does_not_end_is_ended_and_that_is_told():
    proof = proof_of(models.slow(2_000_000_000))
    assert proof == BatchProof(Verdict.UNKNOWN, "no made-up row runs: it takes longer than 2 s, and was ended")


@pytest.mark.parametrize("datatype", ["INT8", "UINT8", "INT32", "INT64"])
def test_integers_are_below_128_and_below_2_where_those_are_out_of_bounds(datatype):
    narrow = proof_of(mixing_models.lookup(2, datatype))
    assert (narrow.verdict, max(row["INDEX"].max() for row in narrow.rows)) == (Verdict.SAFE, 1)
    wide = proof_of(mixing_models.lookup(128, datatype))
    assert (wide.verdict, max(row["INDEX"].max() for row in wide.rows) > 1) == (Verdict.SAFE, True)


def test_a_model_whose_rounding_depends_on_the_batch_gets_other_rows_and_is_refused_where_none_helps():
    def of(merged: Callable[[np.ndarray], np.ndarray]) -> BatchProof:
        spec = TensorSpec("X", "INT32", (-1, 4))
        signature = GraphSignature((spec,), (TensorSpec("X", "FP32", (-1, 4)),))
        return prove(FakeSession(merged=merged), signature, completed(signature), ProofOptions())

    always = of(lambda values: values * 1.01)
    assert always.verdict is Verdict.UNSAFE
    assert always.reason.startswith("rows give other outputs in a batch of 4 than alone, whoever is beside them: 'X'")
    # Large integers only: zeros and ones come out the same.
    assert of(lambda values: np.where(values > 1, values * 1.01, values)).verdict is Verdict.SAFE


def test_open_dimensions_get_a_size_that_the_model_takes():
    assert [row["X"].shape for row in proof_of(mixing_models.multiples(7)).rows] == [(1, 224)] * 4


def test_a_configuration_that_fixes_a_dimension_of_the_file_is_followed():
    text = 'max_batch_size: 3 input { name: "X" data_type: TYPE_FP32 dims: 21 } dynamic_batching {}'
    assert [row["X"].shape for row in proof_of(mixing_models.multiples(7), text).rows] == [(1, 21)] * 3


def test_warm_up_says_which_shapes_are_likely():
    sample = 'model_warmup { name: "s" batch_size: 1 inputs { key: "X" value { data_type: TYPE_FP32 dims: 35'
    proof = proof_of(mixing_models.multiples(7), f"{sample} zero_data: true }} }} }}")
    assert [row["X"].shape for row in proof.rows] == [(1, 35)] * 4


def test_a_tensor_without_dims_is_fed_as_the_graph_has_it():
    assert [row["X"].shape for row in proof_of(models.identity(dims=("N",))).rows] == [(1,)] * 4


def test_pictures_are_as_large_as_real_ones_and_too_large_ones_are_left_out():
    def shapes(*dims: int) -> list[tuple[int, ...]]:
        spec = TensorSpec("X", "FP32", (-1, *dims))
        signature = GraphSignature((spec,), (spec,))
        return [rows[0]["X"].shape for rows in made_up_rows(completed(signature), signature, 2)]

    assert shapes(3, -1, -1) == [(1, 3, size, size) for size in PICTURE_SIZES]
    assert shapes(3, 8, 8) == [(1, 3, 8, 8)]
    assert shapes(1024, 1024, 5) == []


@pytest.mark.parametrize("datatype", models.ONNX_TYPES)
def test_rows_differ_from_their_neighbours_however_small(datatype):
    spec = TensorSpec("X", datatype, (-1, 1))
    signature = GraphSignature((spec,), (spec,))
    rows = next(made_up_rows(completed(signature), signature, 4))
    assert all(one["X"] != other["X"] for one, other in itertools.pairwise(rows))


def test_only_models_that_merge_are_proven():
    signature = GraphSignature((TensorSpec("X", "FP32", (-1, 4)),), (TensorSpec("Y", "FP32", (-1, 4)),))
    assert merges(completed(signature))
    assert not merges(completed(signature, "max_batch_size: 1 dynamic_batching {}"))
    fixed = GraphSignature((TensorSpec("X", "FP32", (1, 4)),), (TensorSpec("Y", "FP32", (1, 4)),))
    assert not merges(completed(fixed))


def parameters(**values: str) -> ModelConfig:
    config = ModelConfig(name="m")
    for key, value in values.items():
        config.parameters[key].string_value = value
    return config


def test_parameters_switch_the_proof_off_and_set_its_tolerance():
    assert proof_options(ModelConfig()) == ProofOptions(wanted=True, asked=False, tolerance=None)
    assert proof_options(parameters(batch_proof="on")) == ProofOptions(wanted=True, asked=True)
    assert not proof_options(parameters(batch_proof="off")).wanted
    assert proof_options(parameters(batch_proof_tolerance="0.25")).tolerance == 0.25
    off = proof_of(mixing_models.mean_over_rows(), options=ProofOptions(wanted=False))
    assert (off.verdict, off.rows) == (Verdict.UNKNOWN, ())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("batch_proof", "yes", "one of on, off"),
        ("batch_proof", "", "one of on, off"),
        *(("batch_proof_tolerance", text, "a number above 0 and below 1") for text in ("", "x", "0", "-1", "1", "nan")),
    ],
)
def test_other_values_are_refused(key, value, expected):
    with pytest.raises(BadOption, match=f"'{key}' is '{value}', expected {expected}"):
        proof_options(parameters(**{key: value}))


def test_the_tolerance_decides():
    def verdict(tolerance: float | None) -> Verdict:
        half = FakeSession(merged=lambda values: values * 1.05)
        return prove(half, SIGNATURE, completed(SIGNATURE), ProofOptions(tolerance=tolerance)).verdict

    assert verdict(None) is Verdict.UNSAFE
    assert verdict(0.1) is Verdict.SAFE


def test_other_devices_round_as_they_like():
    def verdict(*providers: str) -> Verdict:
        rounding = FakeSession(merged=lambda values: values * 1.005)
        return prove(rounding, SIGNATURE, completed(SIGNATURE), ProofOptions(), providers).verdict

    assert verdict(CPU) is Verdict.UNSAFE
    assert verdict(CUDA, CPU) is Verdict.SAFE


def test_tensorrt_builds_no_engines_for_a_proof_that_nobody_asked_for():
    session = FakeSession()
    config = completed(SIGNATURE)
    proof = prove(session, SIGNATURE, config, ProofOptions(), (TENSORRT, CUDA, CPU))
    assert (proof.verdict, session.runs) == (Verdict.UNKNOWN, [])
    assert prove(session, SIGNATURE, config, ProofOptions(asked=True), (TENSORRT, CPU)).verdict is Verdict.SAFE


SIGNATURE = GraphSignature((TensorSpec("X", "FP32", (-1, 4)),), (TensorSpec("X", "FP32", (-1, 4)),))


class FakeSession:
    """Gives its input back, after a time that its clock shows; `fails` are the numbers of runs that fail."""

    def __init__(self, run_ns: int = 0, merged=lambda values: values, fails: Sequence[int] = ()) -> None:
        self.run_ns = run_ns
        self.merged = merged
        self.fails = fails
        self.now_ns = 0
        self.runs: list[int] = []

    def run(self, output_names: Sequence[str], feeds: Row) -> list[np.ndarray]:
        assert output_names == ["X"]
        rows = len(feeds["X"])
        self.runs.append(rows)
        self.now_ns += self.run_ns * rows
        if len(self.runs) in self.fails:
            raise BackendError(1, "no")
        values = feeds["X"].astype(np.float32)
        return [self.merged(values) if rows > 1 else values]

    def clock(self) -> int:
        return self.now_ns

    def prove(self) -> BatchProof:
        return prove(self, SIGNATURE, completed(SIGNATURE), ProofOptions(), clock=self.clock)


@pytest.mark.parametrize(
    ("run_s", "runs"),
    [
        (0.1, [1, 1, 1, 1, 1, 4]),
        (0.25, [1, 1, 1, 1, 3]),
        (0.3, [1, 1, 1, 2]),
        (0.5, [1, 1]),
        (BUDGET_NS / SECOND_NS, [1]),
    ],
)
def test_slow_models_are_tried_with_fewer_rows_or_not_at_all(run_s, runs):
    session = FakeSession(int(run_s * SECOND_NS))
    proof = session.prove()
    assert session.runs == runs
    assert proof.verdict is (Verdict.SAFE if runs[-1] > 1 else Verdict.UNKNOWN)
    assert proof.rows


def test_a_model_that_takes_long_to_refuse_rows_is_not_tried_with_every_size():
    spec = TensorSpec("X", "FP32", (-1, -1))
    signature = GraphSignature((spec,), (spec,))
    session = FakeSession(BUDGET_NS // 2, fails=range(100))
    proof = prove(session, signature, completed(signature), ProofOptions(), clock=session.clock)
    assert (proof.verdict, session.runs) == (Verdict.UNKNOWN, [1, 1])


@pytest.mark.parametrize(
    ("fails", "verdict", "why"),
    [
        ([2], Verdict.UNKNOWN, "a made-up row runs once only"),
        ([4], Verdict.UNKNOWN, "not every made-up row runs"),
        ([6], Verdict.UNSAFE, "rows run alone, and 4 together fail"),
    ],
)
def test_what_a_failing_run_means_depends_on_which_it_is(fails, verdict, why):
    proof = FakeSession(fails=fails).prove()
    assert (proof.verdict, proof.reason.startswith(why)) == (verdict, True)


def test_rows_of_another_shape_together_are_a_disproof():
    proof = FakeSession(merged=lambda values: values[:, :2]).prove()
    expected = "rows of output 'X' have shape [2] together, [4] alone"
    assert proof == BatchProof(Verdict.UNSAFE, expected)


def test_what_is_no_number_equals_itself_only():
    outputs = Comparison(["Y"])
    odd = np.array([[np.nan, np.inf, -np.inf, 1.0]], np.float32)
    assert outputs.difference([odd], [odd.copy()]) == ""
    for place in range(3):
        other = odd.copy()
        other[0, place] = 0.0
        assert outputs.difference([other], [odd])
    assert outputs.difference([odd], [odd[:, :2]]) == "'Y' of shape [1,4] and [1,2]"
    empty = np.empty((2, 0), np.float32)
    assert outputs.difference([empty], [empty]) == ""


@given(st.lists(st.floats(-(2.0**90), 2.0**90, width=32), min_size=2, max_size=20), st.integers(0, 2**31))
def test_rounding_is_no_difference_and_another_row_is(values, seed):
    outputs = Comparison(["Y"])
    rows = np.array(values, np.float32)[:, None]
    noise = np.random.default_rng(seed).uniform(-1e-6, 1e-6, rows.shape)
    assert outputs.difference([(rows * (1 + noise)).astype(np.float32)], [rows]) == ""
    far = (rows + np.float32(2) * (np.abs(rows).max() + 1)).astype(np.float32)
    assert outputs.difference([far], [rows])
