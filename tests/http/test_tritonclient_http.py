"""tritonclient's HTTP clients as they are, the blocking one and that of asyncio: every method that they offer."""

from __future__ import annotations

import inspect
import json
import uuid
from contextlib import contextmanager

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from tritonclient.http import InferenceServerClientPlugin
from tritonclient.utils import InferenceServerException, shared_memory

from sluice_server.repository.manager import ControlMode
from support import models
from support.blocking import Blocking
from support.rest import request
from support.server import LOOPBACK, running, server_settings

pytestmark = [
    pytest.mark.usefixtures("no_errors_logged"),
    # gevent's and geventhttpclient's own: sockets that the collector closes.
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]

A = np.arange(32, dtype=np.int32).reshape(2, 16)
B = np.full((2, 16), 5, np.int32)


@pytest.fixture(scope="module")
def server(transport, tmp_path_factory):
    repository = tmp_path_factory.mktemp("models")
    models.write_model(repository, "simple", models.sum_and_difference(), max_batch_size=8)
    models.write_model(repository, "spare", models.identity(), max_batch_size=8)
    models.write_model(repository, "text", models.identity("BYTES", ("N", 2)), max_batch_size=8)
    models.write_model(repository, "half", models.identity("FP16", ("N", 2)), max_batch_size=8)
    settings = server_settings(
        repository,
        allow_client_shm=True,
        models={"control_mode": ControlMode.EXPLICIT, "load_models": ("simple", "text", "half")},
    )
    with running(settings, transport) as server:
        yield server


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request):
    return request.param


@pytest.fixture
def client(kind, server):
    url = f"{LOOPBACK}:{server.server.http_port}"
    if kind == "blocking":
        made = triton.InferenceServerClient(url, concurrency=4)
    else:
        made = Blocking(lambda: triton_aio.InferenceServerClient(url))
    yield made
    made.close()


def inputs(*, binary: bool = True):
    made = [triton.InferInput(name, A.shape, "INT32") for name in ("INPUT0", "INPUT1")]
    for tensor, array in zip(made, (A, B), strict=True):
        tensor.set_data_from_numpy(array, binary_data=binary)
    return made


def test_health_and_metadata(client):
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("simple")
    assert client.is_model_ready("simple", "1")
    assert not client.is_model_ready("spare")
    assert client.get_server_metadata()["name"] == "triton"
    assert client.get_model_metadata("simple")["versions"] == ["1"]
    assert client.get_model_config("simple", "1")["max_batch_size"] == 8
    with pytest.raises(InferenceServerException, match="'nope' is not found"):
        client.get_model_metadata("nope")


@pytest.mark.parametrize("binary_in", [True, False])
@pytest.mark.parametrize("binary_out", [True, False])
def test_inference(binary_in, binary_out, client):
    outputs = [triton.InferRequestedOutput(name, binary_data=binary_out) for name in ("OUTPUT1", "OUTPUT0")]
    answer = client.infer("simple", inputs(binary=binary_in), model_version="1", outputs=outputs, request_id="42")
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), A + B)
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT1"), A - B)
    assert answer.get_response()["id"] == "42"
    assert answer.get_output("OUTPUT1")["datatype"] == "INT32"
    assert [output["name"] for output in answer.get_response()["outputs"]] == ["OUTPUT1", "OUTPUT0"]
    # Without a list the client asks for all outputs in binary form.
    np.testing.assert_array_equal(client.infer("simple", inputs()).as_numpy("OUTPUT0"), A + B)


@pytest.mark.parametrize("there", [None, "gzip", "deflate"])
@pytest.mark.parametrize("back", [None, "gzip", "deflate"])
def test_compressed_inference(there, back, client):
    answer = client.infer("simple", inputs(), request_compression_algorithm=there, response_compression_algorithm=back)
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), A + B)


def test_parameters(client):
    answer = client.infer(
        "simple",
        inputs(),
        sequence_id=7,
        sequence_start=True,
        sequence_end=True,
        priority=1,
        timeout=10_000_000,
        parameters={"mine": 1, "text": "a", "flag": True},
        headers={"x-mine": "1"},
        query_params={"a": "b"},
    )
    np.testing.assert_array_equal(answer.as_numpy("OUTPUT0"), A + B)
    with pytest.raises(InferenceServerException):
        client.infer("simple", inputs(), parameters={"triton_x": 1})


