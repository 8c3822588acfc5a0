"""Payloads out of golden samples: which rows, which answers, and what is said of a sample that does not fit."""

from __future__ import annotations

import re

import numpy as np
import pytest

from loadtests.payloads import VARIANTS, PayloadError, cut_payloads

ROWS = np.arange(10, dtype=np.float32).reshape(5, 2)


def golden(folder, **arrays):
    path = folder / "golden.npz"
    np.savez(path, **arrays)
    return path


def test_rows_are_taken_one_after_the_other_and_from_the_start_again(tmp_path):
    payloads = cut_payloads(golden(tmp_path, X=ROWS, Y=10 * ROWS, labels=ROWS), ["X"], ["Y", "Z"], (2,))
    assert len(payloads) == VARIANTS
    assert [payload.inputs["X"][:, 0].tolist() for payload in payloads[:3]] == [[0, 2], [4, 6], [8, 0]]
    assert all((payload.answer["Y"] == 10 * payload.inputs["X"]).all() for payload in payloads)
    assert {*payloads[0].inputs} | {*payloads[0].answer} == {"X", "Y"}


def test_each_number_of_rows_has_as_many_payloads(tmp_path):
    payloads = cut_payloads(golden(tmp_path, X=ROWS), ["X"], ["Y"], (1, 7))
    assert [len(payload.inputs["X"]) for payload in payloads] == [1] * VARIANTS + [7] * VARIANTS


@pytest.mark.parametrize(
    ("arrays", "problem"),
    [
        ({"Y": ROWS}, "has no array for the inputs X"),
        ({"X": ROWS, "Y": ROWS[:2]}, "inputs and outputs need one array [rows, ...] each, of the same number of rows"),
        ({"X": ROWS[:0]}, "inputs and outputs need one array [rows, ...] each, of the same number of rows"),
        ({"X": np.float32(1)}, "inputs and outputs need one array [rows, ...] each, of the same number of rows"),
        ({"X": np.array([None])}, "cannot be read: Object arrays cannot be loaded when allow_pickle=False"),
    ],
)
def test_a_sample_that_does_not_fit_is_refused(tmp_path, arrays, problem):
    path = golden(tmp_path, **arrays)
    with pytest.raises(PayloadError, match=re.escape(problem)):
        cut_payloads(path, ["X"], ["Y"], (1,))


def test_answers_are_held_against_the_sample(tmp_path):
    payload = cut_payloads(golden(tmp_path, X=ROWS, Y=ROWS, N=np.arange(5)), ["X"], ["Y", "N"], (1,))[1]
    right = {"Y": ROWS[1:2] * 1.00001, "N": np.array([1])}
    payload.check(right, "m")
    for wrong, problem in (
        ({"Y": ROWS[2:3]}, "model 'm': output 'Y' differs from the golden sample"),
        ({"N": np.array([2])}, "model 'm': output 'N' differs from the golden sample"),
        ({"Y": ROWS[1:3]}, "model 'm': output 'Y' has the shape (2, 2), the golden (1, 2)"),
        ({"Y": None}, "model 'm': output 'Y' has the shape None, the golden (1, 2)"),
    ):
        with pytest.raises(PayloadError, match=f"^{re.escape(problem)}$"):
            payload.check(right | wrong, "m")
