"""Models whose rows may not share a batch, on a server: they are served one request at a time, and it is said why."""

from __future__ import annotations

import logging

import numpy as np

from sluice_proto import grpc_service_pb2 as pb
from support import mixing_models, models
from support.fakes import eventually, held

REQUESTS = 6


def request(values: np.ndarray) -> pb.ModelInferRequest:
    message = pb.ModelInferRequest(model_name="m", raw_input_contents=[values.astype(np.float32).tobytes()])
    message.inputs.add(name="X", datatype="FP32", shape=values.shape)
    return message


def answers(server, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The answers to requests of which all but the first wait together."""
    with held(server.model("m")) as session:
        calls = [server.begin("ModelInfer", request(inputs[0]))]
        session.wait_for_runs(1)
        calls += [server.begin("ModelInfer", request(values)) for values in inputs[1:]]
        eventually(lambda: server.model("m").queue.rows >= len(inputs) - 1, "the others wait")
        session.release()
        results = [call.result() for call in calls]
    return [np.frombuffer(item.raw_output_contents[0], np.float32).reshape(item.outputs[0].shape) for item in results]


def index_entry(server) -> pb.RepositoryIndexResponse.ModelIndex:
    (entry,) = server.call("RepositoryIndex", pb.RepositoryIndexRequest()).models
    return entry


def rows(count: int) -> list[np.ndarray]:
    random = np.random.default_rng(3)
    return [random.standard_normal((1, mixing_models.COLUMNS)).astype(np.float32) for _ in range(count)]


def test_a_model_that_mixes_rows_runs_each_request_alone_and_says_why(repository, start_server, caplog):
    models.write_model(repository, "m", mixing_models.mean_over_rows(), max_batch_size=8)
    with caplog.at_level(logging.WARNING):
        server = start_server(repository)
    why = "dynamic batching is off, each request is its own execution: rows give other outputs beside others than alone"
    assert [record.getMessage().startswith(why) for record in caplog.records] == [True]
    entry = index_entry(server)
    assert (entry.state, entry.reason.startswith(why)) == ("READY", True)
    metadata = server.call("ModelMetadata", pb.ModelMetadataRequest(name="m"))
    assert metadata.properties["batch_proof"].startswith("unsafe: rows give other outputs beside others than alone")
    assert server.executions("m") == 0
    for answer in answers(server, rows(REQUESTS)):
        np.testing.assert_array_equal(answer, np.zeros_like(answer))  # less the mean of itself alone
    assert server.executions("m") == REQUESTS


def test_a_client_may_send_several_rows_of_its_own_all_the_same(repository, start_server):
    models.write_model(repository, "m", mixing_models.mean_over_rows(), max_batch_size=8)
    server = start_server(repository)
    values = np.concatenate(rows(3))
    (answer,) = answers(server, [values])
    np.testing.assert_allclose(answer, values - values.mean(axis=0), rtol=1e-4, atol=1e-6)


def test_rows_that_are_kept_apart_share_batches_and_nothing_is_said(repository, start_server, caplog):
    models.write_model(repository, "m", models.identity(), max_batch_size=8)
    with caplog.at_level(logging.WARNING):
        server = start_server(repository)
    assert not caplog.records
    assert (index_entry(server).state, index_entry(server).reason) == ("READY", "")
    metadata = server.call("ModelMetadata", pb.ModelMetadataRequest(name="m"))
    assert metadata.properties["batch_proof"] == "safe: 4 made-up rows give the same outputs alone and together"
    sent = rows(REQUESTS)
    for answer, values in zip(answers(server, sent), sent, strict=True):
        np.testing.assert_array_equal(answer, values)
    assert server.executions("m") == 2  # the first, and all that waited for it


def test_a_configuration_can_have_it_merged_all_the_same(repository, start_server):
    more = 'parameters { key: "batch_proof" value { string_value: "off" } }'
    models.write_model(repository, "m", mixing_models.mean_over_rows(), max_batch_size=8, more=more)
    server = start_server(repository)
    assert index_entry(server).reason == ""
    answers(server, rows(REQUESTS))
    assert server.executions("m") == 2


def test_a_value_that_there_is_not_keeps_the_model_from_loading(repository, start_server):
    more = 'parameters { key: "batch_proof" value { string_value: "maybe" } }'
    models.write_model(repository, "m", models.identity(), max_batch_size=8, more=more)
    server = start_server(repository, exit_on_error=False)
    entry = index_entry(server)
    expected = "Invalid argument: model 'm': parameter 'batch_proof' is 'maybe', expected one of on, off"
    assert (entry.state, entry.reason) == ("UNAVAILABLE", expected)


def test_a_run_without_an_end_does_not_hold_up_the_load(start_server, repository):
    models.write_model(repository, "endless", models.slow(2_000_000_000), max_batch_size=4)
    server = start_server(repository, http=None, metrics=None)
    (found,) = server.call("RepositoryIndex", pb.RepositoryIndexRequest()).models
    assert (found.state, found.reason) == ("READY", "")