@pytest.mark.parametrize("binary", [True, False])
def test_text(binary, client):
    words = np.array([["a", "\u00e9\u4e16"], ["", "x" * 100]], dtype=np.object_)
    tensor = triton.InferInput("X", words.shape, "BYTES")
    tensor.set_data_from_numpy(words, binary_data=binary)
    answer = client.infer("text", [tensor], outputs=[triton.InferRequestedOutput("Y", binary_data=binary)])
    got = answer.as_numpy("Y")
    decoded = [[word.decode() if isinstance(word, bytes) else word for word in row] for row in got.tolist()]
    assert decoded == words.tolist()


def test_half_precision(client):
    values = np.array([[1.5, np.nan]], np.float16)
    tensor = triton.InferInput("X", values.shape, "FP16")
    tensor.set_data_from_numpy(values)
    np.testing.assert_array_equal(client.infer("half", [tensor]).as_numpy("Y"), values)


def test_classification(client):
    outputs = [triton.InferRequestedOutput("OUTPUT0", binary_data=binary, class_count=2) for binary in (True,)]
    answer = client.infer("simple", inputs(), outputs=outputs)
    assert answer.as_numpy("OUTPUT0").tolist() == [[b"20:15", b"19:14"], [b"36:15", b"35:14"]]
    outputs = [triton.InferRequestedOutput("OUTPUT0", binary_data=False, class_count=1)]
    assert client.infer("simple", inputs(), outputs=outputs).get_output("OUTPUT0")["data"] == ["20:15", "36:15"]


def test_bodies_of_ones_own(client, server):
    body, head_length = client.generate_request_body(inputs())
    assert head_length is not None
    headers = {"Inference-Header-Content-Length": str(head_length)}
    answer = request(server, "POST", "/v2/models/simple/infer", bytes(body), headers)
    length = int(answer.headers["inference-header-content-length"])
    result = client.parse_response_body(answer.body, header_length=length)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), A + B)


def test_errors_have_the_servers_text(client):
    tensors = inputs()
    tensors[0]._name = "Z"
    with pytest.raises(InferenceServerException, match="unexpected inference input 'Z'"):
        client.infer("simple", tensors)
    with pytest.raises(InferenceServerException, match="'nope' is not found"):
        client.infer("nope", inputs())


def test_models_are_loaded_and_unloaded(client):
    client.load_model("spare")
    assert client.is_model_ready("spare")
    client.load_model("spare", config=json.dumps({"backend": "onnxruntime", "max_batch_size": 2}),
                      files={"file:1/model.onnx": models.identity()})  # fmt: skip
    assert client.get_model_config("spare")["max_batch_size"] == 2
    states = {entry["name"]: entry.get("state") for entry in client.get_model_repository_index()}
    assert states["spare"] == "READY"
    client.unload_model("spare", unload_dependents=True)
    assert not client.is_model_ready("spare")
    with pytest.raises(InferenceServerException, match="failed to load 'nope'"):
        client.load_model("nope")


def test_statistics(client):
    client.infer("simple", inputs())
    (of_model,) = client.get_inference_statistics("simple", "1")["model_stats"]
    assert of_model["inference_count"] >= 2
    assert {"simple", "text"} <= {entry["name"] for entry in client.get_inference_statistics()["model_stats"]}


def test_trace_settings(client):
    before = client.get_trace_settings()
    assert before["trace_level"] == ["OFF"]
    assert before["trace_rate"] == "1000"
    changed = client.update_trace_settings(settings={"trace_rate": "7", "log_frequency": 3})
    assert (changed["trace_rate"], changed["log_frequency"]) == ("7", "3")
    own = client.update_trace_settings("simple", {"trace_rate": "9"})
    assert own["trace_rate"] == "9"
    assert client.get_trace_settings("text")["trace_rate"] == "7"
    client.update_trace_settings("simple", {"trace_rate": None})
    assert client.get_trace_settings("simple")["trace_rate"] == "7"
    assert client.update_trace_settings(settings={"trace_rate": None, "log_frequency": None}) == before
    with pytest.raises(InferenceServerException, match="Unable to parse 'trace_rate', got: abc"):
        client.update_trace_settings(settings={"trace_rate": "abc"})


