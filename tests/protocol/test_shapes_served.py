"""Shapes that a configuration makes of the graph's, tensors and batches of nothing, scalars, models without batches."""

from __future__ import annotations

import grpc
import numpy as np
import pytest

from sluice_proto import grpc_service_pb2 as pb
from support import models
from support.fakes import eventually, held
from support.requests import answer_arrays, infer_request
from support.server import running, server_settings


def of_identity(datatype: str, batch: int, dims: str, reshape: str, out_dims: str = "", out_reshape: str = "") -> str:
    """The configuration of X -> Y; dims and reshape of Y are those of X unless given."""
    return f"""
    max_batch_size: {batch}
    {"dynamic_batching { }" if batch else ""}
    input {{ name: "X" data_type: TYPE_{datatype} dims: {dims} {reshape} }}
    output {{ name: "Y" data_type: TYPE_{datatype} dims: {out_dims or dims} {out_reshape or reshape} }}
    """


def shape(dims: str) -> str:
    return f"reshape {{ shape: {dims} }}"


@pytest.fixture(scope="module")
def module_server(transport, tmp_path_factory):
    repository = tmp_path_factory.mktemp("shapes")

    def add(name: str, datatype: str, graph: models.Dims, text: str) -> None:
        datatype = datatype.replace("STRING", "BYTES")
        models.write_configured(repository, name, models.identity(datatype, graph), text)

    add("rows", "FP32", ("N", 2, 3), of_identity("FP32", 8, "6", shape("[ 2, 3 ]"), "[ 3, 2 ]", shape("[ 2, 3 ]")))
    add("whole", "FP32", (2, 3), of_identity("FP32", 0, "6", shape("[ 2, 3 ]"), "[ 1, 6 ]", shape("[ 2, 3 ]")))
    add("open", "FP32", ("A", 2, 3, "B"), of_identity("FP32", 0, "[ -1, 6, -1 ]", shape("[ -1, 2, 3, -1 ]")))
    add("text", "STRING", ("N", 2, 2), of_identity("STRING", 8, "4", shape("[ 2, 2 ]")))
    add("column", "FP32", ("N",), of_identity("FP32", 8, "1", "reshape { }"))
    add("scalar", "FP32", (), of_identity("FP32", 0, "1", ""))
    add("scalar_matrix", "FP32", (), of_identity("FP32", 0, "[ 1, 1 ]", ""))
    add("open_rows", "FP32", ("N", "W"), of_identity("FP32", 8, "-1", ""))
    add("open_text", "STRING", ("N", "W"), of_identity("STRING", 8, "-1", ""))
    add("fixed", "FP32", (1, 4), of_identity("FP32", 0, "[ 1, 4 ]", ""))
    with running(server_settings(repository), transport) as server:
        yield server


@pytest.fixture
def server(module_server, no_errors_logged):
    return module_server


def echoed(server, model: str, array: np.ndarray) -> np.ndarray:
    return answer_arrays(server.infer(infer_request(model, {"X": array})))["Y"]


def numbers(*dims: int) -> np.ndarray:
    return np.arange(np.prod(dims), dtype=np.float32).reshape(dims)


@pytest.mark.parametrize(("model", "sent", "got"), [
    ("rows", (1, 6), (1, 3, 2)),
    ("rows", (3, 6), (3, 3, 2)),
    ("whole", (6,), (1, 6)),
    ("open", (4, 6, 5), (4, 6, 5)),
    ("open", (0, 6, 5), (0, 6, 5)),
    ("open", (1, 6, 0), (1, 6, 0)),
    ("column", (1, 1), (1, 1)),
    ("column", (5, 1), (5, 1)),
    ("scalar", (1,), (1,)),
    ("scalar_matrix", (1, 1), (1, 1)),
    ("open_rows", (3, 0), (3, 0)),
    ("fixed", (1, 4), (1, 4)),
])  # fmt: skip
def test_clients_see_the_dims_and_the_graph_its_own(model, sent, got, server):
    array = numbers(*sent)
    np.testing.assert_array_equal(echoed(server, model, array), array.reshape(got), strict=True)


def test_text_is_reshaped_too(server):
    array = np.array([[b"a", b"", b"b\0", b"c"], [b"d", b"e", b"f", b"g"]], object)
    assert echoed(server, "text", array).tolist() == array.tolist()


def test_typed_contents_are_reshaped_too(server):
    array = numbers(2, 6)
    answer = server.infer(infer_request("rows", {"X": array}, typed=True))
    np.testing.assert_array_equal(answer_arrays(answer)["Y"], array.reshape(2, 3, 2))
    assert not answer.outputs[0].HasField("contents")


