"""tritonclient's gRPC clients as they are, the blocking one and that of asyncio: every method that they offer.

A table has a use of each method; that it has all of them is asked of the classes themselves.
"""

from __future__ import annotations

import inspect
import json
import queue
import uuid
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.grpc import InferenceServerClientPlugin
from tritonclient.utils import InferenceServerException, shared_memory

from sluice_server.repository.manager import ControlMode
from support import models
from support.blocking import Blocking
from support.fakes import PATIENCE_S
from support.server import running, server_settings

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("no_errors_logged")

A = np.arange(32, dtype=np.int32).reshape(2, 16)
B = np.full((2, 16), 5, np.int32)

CLIENTS = {"blocking": triton.InferenceServerClient, "asyncio": triton_aio.InferenceServerClient}


@pytest.fixture(scope="module")
def server(transport, tmp_path_factory):
    repository = tmp_path_factory.mktemp("models")
    models.write_model(repository, "simple", models.sum_and_difference(), max_batch_size=8)
    models.write_model(repository, "spare", models.identity(), max_batch_size=8)
    settings = server_settings(
        repository,
        allow_client_shm=True,
        http=None,
        metrics=None,
        models={"control_mode": ControlMode.EXPLICIT, "load_models": ("simple",)},
    )
    with running(settings, transport) as server:
        yield server


def connect(kind: str, target: str) -> Any:
    """A client; closing it is left to the test."""
    options = triton.KeepAliveOptions(keepalive_time_ms=60_000)
    if kind == "blocking":
        return triton.InferenceServerClient(target, keepalive_options=options)
    return Blocking(lambda: triton_aio.InferenceServerClient(target, keepalive_options=options))


@pytest.fixture(params=CLIENTS)
def kind(request):
    return request.param


@pytest.fixture
def client(kind, server):
    made = connect(kind, server.target)
    yield made
    made.close()


def inputs() -> list[Any]:
    made = [triton.InferInput(name, [1], "FP32") for name in ("INPUT0", "INPUT1")]
    for tensor, array in zip(made, (A, B), strict=True):
        assert (tensor.datatype(), tensor.shape()) == ("FP32", [1])
        tensor._input.datatype = "INT32"
        assert tensor.set_shape(array.shape).set_data_from_numpy(array) is tensor
    return made


def assert_right(result: Any, request_id: str = "") -> None:
    np.testing.assert_array_equal(result.as_numpy("OUTPUT0"), A + B)
    np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), A - B)
    assert result.as_numpy("OUTPUT2") is None
    assert list(result.get_output("OUTPUT1").shape) == [2, 16]
    assert result.get_response().id == request_id
    assert result.get_response(as_json=True)["model_version"] == "1"


# --- a use of each method


def is_server_live(client):
    assert client.is_server_live(headers={"x-mine": "1"})


def is_server_ready(client):
    assert client.is_server_ready()


def is_model_ready(client):
    assert client.is_model_ready("simple")
    assert client.is_model_ready("simple", "1")
    assert not client.is_model_ready("simple", "2")
    assert not client.is_model_ready("spare")


def get_server_metadata(client):
    assert client.get_server_metadata().name == "triton"
    assert "statistics" in client.get_server_metadata(as_json=True)["extensions"]


def get_model_metadata(client):
    assert [tensor.name for tensor in client.get_model_metadata("simple", "1").inputs] == ["INPUT0", "INPUT1"]
    assert client.get_model_metadata("simple", as_json=True)["versions"] == ["1"]
    with pytest.raises(InferenceServerException, match="'nope' is not found") as refused:
        client.get_model_metadata("nope")
    assert refused.value.status() == "StatusCode.NOT_FOUND"


def get_model_config(client):
    assert client.get_model_config("simple").config.max_batch_size == 8
    assert client.get_model_config("simple", "1", as_json=True)["config"]["backend"] == "onnxruntime"


def get_model_repository_index(client):
    states = {model.name: model.state for model in client.get_model_repository_index().models}
    assert states["simple"] == "READY"
    assert {"name": "simple", "version": "1", "state": "READY"} in client.get_model_repository_index(as_json=True)[
        "models"
    ]


def load_model(client):
    client.load_model("spare")
    assert client.is_model_ready("spare")
    config = json.dumps({"backend": "onnxruntime", "max_batch_size": 2})
    client.load_model("spare", config=config, files={"file:1/model.onnx": models.identity()})
    assert client.get_model_config("spare").config.max_batch_size == 2
    with pytest.raises(InferenceServerException, match="failed to load 'nope'"):
        client.load_model("nope")
    client.unload_model("spare")