def test_log_settings(client):
    before = client.get_log_settings()
    assert before["log_info"] is True
    assert before["log_verbose_level"] == 0
    changed = client.update_log_settings({"log_verbose_level": 2, "log_warning": False, "unknown": [1]})
    assert (changed["log_verbose_level"], changed["log_warning"]) == (2, False)
    assert client.update_log_settings({"log_verbose_level": 0, "log_warning": True}) == before
    for settings, status in (
        ({"log_verbose_level": "x"}, "500"),
        ({"log_format": "weird"}, "503"),
        ({"log_file": "x"}, "501"),
    ):
        with pytest.raises(InferenceServerException) as refused:
            client.update_log_settings(settings)
        assert refused.value.status() == status


@contextmanager
def region(client, name: str, size_bytes: int):
    key = f"/sluice-test-{uuid.uuid4().hex}"
    handle = shared_memory.create_shared_memory_region(name, key, size_bytes)
    try:
        client.register_system_shared_memory(name, key, size_bytes)
        yield handle
    finally:
        client.unregister_system_shared_memory(name)
        shared_memory.destroy_shared_memory_region(handle)


def test_system_shared_memory(client):
    assert client.get_system_shared_memory_status() == []
    size = A.nbytes
    with region(client, "in", 2 * size) as there, region(client, "out", size) as back:
        (entry,) = client.get_system_shared_memory_status("in")
        assert (entry["name"], entry["offset"], entry["byte_size"]) == ("in", 0, 2 * size)
        shared_memory.set_shared_memory_region(there, [A, B])
        tensors = [triton.InferInput(name, A.shape, "INT32") for name in ("INPUT0", "INPUT1")]
        for index, tensor in enumerate(tensors):
            tensor.set_shared_memory("in", size, offset=index * size)
        outputs = [triton.InferRequestedOutput("OUTPUT0"), triton.InferRequestedOutput("OUTPUT1")]
        outputs[0].set_shared_memory("out", size)
        answer = client.infer("simple", tensors, outputs=outputs)
        np.testing.assert_array_equal(shared_memory.get_contents_as_numpy(back, np.int32, A.shape), A + B)
        np.testing.assert_array_equal(answer.as_numpy("OUTPUT1"), A - B)
        assert "data" not in answer.get_output("OUTPUT0")
        with pytest.raises(InferenceServerException, match="already in manager"):
            client.register_system_shared_memory("in", "/x", 1)
    with pytest.raises(InferenceServerException) as refused:
        client.get_system_shared_memory_status("in")
    assert refused.value.status() == "404"
    client.unregister_system_shared_memory()


def test_cuda_shared_memory_is_refused_without_a_gpu(client):
    assert client.get_cuda_shared_memory_status() == []
    client.unregister_cuda_shared_memory()
    with pytest.raises(InferenceServerException) as refused:
        client.register_cuda_shared_memory("gpu", b"aGFuZGxl", 0, 64)
    assert refused.value.status() in ("400", "501")


def test_a_plugin_adds_headers(client):
    class Plugin(InferenceServerClientPlugin):
        def __call__(self, request):
            request.headers["accept-encoding"] = "gzip"

    plugin = Plugin()
    client.register_plugin(plugin)
    assert client.plugin() is plugin
    np.testing.assert_array_equal(client.infer("simple", inputs()).as_numpy("OUTPUT0"), A + B)
    client.unregister_plugin()
    assert client.plugin() is None


def test_every_method_of_the_clients_is_tried_here():
    source = inspect.getsource(inspect.getmodule(inspect.currentframe()))
    for kind in (triton.InferenceServerClient, triton_aio.InferenceServerClient):
        offered = {name for name, _ in inspect.getmembers(kind, inspect.isfunction) if not name.startswith("_")}
        assert len(offered) > 20
        assert {name for name in offered if f"client.{name}(" not in source} == set()


def test_asynchronous_inference_of_the_blocking_client(server):
    client = triton.InferenceServerClient(f"{LOOPBACK}:{server.server.http_port}", concurrency=8)
    waiting = [client.async_infer("simple", inputs(), request_id=str(number)) for number in range(32)]
    for number, answer in enumerate(waiting):
        result = answer.get_result()
        np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), A + B)
        assert result.get_response()["id"] == str(number)
    client.close()
