"""Ensembles through a server: what is answered, by whom, and what an error of a step becomes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from sluice_proto import grpc_service_pb2 as pb
from support import models
from support.requests import answer_arrays, infer_request

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("no_errors_logged")

X = np.arange(8, dtype=np.float32).reshape(2, 4)


def write_diamond(repository: Path, **how) -> None:
    """2X + 1 and 3X in parallel, then their sum: Y = 5X + 1; and Z = 3X."""
    models.write_model(repository, "double", models.affine(2, 1), max_batch_size=8)
    models.write_model(repository, "triple", models.affine(3, 0), max_batch_size=8)
    models.write_model(repository, "sum", models.add_two(), max_batch_size=8)
    models.write_ensemble(
        repository,
        "diamond",
        models.port("input", "X") + models.port("output", "Y") + models.port("output", "Z"),
        [
            models.step("sum", {"A": "left", "B": "Z"}, {"Y": "Y"}),
            models.step("double", {"X": "X"}, {"Y": "left"}),
            models.step("triple", {"X": "X"}, {"Y": "Z"}),
        ],
        **how,
    )


def statistics(server, model: str) -> pb.ModelStatistics:
    (found,) = server.call("ModelStatistics", pb.ModelStatisticsRequest(name=model)).model_stats
    return found


def test_steps_run_when_their_inputs_are_there_and_the_batch_goes_whole(start_server, repository):
    write_diamond(repository)
    server = start_server(repository)
    answer = server.infer(infer_request("diamond", {"X": X}, request_id="7"))
    assert (answer.model_name, answer.model_version, answer.id) == ("diamond", "1", "7")
    arrays = answer_arrays(answer)
    assert list(arrays) == ["Y", "Z"]
    np.testing.assert_array_equal(arrays["Y"], 5 * X + 1)
    np.testing.assert_array_equal(arrays["Z"], 3 * X)
    for model in ("diamond", "double", "triple", "sum"):
        found = statistics(server, model)
        assert (found.inference_count, found.execution_count) == (2, 1), model
        assert found.inference_stats.success.count == 1
    stats = statistics(server, "diamond").inference_stats
    parts = [statistics(server, part).inference_stats for part in ("double", "triple", "sum")]
    assert stats.compute_infer.ns == sum(part.compute_infer.ns for part in parts)