def test_reshaped_requests_are_merged_and_cut(server):
    model = server.model("rows")
    with held(model) as session:
        calls = [server.begin("ModelInfer", infer_request("rows", {"X": numbers(1, 6)}))]
        session.wait_for_runs(1)
        arrays = [numbers(1, 6) + 10, numbers(2, 6) + 20, numbers(1, 6) + 30]
        calls += [server.begin("ModelInfer", infer_request("rows", {"X": array})) for array in arrays]
        eventually(lambda: len(model.queue) == len(arrays), "all requests wait")
        session.release()
        for call, array in zip(calls[1:], arrays, strict=True):
            np.testing.assert_array_equal(answer_arrays(call.result())["Y"], array.reshape(-1, 3, 2), strict=True)
    assert [feeds["X"].shape for feeds in session.runs] == [(1, 2, 3), (4, 2, 3)]


@pytest.mark.parametrize("model", ["rows", "whole"])
def test_metadata_and_configuration_show_the_dims_and_the_reshape(model, server):
    batch = [-1] if model == "rows" else []
    metadata = server.call("ModelMetadata", pb.ModelMetadataRequest(name=model))
    out_dims = [3, 2] if model == "rows" else [1, 6]
    assert [list(metadata.inputs[0].shape), list(metadata.outputs[0].shape)] == [[*batch, 6], [*batch, *out_dims]]
    config = server.call("ModelConfig", pb.ModelConfigRequest(name=model)).config
    assert [list(tensor.reshape.shape) for tensor in (config.input[0], config.output[0])] == [[2, 3], [2, 3]]


@pytest.mark.parametrize(("model", "sent", "facts"), [
    ("rows", (1, 2, 3), ("unexpected shape for input 'X' for model 'rows'", "[-1,6]", "[1,2,3]")),
    ("rows", (6,), ("unexpected shape for input 'X'", "[-1,6]", "[6]")),
    ("whole", (2, 3), ("unexpected shape for input 'X'", "Expected [6], got [2,3]")),
    ("open", (4, 2, 3, 5), ("unexpected shape for input 'X'", "[-1,6,-1]", "[4,2,3,5]")),
    ("scalar", (), ("unexpected shape for input 'X'", "Expected [1], got []")),
    ("scalar", (2,), ("unexpected shape for input 'X'", "Expected [1], got [2]")),
    ("open_rows", (), ("no shape but model requires batch dimension for 'open_rows'",)),
    ("open_rows", (0, 4), ("byte size mismatch", "'open_rows'", "got 0")),
    ("open_rows", (0, 0), ("byte size mismatch", "'open_rows'", "got 0")),
    ("rows", (0, 6), ("byte size mismatch", "'rows'", "got 0")),
    ("fixed", (2, 4), ("unexpected shape for input 'X'", "Expected [1,4], got [2,4]")),
    ("fixed", (0, 4), ("unexpected shape for input 'X'", "Expected [1,4], got [0,4]")),
])  # fmt: skip
def test_other_shapes_and_batches_of_no_rows_are_refused(model, sent, facts, server):
    code, message = server.refusal("ModelInfer", infer_request(model, {"X": numbers(*sent)}, request_id="9"))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert message.startswith("[request id: 9] ")
    assert [fact for fact in facts if fact not in message] == [], message


def test_a_batch_of_no_texts_is_refused_and_rows_of_none_are_not(server):
    nothing = np.empty((0, 4), object)
    code, message = server.refusal("ModelInfer", infer_request("open_text", {"X": nothing}))
    assert (code, "got 0" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    assert echoed(server, "open_text", np.empty((2, 0), object)).shape == (2, 0)


@pytest.mark.parametrize(("batch", "graph", "dims", "reshape", "facts"), [
    (8, ("N", 2, 3), "6", "[ 3, 2 ]", ("tensor 'X'", "[-1,2,3]", "[-1,3,2]")),
    (8, ("N", 2, 3), "6", "[ 2, 3, 1 ]", ("tensor 'X'", "3 dimensions", "4 dimensions")),
    (0, (2, 3), "6", "[ 1, 6 ]", ("tensor 'X'", "[2,3]", "[1,6]")),
    (0, (2, 3), "6", "[ 2, 4 ]", ("input[0].reshape of 'X' is [2,4]", "different size than dims [6]")),
    (0, (), "[ 1, 2 ]", "", ("tensor 'X'", "[1,2]")),
])  # fmt: skip
def test_a_reshape_that_does_not_fit_the_graph_fails_the_load(
    batch, graph, dims, reshape, facts, repository, transport
):
    text = of_identity("FP32", batch, dims, shape(reshape) if reshape else "")
    models.write_configured(repository, "bad", models.identity("FP32", graph), text)
    settings = server_settings(repository, exit_on_error=False, http=None, metrics=None)
    with running(settings, transport) as server:
        (entry,) = server.call("RepositoryIndex", b"").models
    assert entry.state == "UNAVAILABLE"
    assert [fact for fact in facts if fact not in entry.reason] == [], entry.reason