def unload_model(client):
    client.load_model("spare")
    client.unload_model("spare", unload_dependents=True)
    assert not client.is_model_ready("spare")


def get_inference_statistics(client):
    client.infer("simple", inputs())
    (of_model,) = client.get_inference_statistics("simple", "1").model_stats
    assert of_model.inference_count >= 2
    assert client.get_inference_statistics(as_json=True)["model_stats"][0]["name"] == "simple"


def update_trace_settings(client):
    before = client.get_trace_settings(as_json=True)
    changed = client.update_trace_settings("simple", {"trace_rate": "9", "trace_level": ["TIMESTAMPS"]})
    assert list(changed.settings["trace_rate"].value) == ["9"]
    client.update_trace_settings("simple", {"trace_rate": None, "trace_level": None})
    assert client.get_trace_settings("simple", as_json=True) == before
    with pytest.raises(InferenceServerException, match="Unable to parse 'trace_rate', got: abc"):
        client.update_trace_settings(settings={"trace_rate": "abc"})


def get_trace_settings(client):
    assert list(client.get_trace_settings("simple").settings["trace_level"].value) == ["OFF"]
    assert client.get_trace_settings(as_json=True)["settings"]["trace_rate"]["value"] == ["1000"]


def update_log_settings(client):
    changed = client.update_log_settings({"log_verbose_level": 2, "log_warning": False})
    assert changed.settings["log_verbose_level"].uint32_param == 2
    again = client.update_log_settings({"log_verbose_level": 0, "log_warning": True}, as_json=True)
    assert again["settings"]["log_warning"] == {"bool_param": True}


def get_log_settings(client):
    assert client.get_log_settings().settings["log_info"].bool_param
    assert client.get_log_settings(as_json=True)["settings"]["log_format"] == {"string_param": "default"}


def in_shared_memory(client):
    """A tensor in a region that is registered, and one that is not any more."""
    key, size = f"/sluice-test-{uuid.uuid4().hex}", A.nbytes
    handle = shared_memory.create_shared_memory_region("all", key, 3 * size)
    try:
        client.register_system_shared_memory("all", key, 3 * size)
        assert client.get_system_shared_memory_status("all").regions["all"].byte_size == 3 * size
        shared_memory.set_shared_memory_region(handle, [A])
        shared_memory.set_shared_memory_region(handle, [B], offset=size)
        tensors = [triton.InferInput(name, A.shape, "INT32") for name in ("INPUT0", "INPUT1")]
        for place, tensor in enumerate(tensors):
            tensor.set_shared_memory("all", size, offset=place * size)
        outputs = [triton.InferRequestedOutput(name) for name in ("OUTPUT0", "OUTPUT1")]
        outputs[0].set_shared_memory("all", size, offset=2 * size)
        outputs[1].set_shared_memory("all", size)
        outputs[1].unset_shared_memory()
        result = client.infer("simple", tensors, outputs=outputs)
        written = shared_memory.get_contents_as_numpy(handle, np.int32, A.shape, offset=2 * size)
        np.testing.assert_array_equal(written, A + B)
        np.testing.assert_array_equal(result.as_numpy("OUTPUT1"), A - B)
        assert key in shared_memory.mapped_shared_memory_regions()
        client.unregister_system_shared_memory("all")
        with pytest.raises(InferenceServerException, match="Unable to find shared memory region: 'all'"):
            client.infer("simple", tensors)
    finally:
        client.unregister_system_shared_memory()
        shared_memory.destroy_shared_memory_region(handle)
    assert client.get_system_shared_memory_status(as_json=True) == {}


def without_a_gpu(client):
    assert not client.get_cuda_shared_memory_status().regions
    with pytest.raises(InferenceServerException) as refused:
        client.register_cuda_shared_memory("gpu", b"aGFuZGxl", 0, 64)
    assert refused.value.status() in ("StatusCode.INVALID_ARGUMENT", "StatusCode.UNIMPLEMENTED")
    client.unregister_cuda_shared_memory("gpu")
    client.unregister_cuda_shared_memory()


def infer(client):
    assert_right(client.infer("simple", inputs(), request_id="42", compression_algorithm="gzip"), "42")
    parameters = {"mine": 1, "text": "a", "flag": True}
    at_once: dict[str, Any] = {"sequence_id": 7, "sequence_start": True, "sequence_end": True, "priority": 1}
    assert_right(client.infer("simple", inputs(), "1", parameters=parameters, timeout=10_000_000, **at_once))
    output = triton.InferRequestedOutput("OUTPUT0", class_count=2)
    assert output.name() == "OUTPUT0"
    classes = client.infer("simple", inputs(), outputs=[output]).as_numpy("OUTPUT0")
    assert classes.tolist() == [[b"20:15", b"19:14"], [b"36:15", b"35:14"]]
    with pytest.raises(InferenceServerException, match="expected 2 inputs but got 1"):
        client.infer("simple", inputs()[:1])
    assert_right(client.infer("simple", inputs(), client_timeout=PATIENCE_S))


