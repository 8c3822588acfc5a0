"""Shape buckets through a real server: requests of different lengths share a run, and each gets what it gets alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import grpc
import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sluice_proto import grpc_service_pb2 as pb
from sluice_proto.model_config_pb2 import ModelConfig
from sluice_server.execution.bucket_options import read_buckets
from sluice_server.execution.parameters import BadOption
from support import models
from support.fakes import run_together
from support.requests import answer_arrays, infer_request

if TYPE_CHECKING:
    from pathlib import Path

    from sluice_server.execution.buckets import Buckets

SEQUENCE = {
    "sizes": [4, 8, 16],
    "axes": {"IDS": 0, "MASK": 0, "EACH": 0},
    "pad": {"IDS": 31},
    "mask": "MASK",
}


def quoted(value: object) -> str:
    return json.dumps(json.dumps(value))


def buckets(shapes: object = None, batches: str = "") -> str:
    text = (
        "" if shapes is None else f'parameters {{ key: "shape_buckets" value {{ string_value: {quoted(shapes)} }} }}\n'
    )
    return text + (f'parameters {{ key: "batch_buckets" value {{ string_value: "{batches}" }} }}' if batches else "")


def add(repository: Path, name: str = "attention", more: str = "", **changes: object) -> None:
    models.write_model(repository, name, models.attention(), max_batch_size=8, more=more, **changes)


@pytest.fixture
def server(start_server, repository):
    add(repository, "alone")
    add(repository, more=buckets({"sequence": SEQUENCE}))
    add(repository, "full", buckets({"sequence": SEQUENCE}, batches="1,4,8"))
    return start_server(repository, http=None, metrics=None)


def words(length: int, rows: int = 1, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + length).integers(0, 30, (rows, length))


def request(model: str, ids: np.ndarray, mask: np.ndarray | None = None, **more: object) -> pb.ModelInferRequest:
    inputs = {"IDS": ids} if mask is None else {"IDS": ids, "MASK": mask}
    return infer_request(model, inputs, **more)


def alone(server, ids: np.ndarray, mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    return answer_arrays(server.infer(request("alone", ids, np.ones_like(ids) if mask is None else mask)))


def together(server, model: str, requests: list[pb.ModelInferRequest]) -> tuple[list[dict[str, np.ndarray]], list]:
    """The answers to requests that wait while another one runs, and the feeds of the runs that they share."""
    calls, runs = run_together(server, model, request(model, words(2)), requests)
    return [answer_arrays(call.result()) for call in calls], runs


def assert_equal(answer: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert answer.keys() == expected.keys()
    for name, array in answer.items():
        assert array.shape == expected[name].shape
        np.testing.assert_allclose(array, expected[name], rtol=1e-5, atol=1e-5)


def test_requests_whose_lengths_have_one_bucket_share_a_run(server):
    lengths = (5, 8, 6, 7)
    answers, runs = together(server, "attention", [request("attention", words(length)) for length in lengths])
    assert [feeds["IDS"].shape for feeds in runs] == [(4, 8)]
    for answer, length in zip(answers, lengths, strict=True):
        assert_equal(answer, alone(server, words(length)))


def test_requests_of_different_buckets_do_not_and_what_is_too_long_for_all_runs_as_it_is(server):
    lengths = (3, 9, 17, 18, 17)
    answers, runs = together(server, "attention", [request("attention", words(length)) for length in lengths])
    assert sorted(feeds["IDS"].shape for feeds in runs) == [(1, 4), (1, 16), (1, 18), (2, 17)]
    for answer, length in zip(answers, lengths, strict=True):
        assert_equal(answer, alone(server, words(length)))


def test_padding_has_the_declared_value_and_the_mask_says_where_it_is(server):
    _, runs = together(
        server, "attention", [request("attention", words(3)), request("attention", words(2), words(2) * 0 + 1)]
    )
    (feeds,) = runs
    assert feeds["IDS"][0].tolist() == [*words(3)[0], 31]
    assert feeds["IDS"][1].tolist() == [*words(2)[0], 31, 31]
    assert feeds["MASK"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert feeds["MASK"].dtype == np.int64


def test_a_mask_that_the_client_sends_is_kept(server):
    ids, mask = words(7), np.array([[1, 0, 1, 1, 0, 1, 1]])
    assert_equal(answer_arrays(server.infer(request("attention", ids, mask))), alone(server, ids, mask))


def test_batches_are_filled_up_to_the_declared_sizes(server):
    requests = [request("full", words(length, rows)) for length, rows in ((5, 2), (6, 1), (8, 3))]
    answers, runs = together(server, "full", requests)
    assert [feeds["IDS"].shape for feeds in runs] == [(8, 8)]
    assert (runs[0]["IDS"][6:] == runs[0]["IDS"][5]).all()
    for answer, (length, rows) in zip(answers, ((5, 2), (6, 1), (8, 3)), strict=True):
        assert_equal(answer, alone(server, words(length, rows)))


def test_only_the_outputs_that_are_asked_for_are_cut(server):
    answer = answer_arrays(server.infer(request("attention", words(5), outputs=["MEAN"])))
    np.testing.assert_allclose(answer["MEAN"], alone(server, words(5))["MEAN"], rtol=1e-5, atol=1e-5)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 3)), min_size=1, max_size=6))
def test_any_mix_of_lengths_and_rows_gives_each_what_it_gets_alone(server, kinds):
    arrays = [words(length, rows, seed) for seed, (length, rows) in enumerate(kinds)]
    for model in ("attention", "full"):
        calls = [server.begin("ModelInfer", request(model, ids)) for ids in arrays]
        for call, ids in zip(calls, arrays, strict=True):
            assert_equal(answer_arrays(call.result()), alone(server, ids))


def test_equal_requests_of_a_padded_batch_are_cached_as_they_are_answered(start_server, repository):
    add(repository, "alone")
    more = buckets({"sequence": SEQUENCE}, batches="4") + "response_cache { enable: true }"
    add(repository, more=more)
    server = start_server(repository, http=None, metrics=None, models={"cache_bytes": 1 << 20})
    for _ in range(2):
        for length in (5, 6):
            answer = answer_arrays(server.infer(request("attention", words(length))))
            assert_equal(answer, alone(server, words(length)))
    (found,) = server.call("ModelStatistics", pb.ModelStatisticsRequest(name="attention")).model_stats
    assert (found.inference_stats.cache_hit.count, found.inference_stats.cache_miss.count) == (2, 2)


def test_a_cache_tells_requests_of_equal_bytes_apart_that_are_padded_to_one_shape(start_server, repository):
    both = {name: {"sizes": [8], "axes": {"X": axis, "Y": axis}} for axis, name in enumerate(("high", "wide"))}
    more = buckets(both) + "response_cache { enable: true }"
    models.write_model(repository, "image", models.identity("FP32", ("N", "H", "W")), max_batch_size=4, more=more)
    server = start_server(repository, http=None, metrics=None, models={"cache_bytes": 1 << 20})
    for shape in ((1, 2, 6), (1, 3, 4), (1, 2, 6)):
        x = np.arange(12, dtype=np.float32).reshape(shape)
        np.testing.assert_array_equal(answer_arrays(server.infer(infer_request("image", {"X": x})))["Y"], x)


def test_inputs_of_different_lengths_are_refused_and_nobody_else_is_harmed(server):
    code, text = server.refusal("ModelInfer", request("attention", words(5), np.ones((1, 6), np.int64)))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "the inputs of model 'attention' differ in 'sequence': 'IDS' has 5, 'MASK' has 6" in text
    assert_equal(answer_arrays(server.infer(request("attention", words(5)))), alone(server, words(5)))


def state_of(server, name: str) -> tuple[str, str]:
    (found,) = [
        each for each in server.call("RepositoryIndex", pb.RepositoryIndexRequest()).models if each.name == name
    ]
    return found.state, found.reason


def test_a_model_that_looks_at_padding_is_served_without_it_and_says_so(start_server, repository):
    add(repository, "alone")
    # Without the mask among the axes, the words of the padding are seen.
    unmasked = SEQUENCE | {"axes": {"IDS": 0, "MASK": 0, "EACH": 0}, "mask": None}
    add(repository, more=buckets({"sequence": unmasked | {"pad": {"IDS": 31, "MASK": 1}}}))
    server = start_server(repository, http=None, metrics=None)
    state, reason = state_of(server, "attention")
    assert state == "READY"
    assert "shape_buckets are off, requests share a batch where their shapes are equal: a padded row gives" in reason
    assert state_of(server, "alone") == ("READY", "")
    ids = words(5)
    assert_equal(answer_arrays(server.infer(request("attention", ids, np.ones_like(ids)))), alone(server, ids))


def test_an_output_that_is_not_as_declared_is_seen_at_load(start_server, repository):
    shapes = {"width": {"sizes": [4], "axes": {"X": 0, "Y": 0}}}
    models.write_model(repository, "twice", models.twice(), max_batch_size=4, more=buckets(shapes))
    server = start_server(repository, http=None, metrics=None)
    assert "rows of two lengths run alone, and padded they fail: output 'Y' came out" in state_of(server, "twice")[1]
    answer = answer_arrays(server.infer(infer_request("twice", {"X": np.ones((1, 3), np.float32)})))
    assert answer["Y"].shape == (1, 6)


def test_an_output_that_is_not_as_declared_fails_and_says_so_where_nothing_was_tried(start_server, repository):
    shapes = {"width": {"sizes": [4], "axes": {"X": 0, "Y": 0}}}
    untried = 'parameters { key: "batch_proof" value { string_value: "off" } }'
    models.write_model(repository, "twice", models.twice(), max_batch_size=4, more=buckets(shapes) + untried)
    server = start_server(repository, http=None, metrics=None)
    code, text = server.refusal("ModelInfer", infer_request("twice", {"X": np.ones((1, 3), np.float32)}))
    assert code is grpc.StatusCode.INTERNAL
    assert (
        "output 'Y' came out with shape [1,8], and shape_buckets say that its dimension 0 is 'width', which is 4"
        in text
    )


BAD = [
    ("{", "expected JSON: "),
    ("[]", "expected an object with a bucket under each name"),
    ({}, "expected an object with a bucket under each name"),
    ({"s": {"sizes": [4]}}, "expected an object with sizes and axes, and maybe pad and mask, as 's'"),
    ({"s": SEQUENCE | {"size": 1}}, "expected an object with sizes and axes, and maybe pad and mask, as 's'"),
    *(
        ({"s": SEQUENCE | {"sizes": sizes}}, "expected 's.sizes' to be a list of different whole numbers above 0")
        for sizes in ([], [0], [8, 4], [4, 4], [4.5], ["4"], [True], 4, [1 << 31])
    ),
    (
        {"s": SEQUENCE | {"axes": []}},
        "expected 's.axes' to be an object with a dimension under the name of each tensor",
    ),
    (
        {"s": SEQUENCE | {"axes": {"IDZ": 0}}},
        "expected 's.axes.IDZ' to be a tensor of the model: IDS, MASK, EACH, MEAN",
    ),
    (
        {"s": SEQUENCE | {"axes": {"IDS": 1}}},
        "expected 's.axes.IDS' to be the index of an open dimension in its dims [-1]",
    ),
    ({"s": SEQUENCE | {"axes": {"EACH": 1}}}, "expected 's.axes.EACH' to be the index of an open dimension"),
    ({"s": SEQUENCE | {"axes": {"EACH": 0}, "mask": None, "pad": {}}}, "expected 's.axes' to name an input that tells"),
    ({"s": SEQUENCE | {"axes": {"MASK": 0}, "pad": {}}}, "expected 's.axes' to name an input that tells the length"),
    ({"s": SEQUENCE, "t": SEQUENCE}, "expected 't.axes.IDS' to be in one bucket only"),
    ({"s": SEQUENCE | {"mask": "EACH"}}, "expected 's.mask' to be an input in its axes that has this dimension only"),
    ({"s": SEQUENCE | {"mask": 1}}, "expected 's.mask' to be an input in its axes that has this dimension only"),
    ({"s": SEQUENCE | {"pad": [1]}}, "expected 's.pad' to be an object with a number under the name of each input"),
    ({"s": SEQUENCE | {"pad": {"EACH": 1}}}, "expected 's.pad.EACH' to be for an input in its axes"),
    *(
        ({"s": SEQUENCE | {"pad": {"IDS": pad}}}, "expected 's.pad.IDS' to be a number that INT64 holds")
        for pad in (0.5, "0", True, 1 << 63, None)
    ),
]


@pytest.mark.parametrize(("shapes", "expected"), BAD, ids=range(len(BAD)))
def test_buckets_that_cannot_be_are_refused_at_load(shapes, expected, model_config):
    text = shapes if isinstance(shapes, str) else json.dumps(shapes)
    config = model_config(shape_buckets=text)
    with pytest.raises(BadOption) as refused:
        read_buckets(config)
    assert f"model 'm': parameter 'shape_buckets' is '{text}', {expected}" in str(refused.value)


@pytest.mark.parametrize("sizes", ["", "0", "1,9", "4,1", "1,1", "a", "1,,2", "-1", "1;2", "99999999999"])
def test_batch_sizes_that_cannot_be_are_refused_at_load(sizes, model_config):
    with pytest.raises(BadOption, match="expected different numbers of rows from 1 to 8, the smallest first"):
        read_buckets(model_config(batch_buckets=sizes))


@pytest.mark.parametrize("key", ["shape_buckets", "batch_buckets"])
def test_a_model_that_does_not_batch_has_no_use_for_buckets(key, model_config):
    config = model_config(**{key: "1"})
    config.ClearField("dynamic_batching")
    with pytest.raises(BadOption, match="is 0 or 1, dynamic_batching is missing, or merge_requests is false"):
        read_buckets(config)


def test_buckets_without_any_parameter_are_none(model_config):
    assert read_buckets(model_config()) is None


@pytest.fixture
def model_config():
    def make(**parameters: str) -> ModelConfig:
        text = models.config_text(models.attention(), 8, 1) + "name: 'm' dynamic_batching { }"
        config = text_format.Parse(text, ModelConfig())
        for key, value in parameters.items():
            config.parameters[key].string_value = value
        return config

    return make


def test_padding_of_numbers_that_a_type_does_not_hold_is_refused():
    config = text_format.Parse(
        "name: 'm' max_batch_size: 8 dynamic_batching { } input { name: 'X' data_type: TYPE_FP16 dims: -1 }"
        " input { name: 'B' data_type: TYPE_BOOL dims: -1 } input { name: 'S' data_type: TYPE_STRING dims: -1 }"
        " input { name: 'R' data_type: TYPE_FP32 dims: -1 reshape { shape: [ -1, 1 ] } }",
        ModelConfig(),
    )

    def read(name: str, pad: object) -> Buckets | None:
        shapes = {"s": {"sizes": [4], "axes": {name: 0}, "pad": {name: pad}}}
        config.parameters["shape_buckets"].string_value = json.dumps(shapes)
        return read_buckets(config)

    assert read("X", -1.5) is not None
    assert read("B", 1) is not None
    for name, pad, expected in (
        ("X", 1e6, "'s.pad.X' to be a number that FP16 holds"),
        ("X", float("inf"), "'s.pad.X' to be a number that FP16 holds"),
        ("B", 2, "'s.pad.B' to be a number that BOOL holds"),
        ("S", 0, "'s.axes.S' to have a datatype of numbers, as BYTES cannot be padded"),
        ("R", 0, "'s.axes.R' to be a tensor without reshape"),
    ):
        with pytest.raises(BadOption, match=expected):
            read(name, pad)


def test_ragged_batches_are_not_padded(model_config):
    config = model_config(batch_buckets="4")
    config.input[0].allow_ragged_batch = True
    with pytest.raises(BadOption, match="'batch_buckets' is '4', expected no value: ragged batches are not padded"):
        read_buckets(config)