def async_infer(client):
    results: queue.Queue[Any] = queue.Queue()
    for number in range(16):
        client.async_infer(
            "simple", inputs(), lambda result, error: results.put((result, error)), request_id=str(number)
        )
    got = [results.get(timeout=PATIENCE_S) for _ in range(16)]
    assert [error for _, error in got] == [None] * 16
    assert sorted(int(result.get_response().id) for result, _ in got) == list(range(16))
    context = client.async_infer("simple", inputs(), lambda result, error: results.put((result, error)))
    context.cancel()  # whichever is faster
    result, error = results.get(timeout=PATIENCE_S)
    assert (result is None) != (error is None)


def blocking_stream(client):
    results: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: results.put((result, error)))
    client.async_stream_infer("simple", inputs(), request_id="1", enable_empty_final_response=True)
    client.async_stream_infer("nope", inputs(), request_id="2")
    client.async_stream_infer("simple", inputs(), request_id="3")
    first, second, third = (results.get(timeout=PATIENCE_S) for _ in range(3))
    assert_right(first[0], "1")
    assert first[0].get_response().parameters["triton_final_response"].bool_param
    assert "'nope' is not found" in str(second[1])
    assert_right(third[0], "3")
    client.stop_stream()


def stream_infer(client):
    async def requests():
        for number, model in enumerate(("simple", "nope", "simple")):
            yield {"model_name": model, "inputs": inputs(), "request_id": str(number)}

    first, second, third = client.stream_infer(requests())
    assert_right(first[0], "0")
    assert "'nope' is not found" in str(second[1])
    assert_right(third[0], "2")


def with_a_plugin(client):
    seen = []

    class Plugin(InferenceServerClientPlugin):
        def __call__(self, request):
            seen.append(request)
            request.headers["grpc-timeout"] = "5S"

    plugin = Plugin()
    client.register_plugin(plugin)
    assert client.plugin() is plugin
    assert client.is_server_live()
    client.unregister_plugin()
    assert client.plugin() is None
    assert len(seen) == 1


def close(client):
    """The fixture closes it too: a second time does no harm."""
    assert client.is_server_live()


USES: dict[str, Callable[[Any], None]] = {
    use.__name__: use
    for use in (
        is_server_live, is_server_ready, is_model_ready, get_server_metadata, get_model_metadata, get_model_config,
        get_model_repository_index, load_model, unload_model, get_inference_statistics, update_trace_settings,
        get_trace_settings, update_log_settings, get_log_settings, infer, close,
    )
}  # fmt: skip
USES |= dict.fromkeys(
    ("register_system_shared_memory", "get_system_shared_memory_status", "unregister_system_shared_memory"),
    in_shared_memory,
)
USES |= dict.fromkeys(
    ("register_cuda_shared_memory", "get_cuda_shared_memory_status", "unregister_cuda_shared_memory"), without_a_gpu
)
USES |= dict.fromkeys(("plugin", "register_plugin", "unregister_plugin"), with_a_plugin)
USES_OF_ONE = {
    "blocking": {
        "async_infer": async_infer,
        **dict.fromkeys(("start_stream", "async_stream_infer", "stop_stream"), blocking_stream),
    },
    "asyncio": {"stream_infer": stream_infer},
}
"""Of methods that one of the clients alone has."""


def uses_of(kind: str) -> dict[str, Callable[[Any], None]]:
    return USES | USES_OF_ONE[kind]


def test_the_table_has_every_method_that_the_client_offers(kind):
    members = inspect.getmembers(CLIENTS[kind], inspect.isfunction)
    offered = {name for name, _ in members if not name.startswith("_")}
    assert offered == set(uses_of(kind))
    for name, use in uses_of(kind).items():
        assert name == "close" or f"client.{name}(" in inspect.getsource(use), f"{use.__name__} does not call {name}"


@pytest.mark.parametrize(
    "use", sorted({use.__name__ for uses in (USES, *USES_OF_ONE.values()) for use in uses.values()})
)
def test_it_does_what_it_says(use, kind, client):
    found = {each.__name__: each for each in uses_of(kind).values()}
    if use not in found:
        pytest.skip(f"the {kind} client has no such method")
    found[use](client)
